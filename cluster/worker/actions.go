package worker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Reasons that actions give when they fail.
const (
	ReasonImageMissing = "image.missing"
	ReasonImageDenied  = "image.denied"
	ReasonRegistry     = "image.registry"
	ReasonImage        = "image.failed"
	ReasonPortTaken    = "port.taken"
	ReasonCreate       = "task.create"
	ReasonStart        = "task.start"
	ReasonStop         = "task.stop"
	ReasonDisk         = "disk.full"
	ReasonVolume       = "volume.missing"
)

// Draining waits at most this long for a task's connections before it is told to stop; its stop_grace_period comes after that.
const (
	drainMax  = 5 * time.Second
	drainPoll = 20 * time.Millisecond
)

// job is an action with all that it needs, so that its goroutine touches nothing of the loop's.
type job struct {
	*Worker
	action converge.Action
	task   converge.Assignment
	stack  manifest.Stack
	source string
	policy string
	images map[string]Image
	digest map[string]string // known digests by container
	nets   map[string]network.Network
	refuse map[string]error // networks that could not be made, with the reason
	secret func(name string) (state.Secret, bool)
	ports  []network.Port // host ports of the service that are not published yet
	found  []state.Volume // of the images of its containers
}

// outcome is what an action leaves in the memory of its task.
type outcome struct {
	err    error
	images map[string]Image
}

// act starts an action of a task, unless one is under way.
func (w *Worker) act(ctx context.Context, group *sync.WaitGroup, view *state.View, a *converge.Assignment, action converge.Action) {
	m := w.remember(action.Task)
	if m.Busy {
		return
	}
	m.Busy = true
	j := job{Worker: w, action: action, images: maps.Clone(m.images), nets: maps.Clone(w.networks), refuse: w.refused}
	if a != nil {
		j.task = *a
		j.digest = w.last[a.ID].Images
		if st, ok := view.Stacks.Get(a.Stack); ok {
			j.source, j.policy = st.Value.Source, st.Value.Wanted.Verdict.Policy
			if st.Value.Applied != nil {
				rel, _ := view.Releases.Get(st.Value.Applied.Release)
				j.stack = rel.Value.Stack
			}
		}
		j.secret = func(name string) (state.Secret, bool) { e, ok := view.Secrets.Get(name); return e.Value, ok }
		j.ports = w.newPorts(view, a)
	}
	if action.Verb == converge.Kill {
		m.Killed = action.Attempt
	}
	touched := slices.Clone(action.Containers)
	for _, c := range j.task.Spec.Containers {
		touched = append(touched, containerID(j.task.ID, c.Name, j.task.Spec.Name, action.Attempt))
	}
	group.Go(func() {
		select {
		case w.slots <- struct{}{}:
			defer func() { <-w.slots }()
		case <-ctx.Done():
			return
		}
		out := j.perform(ctx)
		if ctx.Err() != nil {
			return
		}
		w.post(ctx, func() {
			w.performed(action, m, out)
			w.note(j.found)
			w.touch(touched...)
		})
	})
}

// performed takes in how an action went.
func (w *Worker) performed(a converge.Action, m *memory, out outcome) {
	m.Busy = false
	for name, img := range out.images {
		m.images[name] = img
		if m.Images == nil {
			m.Images = map[string]string{}
		}
		m.Images = maps.Clone(m.Images)
		m.Images[name] = img.Digest
	}
	switch a.Verb {
	case converge.Create:
		m.Network = true
		m.Health, m.Why = state.HealthUnknown, ""
	case converge.Remove, converge.Reap:
		m.Network = out.err != nil
	}
	if out.err == nil {
		m.Trouble = nil
		return
	}
	t := classify(a.Verb, out.err)
	if m.Trouble != nil {
		t.Count = m.Trouble.Count
	}
	t.Count++
	t.At = time.Now()
	m.Trouble = &t
	w.log.Warn("task action failed", "task", a.Task, "action", string(a.Verb), "err", out.err)
}

// classify turns an action's error into what converge and people need to know of it.
func classify(v converge.Verb, err error) converge.Trouble {
	t := converge.Trouble{Reason: state.Reason{Message: err.Error()}, Permanent: errors.Is(err, ErrPermanent)}
	// A runtime that does not answer in time says nothing of the task.
	answered := !errors.Is(err, ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded)
	var told *toldError
	switch {
	case errors.As(err, &told):
		t.Reason.ID, t.Fault = told.id, told.fault
	case errors.Is(err, errNoSpace):
		t.Reason.ID = ReasonDisk
	case errors.Is(err, ErrImageMissing) || v == converge.Pull && errors.Is(err, ErrNotFound):
		t.Reason.ID, t.Fault = ReasonImageMissing, true
	case errors.Is(err, ErrImageDenied):
		t.Reason.ID, t.Fault = ReasonImageDenied, true
	case v == converge.Pull && errors.Is(err, ErrUnavailable):
		t.Reason.ID = ReasonRegistry
	case v == converge.Pull:
		t.Reason.ID, t.Fault = ReasonImage, t.Permanent
	case v == converge.Start:
		t.Reason.ID, t.Fault = ReasonStart, answered
	case v == converge.Remove || v == converge.Kill:
		t.Reason.ID = ReasonStop
	default:
		t.Reason.ID, t.Fault = ReasonCreate, answered
	}
	return t
}

