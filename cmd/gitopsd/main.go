// Command gitopsd is the agent of one machine: it follows Git, decides, and runs containers.
//
// The flow: main reads flags and the environment; run.go joins the adapters (Git and Compose, containerd, the network) with package cluster and runs it until
// a signal comes; teardown.go removes every trace of it. Containers, names and published ports go on when the agent ends.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(version).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "gitopsd: "+err.Error())
		os.Exit(1)
	}
}
