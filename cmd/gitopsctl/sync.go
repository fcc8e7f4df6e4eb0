package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

type syncOptions struct {
	target string
	wait   bool
}

// The exit codes of sync --wait.
const (
	exitRolledBack = 3
	exitStuck      = 4
	exitTimeout    = 5
)

// lookLimit is how long the daemon is asked what is left, once time is up.
const lookLimit = 5 * time.Second

func (c *cli) syncCmd() *cobra.Command {
	var o syncOptions
	cmd := &cobra.Command{
		Use:   "sync [STACK|SOURCE]",
		Short: "Fetch now, and with --wait tell what became of it",
		Long: `Fetch the source of a stack, a source, or all sources now, and judge what is new. With --wait, wait until it is known what
became of the newest revision:
of the stack, or of all stacks of the source. Where several stacks end in different ways, the highest exit code counts.

Exit codes without --wait: 0 fetched and judged, 2 error.
Exit codes with --wait: 0 Deployed, 3 RolledBack, 4 Stalled or Blocked (a person must act; also suspended or pinned stacks with
something new), 5 timeout, 2 other error.`,
		Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(func(st api.Status) []string {
			return append(stackNames(st), sourceNames(st)...)
		})),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.target = args[0]
			}
			return c.sync(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.wait, "wait", false, "wait for the outcome")
	return cmd
}

func (c *cli) sync(ctx context.Context, o syncOptions) error {
	if err := c.only(); err != nil {
		return err
	}
	usual := writeLimit
	if o.wait {
		usual = waitLimit
	}
	limited, cancel := c.limit(ctx, usual)
	defer cancel()
	err := c.syncAll(limited, o)
	if o.wait && limited.Err() != nil && ctx.Err() == nil {
		c.unfinished(ctx, o.target)
		return exitCode{exitTimeout, errors.New("time is up; the rollout goes on: `gitopsctl status` tells how far it is")}
	}
	return err
}

// unfinished tells what the stacks that a sync is about still wait for. What goes wrong with that is not told: that time is up is.
func (c *cli) unfinished(ctx context.Context, target string) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return
	}
	one := slices.Contains(stackNames(st), target)
	for _, s := range st.Stacks {
		if s.Ready || one && s.Name != target || !one && target != "" && s.Source != target {
			continue
		}
		for _, r := range distinct(s.Reasons) {
			c.note("%s: %s", s.Name, reason(r))
		}
		for _, svc := range s.Services {
			if svc.Step == state.StepDone && svc.Ready >= svc.Desired {
				continue
			}
			c.note("%s/%s: %d of %s updated, %d ready", s.Name, svc.Name, svc.Updated, plural(svc.Desired, "task"), svc.Ready)
			for _, t := range svc.Tasks {
				if t.Desired != state.DesiredStop && !t.Report.Ready() {
					c.note("  %s is %s", t.ID, strings.TrimSpace(cmp.Or(string(t.Report.Phase), "pending")+" "+string(t.Report.Health)))
				}
			}
		}
	}
}

func (c *cli) syncAll(ctx context.Context, o syncOptions) error {
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return err
	}
	if len(st.Sources) == 0 {
		return errors.New("there is no source yet; add one with `gitopsctl source add NAME URL`")
	}
	sources, stack := sourceNames(st), ""
	switch {
	case o.target == "":
	case slices.Contains(stackNames(st), o.target), !slices.Contains(sources, o.target): // a stack wins over a source of its name: it is the smaller of the two
		sources, stack = []string{""}, o.target
	default:
		sources = []string{o.target}
	}
	results := []api.Result{}
	for i, s := range sources {
		var res api.Result
		err := c.patient(ctx, func() (err error) {
			res, err = c.daemon().Operate(ctx, api.Operation{Kind: api.OpSync, ID: api.NewRequestID(), Actor: c.actor(), Source: s, Stack: stack})
			return err
		})
		if stack != "" && err != nil && api.KindOf(err) == api.NotFound {
			return c.unknown(ctx, o)
		}
		if err != nil {
			return fmt.Errorf("sync %s: %w", cmp.Or(s, stack), err)
		}
		sources[i] = res.Source
		results = append(results, res)
		if o.wait {
			c.note("%s: %s", res.Source, revision(res.Revision))
		} else if !c.structured() {
			fmt.Fprintln(c.out, cleanLine(res.Message))
		}
	}
	if !o.wait {
		if c.structured() {
			return c.printData(results)
		}
		return nil
	}
	return c.await(ctx, sources, stack, results)
}

