package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

func (c *cli) psCmd() *cobra.Command {
	all := false
	cmd := c.watchable(&cobra.Command{
		Use:   "ps [STACK]",
		Short: "The tasks that run or should run",
		Long: `The tasks that run or should run, of all stacks or of one. With --all those too that are being stopped.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
	}, func(ctx context.Context, args []string) error { return c.ps(ctx, strings.Join(args, ""), all) })
	cmd.Flags().BoolVarP(&all, "all", "a", false, "tasks that are being stopped, too")
	return cmd
}

func (c *cli) ps(ctx context.Context, stack string, all bool) error {
	if err := c.only("wide", "name"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	st, err := c.daemon().Status(ctx, stack)
	if err != nil {
		return err
	}
	t := taskTable(c, nil, all)
	tasks := []reconcile.TaskStatus{}
	for _, s := range st.Stacks {
		more := taskTable(c, s.Services, all)
		t.rows, t.names = append(t.rows, more.rows...), append(t.names, more.names...)
		for _, svc := range s.Services {
			for _, k := range svc.Tasks {
				if all || k.Desired != state.DesiredStop {
					tasks = append(tasks, k)
				}
			}
		}
	}
	return c.print(t, tasks)
}
