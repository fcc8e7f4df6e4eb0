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
	"github.com/gitopsd/gitopsd/policy"
)

func (c *cli) explainCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "explain [ID]",
		Short: "What a reason or rule means, and what to do about it",
		Long: `What the id of a reason, a problem or a rule of policy means, and what to do about it. Without an ID, the list of all. No daemon is needed.

Exit codes: 0 done, 2 error.`,
		Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var ids []string
			if all, err := entries(context.WithoutCancel(cmd.Context())); err == nil && len(args) == 0 {
				for _, e := range all {
					ids = append(ids, e.ID)
				}
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.explain(cmd.Context(), strings.Join(args, ""))
		},
	}
}

// entries are the reasons and problems, and the rules of policy, which tell of themselves.
func entries(ctx context.Context) ([]explain.Entry, error) {
	engine, err := policy.New(ctx, policy.Options{})
	if err != nil {
		return nil, err
	}
	all := explain.All()
	for _, r := range engine.Rules() {
		all = append(all, explain.Entry{ID: r.ID, Title: r.Title, Text: strings.TrimSpace(r.Reason + "\n\n" + r.WayOut)})
	}
	slices.SortFunc(all, func(a, b explain.Entry) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

func (c *cli) explain(ctx context.Context, id string) error {
	if err := c.only("name"); err != nil {
		return err
	}
	all, err := entries(ctx)
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
		if c.structured() {
			return c.printData(e)
		}
		fmt.Fprintf(c.out, "%s: %s\n\n%s\n", c.paint(bold, e.ID), cleanLine(e.Title), wrap(cleanText(e.Text), 100))
		return nil
	}
	return api.NotFoundf("explanation of", id, known)
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
