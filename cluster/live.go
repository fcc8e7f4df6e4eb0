package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/blob"
	"github.com/gitopsd/gitopsd/cluster/tasklog"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Drift compares what runs of a stack with what its applied revision asks for. See [api.Live].
func (n *Node) Drift(ctx context.Context, stack string) ([]api.TaskDrift, error) {
	v := n.View()
	if _, ok := v.Stacks.Get(stack); !ok && stack != "" {
		return nil, api.NotFoundf("stack", stack, keys(v.Stacks))
	}
	drifts, err := n.worker.Drift(ctx)
	if err != nil {
		return nil, err
	}
	var out []api.TaskDrift
	for _, id := range slices.Sorted(maps.Keys(drifts)) {
		t, known := v.Tasks.Get(id)
		if stack != "" && t.Value.Stack != stack {
			continue
		}
		d := api.TaskDrift{Task: id, Node: n.cfg.ID, Drift: drifts[id], Healed: true}
		if known {
			d.Stack, d.Service = t.Value.Stack, t.Value.Service
			if st, ok := v.Stacks.Get(d.Stack); ok && st.Value.Applied != nil {
				rel, _ := v.Releases.Get(st.Value.Applied.Release)
				d.Healed = rel.Value.Stack.Drift != manifest.DriftReport
			}
		}
		out = append(out, d)
	}
	return out, nil
}

