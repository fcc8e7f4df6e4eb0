package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gitopsd/gitopsd/cluster/api"
)

// exitExec says that a command could not be run, as apart from one that failed.
const exitExec = 125

type execOptions struct {
	task  string
	stdin bool
	req   api.ExecRequest
}

func (c *cli) execCmd() *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:   "exec TASK -- COMMAND [ARGUMENT…]",
		Short: "Run a command in a task",
		Long: `Run a command in a task's container, with -it at the terminal. ` + taskHelp + `

Exit codes: that of the command; 125 if it could not be run.`,
		Example:           "  gitopsctl exec -it shop/web -- sh",
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: c.complete(oneOf(taskNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.task, o.req.Command = args[0], args[1:]
			if o.req.Command[0] == "--" { // flags end at TASK, so what only separates is left to us
				o.req.Command = o.req.Command[1:]
			}
			if len(o.req.Command) == 0 {
				return exitCode{exitExec, errors.New("exec needs a command")}
			}
			code, err := c.exec(cmd.Context(), o)
			if err != nil && cmd.Context().Err() == nil {
				return exitCode{exitExec, err}
			}
			return errors.Join(err, exit(code))
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&o.stdin, "interactive", "i", false, "pass the standard input on")
	f.BoolVarP(&o.req.TTY, "tty", "t", false, "give the command a terminal")
	f.StringVarP(&o.req.User, "user", "u", "", "run as this `user` or uid; default: the container's")
	f.StringVar(&o.req.WorkingDir, "workdir", "", "run in this `directory`")
	f.StringArrayVarP(&o.req.Env, "env", "e", nil, "set a variable, as `KEY=VALUE`; may be given again")
	f.StringVar(&o.req.Container, "container", "", "the `name` of a container, in a task of several")
	return cmd
}

func (c *cli) exec(ctx context.Context, o execOptions) (int, error) {
	if o.req.TTY && !c.inTTY {
		return 0, errors.New("the input is no terminal: leave -t out")
	}
	limited, cancel := c.limit(ctx, readLimit)
	task, err := c.findTask(limited, o.task)
	cancel()
	if err != nil {
		return 0, err
	}
	o.req.Task = task.ID
	ctx, cancel = c.limit(ctx, 0)
	defer cancel()
	streams := api.ClientStreams{Stdout: direct{c}, Stderr: c.err}
	if o.stdin {
		streams.Stdin = c.in
	}
	if o.req.TTY {
		restore, resize, err := c.rawTerminal(ctx, &o.req)
		if err != nil {
			return 0, err
		}
		defer restore()
		streams.Resize = resize
	}
	return c.daemon().Exec(ctx, o.req, streams)
}

// direct shows each piece of output at once.
type direct struct{ c *cli }

func (d direct) Write(p []byte) (int, error) {
	n, err := d.c.out.Write(p)
	return n, errors.Join(err, d.c.flush())
}

// rawTerminal hands the terminal over to the command: keys go there unread, and it learns the terminal's size. restore takes it back.
func (c *cli) rawTerminal(ctx context.Context, req *api.ExecRequest) (restore func(), sizes <-chan api.Size, err error) {
	file, ok := c.in.(*os.File)
	if !ok {
		return nil, nil, errors.New("the input is no terminal: leave -t out")
	}
	fd := int(file.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, nil, err
	}
	size := func() (api.Size, bool) {
		w, h, err := term.GetSize(fd)
		return api.Size{Columns: uint16(w), Rows: uint16(h)}, err == nil
	}
	req.Size, _ = size()
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	resize := make(chan api.Size)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(resize)
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			if s, ok := size(); ok {
				select {
				case resize <- s:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return func() {
		signal.Stop(changed)
		cancel()
		<-done
		_ = term.Restore(fd, before)
	}, resize, nil
}

var _ io.Writer = direct{}