// await follows the stacks to their ends and chooses the exit code.
func (c *cli) await(ctx context.Context, sources []string, stack string, results []api.Result) error {
	ends := []api.Progress{}
	told := map[string]string{}
	for i, s := range sources {
		var found []api.Progress
		err := c.patient(ctx, func() (err error) {
			found, err = c.daemon().WatchProgress(ctx, s, stack, results[i].Index, func(p api.Progress) error {
				if what := progressOf(p); told[p.Stack] != what {
					told[p.Stack] = what
					c.note("%s: %s", p.Stack, what)
				}
				return nil
			})
			return err
		})
		if err != nil {
			return fmt.Errorf("wait for %s: %w", s, err)
		}
		ends = append(ends, found...)
		if stack == "" {
			st, err := c.daemon().Status(ctx, "")
			if err != nil {
				return err
			}
			more := held(st, s)
			if len(found) > 0 { // each stack said it
				more = slices.DeleteFunc(more, func(p api.Progress) bool { return p.Stack == "" })
			}
			ends = append(ends, more...)
		}
	}
	code := exitOK
	t := &table{columns: []string{"STACK", "REVISION", "OUTCOME", "TASKS", "REASON"}}
	for _, p := range ends {
		code = max(code, endCode(p.End))
		outcome := word(string(p.End))
		if p.To.Commit != "" {
			outcome.text += " to " + p.To.String()
		}
		why := ""
		if p.End != api.EndDeployed && p.Reason.Message != "" {
			why = reason(p.Reason)
		}
		t.add(p.Stack, text(p.Stack), text(revision(p.Revision)), outcome, text(fmt.Sprintf("%d/%d", p.Ready, p.Desired)), text(why))
	}
	if err := c.print(t, ends); err != nil {
		return err
	}
	for _, p := range ends {
		if p.End == api.EndStalled || p.End == api.EndRolledBack {
			c.lastWords(ctx, p.Stack)
		}
	}
	return exit(code)
}

// unknown says that no source has a stack, after all were fetched, and what is wrong with the sources: the stack may be in what does not get through.
func (c *cli) unknown(ctx context.Context, o syncOptions) error {
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return err
	}
	code := exitError
	for _, s := range st.Sources {
		for _, r := range wrong(s) {
			c.note("source %s: %s", s.Name, reason(r))
		}
		if o.wait && len(s.Waiting) > 0 {
			code = exitStuck
		}
	}
	return exitCode{code, api.NotFoundf("stack or source", o.target, append(stackNames(st), sourceNames(st)...))}
}

// wordsKept is how many lines of a failed task are shown.
const wordsKept = 10

// lastWords shows what a failed task of a stack wrote last, where there is one still. It is a help, not an answer: what goes wrong with it
// is not told.
func (c *cli) lastWords(ctx context.Context, stack string) {
	st, err := c.daemon().Status(ctx, stack)
	if err != nil {
		return
	}
	for _, t := range allTasks(st) {
		if t.Report.Failures == 0 {
			continue
		}
		var lines []string
		err := c.daemon().Logs(ctx, api.LogQuery{Stack: stack, Task: t.ID, Tail: wordsKept}, func(l api.LogLine) error {
			lines = append(lines, string(l.Text))
			return nil
		})
		if err != nil || len(lines) == 0 {
			return
		}
		c.note("\nLast lines of %s; more with `gitopsctl logs %s`:", t.ID, t.ID)
		for _, l := range lines[max(0, len(lines)-wordsKept):] {
			c.note("  %s", l)
		}
		return
	}
}

// held tells of what a source does not get through beside its stacks: a revision that waits for a person or does not render as a whole, and stacks that belong to
// another source.
func held(st api.Status, source string) []api.Progress {
	at := slices.IndexFunc(st.Sources, func(s api.SourceStatus) bool { return s.Name == source })
	if at < 0 {
		return nil
	}
	s := st.Sources[at]
	var out []api.Progress
	switch {
	case len(s.Waiting) > 0:
		out = append(out, api.Progress{Revision: s.Seen, End: api.EndBlocked, Reason: s.Waiting[0]})
	case s.Trouble != nil && s.Trouble.ID == reconcile.ReasonRender:
		out = append(out, api.Progress{Revision: s.Seen, End: api.EndFailed, Reason: *s.Trouble})
	}
	for _, p := range s.Problems {
		if p.Severity == manifest.Error && p.Stack != "" {
			out = append(out, api.Progress{Stack: p.Stack, Revision: s.Seen, End: api.EndBlocked, Reason: state.Reason{ID: p.Rule, Message: p.Message}})
		}
	}
	return out
}

// progressOf tells how far a stack is.
func progressOf(p api.Progress) string {
	if p.End != "" {
		return string(p.End)
	}
	if p.Reason.ID == reconcile.ReasonPruned {
		return fmt.Sprintf("it is being removed, %s ready", plural(p.Ready, "task"))
	}
	return fmt.Sprintf("%d of %d tasks updated, %d ready", p.Updated, p.Desired, p.Ready)
}

func endCode(e api.Ending) int {
	switch e {
	case api.EndDeployed, api.EndRemoved:
		return exitOK
	case api.EndRolledBack:
		return exitRolledBack
	case api.EndStalled, api.EndBlocked, api.EndSuspended, api.EndPinned:
		return exitStuck
	}
	return exitError
}
