package containerd

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

func randomID() string { return strings.ToLower(rand.Text()) }

// resourcesAny packs limits the way containerd's task service reads them.
func resourcesAny(encoded []byte) *anypb.Any {
	url, err := typeurl.TypeURL(&specs.LinuxResources{})
	if err != nil {
		panic(err) // the client registers the type
	}
	return &anypb.Any{TypeUrl: url, Value: encoded}
}

// Exec implements [worker.Inspector]. It returns when the command has ended and its output is written, and kills it when ctx ends or
// the timeout is over. A Stdin that blocks is read until it returns, even after that.
func (r *Runtime) Exec(ctx context.Context, id string, req worker.ExecRequest) (int, error) {
	ctx = r.in(ctx)
	if len(req.Command) == 0 {
		return 0, permanent("run a command in %s: the command is empty", id)
	}
	ctr, err := r.client.LoadContainer(ctx, id)
	if err != nil {
		return 0, wrap(err, "run %s in container %s", req.Command[0], id)
	}
	task, err := ctr.Task(ctx, nil)
	if err != nil {
		return 0, wrap(err, "run %s in container %s: it does not run", req.Command[0], id)
	}
	process, err := r.execProcess(ctx, ctr, task, req)
	if err != nil {
		return 0, fmt.Errorf("run %s in container %s: %w", req.Command[0], id, err)
	}
	x := &execution{req: req, tried: fmt.Sprintf("run %s in container %s", req.Command[0], id)}
	return x.run(ctx, task, process, filepath.Join(r.o.StateDir, "fifo"))
}

// execProcess takes the container's own process and changes what the request says.
func (r *Runtime) execProcess(ctx context.Context, ctr client.Container, task client.Task, req worker.ExecRequest) (*specs.Process, error) {
	rec, err := ctr.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(rec.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("read its spec: %w", err)
	}
	p := spec.Process
	p.Args, p.Terminal = req.Command, req.TTY
	p.Env = append(p.Env, req.Env...)
	if req.TTY {
		p.Env = append(p.Env, "TERM=xterm")
	}
	if req.WorkingDir != "" {
		p.Cwd = req.WorkingDir
	}
	if req.User != "" {
		users, err := runningUsers(int(task.Pid()))
		if err != nil {
			return nil, fmt.Errorf("read its users: %w", err)
		}
		if p.User, err = users.lookup(req.User, nil); err != nil {
			return nil, err
		}
		p.Capabilities.Effective, p.Capabilities.Permitted = nil, nil
		if p.User.UID == 0 {
			p.Capabilities.Effective, p.Capabilities.Permitted = p.Capabilities.Bounding, p.Capabilities.Bounding
		}
	}
	return p, nil
}

// execution is one command that runs in a container.
type execution struct {
	req   worker.ExecRequest
	tried string
}

func (x *execution) run(ctx context.Context, task client.Task, spec *specs.Process, fifos string) (code int, err error) {
	if x.req.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, x.req.Timeout)
		defer cancel()
	}
	if ctx.Err() != nil {
		return 0, x.failed(ctx, ctx.Err())
	}
	// Cleaning up must not end with the command's time.
	after, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stdin := &endingReader{r: x.req.Stdin, end: make(chan struct{})}
	// Nor is a start given up halfway: the shim would go on with it, and nobody would end what it started.
	whole, done := cleanup(ctx)
	defer done()
	p, err := task.Exec(whole, "x"+randomID(), spec, x.streams(stdin, fifos))
	if err != nil {
		return 0, x.failed(ctx, err)
	}
	defer func() {
		limited, stop := context.WithTimeout(after, cleanupTime)
		defer stop()
		if _, undo := p.Delete(limited); undo != nil && !errdefs.IsNotFound(undo) && err == nil {
			err = wrap(undo, "%s: clean up", x.tried)
		}
	}()
	waiting, err := p.Wait(after)
	if err != nil {
		return 0, wrap(err, "%s", x.tried)
	}
	if err := p.Start(whole); err != nil {
		return 0, x.failed(ctx, err)
	}
	var resizing sync.WaitGroup
	stop := make(chan struct{})
	defer resizing.Wait()
	defer close(stop)
	resizing.Go(func() { x.attend(after, p, stdin.end, stop) })
	select {
	case status := <-waiting:
		drain(ctx, p)
		return x.exit(status)
	case <-ctx.Done():
	}
	if err := p.Kill(after, syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return 0, wrap(err, "%s: kill it", x.tried)
	}
	gone := time.NewTimer(cleanupTime)
	defer gone.Stop()
	select {
	case <-waiting:
		return 0, fmt.Errorf("%s: %w", x.tried, ctx.Err())
	case <-gone.C:
		return 0, fmt.Errorf("%s: it was killed and did not end: %w", x.tried, ctx.Err())
	}
}

