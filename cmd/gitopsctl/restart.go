package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

func (c *cli) restartCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "restart STACK[/SERVICE]",
		Short: "Replace each task of a stack or service by a new one of the same revision",
		Long: `Replace each task by a new one of the same revision, as gently as the update policy says.

Exit codes: 0 done, 2 error.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.complete(oneOf(serviceNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.only(); err != nil {
				return err
			}
			stack, service, _ := strings.Cut(args[0], "/")
			return c.operate(cmd.Context(), api.Operation{Kind: api.OpRestart, Stack: stack, Service: service})
		},
	}
}