// toldError is an error that knows its reason's id.
type toldError struct {
	id    string
	fault bool
	err   error
}

func (e *toldError) Error() string { return e.err.Error() }
func (e *toldError) Unwrap() error { return e.err }

func (j *job) perform(ctx context.Context) outcome {
	switch j.action.Verb {
	case converge.Pull:
		return j.pull(ctx)
	case converge.Create:
		return j.create(ctx)
	case converge.Start:
		return outcome{err: j.start(ctx)}
	case converge.Kill:
		return outcome{err: j.stopContainers(ctx, j.action.Containers)}
	case converge.Remove:
		return outcome{err: j.remove(ctx)}
	case converge.Limit:
		return outcome{err: j.limit(ctx)}
	case converge.Resume:
		return outcome{err: j.each(j.action.Containers, func(id string) error { return j.cfg.Inspector.Resume(ctx, id) })}
	case converge.Reap:
		return outcome{err: errors.Join(j.each(j.action.Containers, func(id string) error { return j.cfg.Runtime.Remove(ctx, id) }), j.cfg.Network.Detach(ctx, j.action.Task))}
	}
	return outcome{err: fmt.Errorf("unknown action %s", j.action.Verb)}
}

func (j *job) each(ids []string, f func(string) error) error {
	var errs []error
	for _, id := range ids {
		errs = append(errs, f(id))
	}
	return errors.Join(errs...)
}

// pull brings the images of the task. A tag that has no digest yet is resolved now, once.
func (j *job) pull(ctx context.Context) outcome {
	out := outcome{images: map[string]Image{}}
	for i := range j.task.Spec.Containers {
		c := &j.task.Spec.Containers[i]
		img, err := j.image(ctx, c)
		if err != nil {
			out.err = fmt.Errorf("image %s: %w", c.Image, err)
			return out
		}
		out.images[c.Name] = img
	}
	return out
}

func (j *job) image(ctx context.Context, c *manifest.Container) (Image, error) {
	digest := j.digest[c.Name]
	if digest == "" {
		if c.PullPolicy == "never" {
			img, err := j.cfg.Images.Local(ctx, c.Image, c.Platform)
			if errors.Is(err, ErrNotFound) {
				return img, fmt.Errorf("pull_policy is never and it is not on this node: import it, or change the policy: %w", err)
			}
			return img, err
		}
		var err error
		key := j.task.Task.Spec + "/" + c.Name
		if digest, err = j.tags.resolve(key, func() (string, error) { return j.cfg.Images.Resolve(ctx, c.Image, c.Platform) }); err != nil {
			// Without an answer from the registry, what is here will do: a reboot without network starts from local images.
			if img, lerr := j.cfg.Images.Local(ctx, c.Image, c.Platform); lerr == nil && c.PullPolicy != "always" {
				return img, nil
			}
			return Image{}, err
		}
	}
	return j.cfg.Images.Ensure(ctx, c.Image, digest, c.Platform)
}

// tags remembers what the references of specs were resolved to, so that the tasks of a service that start together ask a registry once and run
// the same bytes. The leader records the answer in the log for all later ones.
type tags struct {
	asking singleflight.Group
	known  sync.Map // spec/container -> digest
}

func (t *tags) resolve(key string, ask func() (string, error)) (string, error) {
	v, err, _ := t.asking.Do(key, func() (any, error) {
		if d, ok := t.known.Load(key); ok {
			return d, nil
		}
		d, err := ask()
		if err == nil {
			t.known.Store(key, d)
		}
		return d, err
	})
	return v.(string), err
}

