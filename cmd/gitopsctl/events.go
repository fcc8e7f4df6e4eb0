package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

type eventsOptions struct {
	query api.EventQuery
}

func (c *cli) eventsCmd() *cobra.Command {
	var o eventsOptions
	cmd := &cobra.Command{
		Use:   "events [STACK]",
		Short: "What happened, oldest first",
		Long: `What happened: decisions, what caused them, and who asked. With -w it goes on with what comes. -o json prints one object a line.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.query.Stack = strings.Join(args, "")
			return c.events(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVarP(&o.query.Watch, "watch", "w", false, "go on with what comes")
	cmd.Flags().IntVarP(&o.query.Tail, "tail", "n", 50, "the last so many `events`; -1 = all that are kept")
	return cmd
}

func (c *cli) events(ctx context.Context, o eventsOptions) error {
	if c.output != "" && c.output != "json" {
		return errors.New("events are printed as lines, or with -o json as one object a line")
	}
	if o.query.Watch {
		ctx, cancel := c.limit(ctx, 0)
		defer cancel()
		err := c.patient(ctx, func() error {
			return c.daemon().WatchEvents(ctx, o.query, func(e api.EventInfo) error {
				o.query.After, o.query.Tail = e.Key, -1
				return errors.Join(c.writeEvent(e), c.flush())
			})
		})
		if errors.Is(err, context.DeadlineExceeded) {
			return nil // --timeout says how long to watch
		}
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	list, err := c.daemon().Events(ctx, o.query)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := c.writeEvent(e); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) writeEvent(e api.EventInfo) error {
	if c.output == "json" {
		return c.printLine(e)
	}
	what := e.Task
	switch {
	case what != "":
	case e.Service != "":
		what = e.Stack + "/" + e.Service
	case e.Stack != "":
		what = e.Stack
	case e.Source != "":
		what = "source " + e.Source
	}
	at := e.Time.UTC().Format(time.RFC3339)
	if c.outTTY {
		at = e.Time.Local().Format("Jan _2 15:04:05")
	}
	who := ""
	if e.Actor != "" {
		who = " (" + e.Actor + ")"
	}
	line := fmt.Sprintf("%s  %-9s %s", at, e.Kind, what)
	if e.Revision.Commit != "" {
		line += " " + e.Revision.String()
	}
	_, err := fmt.Fprintln(c.out, strings.TrimRight(cleanLine(line+who)+": "+reason(e.Reason), ": "))
	return err
}
