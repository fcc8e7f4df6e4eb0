package main

import (
	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) suspendCmd() *cobra.Command {
	op := api.Operation{Kind: api.OpSuspend}
	cmd := c.stackOperation(&op, "suspend STACK", "Stop following Git; what runs is still healed",
		`Let a stack stay what it is: new commits are judged and shown, not run. What runs is still healed. resume ends it.`)
	cmd.Flags().StringVar(&op.Reason, "reason", "", "a `sentence` for the history")
	return cmd
}

func (c *cli) resumeCmd() *cobra.Command {
	op := api.Operation{Kind: api.OpResume}
	return c.stackOperation(&op, "resume STACK", "Follow Git again", `End a suspend: the stack follows the newest accepted revision again.`)
}

// stackOperation makes a command that is one operation on a stack.
func (c *cli) stackOperation(op *api.Operation, use, short, long string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long + "\n\nExit codes: 0 done, 2 error.",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			op.Stack = args[0]
			return c.operate(cmd.Context(), *op)
		},
	}
}
