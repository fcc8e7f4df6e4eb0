package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

type logsOptions struct {
	target     string
	follow     bool
	since      string
	tail       int
	previous   bool
	timestamps bool
	noPrefix   bool
}

func (c *cli) logsCmd() *cobra.Command {
	var o logsOptions
	cmd := &cobra.Command{
		Use:   "logs STACK[/SERVICE[.SLOT[.GENERATION]]]",
		Short: "What tasks wrote to their standard output and error",
		Long: `What the tasks of a stack, of a service, or one task wrote, in order of time. Lines are shown as they are; of several
tasks each begins with the task's name.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(taskNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.target = args[0]
			return c.logs(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.follow, "follow", "f", false, "go on with what comes")
	f.StringVar(&o.since, "since", "", "lines since this `time`: 10m, 2026-01-02 or 2026-01-02T15:04:05Z")
	f.IntVarP(&o.tail, "tail", "n", -1, "the last so many `lines` of each task; -1 = all")
	f.BoolVarP(&o.previous, "previous", "p", false, "of the start before the current one")
	f.BoolVarP(&o.timestamps, "timestamps", "t", false, "with the time of each line")
	f.BoolVar(&o.noPrefix, "no-prefix", false, "without the task's name")
	return cmd
}

func (c *cli) logs(ctx context.Context, o logsOptions) error {
	if c.output != "" && c.output != "json" {
		return errors.New("logs are printed as they are, or with -o json as one object a line")
	}
	since, err := parseSince(o.since, c.now())
	if err != nil {
		return err
	}
	usual := readLimit
	if o.follow {
		usual = 0
	}
	limited, cancel := c.limit(ctx, readLimit)
	st, err := c.daemon().Status(limited, "")
	cancel()
	if err != nil {
		return err
	}
	q, one, err := logTarget(st, o.target)
	if err != nil {
		return err
	}
	q.Follow, q.Since, q.Tail, q.Previous = o.follow, since, max(-1, o.tail), o.previous
	ctx, cancel = c.limit(ctx, usual)
	defer cancel()
	p := logPrinter{c: c, o: o, one: one, stack: q.Stack, open: map[string]bool{}}
	err = c.daemon().Logs(ctx, q, p.line)
	if o.follow && errors.Is(err, context.DeadlineExceeded) {
		return nil // --timeout says how long to follow
	}
	if errors.Is(err, api.ErrGone) {
		return fmt.Errorf("%w; what tasks write is kept: ask again, with --since 1m, when it is back", api.ErrGone)
	}
	return err
}

// parseSince reads how long ago, a day, or a moment.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", time.DateTime, time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("--since %s: write how long ago (10m), a day (2026-01-02) or a time (2026-01-02T15:04:05Z)", s)
}

// logPrinter writes lines as the programs wrote them: a terminal obeys what is in them, as it would if they ran here.
type logPrinter struct {
	c     *cli
	o     logsOptions
	one   bool
	stack string
	open  map[string]bool // task and stream whose last piece was no whole line
}

func (p *logPrinter) line(l api.LogLine) error {
	if p.c.output == "json" {
		err := p.c.printLine(struct {
			Task    string    `json:"task"`
			Time    time.Time `json:"time"`
			Stream  string    `json:"stream"`
			Attempt int       `json:"attempt,omitempty"`
			Partial bool      `json:"partial,omitempty"`
			Text    string    `json:"text"`
		}{l.Task, l.Time, l.Stream, l.Attempt, l.Partial, string(l.Text)})
		return errors.Join(err, p.c.flush())
	}
	out, ok := p.c.out.(flusher)
	if !ok {
		out = flusher{bufio.NewWriter(p.c.out)}
	}
	key := l.Task + l.Stream
	if !p.open[key] {
		if !p.one && !p.o.noPrefix {
			_, _ = out.WriteString(strings.TrimPrefix(l.Task, p.stack+"/") + " | ")
		}
		if p.o.timestamps {
			_, _ = out.WriteString(l.Time.UTC().Format(time.RFC3339Nano) + " ")
		}
	}
	// Pieces of one line follow each other but for those of other tasks and streams; only without a prefix can they be joined.
	p.open[key] = l.Partial && p.one
	_, _ = out.Write(l.Text)
	if !p.open[key] {
		_ = out.WriteByte('\n')
	}
	return out.Flush()
}
