package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) diffCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "diff [STACK]",
		Short: "Drift: where what runs is not what the applied revision asks for",
		Long: `Compare what runs now with what the applied revision asks for, field by field. What a new revision would change is told by plan.

Exit codes: 0 no difference, 1 differences, 2 error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.diff(cmd.Context(), strings.Join(args, ""))
		},
	}
}

func (c *cli) diff(ctx context.Context, stack string) error {
	if err := c.only("name"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	ds, err := c.daemon().Drift(ctx, stack)
	if err != nil {
		return err
	}
	switch {
	case c.structured():
		err = c.printData(list(ds))
	case c.output == "name":
		for _, d := range ds {
			fmt.Fprintln(c.out, cleanLine(d.Task))
		}
	default:
		for _, d := range ds {
			c.writeDrift(d)
		}
		if len(ds) == 0 {
			c.note("no drift: what runs is what the applied revisions ask for")
		}
	}
	if err == nil && len(ds) > 0 {
		return exit(exitDifferent)
	}
	return err
}

func (c *cli) writeDrift(d api.TaskDrift) {
	what := "only reported: the stack says so"
	if d.Healed {
		what = "will be healed"
	}
	where := ""
	if node := cmp.Or(d.NodeName, d.Node); node != "" {
		where = " on " + cleanLine(node)
	}
	fmt.Fprintf(c.out, "%s%s (%s)\n", c.paint(bold, cleanLine(d.Task)), where, what)
	for _, f := range d.Drift {
		path := ""
		if f.Path != "" {
			path = " " + cleanLine(f.Path)
		}
		fmt.Fprintf(c.out, "  %s%s\n", c.paint(warn, cleanLine(f.Kind)), path)
		if f.Want != "" || f.Have != "" {
			fmt.Fprintln(c.out, c.paint(bad, "    - "+dash(cleanLine(f.Want))))
			fmt.Fprintln(c.out, c.paint(good, "    + "+dash(cleanLine(f.Have))))
		}
	}
}
