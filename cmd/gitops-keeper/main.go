// Command gitops-keeper is the small program beside the agent for what must outlive it. The agent and containerd start it; nobody calls it
// by hand.
//
//	gitops-keeper log STREAMS,SIZE,FILES,DIR   write a container's log; started by containerd's shim
//	gitops-keeper init [-stdin] -- COMMAND     be a container's init process: pass signals on, reap orphans
//	gitops-keeper exec [-stdin] -- COMMAND     open a standard input that never ends, then become the command
//	gitops-keeper names FILE                   answer the names that tasks on this node ask for
//
// One `log` runs for each container, so it must be small: see package sidecar.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/gitopsd/gitopsd/cluster/network/names"
	"github.com/gitopsd/gitopsd/cmd/gitops-keeper/sidecar"
)

const usage = "usage: gitops-keeper log STREAMS,SIZE,FILES,DIR | init [-stdin] -- COMMAND… | exec [-stdin] -- COMMAND… | names FILE"

func main() {
	sidecar.Dispatch()
	if len(os.Args) != 3 || os.Args[1] != "names" {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := names.Serve(ctx, names.Config{Path: os.Args[2], Log: logger})
	stop()
	if err != nil {
		logger.Error("names are not served any more", "error", err)
		os.Exit(1)
	}
}
