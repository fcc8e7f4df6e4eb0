package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// policyOptions say what to judge by.
type policyOptions struct {
	render renderOptions
	source string
	sets   []string
}

func (c *cli) policyCmd() *cobra.Command {
	return parent("policy", "Judge files by policy, and list its rules", `Judge files by policy without a daemon, and list the rules.`,
		c.policyCheckCmd(), c.policyRulesCmd())
}

func (c *cli) policyCheckCmd() *cobra.Command {
	var o policyOptions
	cmd := &cobra.Command{
		Use:   "check PATH",
		Short: "Judge the stacks of a directory by policy",
		Long: `Judge the stacks of a directory by policy, as the daemon would before it accepts a commit. No daemon is needed. A stack
that does not render can't be judged: its
problems are listed instead.

With -o json the answer is {"findings": [{"severity", "rule", "stack", "service", "file", "line", "message"}]}.

Exit codes: 0 clean, or notices only, 1 errors were found, 2 it could not be judged.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.render.path = args[0]
			return c.policyCheck(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.source, "policy", "", "the policy source: a `directory` with policy.yaml, exemptions.yaml and your own rules")
	f.StringSliceVar(&o.sets, "set", nil, "switch this `set` of rules on beside those that the policy source names: restricted")
	o.render.flags(f)
	return cmd
}

// engine compiles the policy that the options name.
func (o *policyOptions) engine(ctx context.Context) (*policy.Engine, error) {
	var src policy.Source
	if o.source != "" {
		if info, err := os.Stat(o.source); err != nil {
			return nil, plainPathError("read the policy source", o.source, err)
		} else if !info.IsDir() {
			return nil, fmt.Errorf("read the policy source %s: it is no directory", o.source)
		}
		root, err := os.OpenRoot(o.source)
		if err != nil {
			return nil, plainPathError("read the policy source", o.source, err)
		}
		defer root.Close()
		if src, err = policy.LoadSource(root.FS()); err != nil {
			return nil, fmt.Errorf("read the policy source %s: %w", o.source, err)
		}
	}
	engine, err := policy.New(ctx, policy.Options{Source: src})
	if err != nil && o.source != "" {
		return nil, fmt.Errorf("policy source %s: %w", o.source, err)
	}
	return engine, err
}

func (c *cli) policyCheck(ctx context.Context, o policyOptions) error {
	if err := c.only(); err != nil {
		return err
	}
	engine, err := o.engine(ctx)
	if err != nil {
		return err
	}
	for _, set := range o.sets {
		if set != policy.Baseline && set != policy.Restricted && set != policy.Custom {
			return fmt.Errorf("--set %s: there are the sets %s, %s and %s", set, policy.Baseline, policy.Restricted, policy.Custom)
		}
	}
	b, err := o.render.load(ctx)
	if err != nil {
		return err
	}
	var findings []manifest.Problem
	for _, p := range b.Problems {
		if p.Severity == manifest.Error {
			findings = append(findings, p)
		}
	}
	for _, s := range b.Stacks {
		hard, _ := policy.Harden(s, policy.Defaults{})
		v, err := engine.Review(ctx, policy.Input{Gate: policy.RevisionGate, Stack: hard, Now: c.now(), Sets: o.sets})
		if err != nil {
			return err
		}
		for _, f := range v.Findings {
			findings = append(findings, f.Problem())
		}
	}
	manifest.SortProblems(findings)
	if c.structured() {
		err = c.printData(struct {
			Findings []manifest.Problem `json:"findings"`
		}{list(findings)})
	} else {
		c.writeProblems(findings)
		c.note("%s", foundSummary(findings, "stack", len(b.Found)))
	}
	if err == nil && manifest.HasErrors(findings) {
		return exit(exitDifferent)
	}
	return err
}

func (c *cli) policyRulesCmd() *cobra.Command {
	var o policyOptions
	cmd := &cobra.Command{
		Use:   "rules",
		Short: "List the rules of policy",
		Long: `List the built-in rules, and with --policy your own. explain ID tells why there is a rule and what to do instead.

Exit codes: 0 done, 2 error.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.only("wide", "name"); err != nil {
				return err
			}
			engine, err := o.engine(cmd.Context())
			if err != nil {
				return err
			}
			rules := engine.Rules()
			t := &table{columns: []string{"RULE", "SET", "TITLE"}, wide: []string{"WAY OUT"}}
			for _, r := range rules {
				t.add(r.ID, text(r.ID), text(r.Set), text(r.Title), text(r.WayOut))
			}
			return c.print(t, list(rules))
		},
	}
	cmd.Flags().StringVar(&o.source, "policy", "", "the policy source: a `directory` with your own rules")
	return cmd
}
