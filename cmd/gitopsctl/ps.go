package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

type psOptions struct {
	stack string
	all   bool
	watch bool
}

func (c *cli) psCmd() *cobra.Command {
	var o psOptions
	cmd := &cobra.Command{
		Use:   "ps [STACK]",
		Short: "The tasks that run or should run",
		Long: `The tasks that run or should run, of all stacks or of one. With --all those too that are being stopped.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.stack = args[0]
			}
			if o.watch {
				return c.watch(cmd.Context(), func(ctx context.Context) error { return c.ps(ctx, o) })
			}
			return c.ps(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVarP(&o.all, "all", "a", false, "tasks that are being stopped, too")
	cmd.Flags().BoolVarP(&o.watch, "watch", "w", false, "show it again whenever something changes")
	return cmd
}

func (c *cli) ps(ctx context.Context, o psOptions) error {
	if err := c.only("wide", "name"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	st, err := c.daemon().Status(ctx, o.stack)
	if err != nil {
		return err
	}
	t := taskTable(c, nil, o.all)
	tasks := []reconcile.TaskStatus{}
	for _, s := range st.Stacks {
		more := taskTable(c, s.Services, o.all)
		t.rows, t.names = append(t.rows, more.rows...), append(t.names, more.names...)
		for _, svc := range s.Services {
			for _, k := range svc.Tasks {
				if o.all || k.Desired != state.DesiredStop {
					tasks = append(tasks, k)
				}
			}
		}
	}
	return c.print(t, tasks)
}
