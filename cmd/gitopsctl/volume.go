package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) volumeCmd() *cobra.Command {
	return parent("volume", "Data on nodes: list, forget or remove them", `List, forget and remove the data that tasks left on nodes: volumes, data directories, writable
paths of the host. A slot with such data stays on their node, and they are kept when the stack goes, unless gitops.yaml says prune: {volumes: true}.`,
		c.volumeListCmd(), c.volumeForgetCmd(), c.volumeRemoveCmd())
}

func (c *cli) volumeListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ls [STACK]", Aliases: []string{"list"}, Short: "List the data on nodes, as get volumes does",
		Long:              "List all data that tasks left on nodes, or those of one stack.\n\nExit codes: 0 done, 2 error.",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := getOptions{kind: "volumes"}
			if len(args) > 0 {
				o.stack = args[0]
			}
			return c.get(cmd.Context(), o)
		},
	}
}

func (c *cli) volumeForgetCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "forget VOLUME",
		Short: "Let a volume's data lie, and its slot start anywhere",
		Long: `Take a volume out of the list. Its data stay where they are, and no slot is bound to that node by them any more; a stack that
names the volume again finds them there. VOLUME is what volume ls shows, or STACK/NAME; where several are called so, the id that -o name shows.
What a service still uses is not forgotten without --force: its next task may then start empty, on another node. That is for a node that does not come back.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			vol, err := c.findVolume(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpVolumeForget, Volume: vol.Key, Force: force})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "although services use it: their next tasks may start empty, on another node")
	return cmd
}

func (c *cli) volumeRemoveCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "rm VOLUME", Aliases: []string{"remove"}, Short: "Remove a volume with its data",
		Long: `Have the node that holds a volume remove it with its data, and wait until that is done. VOLUME is what volume ls shows, or
STACK/NAME; where several are called so, the id that -o name shows. What a task uses is not removed, nor are external volumes and paths of the host.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			vol, err := c.findVolume(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if !yes {
				question := fmt.Sprintf("volume %s of stack %s on %s will be removed with all its data", vol.Name, vol.Stack, cmp.Or(vol.NodeName, vol.Node))
				if err := c.ask(cmd.Context(), question, "--yes"); err != nil {
					return err
				}
			}
			if err := c.operate(cmd.Context(), api.Operation{Kind: api.OpVolumeRemove, Volume: vol.Key}); err != nil {
				return err
			}
			return c.untilRemoved(cmd.Context(), vol)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// findVolume finds the volume that an operation is about. Operations print no objects.
func (c *cli) findVolume(ctx context.Context, ref string) (api.VolumeInfo, error) {
	if err := c.only(); err != nil {
		return api.VolumeInfo{}, err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	all, err := c.daemon().Volumes(ctx)
	if err != nil {
		return api.VolumeInfo{}, err
	}
	return api.FindVolume(all, ref)
}

func (c *cli) completeVolumes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmp.Or(cmd.Context(), context.Background()), completeLimit)
	defer cancel()
	all, _ := c.daemon().Volumes(ctx) // without a daemon there is nothing to offer
	var out []string
	for _, v := range all {
		out = append(out, v.Name)
	}
	return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
}

// untilRemoved waits until a volume's node has removed it.
func (c *cli) untilRemoved(ctx context.Context, vol api.VolumeInfo) error {
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	done := errors.New("it is removed")
	err := c.daemon().WatchChanges(ctx, func(api.Change) error {
		all, err := c.daemon().Volumes(ctx)
		if err != nil {
			return err
		}
		at := slices.IndexFunc(all, func(v api.VolumeInfo) bool { return v.Key == vol.Key })
		switch {
		case at < 0:
			return done
		case all[at].Stuck != nil:
			return api.Conflictf("%s", all[at].Stuck.Message)
		}
		return nil
	})
	switch {
	case errors.Is(err, done):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s did not tell yet that it is done: `gitopsctl events` has that when it is", cmp.Or(vol.NodeName, vol.Node))
	}
	return err
}