// create makes all containers of the next attempt.
func (j *job) create(ctx context.Context) (out outcome) {
	t := &j.task
	if err := j.each(j.action.Containers, func(id string) error { return j.cfg.Runtime.Remove(ctx, id) }); err != nil {
		out.err = fmt.Errorf("remove the last attempt: %w", err)
		return out
	}
	var gateways []netip.Addr
	for _, n := range j.nets {
		gateways = append(gateways, n.Gateway)
	}
	if taken := network.PortsTaken(ctx, j.ports, gateways); len(taken) > 0 {
		out.err = &toldError{ReasonPortTaken, true, fmt.Errorf("port %s is held by another program of this machine (%s): free it, or publish another one", taken[0].Port, taken[0].Reason)}
		return out
	}
	ns, err := j.attach(ctx)
	if err != nil {
		out.err = fmt.Errorf("connect it: %w", err)
		return out
	}
	for i := range t.Spec.Containers {
		c := &t.Spec.Containers[i]
		img, ok := j.images[c.Name]
		if !ok {
			if img, err = j.image(ctx, c); err != nil {
				out.err = fmt.Errorf("image %s: %w", c.Image, err)
				return out
			}
			if out.images == nil {
				out.images = map[string]Image{}
			}
			out.images[c.Name] = img
		}
		mounts, err := j.mounts(c, img)
		if err != nil {
			out.err = err
			return out
		}
		var profile string
		if digest := c.SeccompDigest(); digest != "" {
			if profile, err = j.cfg.Content.Materialise(ctx, digest, false, false); err != nil {
				out.err = fmt.Errorf("seccomp profile of %s: %w", c.Name, err)
				return out
			}
		}
		id := containerID(t.ID, c.Name, t.Spec.Name, j.action.Attempt)
		spec := ContainerSpec{
			ID: id, Image: c.Image, Digest: img.Digest, Spec: *c, Mounts: mounts, NetNS: ns, Hostname: j.hostname(), Domain: t.Spec.Domainname,
			PIDMode: t.Spec.PID, IPCMode: t.Spec.IPC, UserNS: t.Spec.UserNS, Sysctls: t.Spec.Sysctls,
			Seccomp: profile, Cgroup: j.cfg.CgroupParent + "/" + id, LogDir: j.logDir(t.ID, c.Name),
			Labels: map[string]string{
				labelCluster: j.cfg.Cluster, labelNode: j.cfg.Node, labelTask: t.ID, labelContainer: c.Name, labelSpec: t.Task.Spec,
				labelAttempt: strconv.Itoa(j.action.Attempt), labelStreak: strconv.Itoa(j.action.Streak), labelFailures: strconv.Itoa(j.action.Failures),
				labelSource: j.source, labelRevision: t.Revision.Commit, labelPolicy: j.policy,
			},
		}
		if err := j.cfg.Runtime.Create(ctx, spec); err != nil {
			out.err = fmt.Errorf("create container %s: %w", c.Name, err)
			return out
		}
	}
	return out
}

func (j *job) hostname() string {
	if h := j.task.Spec.Hostname; h != "" {
		return h
	}
	if j.task.Spec.NetworkMode == "host" {
		h, _ := os.Hostname()
		return h
	}
	return fmt.Sprintf("%s-%d", j.task.Service, j.task.Slot)
}

// attach makes the task's network namespace; "" is the host's.
func (j *job) attach(ctx context.Context) (string, error) {
	t := &j.task
	if t.Spec.NetworkMode == "host" {
		return "", nil
	}
	e := network.Endpoint{Task: t.ID, Sysctls: netSysctls(t.Spec.Sysctls)}
	for i, at := range t.Spec.Networks {
		if t.Spec.NetworkMode == "none" {
			break
		}
		if err := j.refuse[at.Network]; err != nil {
			return "", err // it would only say that the network is not there
		}
		addr, err := netip.ParseAddr(t.Addrs[at.Network])
		if err != nil {
			return "", fmt.Errorf("network %s: the task has no address", at.Network)
		}
		e.Interfaces = append(e.Interfaces, network.Interface{Name: fmt.Sprintf("eth%d", i), Network: at.Network, Address: addr, MAC: at.MAC})
	}
	return j.cfg.Network.Attach(ctx, e)
}

// start runs the created containers, in order.
func (j *job) start(ctx context.Context) error {
	for _, c := range j.task.Spec.Containers {
		id := containerID(j.task.ID, c.Name, j.task.Spec.Name, j.action.Attempt)
		if err := j.cfg.Runtime.Start(ctx, id); err != nil {
			return fmt.Errorf("start container %s: %w", c.Name, err)
		}
	}
	return nil
}

// stopContainers stops the task's containers, the last started first.
func (j *job) stopContainers(ctx context.Context, ids []string) error {
	var errs []error
	for i := len(j.task.Spec.Containers) - 1; i >= 0; i-- {
		c := &j.task.Spec.Containers[i]
		id := containerID(j.task.ID, c.Name, j.task.Spec.Name, j.action.Attempt)
		for _, have := range ids {
			if have != id {
				continue
			}
			sig := c.StopSignal
			if sig == "" {
				sig = j.images[c.Name].Config.StopSignal
			}
			errs = append(errs, j.cfg.Runtime.Stop(ctx, id, sig, j.task.Spec.StopGrace.Std()))
		}
	}
	return errors.Join(errs...)
}