// Logs reads the logs of tasks, in order of time where they do not follow. With Previous, it is of each slot what was there before what runs now: the attempt
// before the last one of its task, or else the task before it. See [api.Live].
func (n *Node) Logs(ctx context.Context, q api.LogQuery, line func(api.LogLine) error) error {
	v := n.View()
	dirs := n.logDirs(v, q)
	if len(dirs) == 0 {
		if q.Task != "" {
			return api.NotFoundf("task", q.Task, keys(v.Tasks))
		}
		if _, ok := v.Stacks.Get(q.Stack); !ok {
			return api.NotFoundf("stack", q.Stack, keys(v.Stacks))
		}
		return api.NotFoundf("log of", q.Stack+"/"+q.Service, nil)
	}
	read := tasklog.Query{Since: q.Since, Tail: q.Tail, Follow: q.Follow && !q.Previous}
	if read.Follow {
		return follow(ctx, dirs, read, line)
	}
	var all []api.LogLine
	for _, d := range dirs {
		read.Attempts = d.attempts
		err := tasklog.Read(ctx, d.path, read, func(e tasklog.Entry) error {
			all = append(all, logLine(d.task, e))
			return nil
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read the log of %s: %w", d.task, err)
		}
	}
	slices.SortStableFunc(all, func(a, b api.LogLine) int { return a.Time.Compare(b.Time) })
	for _, l := range all {
		if err := line(l); err != nil {
			return err
		}
	}
	return nil
}

// logDirs finds the logs that a query is about.
func (n *Node) logDirs(v *state.View, q api.LogQuery) []logDir {
	if q.Task != "" {
		attempts := tasklog.AllAttempts
		if q.Previous {
			attempts = tasklog.Previous
		}
		return n.taskLogs(q.Task, attempts)
	}
	prefix := q.Stack + "/"
	if q.Service != "" {
		prefix = state.TaskPrefix(q.Stack, q.Service)
	}
	var dirs []logDir
	gone := n.worker.Logged(q.Stack)
	for id, t := range v.Tasks.Below(prefix) {
		if t.Value.Node != n.cfg.ID || q.Previous && t.Value.Desired == state.DesiredStop {
			continue
		}
		if !q.Previous {
			dirs = append(dirs, n.taskLogs(id, tasklog.AllAttempts)...)
			continue
		}
		if r, _ := v.Reports.Get(id); r.Value.Attempt > 1 {
			dirs = append(dirs, n.taskLogs(id, tasklog.Previous)...)
		} else if before := earlier(gone, t.Value); before != "" {
			dirs = append(dirs, n.taskLogs(before, tasklog.Last)...)
		}
	}
	return dirs
}

// earlier is the newest task of the same slot that was there before.
func earlier(logged []string, t state.Task) string {
	last := 0
	for _, id := range logged {
		number, ok := strings.CutPrefix(id, fmt.Sprintf("%s/%s.%d.", t.Stack, t.Service, t.Slot))
		if gen, err := strconv.Atoi(number); ok && err == nil && gen < t.Gen {
			last = max(last, gen)
		}
	}
	if last == 0 {
		return ""
	}
	return state.TaskID(t.Stack, t.Service, t.Slot, last)
}

func (n *Node) taskLogs(task string, attempts tasklog.Attempts) []logDir {
	if !filepath.IsLocal(task) { // the name comes from outside
		return nil
	}
	base := n.worker.LogDir(task, "")
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	var dirs []logDir
	for _, e := range entries {
		dirs = append(dirs, logDir{task: task, path: filepath.Join(base, e.Name()), attempts: attempts})
	}
	return dirs
}

type logDir struct {
	task, path string
	attempts   tasklog.Attempts
}

func logLine(task string, e tasklog.Entry) api.LogLine {
	return api.LogLine{Task: task, Time: e.Time, Stream: string(e.Stream), Attempt: e.Attempt, Partial: e.Partial, Text: slices.Clone(e.Text)}
}

// follow reads several logs at once, line by line as they come.
func follow(ctx context.Context, dirs []logDir, q tasklog.Query, line func(api.LogLine) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, d := range dirs {
		wg.Go(func() {
			err := tasklog.Read(ctx, d.path, q, func(e tasklog.Entry) error {
				mu.Lock()
				defer mu.Unlock()
				return line(logLine(d.task, e))
			})
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// Exec runs a command in a task's container. See [api.Live].
func (n *Node) Exec(ctx context.Context, req api.ExecRequest, streams api.ExecStreams) (int, error) {
	c, err := n.container(ctx, req.Task, req.Container)
	if err != nil {
		return 0, err
	}
	if c.Phase != worker.Running {
		return 0, api.Conflictf("task %s does not run now (%s)", req.Task, c.Phase)
	}
	sctx, stop := context.WithCancel(ctx)
	defer stop()
	out := make(chan [2]uint16, 1)
	if req.Size.Columns > 0 {
		out <- [2]uint16{req.Size.Columns, req.Size.Rows}
	}
	go func() {
		for {
			select {
			case <-sctx.Done():
				return
			case s, ok := <-streams.Resize:
				if !ok {
					return
				}
				select {
				case out <- [2]uint16{s.Columns, s.Rows}:
				case <-sctx.Done():
					return
				}
			}
		}
	}()
	code, err := n.worker.Exec(ctx, c.ID, worker.ExecRequest{
		Command: req.Command, Env: req.Env, User: req.User, WorkingDir: req.WorkingDir, TTY: req.TTY,
		Stdin: streams.Stdin, Stdout: streams.Stdout, Stderr: streams.Stderr, Resize: out,
	})
	if errors.Is(err, worker.ErrPermanent) {
		return code, api.Invalidf("%v", err)
	}
	return code, err
}

func (n *Node) container(ctx context.Context, task, name string) (worker.Container, error) {
	v := n.View()
	if _, ok := v.Tasks.Get(task); !ok {
		return worker.Container{}, api.NotFoundf("task", task, keys(v.Tasks))
	}
	c, err := n.worker.Container(ctx, task, name)
	if errors.Is(err, worker.ErrNotFound) {
		return c, api.Conflictf("%v", err)
	}
	return c, err
}

// Inspect is the runtime's record of a task's container, with what the log says of the task. See [api.Live].
func (n *Node) Inspect(ctx context.Context, task string) (json.RawMessage, error) {
	c, err := n.container(ctx, task, "")
	if err != nil {
		return nil, err
	}
	v := n.View()
	t, _ := v.Tasks.Get(task)
	r, _ := v.Reports.Get(task)
	spec, _ := v.Specs.Get(t.Value.Spec)
	return json.Marshal(struct {
		Task      state.Task       `json:"task"`
		Report    state.Report     `json:"report"`
		Spec      manifest.Service `json:"spec"`
		Container worker.Container `json:"container"`
		Logs      string           `json:"logs"`
	}{t.Value, r.Value, spec.Value.Service, c, filepath.Dir(n.worker.LogDir(task, "x"))})
}

// workerLog is the worker's side of the store.
type workerLog struct{ *Node }

// Settled says whether the replica caught up: a leader's has all that earlier terms committed.
func (w workerLog) Settled() bool {
	if !w.settled.Load() {
		_, leads := w.cfg.Store.Leading()
		w.settled.Store(leads)
	}
	return w.settled.Load()
}

// eventsOfNodes keeps the keys of nodes' events apart from those of the leader's plans.
const eventsOfNodes = 5000

// Report proposes what this node observed.
func (w workerLog) Report(ctx context.Context, items []state.Item, events []state.Event) error {
	now := w.now()
	for i, e := range events {
		e.Time = now.Wall.UTC()
		items = append(items, state.Item{state.Set(state.EventKey(now.Log, eventsOfNodes+i), e)})
	}
	_, err := w.propose(ctx, state.Command{Actor: "node/" + w.cfg.ID, Items: items})
	return err
}

// Content is the node's repository files as its worker mounts them.
type Content struct{ Blobs *blob.Store }

// Materialise lays a file or a directory out, and returns its path.
func (c Content) Materialise(_ context.Context, digest string, dir, exec bool) (string, error) {
	if dir {
		return c.Blobs.Materialise(digest)
	}
	return c.Blobs.MaterialiseFile(digest, exec)
}
