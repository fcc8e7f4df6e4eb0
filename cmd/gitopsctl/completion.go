package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) completionCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "completion bash|zsh|fish|powershell",
		Short: "Print a script that lets a shell complete commands and names",
		Long: `Print a script that lets a shell complete commands, and names of stacks, services and tasks as the daemon has them.

  bash:  gitopsctl completion bash > /etc/bash_completion.d/gitopsctl
  zsh:   gitopsctl completion zsh > "${fpath[1]}/_gitopsctl"
  fish:  gitopsctl completion fish > ~/.config/fish/completions/gitopsctl.fish

Exit codes: 0 done, 2 error.`,
		Args:      cobra.ExactArgs(1),
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				return root.GenBashCompletionV2(c.out, true)
			case "zsh":
				return root.GenZshCompletion(c.out)
			case "fish":
				return root.GenFishCompletion(c.out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(c.out)
			}
			return api.NotFoundf("shell", args[0], []string{"bash", "zsh", "fish", "powershell"})
		},
	}
	return cmd
}

// completeLimit is how long a person's Tab waits for the daemon.
const completeLimit = time.Second

// complete offers names out of the daemon's status; none when it does not answer.
func (c *cli) complete(names func(args []string, st api.Status) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		parent := cmd.Context()
		if parent == nil {
			parent = context.Background()
		}
		ctx, cancel := context.WithTimeout(parent, completeLimit)
		defer cancel()
		st, err := c.daemon().Status(ctx, "")
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names(args, st), cobra.ShellCompDirectiveNoFileComp
	}
}

// oneOf offers names for the first argument only.
func oneOf(names func(api.Status) []string) func([]string, api.Status) []string {
	return func(args []string, st api.Status) []string {
		if len(args) > 0 {
			return nil
		}
		return names(st)
	}
}

func stackNames(st api.Status) []string {
	var out []string
	for _, s := range st.Stacks {
		out = append(out, s.Name)
	}
	return out
}

func sourceNames(st api.Status) []string {
	var out []string
	for _, s := range st.Sources {
		out = append(out, s.Name)
	}
	return out
}

// serviceNames are the stacks, and each service of theirs.
func serviceNames(st api.Status) []string {
	var out []string
	for _, s := range st.Stacks {
		out = append(out, s.Name)
		for _, svc := range s.Services {
			out = append(out, s.Name+"/"+svc.Name)
		}
	}
	return out
}

// taskNames are the services, and each task of theirs.
func taskNames(st api.Status) []string {
	out := serviceNames(st)
	for _, t := range allTasks(st) {
		out = append(out, t.ID)
	}
	return out
}
