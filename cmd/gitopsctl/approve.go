package main

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) approveCmd() *cobra.Command {
	var op api.Operation
	cmd := &cobra.Command{
		Use:   "approve SOURCE|STACK",
		Short: "Let a revision go on that waits for a person",
		Long: `Let the revision of a source, or of a stack in it, go on that waits for a person: the first one of a new source, one that
removes more than the budget, a rewind.
Look at it with plan first. An approval is of one commit: with --revision only that one is approved, without it the one that waits now.

Exit codes: 0 done, 2 error.`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(func(st api.Status) []string {
			return append(sourceNames(st), stackNames(st)...)
		})),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			ctx, cancel := c.limit(cmd.Context(), readLimit)
			defer cancel()
			st, err := c.daemon().Status(ctx, "")
			if err != nil {
				return err
			}
			op.Kind = api.OpApprove
			// A source wins over a stack of its name, as the messages that ask for an approval name the source.
			switch name := args[0]; {
			case slices.Contains(sourceNames(st), name):
				op.Source = name
			case slices.Contains(stackNames(st), name):
				op.Stack = name
			default:
				return api.NotFoundf("source or stack", name, append(sourceNames(st), stackNames(st)...))
			}
			return c.operate(cmd.Context(), op)
		},
	}
	cmd.Flags().StringVar(&op.Revision, "revision", "", "the `commit`, or its first digits")
	return cmd
}
