package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gitopsd/gitopsd/cluster/api"
)

// maxSecret is the size of the largest secret, in bytes: that of Docker's.
const maxSecret = 500 << 10

func (c *cli) secretCmd() *cobra.Command {
	return parent("secret", "External secrets: values that are not in Git", `Set, list and remove the values of secrets that Compose
files name as external. Values are sealed before they are stored, and nothing gives them back but a task's own mount.`, c.secretSetCmd(), c.secretListCmd(), c.secretRemoveCmd())
}

func (c *cli) secretSetCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "set NAME",
		Short: "Set a secret to what the standard input holds",
		Long: `Set a secret to what the standard input holds, byte for byte; at a terminal it is asked for. Tasks that use it are replaced.

Exit codes: 0 done, 2 error.`,
		Example: "  printf %s \"$PASSWORD\" | gitopsctl secret set db_password",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			value, err := c.readSecret(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpSecretSet, Secret: &api.SecretValue{Name: args[0], Value: value}})
		},
	}
}

func (c *cli) readSecret(ctx context.Context, name string) ([]byte, error) {
	if file, ok := c.in.(*os.File); ok && c.inTTY {
		fmt.Fprintf(c.err, "Value of %s: ", cleanLine(name))
		value, err := readPassword(ctx, int(file.Fd()))
		fmt.Fprintln(c.err)
		if err == nil && len(value) == 0 {
			err = errors.New("nothing was typed: the secret is as it was")
		}
		return value, err
	}
	value, err := interruptible(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(c.in, maxSecret+1)) })
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the value: %w", err)
	case len(value) > maxSecret:
		return nil, fmt.Errorf("the value is larger than %d bytes", maxSecret)
	case len(value) == 0:
		return nil, errors.New("the standard input is empty: the secret is as it was")
	}
	if bytes.HasSuffix(value, []byte("\n")) && bytes.Count(value, []byte("\n")) == 1 {
		c.note("the value ends with a line end, and that is part of it; `printf %%s` writes none")
	}
	return value, nil
}

// readPassword reads a line that the terminal does not show. However it ends, the terminal shows again what is typed.
func readPassword(ctx context.Context, fd int) ([]byte, error) {
	before, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	value, err := interruptible(ctx, func() ([]byte, error) { return term.ReadPassword(fd) })
	return value, errors.Join(err, term.Restore(fd, before))
}

func (c *cli) secretListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the names of the secrets",
		Long: "List the names of the secrets: those that were set, and those that a revision brought.\n\nExit codes: 0 done, 2 error.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.only("wide", "name"); err != nil {
				return err
			}
			ctx, cancel := c.limit(cmd.Context(), readLimit)
			defer cancel()
			secrets, err := c.daemon().Secrets(ctx)
			if err != nil {
				return err
			}
			t := &table{columns: []string{"SECRET", "FROM", "CHANGED"}, wide: []string{"NODES"}}
			for _, s := range secrets {
				from := "a person"
				if s.Stack != "" {
					from = "stack " + s.Stack
				}
				t.add(s.Name, text(s.Name), text(from), text(c.when(s.Since)), text(fmt.Sprint(s.Nodes)))
			}
			return c.print(t, list(secrets))
		},
	}
}

func (c *cli) secretRemoveCmd() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Aliases: []string{"remove"}, Short: "Remove a secret",
		Long: `Remove a secret that was set. Tasks that run keep what they have; new ones that name it wait until it is set again.

Exit codes: 0 done, 2 error.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpSecretRemove, Secret: &api.SecretValue{Name: args[0]}})
		},
	}
}
