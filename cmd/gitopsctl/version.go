package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
)

// version is set by the linker.
var version = "unknown"

func (c *cli) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "The version of gitopsctl and of the daemon",
		Long:  "The version of gitopsctl, and of the daemon if one answers.\n\nExit codes: 0 done, 2 error.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.only(); err != nil {
				return err
			}
			ctx, cancel := c.limit(cmd.Context(), readLimit)
			defer cancel()
			daemon, err := c.daemon().Version(ctx)
			if c.structured() {
				out := struct {
					Client string       `json:"client"`
					Daemon *api.Version `json:"daemon,omitempty"`
				}{Client: version}
				if err == nil {
					out.Daemon = &daemon
				}
				return c.printData(out)
			}
			fmt.Fprintf(c.out, "gitopsctl %s\n", version)
			if err != nil {
				c.note("%s", err)
				return nil
			}
			fmt.Fprintf(c.out, "gitopsd   %s on %s, log format %d, at entry %d\n",
				cleanLine(daemon.Version), cleanLine(daemon.Node), daemon.Format, daemon.Index)
			return nil
		},
	}
}
