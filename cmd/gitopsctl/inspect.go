package main

import (
	"bytes"
	"encoding/json"

	"github.com/spf13/cobra"
)

func (c *cli) inspectCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect TASK",
		Short: "All that is known of a task, and the runtime's own record of it",
		Long: `All that is known of a task, and the runtime's own record of it, as JSON (or YAML with -o yaml). Values that are named
like a secret are masked.
` + taskHelp + `

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(taskNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			ctx, cancel := c.limit(cmd.Context(), readLimit)
			defer cancel()
			task, err := c.findTask(ctx, args[0])
			if err != nil {
				return err
			}
			record, err := c.daemon().Inspect(ctx, task.ID)
			if err != nil {
				return err
			}
			if c.output == "" {
				c.output = "json"
			}
			return c.printData(struct {
				Task    any             `json:"task"`
				Runtime json.RawMessage `json:"runtime"`
			}{task, bytes.TrimSpace(record)})
		},
	}
}
