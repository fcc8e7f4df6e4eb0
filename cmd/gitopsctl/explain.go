package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/api/explain"
)

func (c *cli) explainCmd() *cobra.Command {
	var o policyOptions
	cmd := &cobra.Command{
		Use:   "explain [ID]",
		Short: "What a reason or rule means, and what to do about it",
		Long: `What the id of a reason, a problem or a rule of policy means, and what to do about it. Without an ID, the list of all. No daemon is needed, but
for a rule of your own: without --policy, what it found in the stacks that there are is shown.

Exit codes: 0 done, 2 error.`,
		Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var ids []string
			if all, err := o.entries(context.WithoutCancel(cmd.Context())); err == nil && len(args) == 0 {
				for _, e := range all {
					ids = append(ids, e.ID)
				}
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.explain(cmd.Context(), o, strings.Join(args, ""))
		},
	}
	cmd.Flags().StringVar(&o.source, "policy", "", "the policy source: a `directory` with your own rules")
	return cmd
}

// entries are the reasons and problems, and the rules of policy, which tell of themselves.
func (o *policyOptions) entries(ctx context.Context) ([]explain.Entry, error) {
	engine, err := o.engine(ctx)
	if err != nil {
		return nil, err
	}
	all := explain.All()
	for _, r := range engine.Rules() {
		text := r.Reason + "\n\n" + r.WayOut
		if r.File != "" {
			text += "\n\nA rule of your own: " + r.File + " of the policy source."
		}
		all = append(all, explain.Entry{ID: r.ID, Title: cmp.Or(r.Title, "a rule of your own"), Text: strings.TrimSpace(text)})
	}
	slices.SortFunc(all, func(a, b explain.Entry) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

func (c *cli) explain(ctx context.Context, o policyOptions, id string) error {
	if err := c.only("name"); err != nil {
		return err
	}
	all, err := o.entries(ctx)
	if err != nil {
		return err
	}
	if id == "" {
		t := &table{columns: []string{"ID", "MEANS"}}
		for _, e := range all {
			t.add(e.ID, text(e.ID), text(e.Title))
		}
		return c.print(t, all)
	}
	var known []string
	for _, e := range all {
		known = append(known, e.ID)
		if e.ID != id {
			continue
		}
		return c.writeEntry(e)
	}
	if e, ok := c.found(ctx, id); ok {
		return c.writeEntry(e)
	}
	return api.NotFoundf("explanation of", id, known)
}

func (c *cli) writeEntry(e explain.Entry) error {
	if c.structured() {
		return c.printData(e)
	}
	fmt.Fprintf(c.out, "%s: %s\n\n%s\n", c.paint(bold, cleanLine(e.ID)), cleanLine(e.Title), wrap(cleanText(e.Text), 100))
	return nil
}

// found explains a rule by what it said of the stacks that there are. A daemon that does not answer found nothing.
func (c *cli) found(ctx context.Context, rule string) (explain.Entry, bool) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return explain.Entry{}, false
	}
	var said []string
	for _, s := range st.Stacks {
		for _, p := range s.Problems {
			if p.Rule == rule {
				said = append(said, p.String())
			}
		}
	}
	text := "What it found in the stacks that there are:\n\n" + strings.Join(said, "\n") +
		"\n\nIts reason and its way out are in the policy source: `gitopsctl explain " + rule + " --policy DIRECTORY` shows them."
	return explain.Entry{ID: rule, Title: "a rule of your own", Text: text}, len(said) > 0
}

// wrap breaks long lines between words.
func wrap(text string, width int) string {
	var out []string
	for _, line := range strings.Split(text, "\n") {
		row := ""
		for _, w := range strings.Fields(line) {
			if row != "" && utf8.RuneCountInString(row)+1+utf8.RuneCountInString(w) > width {
				out, row = append(out, row), ""
			}
			row = strings.TrimPrefix(row+" "+w, " ")
		}
		out = append(out, row)
	}
	return strings.Join(out, "\n")
}
