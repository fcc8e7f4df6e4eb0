// Package worker performs on this node what was decided: it turns assignments of the log into running containers, and what runs into reports.
//
// The flow: [Worker.Run] is one loop that owns all of the node's state. It wakes when the log moved, when the runtime tells of a container, when an
// action or a check ended, or when time asks for it; it gathers assignments, containers and memory; it brings names and published ports up to date; it
// calls converge.Next; and it starts the actions that come back, one a task, several tasks at once. What it has to report it proposes to the log
// in batches, only what changed.
//
// The interfaces to the container runtime, the network, repository files and secrets are defined here, where they are used, and come in as values.
// Containers carry labels that say what they are: they are the node's own record, so a restarted agent adopts what runs.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Network connects tasks. cluster/network implements it.
type Network interface {
	Prepare(ctx context.Context) (network.Neighbours, error)
	EnsureNetwork(ctx context.Context, n network.Network) error
	RemoveNetwork(ctx context.Context, id string) error
	Attach(ctx context.Context, e network.Endpoint) (path string, err error)
	Detach(ctx context.Context, task string) error
	List(ctx context.Context) (network.State, error)
	Names
}

// Names makes tasks reachable, by published ports and by name.
type Names interface {
	SetPublished(ctx context.Context, services []network.Service) error
	SetNames(ctx context.Context, n network.Names) error
	Established(ctx context.Context, backend netip.Addr, ports ...uint16) (int, error)
}

// Content puts repository files where containers can mount them. cluster/blob implements it.
type Content interface {
	// Materialise returns the path of a read-only file, or directory tree, with the content of the digest.
	Materialise(ctx context.Context, digest string, dir, exec bool) (path string, err error)
}

// Log is the node's replica of the decisions and the way to report to it.
type Log interface {
	View() *state.View
	Changed(after uint64) <-chan struct{}
	// Settled says whether the replica has all that was decided before this agent started. Once true, it stays so.
	Settled() bool
	// Report proposes items on behalf of this node, with events that tell of them. An error means that they are to be proposed again.
	Report(ctx context.Context, items []state.Item, events []state.Event) error
}

// Config is all that a worker needs. Every field but Logger must be set.
type Config struct {
	Node    string
	Cluster string // id: containers of another cluster are not touched

	Runtime   Runtime
	Images    Images
	Inspector Inspector
	Network   Network
	Content   Content
	Log       Log
	// OpenSecret unseals a value on this node. The caller owns the bytes.
	OpenSecret func(s state.Secret) ([]byte, error)

	DataRoot     string // volumes and data paths live below it
	RunDir       string // files of running tasks: gone after a reboot
	LogDir       string // log files of tasks
	CgroupParent string // absolute cgroup path below which each container has its own
	Domain       string // search domain of tasks, as svc.internal

	Parallel int           // actions at once; 0 = 16
	Relist   time.Duration // how often drift is looked for without a sign of it; 0 = 30 s
	Logger   *slog.Logger
}

// Worker runs the tasks of one node.
type Worker struct {
	cfg    Config
	log    *slog.Logger
	events chan func() // run by the loop, one after the other
	slots  chan struct{}
	tags   tags

	// The loop owns what follows.
	containers []converge.Container
	runtime    map[string]Container    // by id, as last seen
	memory     map[string]*memory      // by task
	last       map[string]state.Report // by task, of the last pass
	untold     []state.Event           // of all passes since the last report to the log
	dirty      bool                    // any container may have changed since it was seen
	touched    map[string]bool         // ids of containers that may have changed since they were seen
	reporting  bool
	networks   map[string]network.Network
	refused    map[string]error // why networks that tasks are to be on could not be made; a new map in each pass
	published  []network.Service
	names      network.Names
	told       string    // last complaint about published ports, so that it is told once
	tidied     time.Time // when unused images were last looked for
	volumes    volumes
}

// memory is converge's memory of a task with the checks that run for it.
type memory struct {
	converge.Memory
	check  *checking
	images map[string]Image
	ended  int // newest attempt whose end is among Ends
}

