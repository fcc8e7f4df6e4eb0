// Command gitopsctl is the terminal's side of gitopsd: it shows what is true of stacks, plans and checks revisions, and passes a person's
// word on.
//
// How one command runs: main hands the arguments and an [environment] to run; cobra fills the options struct of the command; its run
// function asks the daemon through api.Client (or renders a directory by itself) and gives the answer to a printer. Results go to stdout,
// progress and errors to stderr. Without a terminal there are no colours, no prompts, and times are written in full.
//
// Each command lives in a file of its name; output.go and table.go hold what they share of printing, render.go what they share of reading a
// directory.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cmd/internal/usage"
)

// The exit codes that all commands share. What else a command returns is in its help.
const (
	exitOK          = 0
	exitDifferent   = 1
	exitError       = 2
	exitInterrupted = 130 // by Ctrl-C; 143 by SIGTERM
)

// How long a command waits when --timeout says nothing.
const (
	readLimit  = 30 * time.Second // for facts
	writeLimit = 5 * time.Minute  // for operations and plans, which may fetch
	waitLimit  = 10 * time.Minute // for sync --wait
)

// environment is the world around a command.
type environment struct {
	in                    io.Reader
	out, err              io.Writer
	inTTY, outTTY, errTTY bool
	getenv                func(string) string
	now                   func() time.Time
}

// system is the environment of a real run.
func system() environment {
	return environment{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		inTTY: term.IsTerminal(int(os.Stdin.Fd())), outTTY: term.IsTerminal(int(os.Stdout.Fd())), errTTY: term.IsTerminal(int(os.Stderr.Fd())),
		getenv: os.Getenv, now: time.Now,
	}
}

// cli is what all commands share: the environment and the global options.
type cli struct {
	environment
	socket  string
	output  string
	noColor bool
	timeout time.Duration
	client  *api.Client
}

// exitCode ends a command with a code. What there is to say was said, unless err is set.
type exitCode struct {
	code int
	err  error
}

func (e exitCode) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e exitCode) Unwrap() error { return e.err }

// exit ends a command with a code, quietly. Code 0 is success.
func exit(code int) error {
	if code == exitOK {
		return nil
	}
	return exitCode{code: code}
}

// run is the program: it returns the exit code.
func run(ctx context.Context, args []string, env environment) int {
	c := &cli{environment: env}
	out := bufio.NewWriter(env.out)
	c.out = flusher{out}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(env.in)
	root.SetOut(out)
	root.SetErr(env.err)
	err := root.ExecuteContext(ctx)
	if c.client != nil {
		c.client.Close()
	}
	if e := out.Flush(); err == nil && e != nil {
		err = fmt.Errorf("write the output: %w", e)
	}
	return c.code(ctx, err)
}

// flusher is a buffered stdout that feeds can flush.
type flusher struct{ *bufio.Writer }

// flush shows what was printed so far.
func (c *cli) flush() error {
	if f, ok := c.out.(flusher); ok {
		return f.Flush()
	}
	return nil
}

// code tells of an error and chooses the exit code.
func (c *cli) code(ctx context.Context, err error) int {
	var quiet exitCode
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &quiet):
		if quiet.err != nil {
			c.complain(quiet.err)
		}
		return quiet.code
	case ctx.Err() != nil: // whoever sent the signal knows
		var s signaled
		if errors.As(context.Cause(ctx), &s) {
			return s.code()
		}
		return exitInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		c.complain(errors.New("the daemon did not answer in time; --timeout sets how long to wait"))
		return exitError
	}
	c.complain(err)
	return exitError
}

func (c *cli) complain(err error) {
	fmt.Fprintf(c.err, "gitopsctl: %s\n", cleanText(err.Error()))
	var refused *api.Error
	if errors.As(err, &refused) && refused.Reason != "" && refused.Kind == api.Denied {
		fmt.Fprintf(c.err, "gitopsctl: more about it: gitopsctl explain %s\n", cleanLine(refused.Reason))
	}
}

// note tells of progress.
func (c *cli) note(format string, args ...any) {
	fmt.Fprintln(c.err, cleanText(fmt.Sprintf(format, args...)))
}

