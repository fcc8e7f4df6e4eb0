package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

func (c *cli) statusCmd() *cobra.Command {
	return c.watchable(&cobra.Command{
		Use:   "status [STACK]",
		Short: "What is true of the stacks: synced, healthy, and what became of the last revision",
		Long: `What is true of all stacks, or of one with its services and tasks.

SYNC is how a stack stands to Git, HEALTH how what runs does, OUTCOME what became of the revision that it was last told to be.

After a rollback REVISION is the one that runs, with the one that was refused behind it.

Exit codes: 0 fine, 1 a stack is Degraded, Blocked, Failed or Stalled, or, of all stacks, a source waits for a person or fails,
2 error.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.complete(oneOf(stackNames)),
	}, func(ctx context.Context, args []string) error { return c.status(ctx, strings.Join(args, "")) })
}

func (c *cli) status(ctx context.Context, stack string) error {
	if err := c.only("wide", "name"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	st, err := c.daemon().Status(ctx, stack)
	if err != nil {
		return err
	}
	switch {
	case c.output != "" && c.output != "wide":
		err = c.print(stackTable(c, st.Stacks), st)
	case stack != "":
		c.writeStack(st.Stacks[0])
	case len(st.Stacks) == 0 && len(st.Sources) == 0:
		c.note("there is no stack, and no source to bring one; add one with `gitopsctl source add NAME URL`")
	default:
		c.writeTable(c.out, stackTable(c, st.Stacks), "")
		c.writeReasons(st)
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(st.Stacks, troubled) || stack == "" && slices.ContainsFunc(st.Sources, blocked) {
		return exit(exitDifferent)
	}
	return nil
}

// troubled says whether a person should look at a stack.
func troubled(s reconcile.StackStatus) bool {
	return s.Health == reconcile.Degraded || s.Sync == reconcile.Blocked || s.Sync == reconcile.Failed || s.Outcome.Kind == state.Stalled
}

// blocked says whether a person should look at a source: what it asks for does not get through, as a whole or for a stack that it can't have.
func blocked(s api.SourceStatus) bool {
	return len(s.Waiting) > 0 || s.Trouble != nil || manifest.HasErrors(s.Problems)
}

// runs names the revision of an outcome that runs now.
func runs(o state.Outcome) string {
	if o.Kind == state.RolledBack && o.To.Commit != "" {
		return revision(o.To) + " (not " + revision(o.Revision) + ")"
	}
	return revision(o.Revision)
}

func stackTable(c *cli, stacks []reconcile.StackStatus) *table {
	t := &table{columns: []string{"STACK", "SYNC", "HEALTH", "OUTCOME", "TASKS", "REVISION", "SINCE"}, wide: []string{"SOURCE", "REASON"}}
	for _, s := range stacks {
		ready, desired := 0, 0
		for _, svc := range s.Services {
			ready, desired = ready+svc.Ready, desired+svc.Desired
		}
		since := s.Outcome.Ended
		if since.IsZero() {
			since = s.Outcome.Started
		}
		reason := ""
		if len(s.Reasons) > 0 {
			reason = s.Reasons[0].ID
		}
		t.add(s.Name, text(s.Name), word(string(s.Sync)), word(string(s.Health)), word(string(s.Outcome.Kind)),
			text(fmt.Sprintf("%d/%d", ready, desired)), text(runs(s.Outcome)), text(c.when(since)), text(s.Source), text(reason))
	}
	return t
}

// writeReasons says why stacks and sources are not as they should be.
func (c *cli) writeReasons(st api.Status) {
	begun := false
	line := func(name string, r state.Reason) {
		if !begun {
			fmt.Fprintln(c.out)
			begun = true
		}
		fmt.Fprintf(c.out, "%s: %s\n", c.paint(bold, cleanLine(name)), reason(r))
	}
	said := map[string][]state.Reason{} // by source
	for _, s := range st.Sources {
		said[s.Name] = wrong(s)
		for _, r := range said[s.Name] {
			line("source "+s.Name, r)
		}
	}
	for _, s := range st.Stacks {
		for _, r := range distinct(s.Reasons) {
			if !s.Ready && !slices.Contains(said[s.Source], r) { // the source said it for all its stacks
				line(s.Name, r)
			}
		}
	}
}

// wrong lists what is wrong with a source. Its trouble may be one of its problems.
func wrong(s api.SourceStatus) []state.Reason {
	var out []state.Reason
	if s.Trouble != nil {
		out = append(out, *s.Trouble)
	}
	out = append(out, s.Waiting...)
	for _, p := range s.Problems {
		if s.Trouble == nil || s.Trouble.Message != p.String() {
			out = append(out, state.Reason{ID: p.Rule, Message: strings.TrimSuffix(p.String(), " ["+p.Rule+"]")})
		}
	}
	return out
}

// distinct leaves out reasons that only say again what an earlier one said in more words: a stack's outcome and its service may tell of one
// thing.
func distinct(rs []state.Reason) []state.Reason {
	var out []state.Reason
	for _, r := range rs {
		if !slices.ContainsFunc(out, func(o state.Reason) bool { return o.ID == r.ID && strings.Contains(o.Message, r.Message) }) {
			out = append(out, r)
		}
	}
	return out
}

// reason writes why something is so, with the id that explain takes.
func reason(r state.Reason) string {
	if r.ID == "" || strings.HasSuffix(r.Message, "["+r.ID+"]") {
		return cleanLine(r.Message)
	}
	return cleanLine(r.Message) + " [" + cleanLine(r.ID) + "]"
}

// writeStack tells all of one stack.
func (c *cli) writeStack(s reconcile.StackStatus) {
	field := func(name string, v cell) {
		fmt.Fprintf(c.out, "%-10s %s\n", name, c.paint(v.style, cleanLine(v.text)))
	}
	field("Stack", cell{s.Name, bold})
	field("Source", text(s.Source))
	field("Sync", word(string(s.Sync)))
	health := word(string(s.Health))
	if s.Suspended && s.Health != reconcile.Suspended {
		health.text += " (suspended: it does not follow Git)"
	}
	field("Health", health)
	out := word(string(s.Outcome.Kind))
	if s.Outcome.Kind == "" && s.Outcome.Revision.Commit != "" {
		out.text = "rolling out"
	}
	field("Outcome", out)
	field("Revision", text(runs(s.Outcome)))
	if s.Revision.Commit != "" && s.Revision != s.Outcome.Revision {
		field("Git asks", text(revision(s.Revision)))
	}
	if s.Removing {
		field("Removing", text("yes"))
	}
	for _, r := range distinct(s.Reasons) {
		field("Because", cell{text: reason(r)})
	}
	if len(s.Services) > 0 {
		fmt.Fprintln(c.out)
		c.writeTable(c.out, serviceTable(s.Services, false), "")
	}
	if t := taskTable(c, s.Services, false); len(t.rows) > 0 {
		fmt.Fprintln(c.out)
		c.writeTable(c.out, t, "")
	}
	if len(s.Problems) > 0 {
		fmt.Fprintln(c.out)
		c.writeProblems(s.Problems)
	}
}