// New makes a worker. Nothing is touched until Run.
func New(cfg Config) *Worker {
	if cfg.Parallel == 0 {
		cfg.Parallel = 16
	}
	if cfg.Relist == 0 {
		cfg.Relist = 30 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Worker{
		cfg: cfg, log: cfg.Logger.With("node", cfg.Node), events: make(chan func(), 256), slots: make(chan struct{}, cfg.Parallel),
		runtime: map[string]Container{}, memory: map[string]*memory{}, last: map[string]state.Report{}, networks: map[string]network.Network{}, dirty: true, touched: map[string]bool{}, tidied: time.Now(),
		volumes: volumes{going: map[string]bool{}, again: map[string]time.Time{}},
	}
}

// post hands a result to the loop. It gives up when the worker ends.
func (w *Worker) post(ctx context.Context, f func()) {
	select {
	case w.events <- f:
	case <-ctx.Done():
	}
}

// Run works until ctx ends. Containers run on after it.
func (w *Worker) Run(ctx context.Context) error {
	if err := w.prepareDirs(); err != nil {
		return err
	}
	near, err := w.cfg.Network.Prepare(ctx)
	if err != nil {
		return fmt.Errorf("prepare the node's network: %w", err)
	}
	for _, p := range near.Problems {
		w.log.Warn("another firewall stands in the way", "problem", p)
	}
	if err := w.adoptNetworks(ctx); err != nil {
		return err
	}
	group := &sync.WaitGroup{}
	defer group.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group.Go(func() { w.watch(ctx) })
	relist := time.NewTicker(w.cfg.Relist)
	defer relist.Stop()
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		view := w.cfg.Log.View()
		next := w.step(ctx, group, view)
		if next.IsZero() {
			wake.Stop()
		} else {
			wake.Reset(max(time.Until(next), time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.cfg.Log.Changed(view.Index):
		case <-wake.C:
		case <-relist.C:
			w.dirty = true
			if w.told != "" {
				w.published = nil // what could not be published is tried again
			}
			w.tidyLogs(view)
			w.tidyImages(ctx, group, view)
			if _, err := w.cfg.Network.Prepare(ctx); err != nil && ctx.Err() == nil {
				w.log.Error("check the node's network", "err", err)
			}
		case f := <-w.events:
			f()
		}
		w.drain()
	}
}

// drain takes what else happened meanwhile, so that one pass serves many signs.
func (w *Worker) drain() {
	for {
		select {
		case f := <-w.events:
			f()
		default:
			return
		}
	}
}

// watch listens to the runtime, and again whenever the connection breaks.
func (w *Worker) watch(ctx context.Context) {
	for ctx.Err() == nil {
		w.post(ctx, func() { w.dirty = true })
		err := w.cfg.Runtime.Watch(ctx, func(e Event) { w.post(ctx, func() { w.touch(e.ID) }) })
		if ctx.Err() != nil {
			return
		}
		w.log.Warn("the container runtime stopped answering; trying again", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// step is one pass: observe, make reachable, decide, act, report. It returns when to come again.
func (w *Worker) step(ctx context.Context, group *sync.WaitGroup, view *state.View) time.Time {
	now := time.Now()
	if err := w.observe(ctx); err != nil {
		w.dirty = true
		if ctx.Err() == nil {
			w.log.Error("look at the containers", "err", err)
		}
		return now.Add(time.Second) // without a complete picture nothing may be decided
	}
	assigned := w.assigned(view)
	for i := range assigned {
		a := &assigned[i]
		if last, ok := w.last[a.ID]; ok && w.memory[a.ID] != nil && w.memory[a.ID].Busy {
			a.Last = last // the log may not have it yet, and while it is busy nothing newer is seen
		}
		a.Gate = converge.Gate(view, a.Task, &a.Spec, func(t state.Task) state.Report { return w.reported(view, t) })
	}
	byID := map[string]*converge.Assignment{}
	for i := range assigned {
		byID[assigned[i].ID] = &assigned[i]
	}
	w.adoptImages(ctx, byID)
	w.ensureNetworks(ctx, view, assigned)
	w.checks(ctx, group, assigned)
	in := converge.Input{Node: w.cfg.Node, Assigned: assigned, Containers: w.containers, Memory: map[string]converge.Memory{}, Settled: w.cfg.Log.Settled(), Now: now}
	for id, m := range w.memory {
		m.Ended = w.last[id].Ended
		in.Memory[id] = m.Memory
	}
	out := converge.Next(in)
	for i := range assigned {
		a := &assigned[i]
		old, ok := w.last[a.ID]
		if !ok {
			old = a.Last
		}
		w.untold = append(w.untold, converge.Events(a.Task, old, out.Reports[a.ID])...)
	}
	w.untold = w.untold[max(0, len(w.untold)-state.KeepEvents):]
	w.last = out.Reports
	w.makeReachable(ctx, view, assigned)
	w.forget(byID)
	for _, a := range out.Actions {
		w.act(ctx, group, view, byID[a.Task], a)
	}
	w.report(ctx, group, view, out.Reports)
	if again := w.removeVolumes(ctx, group, view, now); !again.IsZero() && (out.Wake.IsZero() || again.Before(out.Wake)) {
		return again
	}
	return out.Wake
}

// touch has containers looked at before the next decision; an empty id means all.
func (w *Worker) touch(ids ...string) {
	for _, id := range ids {
		w.touched[id] = true
		w.dirty = w.dirty || id == ""
	}
}

// observe brings the picture of the containers up to date. What it costs goes with what changed, but for the looks at everything now and then.
func (w *Worker) observe(ctx context.Context) error {
	if !w.dirty && len(w.touched) == 0 {
		return nil
	}
	if w.dirty || 8*len(w.touched) > len(w.runtime) {
		all, err := w.cfg.Runtime.List(ctx)
		if err != nil {
			return err
		}
		clear(w.runtime)
		for _, c := range all {
			w.runtime[c.ID] = c
		}
	} else {
		for id := range w.touched {
			c, err := w.cfg.Runtime.Get(ctx, id)
			switch {
			case errors.Is(err, ErrNotFound):
				delete(w.runtime, id)
			case err != nil:
				return err
			default:
				w.runtime[id] = c
			}
		}
	}
	w.dirty = false
	clear(w.touched)
	w.containers = w.containers[:0]
	for _, c := range w.runtime {
		if w.ours(c) {
			w.containers = append(w.containers, observed(c))
		}
	}
	slices.SortFunc(w.containers, compareContainers)
	for _, c := range w.containers {
		if m := w.remember(c.Task); c.Phase == converge.Exited && c.Attempt > m.ended {
			m.ended, m.Ends = c.Attempt, append(m.Ends, c.Exited)
		}
	}
	return nil
}

// adoptImages learns what the images of adopted containers say: their health checks and stop signals.
func (w *Worker) adoptImages(ctx context.Context, assigned map[string]*converge.Assignment) {
	for _, c := range w.containers {
		a, m := assigned[c.Task], w.remember(c.Task)
		if _, known := m.images[c.Name]; known || a == nil || c.Digest == "" {
			continue
		}
		at := slices.IndexFunc(a.Spec.Containers, func(s manifest.Container) bool { return s.Name == c.Name })
		if at < 0 {
			continue
		}
		ref, _, _ := strings.Cut(a.Spec.Containers[at].Image, "@")
		img, err := w.cfg.Images.Local(ctx, ref+"@"+c.Digest, a.Spec.Containers[at].Platform)
		if err != nil && !errors.Is(err, ErrNotFound) {
			continue // it is asked again at the next pass
		}
		m.images[c.Name] = img
	}
}

// assigned gathers this node's tasks with their specs. It may be called from any goroutine.
func (w *Worker) assigned(view *state.View) []converge.Assignment {
	var out []converge.Assignment
	for id, t := range view.Tasks.All() {
		if t.Value.Node != w.cfg.Node {
			continue
		}
		spec, ok := view.Specs.Get(t.Value.Spec)
		if !ok {
			continue
		}
		a := converge.Assignment{Task: t.Value, Spec: spec.Value.Service}
		if r, ok := view.Reports.Get(id); ok {
			a.Last = r.Value
		}
		if st, ok := view.Stacks.Get(t.Value.Stack); ok && st.Value.Applied != nil {
			rel, _ := view.Releases.Get(st.Value.Applied.Release)
			a.Report = rel.Value.Stack.Drift == manifest.DriftReport
			a.Ignore = rel.Value.Stack.IgnoreDrift
		}
		out = append(out, a)
	}
	return out
}

// reported is how a task does: this node's tasks as it saw them last, all others as the log has them. A task of this node counts as ready when the log
// knows it, too: not before does its name lead to it, and what waits for a task asks for it by name at once.
func (w *Worker) reported(view *state.View, t state.Task) state.Report {
	r, _ := view.Reports.Get(t.ID)
	if own := w.last[t.ID]; t.Node == w.cfg.Node && (!own.Ready() || r.Value.Ready()) {
		return own
	}
	return r.Value
}

// forget drops the memory of tasks that are not assigned any more.
func (w *Worker) forget(assigned map[string]*converge.Assignment) {
	for id, m := range w.memory {
		if assigned[id] == nil && !m.Busy && !m.Network { // what is left of a task is remembered until it is reaped
			if m.check != nil {
				m.check.stop()
			}
			delete(w.memory, id)
		}
	}
}

// remember returns the memory of a task, making it where there is none.
func (w *Worker) remember(task string) *memory {
	m := w.memory[task]
	if m == nil {
		m = &memory{images: map[string]Image{}}
		w.memory[task] = m
	}
	return m
}

// report proposes what changed. One batch is under way at a time: what comes meanwhile goes with the next.
func (w *Worker) report(ctx context.Context, group *sync.WaitGroup, view *state.View, reports map[string]state.Report) {
	if w.reporting {
		return
	}
	var items []state.Item
	for _, id := range slices.Sorted(maps.Keys(reports)) {
		old, ok := view.Reports.Get(id)
		if r := reports[id]; !ok || !reflect.DeepEqual(normal(old.Value), normal(r)) {
			items = append(items, state.Item{state.Set(id, r)})
		}
	}
	for _, vol := range w.volumes.found {
		items = append(items, state.Item{state.Set(state.VolumeKey(vol.Node, vol.Kind, vol.Name), vol)})
	}
	events, found := w.untold, w.volumes.found
	if len(items)+len(events) == 0 {
		return
	}
	w.reporting, w.untold, w.volumes.found = true, nil, nil
	group.Go(func() {
		err := w.cfg.Log.Report(ctx, items, events)
		w.post(ctx, func() {
			w.reporting = false
			if err != nil {
				w.untold = append(events, w.untold...)
				w.volumes.found = append(found, w.volumes.found...)
				w.log.Warn("report to the log; trying again", "err", err)
			}
		})
	})
}

// normal makes reports comparable: an empty map or list is none.
func normal(r state.Report) state.Report {
	if len(r.Images) == 0 {
		r.Images = nil
	}
	if len(r.Drift) == 0 {
		r.Drift = nil
	}
	return r
}

// Drift compares what runs on this node now with what is assigned to it, by task. It may be called from any goroutine.
func (w *Worker) Drift(ctx context.Context) (map[string][]state.Drift, error) {
	all, err := w.cfg.Runtime.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	in := converge.Input{Node: w.cfg.Node, Assigned: w.assigned(w.cfg.Log.View()), Now: time.Now()}
	for _, c := range all {
		if w.ours(c) {
			in.Containers = append(in.Containers, observed(c))
		}
	}
	return converge.Drifts(in), nil
}

func (w *Worker) ours(c Container) bool {
	return c.Labels[labelCluster] == w.cfg.Cluster && c.Labels[labelNode] == w.cfg.Node
}

// Container finds the newest container of a task that carries the name; "" is the main one.
func (w *Worker) Container(ctx context.Context, task, name string) (Container, error) {
	all, err := w.cfg.Runtime.List(ctx)
	if err != nil {
		return Container{}, fmt.Errorf("list containers: %w", err)
	}
	var best Container
	attempt := -1
	for _, c := range all {
		if !w.ours(c) || c.Labels[labelTask] != task || name != "" && c.Labels[labelContainer] != name {
			continue
		}
		o := observed(c)
		main := o.ID == containerID(task, o.Name, o.Name, o.Attempt)
		if o.Attempt > attempt || o.Attempt == attempt && main && name == "" {
			best, attempt = c, o.Attempt
		}
	}
	if attempt < 0 {
		return best, fmt.Errorf("task %s has no container now: %w", task, ErrNotFound)
	}
	return best, nil
}

// Exec runs a command in a container.
func (w *Worker) Exec(ctx context.Context, id string, req ExecRequest) (int, error) {
	return w.cfg.Inspector.Exec(ctx, id, req)
}

// Logged lists the tasks of a stack that have logs on this node, sorted: those that are gone too, as long as their logs are kept.
func (w *Worker) Logged(stack string) []string {
	if !filepath.IsLocal(stack) { // the name comes from outside
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(w.cfg.LogDir, stack))
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, stack+"/"+e.Name())
	}
	return out
}

// LogDir is where the logs of a task's container are; without a container, where those of all its containers are.
func (w *Worker) LogDir(task, container string) string { return w.logDir(task, container) }