const (
	groupLook    = "look"
	groupCheck   = "check"
	groupOperate = "operate"
	groupTask    = "task"
)

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "gitopsctl",
		Short: "See and steer what gitopsd runs from Git",
		Long: `gitopsctl shows what gitopsd runs, plans and checks revisions before they run, and passes your word on: approve, suspend, roll back.
What runs is changed in Git.

Exit codes: 0 done, 2 error, 130 or 143 ended by Ctrl-C or SIGTERM; commands that answer a question have more, see their help.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return c.prepare() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	socket := c.getenv("GITOPSCTL_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringVarP(&c.output, "output", "o", "", "how to print: wide, json, yaml or name (plan: markdown, too)")
	f.StringVar(&c.socket, "socket", socket, "the daemon's `path`; GITOPSCTL_SOCKET sets it, too")
	f.DurationVar(&c.timeout, "timeout", 0, "give up after this `time` (default: 30s for facts, 5m for operations and plans, 10m for sync --wait)")
	f.BoolVar(&c.noColor, "no-color", false, "no colours; NO_COLOR does the same")
	root.AddGroup(&cobra.Group{ID: groupLook, Title: "See:"}, &cobra.Group{ID: groupCheck, Title: "Check before it runs:"},
		&cobra.Group{ID: groupOperate, Title: "Steer:"}, &cobra.Group{ID: groupTask, Title: "Look into tasks:"})
	for _, g := range []struct {
		id   string
		cmds []*cobra.Command
	}{
		{groupLook, []*cobra.Command{c.statusCmd(), c.diffCmd(), c.historyCmd(), c.getCmd(), c.psCmd(), c.eventsCmd(), c.explainCmd()}},
		{groupCheck, []*cobra.Command{c.planCmd(), c.validateCmd(), c.policyCmd()}},
		{groupOperate, []*cobra.Command{c.syncCmd(), c.approveCmd(), c.suspendCmd(), c.resumeCmd(), c.rollbackCmd(), c.unpinCmd(),
			c.restartCmd(), c.sourceCmd(), c.secretCmd(), c.volumeCmd()}},
		{groupTask, []*cobra.Command{c.logsCmd(), c.execCmd(), c.inspectCmd()}},
		{"", []*cobra.Command{c.versionCmd(), c.completionCmd()}},
	} {
		for _, cmd := range g.cmds {
			cmd.GroupID = g.id
			root.AddCommand(cmd)
		}
	}
	foldHelp(root)
	usage.Tell(root)
	return root
}

// helpWidth is how wide help is, in letters.
const helpWidth = 96

// foldHelp breaks the lines of all long helps. Indented lines, empty ones, and those that begin with exit codes or an option stand by themselves.
func foldHelp(cmd *cobra.Command) {
	var lines []string
	for _, l := range strings.Split(cmd.Long, "\n") {
		n := len(lines) - 1
		apart := l == "" || strings.HasPrefix(l, " ") || strings.HasPrefix(l, "Exit codes") || strings.HasPrefix(l, "-")
		if n < 0 || apart || lines[n] == "" || strings.HasPrefix(lines[n], " ") {
			lines = append(lines, l)
		} else {
			lines[n] += " " + l
		}
	}
	for i, l := range lines {
		if !strings.HasPrefix(l, " ") {
			lines[i] = wrap(l, helpWidth)
		}
	}
	cmd.Long = strings.Join(lines, "\n")
	for _, sub := range cmd.Commands() {
		foldHelp(sub)
	}
}

// parent makes a command that only holds others.
func parent(use, short, long string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Long: long}
	cmd.AddCommand(children...)
	return cmd
}

var outputs = []string{"", "wide", "json", "yaml", "name", "markdown"}

// prepare checks the global options.
func (c *cli) prepare() error {
	if !slices.Contains(outputs, c.output) {
		return fmt.Errorf("-o %s: write wide, json, yaml or name", c.output)
	}
	if c.timeout < 0 {
		return fmt.Errorf("--timeout %s: a time is above 0", c.timeout)
	}
	if c.getenv("NO_COLOR") != "" || c.getenv("TERM") == "dumb" {
		c.noColor = true
	}
	return nil
}

// daemon is the client of the daemon.
func (c *cli) daemon() *api.Client {
	if c.client == nil {
		c.client = api.NewClient(c.socket)
	}
	return c.client
}

// limit bounds a command by --timeout, or by usual where that is not set. A usual of 0 is no bound.
func (c *cli) limit(ctx context.Context, usual time.Duration) (context.Context, context.CancelFunc) {
	d := c.timeout
	if d == 0 {
		d = usual
	}
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// daemonPause is how long a command waits before it looks for a daemon again that ended.
const daemonPause = 250 * time.Millisecond

// patient does something that can be done again, from where it was, each time that the daemon ends meanwhile: that it is restarted is nothing special. It goes on until
// ctx ends.
func (c *cli) patient(ctx context.Context, do func() error) error {
	told := false
	for {
		err := do()
		if !errors.Is(err, api.ErrGone) && !(told && api.KindOf(err) == api.NoQuorum) { // it leads a moment after it is back
			return err
		}
		if !told {
			c.note("%v; waiting for it to come back", api.ErrGone)
			told = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(daemonPause):
		}
	}
}

// operate does one write and tells what became of it.
func (c *cli) operate(ctx context.Context, op api.Operation) error {
	ctx, cancel := c.limit(ctx, writeLimit)
	defer cancel()
	op.ID, op.Actor = api.NewRequestID(), c.actor()
	res, err := c.daemon().Operate(ctx, op)
	if err != nil {
		if api.KindOf(err) == api.NoQuorum || ctx.Err() != nil {
			c.note("request %s: it may still be done; look at `gitopsctl events`", op.ID)
		}
		return err
	}
	return c.printResult(res)
}

func (c *cli) printResult(res api.Result) error {
	if c.structured() {
		return c.printData(res)
	}
	fmt.Fprintln(c.out, cleanLine(res.Message))
	return nil
}

// actor names the person for the history: behind sudo, the one who called it.
func (c *cli) actor() string {
	if who := c.getenv("SUDO_USER"); who != "" {
		return who
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}

// ask puts a question to the person at the terminal. Without one the answer is no, and flag says what to write instead.
func (c *cli) ask(ctx context.Context, question, flag string) error {
	if !c.inTTY || !c.errTTY {
		return fmt.Errorf("%s; there is no terminal to ask at: say %s if you mean it", question, flag)
	}
	fmt.Fprintf(c.err, "%s. Go on? [y/N] ", cleanLine(question))
	line, err := interruptible(ctx, func() (string, error) {
		l, err := bufio.NewReader(c.in).ReadString('\n')
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return l, err
	})
	if err != nil {
		return err
	}
	if a := strings.ToLower(strings.TrimSpace(line)); a != "y" && a != "yes" {
		return errors.New("nothing was changed")
	}
	return nil
}

// interruptible gives up a read of the standard input when ctx ends. The read itself can't be ended: it lasts until the program does.
func interruptible[T any](ctx context.Context, read func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := read()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