// remove takes the task down. Names and published ports do not lead to it any more: the loop saw to that before it started this.
func (j *job) remove(ctx context.Context) error {
	j.drain(ctx)
	if err := j.stopContainers(ctx, j.action.Containers); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if err := j.each(j.action.Containers, func(id string) error { return j.cfg.Runtime.Remove(ctx, id) }); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	if j.task.Spec.NetworkMode != "host" {
		if err := j.cfg.Network.Detach(ctx, j.task.ID); err != nil {
			return fmt.Errorf("disconnect: %w", err)
		}
	}
	return errors.Join(os.RemoveAll(j.taskDir()), os.RemoveAll(j.secretDir()))
}

// drain waits until nobody is connected to the task through a published port, or the time for that is over.
func (j *job) drain(ctx context.Context) {
	addr := j.published()
	if !addr.IsValid() || len(j.action.Containers) == 0 {
		return
	}
	var ports []uint16
	for _, p := range j.task.Spec.Ports {
		ports = append(ports, p.Target)
	}
	ctx, cancel := context.WithTimeout(ctx, min(drainMax, j.task.Spec.StopGrace.Std()))
	defer cancel()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		n, err := j.cfg.Network.Established(ctx, addr, ports...)
		if n == 0 || err != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// published is the address of the task that published ports lead to; not valid when none do.
func (j *job) published() netip.Addr {
	if len(j.task.Spec.Ports) == 0 {
		return netip.Addr{}
	}
	return backend(&j.task.Task, &j.task.Spec, j.nets)
}

// limit sets the limits of the running containers as the spec has them.
func (j *job) limit(ctx context.Context) error {
	var errs []error
	for i := range j.task.Spec.Containers {
		c := &j.task.Spec.Containers[i]
		id := containerID(j.task.ID, c.Name, j.task.Spec.Name, j.action.Attempt)
		errs = append(errs, j.cfg.Inspector.Update(ctx, id, c.Resources))
	}
	return errors.Join(errs...)
}

func (w *Worker) logDir(task, container string) string {
	return filepath.Join(w.cfg.LogDir, filepath.FromSlash(task), container)
}

// imageAge is how long an image stays at least, used or not, and how often is looked for older ones: what was pulled for a task is not in the log yet.
const imageAge = time.Hour

// tidyImages removes the images that no task, no kept release and no person asks for any more.
func (w *Worker) tidyImages(ctx context.Context, group *sync.WaitGroup, view *state.View) {
	now := time.Now()
	if now.Sub(w.tidied) < imageAge || !w.cfg.Log.Settled() {
		return
	}
	w.tidied = now
	var keep []string
	for _, img := range view.Images.All() {
		keep = append(keep, img.Value.Digest)
	}
	for _, r := range view.Reports.All() {
		keep = slices.AppendSeq(keep, maps.Values(r.Value.Images))
	}
	group.Go(func() {
		gone, err := w.cfg.Images.Prune(ctx, keep, now.Add(-imageAge))
		if err != nil && ctx.Err() == nil {
			w.log.Warn("remove unused images", "err", err)
		}
		if len(gone) > 0 {
			w.log.Info("removed unused images", "images", gone)
		}
	})
}

// keepLogs is for how many tasks of a slot that are gone the logs stay.
const keepLogs = 2

// tidyLogs removes the logs of tasks that are long gone.
func (w *Worker) tidyLogs(view *state.View) {
	stacks, err := os.ReadDir(w.cfg.LogDir)
	if err != nil {
		return
	}
	for _, stack := range stacks {
		tasks, err := os.ReadDir(filepath.Join(w.cfg.LogDir, stack.Name()))
		if err != nil {
			continue
		}
		gone := map[string][]int{} // slot -> generations
		for _, t := range tasks {
			i := strings.LastIndexByte(t.Name(), '.')
			if _, ok := view.Tasks.Get(stack.Name() + "/" + t.Name()); ok || i < 0 {
				continue
			}
			if gen, err := strconv.Atoi(t.Name()[i+1:]); err == nil {
				gone[t.Name()[:i]] = append(gone[t.Name()[:i]], gen)
			}
		}
		for slot, gens := range gone {
			slices.Sort(gens)
			for _, gen := range gens[:max(0, len(gens)-keepLogs)] {
				if err := os.RemoveAll(filepath.Join(w.cfg.LogDir, stack.Name(), fmt.Sprintf("%s.%d", slot, gen))); err != nil {
					w.log.Warn("remove an old log", "err", err)
				}
			}
		}
	}
}
