package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

func (c *cli) historyCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "history STACK",
		Short: "What became of a stack's revisions, newest first",
		Long: `What became of the revisions that a stack was told to be, newest first. rollback takes any of them.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only("wide", "name"); err != nil {
				return err
			}
			ctx, cancel := c.limit(cmd.Context(), readLimit)
			defer cancel()
			h, err := c.daemon().History(ctx, args[0])
			if err != nil {
				return err
			}
			t := &table{columns: []string{"REVISION", "OUTCOME", "STARTED", "TOOK", "REASON"}, wide: []string{"RELEASE", "TO"}}
			for _, o := range h.Outcomes {
				took := ""
				if !o.Ended.IsZero() {
					took = o.Ended.Sub(o.Started).Round(time.Second / 10).String()
				}
				kind := word(string(o.Kind))
				if o.Kind == "" {
					kind.text = "rolling out"
				}
				t.add(o.Revision.Commit, text(revision(o.Revision)), kind, text(c.when(o.Started)), text(took), text(outcomeReason(o)),
					text(o.Release[:min(12, len(o.Release))]), text(revision(o.To)))
			}
			if err := c.print(t, h); err != nil {
				return err
			}
			if h.Pinned != nil && !c.structured() && c.output != "name" {
				fmt.Fprintf(c.out, "\nPinned: %s\n", reason(*h.Pinned))
			}
			return nil
		},
	}
}

func outcomeReason(o state.Outcome) string {
	if o.Reason.ID == "" && o.Reason.Message == "" {
		return ""
	}
	return reason(o.Reason)
}
