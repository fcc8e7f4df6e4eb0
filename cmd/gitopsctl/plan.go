package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

type planOptions struct {
	render   renderOptions
	revision string
	source   string
}

func (c *cli) planCmd() *cobra.Command {
	var o planOptions
	cmd := &cobra.Command{
		Use:   "plan [PATH | --revision REF]",
		Short: "What a revision would change, and what policy says of it; nothing is run",
		Long: `What a revision would change: which tasks start, stop and are replaced, which fields differ, what policy says.

Of a PATH (the root of a checkout, or the directory in it that the source's path names) the files are read here, as they are now, committed or not.
Of a --revision (a branch, a tag, refs/pull/7/head or a commit) the daemon fetches it, plans it and forgets it. With neither, it is the newest
commit that the source follows.

-o wide lists the restrictions that nobody wrote, too; -o markdown prints a comment for a pull request.

Exit codes: 0 no difference, 1 differences, 2 error or denied.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.render.path = strings.Join(args, "")
			if o.render.path != "" && o.revision != "" {
				return errors.New("plan takes a PATH or a --revision, not both")
			}
			return c.plan(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.revision, "revision", "", "plan this `ref` or commit of the source")
	f.StringVar(&o.source, "source", "", "the `name` of the source; needed where there are several")
	o.render.flags(f)
	names := c.complete(func(_ []string, st api.Status) []string { return sourceNames(st) })
	_ = cmd.RegisterFlagCompletionFunc("source", names) // fails for a flag that is not there only
	return cmd
}

func (c *cli) plan(ctx context.Context, o planOptions) error {
	if err := c.only("wide", "markdown"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, writeLimit)
	defer cancel()
	var p api.Preview
	var err error
	if o.render.path == "" {
		p, err = c.daemon().PlanRevision(ctx, o.source, o.revision)
	} else {
		p, err = c.planPath(ctx, o)
	}
	if err != nil {
		return err
	}
	switch {
	case c.structured():
		err = c.printData(p)
	case c.output == "markdown":
		writeMarkdown(c.out, p)
	default:
		c.writePlan(p)
	}
	switch {
	case err != nil:
		return err
	case p.Denied():
		return exit(exitError)
	case !p.Empty():
		return exit(exitDifferent)
	}
	return nil
}

func (c *cli) planPath(ctx context.Context, o planOptions) (api.Preview, error) {
	if o.source == "" {
		// The source's name is the name of a stack at the root, so it must be known before the files are read.
		st, err := c.daemon().Status(ctx, "")
		if err != nil {
			return api.Preview{}, err
		}
		stacks := slices.DeleteFunc(st.Sources, func(s api.SourceStatus) bool { return s.Policy })
		if len(stacks) == 1 {
			o.source = stacks[0].Name
		}
	}
	o.render.source = o.source
	b, err := o.render.load(ctx)
	if err != nil {
		return api.Preview{}, err
	}
	return c.daemon().PlanBundle(ctx, b)
}

// marks begin the lines of a plan.
var marks = map[reconcile.Action]struct {
	sign  string
	style style
}{
	reconcile.ActCreate: {"+", good}, reconcile.ActStart: {"+", good}, reconcile.ActReplace: {"~", warn}, reconcile.ActUpdate: {"~", warn},
	reconcile.ActRollback: {"~", warn}, reconcile.ActStop: {"-", bad}, reconcile.ActRemove: {"-", bad}, reconcile.ActAccept: {">", plain},
	reconcile.ActBlock: {"!", bad}, reconcile.ActFail: {"!", bad}, reconcile.ActRefuse: {"!", bad},
	reconcile.ActWait: {"?", warn}, reconcile.ActFinish: {">", plain},
}

// subject is what a step is about: the narrowest thing that it names.
func subject(s reconcile.Step) string {
	switch {
	case s.Volume != "":
		return "volume " + s.Volume
	case s.Task != "":
		return s.Task
	case s.Service != "":
		return s.Stack + "/" + s.Service
	case s.Stack != "":
		return s.Stack
	}
	return "source " + s.Source
}

func (c *cli) writePlan(p api.Preview) {
	title := "Plan of " + p.Source
	if p.Revision.Commit != "" {
		title += " " + p.Revision.String()
	}
	fmt.Fprintln(c.out, c.paint(bold, cleanLine(title)))
	if len(p.Steps) > 0 {
		fmt.Fprintln(c.out)
	}
	for _, s := range p.Steps {
		m := marks[s.Action]
		if m.sign == "" {
			m.sign = " "
		}
		line := fmt.Sprintf("%s %-8s %s", m.sign, s.Action, cleanLine(subject(s)))
		if s.Node != "" {
			line += " on " + cleanLine(s.Node)
		}
		fmt.Fprint(c.out, c.paint(m.style, line))
		if s.Reason.Message != "" {
			fmt.Fprint(c.out, ": "+reason(s.Reason))
		}
		fmt.Fprintln(c.out)
		for _, f := range s.Fields {
			c.writeField(f)
		}
	}
	c.writeAbout(p)
	fmt.Fprintf(c.out, "\n%s\n%s\n", counts(p.Summary), c.paint(verdictStyle(p), verdictOf(p)))
}

// writeAbout tells what else there is to know before a plan is accepted.
func (c *cli) writeAbout(p api.Preview) {
	section := func(title string, n int) bool {
		if n > 0 {
			fmt.Fprintf(c.out, "\n%s\n", c.paint(bold, title))
		}
		return n > 0
	}
	if section("Data", len(p.Data)) {
		for _, d := range p.Data {
			fmt.Fprintf(c.out, "  %s: %s\n", cleanLine(d.Name), cleanLine(d.Message))
		}
	}
	if section("Policy", len(p.Findings)) {
		c.writeProblems(p.Findings)
	}
	if section("Problems", len(p.Problems)) {
		c.writeProblems(p.Problems)
	}
	if c.output == "wide" && section("Restricted unasked (the line gives it back)", len(p.Hardening)) {
		c.writeHardening(p.Hardening)
	}
}

// writeHardening lists restrictions, each once with the services of a stack that it holds for, and below it the line that gives it back.
func (c *cli) writeHardening(hs []api.Hardening) {
	type restriction struct{ stack, value, giveBack string }
	var order []restriction
	services := map[restriction][]string{}
	for _, h := range hs {
		r := restriction{h.Stack, h.Value, h.GiveBack}
		if services[r] == nil {
			order = append(order, r)
		}
		services[r] = append(services[r], h.Service)
	}
	for _, r := range order {
		of := cleanLine(r.stack + ": " + strings.Join(services[r], ", "))
		fmt.Fprintf(c.out, "  %s\n%s\n      %s\n", c.paint(bold, of), indented(wrap(cleanLine(r.value), helpWidth), "    "), c.paint(faint, cleanLine(r.giveBack)))
	}
}

// indented puts a margin before each line.
func indented(text, margin string) string {
	return margin + strings.ReplaceAll(text, "\n", "\n"+margin)
}

func (c *cli) writeField(f manifest.Change) {
	f = f.Mask()
	effect := ""
	if f.Effect == manifest.InPlace {
		effect = c.paint(faint, " (in place)")
	}
	fmt.Fprintf(c.out, "    %s%s\n", cleanLine(f.Path), effect)
	if f.Old != "" {
		fmt.Fprintln(c.out, c.paint(bad, "      - "+cleanLine(f.Old)))
	}
	if f.New != "" {
		fmt.Fprintln(c.out, c.paint(good, "      + "+cleanLine(f.New)))
	}
}

// counts sums a plan up in a sentence.
func counts(s api.Summary) string {
	var parts []string
	for _, n := range []struct {
		n    int
		what string
	}{{s.Create, "to create"}, {s.Replace, "to replace"}, {s.Update, "to update in place"}, {s.Stop, "to stop"}, {s.Remove, "to remove"},
		{s.Blocked, "blocked"}, {s.Failed, "failed"}, {s.Refused, "without a place"}, {s.Waiting, "waiting for a person"}} {
		if n.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n.n, n.what))
		}
	}
	if len(parts) == 0 {
		return "Nothing changes."
	}
	return strings.Join(parts, ", ") + "."
}

func verdictOf(p api.Preview) string {
	switch {
	case p.Denied():
		return "Verdict: denied. What is blocked or failed is not run; what runs keeps running."
	case p.Summary.Waiting > 0:
		return "Verdict: waits for a person."
	case len(p.Findings) > 0:
		return "Verdict: allowed, with findings."
	}
	return "Verdict: allowed."
}

func verdictStyle(p api.Preview) style {
	switch {
	case p.Denied():
		return bad
	case p.Summary.Waiting > 0 || len(p.Findings) > 0:
		return warn
	}
	return good
}

// writeProblems lists problems as compilers do.
func (c *cli) writeProblems(ps []manifest.Problem) {
	for _, p := range ps {
		line := cleanLine(p.String())
		sev := string(p.Severity) + ": "
		fmt.Fprintln(c.out, strings.Replace(line, sev, c.paint(styleOf(string(p.Severity)), sev), 1))
	}
}
