package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

func (c *cli) validateCmd() *cobra.Command {
	var o renderOptions
	cmd := &cobra.Command{
		Use:   "validate PATH",
		Short: "Read Compose files as the daemon would, and tell what is wrong with them",
		Long: `Read the Compose files of a directory (or one file) as the daemon would read a commit, and list what is wrong, with file
and line. No daemon is needed.

With -o json the answer is {"problems": [{"severity", "rule", "stack", "service", "file", "line", "message"}]}.

Exit codes: 0 clean, or notices only, 1 errors were found, 2 it could not be read.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.path = args[0]
			return c.validate(cmd.Context(), o)
		},
	}
	o.flags(cmd.Flags())
	return cmd
}

func (c *cli) validate(ctx context.Context, o renderOptions) error {
	if err := c.only(); err != nil {
		return err
	}
	b, err := o.load(ctx)
	if err != nil {
		return err
	}
	if c.structured() {
		err = c.printData(struct {
			Problems []manifest.Problem `json:"problems"`
		}{list(b.Problems)})
	} else {
		c.writeProblems(b.Problems)
		c.note("%s", foundSummary(b.Problems, "stack", len(b.Found)))
	}
	if err == nil && manifest.HasErrors(b.Problems) {
		return exit(exitDifferent)
	}
	return err
}

// foundSummary counts what was read and what was found.
func foundSummary(ps []manifest.Problem, thing string, n int) string {
	count := map[manifest.Severity]int{}
	for _, p := range ps {
		count[p.Severity]++
	}
	return fmt.Sprintf("%s: %s, %s, %s", plural(n, thing), plural(count[manifest.Error], "error"),
		plural(count[manifest.Warn], "warning"), plural(count[manifest.Notice], "notice"))
}
