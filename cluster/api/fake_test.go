package api

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// fake is a Backend upon a real State, with functions for what runs. What a test does not set fails.
type fake struct {
	mu      sync.Mutex
	state   *state.State
	index   uint64
	changed chan struct{}

	operate func(Operation) (Result, error)
	waiting func(context.Context) error // what Operate does first; may be nil
	plan    func(*manifest.Bundle) (Preview, error)
	drift   func(string) ([]TaskDrift, error)
	logs    func(context.Context, LogQuery, func(LogLine) error) error
	exec    func(context.Context, ExecRequest, ExecStreams) (int, error)
	inspect func(string) (json.RawMessage, error)
}

var errUnset = errors.New("the test does not set this")

func newFake() *fake { return &fake{state: state.New(), changed: make(chan struct{})} }

func (f *fake) apply(t testing.TB, changes ...state.Change) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := state.Encode(state.Command{At: time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC), Items: []state.Item{changes}})
	if err != nil {
		t.Fatal(err)
	}
	f.index++
	if _, err := f.state.Apply(f.index, 1, b); err != nil {
		t.Fatal(err)
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) View() *state.View {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state.View()
}

func (f *fake) Changed(after uint64) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.index > after {
		c := make(chan struct{})
		close(c)
		return c
	}
	return f.changed
}

func (f *fake) Operate(ctx context.Context, op Operation) (Result, error) {
	if f.waiting != nil {
		if err := f.waiting(ctx); err != nil {
			return Result{}, err
		}
	}
	if f.operate == nil {
		return Result{}, errUnset
	}
	return f.operate(op)
}

func (f *fake) Drift(_ context.Context, stack string) ([]TaskDrift, error) {
	if f.drift == nil {
		return nil, errUnset
	}
	return f.drift(stack)
}

func (f *fake) Logs(ctx context.Context, q LogQuery, line func(LogLine) error) error {
	if f.logs == nil {
		return errUnset
	}
	return f.logs(ctx, q, line)
}

func (f *fake) Exec(ctx context.Context, r ExecRequest, s ExecStreams) (int, error) {
	if f.exec == nil {
		return 0, errUnset
	}
	return f.exec(ctx, r, s)
}

func (f *fake) Inspect(_ context.Context, task string) (json.RawMessage, error) {
	if f.inspect == nil {
		return nil, errUnset
	}
	return f.inspect(task)
}

func (f *fake) PlanBundle(_ context.Context, b *manifest.Bundle) (Preview, error) {
	if f.plan == nil {
		return Preview{}, errUnset
	}
	return f.plan(b)
}

func (f *fake) PlanRevision(context.Context, string, string) (Preview, error) {
	return Preview{}, errUnset
}

func (f *fake) TestSource(context.Context, SourceSpec) (SourceReport, error) {
	return SourceReport{}, errUnset
}

// shop puts a source with a stack, a service and a task into the facts.
func (f *fake) shop(t testing.TB) {
	t.Helper()
	rev := manifest.Revision{Ref: "main", Commit: "aaaa111122223333444455556666777788889999"}
	spec := manifest.Service{Name: "web", Replicas: 1, Containers: []manifest.Container{{Name: "web", Image: "nginx:1", Env: map[string]string{"DB_PASSWORD": canary}}}}
	f.apply(t,
		state.Set("home", state.Source{Name: "home", URL: "https://git.example.org/home", Auth: "source/home", Seen: rev, Accepted: rev}),
		state.Set("shop", state.Stack{Name: "shop", Source: "home", Wanted: state.Wanted{Revision: rev, Release: "r1", Decision: state.DecisionAccepted},
			Applied: &state.Applied{Revision: rev, Release: "r1"}, Outcome: state.Outcome{Revision: rev, Release: "r1", Kind: state.Deployed}}),
		state.Set("r1", state.Release{Stack: manifest.Stack{Name: "shop"}, Services: map[string]string{"web": "s1"}}),
		state.Set("s1", state.Spec{Service: spec}),
		state.Set("shop/web", state.Service{Target: "s1", Revision: rev}),
		state.Set("shop/web.1.1", state.Task{ID: "shop/web.1.1", Stack: "shop", Service: "web", Slot: 1, Gen: 1, Node: "n1", Spec: "s1", Desired: state.DesiredRun}),
		state.Set("shop/web.1.1", state.Report{Node: "n1", Phase: state.PhaseRunning, Health: state.HealthHealthy}),
		state.Set("pw", state.Secret{Name: "pw", Ref: "keyed", Sealed: []byte(canary), Keys: map[string][]byte{"n1": []byte(canary)}}),
	)
}

// canary is a secret value that no answer may hold.
const canary = "s3cr3t-canary"

// serve starts a server on f and gives a client of it. Both end with the test.
func serve(t *testing.T, f *fake) *Client {
	t.Helper()
	socket := filepath.Join(shortDir(t), "s")
	stop := start(t, f, socket)
	c := NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		stop()
	})
	return c
}

// start runs a server until the function that it returns is called.
func start(t *testing.T, f *fake, socket string) (stop func()) {
	t.Helper()
	return run(t, NewServer(Config{Socket: socket, Version: "v1", Node: "n1", Backend: f, Live: f, Planner: f}))
}

func run(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	c := NewClient(s.cfg.Socket)
	defer c.Close()
	for {
		if _, err := c.Version(ctx); err == nil {
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("the server ended: %v", err)
		case <-time.After(2 * time.Millisecond):
		}
	}
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	}
}

// shortDir is a directory whose path fits into a socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