// drainTime bounds the wait for output after a command's end. Only a child of the command that lives on and keeps its output open needs it.
const drainTime = 5 * time.Second

// drain waits until the output of a command that has ended is read: cleaning up closes it, read or not.
func drain(ctx context.Context, p client.Process) {
	done := make(chan struct{})
	go func() {
		p.IO().Wait() // ends when the process is deleted, at the latest
		close(done)
	}()
	limit := time.NewTimer(drainTime)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
	case <-ctx.Done():
	}
}

func (x *execution) exit(status client.ExitStatus) (int, error) {
	if err := status.Error(); err != nil {
		return 0, wrap(err, "%s", x.tried)
	}
	return int(status.ExitCode()), nil
}

func (x *execution) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", x.tried, ctx.Err())
	}
	if why := startError(err, x.req.Command[0]); why != nil {
		return fmt.Errorf("%s: %w", x.tried, why)
	}
	if errdefs.IsFailedPrecondition(native(err)) || strings.Contains(err.Error(), "cannot exec in a ") {
		return withKind(worker.ErrNotFound, "%s: the container does not run", x.tried)
	}
	return wrap(err, "%s", x.tried)
}

func (x *execution) streams(stdin io.Reader, fifos string) cio.Creator {
	out, errs := x.req.Stdout, x.req.Stderr
	if out == nil {
		out = io.Discard
	}
	if errs == nil {
		errs = io.Discard
	}
	if same(out, errs) {
		both := &oneAtATime{w: out}
		out, errs = both, both
	}
	if x.req.Stdin == nil {
		stdin = nil
	}
	opts := []cio.Opt{cio.WithStreams(stdin, out, errs), cio.WithFIFODir(fifos)}
	if x.req.TTY {
		opts = append(opts, cio.WithTerminal)
	}
	return cio.NewCreator(opts...)
}

// same says whether both streams go to one writer. Writers of types that cannot be compared are two.
func same(a, b io.Writer) bool {
	defer func() { _ = recover() }()
	return a == b
}

// oneAtATime lets two streams share a writer, line by line as they come, as os/exec does.
type oneAtATime struct {
	mu sync.Mutex
	w  io.Writer
}

func (o *oneAtATime) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.w.Write(b)
}

// attend passes on the terminal's size and the end of standard input until stop closes.
func (x *execution) attend(ctx context.Context, p client.Process, stdinEnd <-chan struct{}, stop <-chan struct{}) {
	resize := x.req.Resize
	for {
		select {
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			_ = p.Resize(ctx, uint32(size[0]), uint32(size[1])) // a size is no reason to end a session
		case <-stdinEnd:
			_ = p.CloseIO(ctx, client.WithStdinCloser) // the command may have ended by now
			stdinEnd = nil
		case <-stop:
			return
		}
	}
}

// endingReader tells when its reader is at the end.
type endingReader struct {
	r    io.Reader
	end  chan struct{}
	once sync.Once
}

func (e *endingReader) Read(b []byte) (int, error) {
	n, err := e.r.Read(b)
	if err != nil {
		e.once.Do(func() { close(e.end) })
		if !errors.Is(err, io.EOF) {
			err = io.EOF // the caller's stream broke: that is the end of the input, not of the command
		}
	}
	return n, err
}
