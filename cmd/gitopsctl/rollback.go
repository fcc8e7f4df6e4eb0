package main

import (
	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) rollbackCmd() *cobra.Command {
	op := api.Operation{Kind: api.OpRollback}
	cmd := &cobra.Command{
		Use:   "rollback STACK [REVISION]",
		Short: "Go back to an earlier revision of a stack, and stay there",
		Long: `Go back to a revision of the stack's history, or without one to the last that was Deployed, by the rollback policy of its
services. The stack is pinned
there: it follows Git again after unpin. What current policy denies is not started, however old.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			op.Stack = args[0]
			if len(args) > 1 {
				op.Revision = args[1]
			}
			return c.operate(cmd.Context(), op)
		},
	}
	cmd.Flags().StringVar(&op.Reason, "reason", "", "a `sentence` for the history")
	return cmd
}

func (c *cli) unpinCmd() *cobra.Command {
	op := api.Operation{Kind: api.OpUnpin}
	return c.stackOperation(&op, "unpin STACK", "Follow Git again after a rollback",
		`End a rollback: the stack follows the newest accepted revision again.`)
}
