// Package sidecar is what the keeper does for a single container: it writes its log, and inside of it is its init process.
//
// There is one such process for each container, so it must be small, and the keeper's other work links large packages. Go initialises
// packages in the order of their import paths as far as their imports allow it, so a package whose path sorts early and that imports little
// comes before the large ones. This one does its work in its init function and ends the process there: what a container's keeper
// never uses is never set up. A test measures that this holds.
package sidecar

import (
	"os"
)

// Exit codes of a command that could not be started, as shells have them.
const (
	exitUsage         = 2
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // and the signal's number
)

func init() {
	if len(os.Args) < 3 {
		return
	}
	switch os.Args[1] {
	case "log":
		os.Exit(writeLog(os.Args[2]))
	case "init":
		os.Exit(beInit(os.Args[2:]))
	case "exec":
		os.Exit(become(os.Args[2:]))
	}
}

// Dispatch ends the process for the subcommands of this package, and returns for others. The work is done by then, when the package was
// initialised; calling it keeps the import.
func Dispatch() {}

// say writes a line to the standard error, which in a container is its log.
func say(text string) { os.Stderr.WriteString("gitops-keeper: " + text + "\n") }
