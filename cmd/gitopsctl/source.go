package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// sourceOptions are a source as flags: what is secret or long comes from files.
type sourceOptions struct {
	spec       api.SourceSpec
	interval   time.Duration
	token      string
	key        string
	passphrase string
	knownHosts string
	ca         string
	signers    string
	test       bool
}

const maxCredential = 1 << 20

func (o *sourceOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&o.spec.Branch, "branch", "", "follow this `branch`; default: the one that the remote's HEAD names")
	f.StringVar(&o.spec.Tag, "tag", "", "follow this `tag`")
	f.StringVar(&o.spec.Path, "path", "", "the `directory` that holds the stacks")
	f.DurationVar(&o.interval, "interval", 0, "how `often` to look for new commits; default: the daemon's")
	f.StringVar(&o.spec.Verify, "verify", "", "which signatures commits need: none, ssh or gpg")
	f.StringVar(&o.signers, "signers-file", "", "allowed_signers, or an armored key ring")
	f.StringVar(&o.spec.Username, "username", "", "https: the user's `name`")
	f.StringVar(&o.token, "token-file", "", "https: a token or password; - reads it from the standard input")
	f.StringVar(&o.ca, "ca-file", "", "https: certificates to trust, in PEM form")
	f.StringVar(&o.key, "key-file", "", "ssh: a private key")
	f.StringVar(&o.passphrase, "passphrase-file", "", "ssh: what opens the key; - reads it from the standard input")
	f.StringVar(&o.knownHosts, "known-hosts-file", "", "ssh: the keys of the hosts")
}

// fill reads the files that the flags name.
func (o *sourceOptions) fill(ctx context.Context, in io.Reader) error {
	o.spec.Interval = manifest.Duration(o.interval)
	if o.token == "-" && o.passphrase == "-" {
		return errors.New("the standard input holds the token or the passphrase, not both")
	}
	for _, f := range []struct {
		path string
		into *string
		line bool // one line: its end does not belong to it
	}{{o.token, &o.spec.Token, true}, {o.passphrase, &o.spec.Passphrase, true}, {o.key, &o.spec.Key, false}, {o.knownHosts, &o.spec.KnownHosts, false},
		{o.ca, &o.spec.CA, false}, {o.signers, &o.spec.Signers, false}} {
		if f.path == "" {
			continue
		}
		b, err := readCredential(ctx, in, f.path)
		if err != nil {
			return err
		}
		*f.into = string(b)
		if f.line {
			*f.into = strings.TrimRight(*f.into, "\r\n")
		}
	}
	return nil
}

// readCredential reads a file, or for - the standard input.
func readCredential(ctx context.Context, in io.Reader, path string) ([]byte, error) {
	if path == "-" {
		return interruptible(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(in, maxCredential)) })
	}
	return readFile(path, maxCredential)
}

func (c *cli) sourceCmd() *cobra.Command {
	return parent("source", "The repositories that are followed", `Add, list, test and remove the repositories that are followed.`,
		c.sourceAddCmd(), c.sourceListCmd(), c.sourceTestCmd(), c.sourceRemoveCmd())
}

func (c *cli) sourceAddCmd() *cobra.Command {
	var o sourceOptions
	cmd := &cobra.Command{
		Use:   "add NAME URL",
		Short: "Follow a repository",
		Long: `Follow a repository: https://, ssh://, user@host:path, or a directory on the daemon's machine. A source of that name is
changed to what is given.
Its first revision waits for approve, unless --yes is said.
With --policy it holds the policy that judges all stacks (policy.yaml, exemptions.yaml, your own rules), and no stacks. Keep it where those who change
the stacks can't: there is one such source, and its newest revision that can be read is in force at once.

Exit codes: 0 done, 1 --test found the source to be wrong and nothing was added, 2 error.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.spec.Name, o.spec.URL = args[0], args[1]
			if err := c.only(); err != nil {
				return err
			}
			if err := o.fill(cmd.Context(), c.in); err != nil {
				return err
			}
			if o.test {
				rep, err := c.testSource(cmd.Context(), o.spec)
				if err != nil {
					return err
				}
				if !rep.OK() {
					if err := c.printReport(rep); err != nil {
						return err
					}
					return exit(exitDifferent)
				}
			}
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpSourceAdd, SourceSpec: &o.spec})
		},
	}
	o.flags(cmd.Flags())
	cmd.Flags().BoolVar(&o.spec.Yes, "yes", false, "run its first revision without asking")
	cmd.Flags().BoolVar(&o.spec.Policy, "policy", false, "it holds the policy, and no stacks")
	cmd.Flags().BoolVar(&o.test, "test", false, "try it first, and add it only if it works")
	return cmd
}

func (c *cli) sourceListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the repositories that are followed",
		Long: "List the repositories that are followed.\n\nExit codes: 0 done, 2 error.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.get(cmd.Context(), getOptions{kind: "sources"}) },
	}
}

func (c *cli) sourceTestCmd() *cobra.Command {
	var o sourceOptions
	cmd := &cobra.Command{
		Use:   "test NAME | URL",
		Short: "Try a source step by step, and tell which part of it is wrong",
		Long: `Try a source step by step: address, credentials, server, ref, commit, signature, path. A NAME is a source that is
followed, with the credentials it has; a URL is
one that might be.

Exit codes: 0 it works, 1 something is wrong, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(sourceNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			if err := o.fill(cmd.Context(), c.in); err != nil {
				return err
			}
			if strings.ContainsAny(args[0], "/:") {
				o.spec.Name, o.spec.URL = "new", args[0]
			} else {
				o.spec.Name = args[0]
			}
			rep, err := c.testSource(cmd.Context(), o.spec)
			if err != nil {
				return err
			}
			if err := c.printReport(rep); err != nil {
				return err
			}
			if !rep.OK() {
				return exit(exitDifferent)
			}
			return nil
		},
	}
	o.flags(cmd.Flags())
	return cmd
}

func (c *cli) testSource(ctx context.Context, s api.SourceSpec) (api.SourceReport, error) {
	ctx, cancel := c.limit(ctx, writeLimit)
	defer cancel()
	return c.daemon().TestSource(ctx, s)
}

func (c *cli) printReport(rep api.SourceReport) error {
	if c.structured() {
		return c.printData(rep)
	}
	for _, s := range rep.Steps {
		mark := c.paint(good, "ok    ")
		if !s.OK {
			mark = c.paint(bad, "failed")
		}
		fmt.Fprintf(c.out, "%-12s %s  %s\n", cleanLine(s.Name), mark, cleanLine(s.Detail))
	}
	return nil
}

func (c *cli) sourceRemoveCmd() *cobra.Command {
	yes := false
	cmd := &cobra.Command{
		Use: "rm NAME", Aliases: []string{"remove"}, Short: "Stop following a repository, and remove what it brought",
		Long: `Stop following a repository. Its stacks are stopped and removed; their volumes are kept.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(sourceNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			if !yes {
				if err := c.askSourceRemove(cmd.Context(), args[0]); err != nil {
					return err
				}
			}
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpSourceRemove, Source: args[0]})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (c *cli) askSourceRemove(whole context.Context, name string) error {
	ctx, cancel := c.limit(whole, readLimit) // for the daemon: a person may take longer
	defer cancel()
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return err
	}
	for _, s := range st.Sources {
		if s.Name == name {
			return c.ask(whole, fmt.Sprintf("source %s and its %s will be removed", name, plural(s.Stacks, "stack")), "--yes")
		}
	}
	return api.NotFoundf("source", name, sourceNames(st))
}
