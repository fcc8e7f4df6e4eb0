package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/sirupsen/logrus"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// Options say which containerd to use and how. Zero fields mean the defaults.
type Options struct {
	Address string // containerd's socket, an absolute path; default /run/containerd/containerd.sock
	// Namespace of containerd that holds all that we make; default "gitopsd". It must be unique among the agents of a machine, even if they
	// use different containerds: runc keeps its state below the namespace's name.
	Namespace string
	// CgroupParent is the cgroup below which containers live that name none themselves; default "/" and the namespace. RemoveAll removes it.
	CgroupParent  string
	Snapshotter   string // default overlayfs
	RuntimeBinary string // runc's path or name; default: what containerd finds
	StateDir      string // for what is gone after a reboot; default /run/gitopsd and the namespace
	KeeperPath    string // absolute path of the static gitops-keeper binary; default: beside the running program
	// CredentialFiles are files in the form of docker's config.json, first match wins. They are read at each use.
	CredentialFiles []string
	// PlainHTTP names registries (host or host:port) that speak HTTP without TLS. Those on a loopback address always may.
	PlainHTTP []string
	// Pulls is how many images are pulled at once; default 3.
	Pulls  int
	Logger *slog.Logger // default: nothing is logged
}

func (o Options) withDefaults() (Options, error) {
	o.Address = firstOf(o.Address, "/run/containerd/containerd.sock")
	o.Namespace = firstOf(o.Namespace, "gitopsd")
	o.CgroupParent = firstOf(o.CgroupParent, "/"+o.Namespace)
	o.Snapshotter = firstOf(o.Snapshotter, "overlayfs")
	o.StateDir = firstOf(o.StateDir, filepath.Join("/run/gitopsd", o.Namespace))
	if o.Pulls <= 0 {
		o.Pulls = 3
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.KeeperPath == "" {
		self, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find gitops-keeper beside this program: %w", err)
		}
		o.KeeperPath = filepath.Join(filepath.Dir(self), "gitops-keeper")
	}
	for _, p := range []string{o.Address, o.StateDir, o.KeeperPath, o.CgroupParent} {
		if !filepath.IsAbs(p) {
			return o, fmt.Errorf("path %s must be absolute", p)
		}
	}
	if info, err := os.Stat(o.KeeperPath); err != nil || info.Mode()&0o111 == 0 {
		return o, fmt.Errorf("%s is not an executable file: install gitops-keeper there or say where it is", o.KeeperPath)
	}
	return o, nil
}

// Runtime is a connection to containerd. It implements [worker.Runtime], [worker.Images] and [worker.Inspector], and it is safe for
// concurrent use.
type Runtime struct {
	o       Options
	client  *client.Client
	host    host
	creds   *credentials
	pulls   chan struct{}
	flights flights
	root    string // where containerd keeps unpacked images; "" = not known
	reserve uint64 // of the disk there, in bytes

	mu     sync.Mutex
	images map[imageKey]*imageFacts
}

var (
	_ worker.Runtime   = (*Runtime)(nil)
	_ worker.Images    = (*Runtime)(nil)
	_ worker.Inspector = (*Runtime)(nil)
)

// cleanupTime bounds what is done after a failure or at the end of a call whose context is over.
const cleanupTime = 20 * time.Second

// Open connects to containerd and makes our namespace in it. It fails where containerd does not answer; later, the connection comes back by
// itself after a restart of containerd. Nothing runs in the background.
func Open(ctx context.Context, o Options) (*Runtime, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	store := &documents{}
	c, err := client.New(o.Address, client.WithDefaultNamespace(o.Namespace), client.WithTimeout(3*time.Second),
		client.WithServices(client.WithContentStore(store)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", o.Address, err)
	}
	store.Store = proxy.NewContentStore(c.Conn())
	r := &Runtime{o: o, client: c, creds: &credentials{files: o.CredentialFiles}, pulls: make(chan struct{}, o.Pulls),
		images: map[imageKey]*imageFacts{}}
	if err := r.open(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return r, nil
}

func (r *Runtime) open(ctx context.Context) error {
	if _, err := os.Stat(r.o.Address); errors.Is(err, fs.ErrNotExist) {
		return withKind(worker.ErrUnavailable, "connect to containerd: there is no socket %s: is containerd installed and running?", r.o.Address)
	}
	ctx = r.in(ctx)
	v, err := r.client.Version(ctx)
	if err != nil {
		return wrap(err, "connect to containerd at %s", r.o.Address)
	}
	err = r.client.NamespaceService().Create(ctx, r.o.Namespace, map[string]string{managedLabel: "true"})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return wrap(err, "make containerd namespace %s", r.o.Namespace)
	}
	if err := os.MkdirAll(r.o.StateDir, 0o700); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	r.findRoom(ctx)
	r.host = host{unified: unified(), swap: swapLimits(), openFiles: openFiles(), keeper: r.o.KeeperPath, kernel: kernel(), apparmor: r.loadAppArmor()}
	if err := r.sweep(ctx); err != nil {
		return err
	}
	r.o.Logger.Info("connected to containerd", "address", r.o.Address, "version", v.Version, "namespace", r.o.Namespace)
	return nil
}

// Close ends the connection. Containers run on.
func (r *Runtime) Close() error { return r.client.Close() }

// Labels and names that mark what is ours in containerd.
const (
	managedLabel  = "gitopsd/managed"
	importedLabel = "gitopsd/imported" // an image that a person brought: it stays until a person takes it away
	internalLabel = "gitopsd.runtime/" // labels with this prefix are this package's own and are not shown
	imageLabel    = internalLabel + "image"
	digestLabel   = internalLabel + "digest"
	cgroupLabel   = internalLabel + "cgroup"
	commandLabel  = internalLabel + "command"
	gcRootLabel   = "containerd.io/gc.root" // containerd collects nothing that has it
	viewPrefix    = "gitopsd-view-"
	runtimeName   = "io.containerd.runc.v2"
)

// in is ctx for calls in our namespace. The client's library logs by itself what it also returns as errors: it is made silent.
func (r *Runtime) in(ctx context.Context) context.Context {
	return log.WithLogger(namespaces.WithNamespace(ctx, r.o.Namespace), silent)
}

var silent = logrus.NewEntry(&logrus.Logger{
	Out: io.Discard, Formatter: &logrus.TextFormatter{}, Hooks: logrus.LevelHooks{}, Level: logrus.PanicLevel,
})

// taskTime bounds the calls that make and remove a container's process. A machine that has just started, with all its tasks to start at once and
// a slow disk, takes long for one of them.
const taskTime = 3 * time.Minute

// wholly is a context for a call that must come to its end: containerd goes on with what it began when its caller leaves, and what is half made or half
// removed then stays, with a shim that nobody knows of any more.
func wholly(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), taskTime)
}

// cleanup is a context for what must be done although ctx may be over.
func cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
}

// appArmorProfile is the name under which the default profile is loaded: one for each agent, so that it can go with the agent.
func (r *Runtime) appArmorProfile() string { return r.o.Namespace + "-default" }

// loadAppArmor loads the default profile where the kernel has AppArmor and names it. A kernel without AppArmor has none; neither has a
// machine without its parser, which is logged.
func (r *Runtime) loadAppArmor() string {
	on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !strings.HasPrefix(string(on), "Y") {
		return ""
	}
	if _, err := exec.LookPath("apparmor_parser"); err != nil {
		r.o.Logger.Warn("containers run without an AppArmor profile: apparmor_parser is not installed")
		return ""
	}
	if err := apparmor.LoadDefaultProfile(r.appArmorProfile()); err != nil {
		r.o.Logger.Warn("containers run without an AppArmor profile", "error", err)
		return ""
	}
	return r.appArmorProfile()
}

// unloadAppArmor takes the profile out of the kernel (apparmorfs: a name that is written to .remove). Nothing is confined by it any more.
func (r *Runtime) unloadAppArmor() error {
	err := os.WriteFile("/sys/kernel/security/apparmor/.remove", []byte(r.appArmorProfile()), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unload AppArmor profile %s: %w", r.appArmorProfile(), err)
	}
	return nil
}

// sweep removes what an agent that was killed in the middle of its work left behind: views of images.
func (r *Runtime) sweep(ctx context.Context) error {
	sn := r.client.SnapshotService(r.o.Snapshotter)
	var stale []string
	err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, viewPrefix) {
			stale = append(stale, info.Name)
		}
		return nil
	})
	if err != nil {
		return wrap(err, "list the snapshots of %s", r.o.Snapshotter)
	}
	if left, err := filepath.Glob(filepath.Join(r.o.StateDir, mountPrefix+"*")); err == nil {
		for _, dir := range left {
			_ = unmount(dir) // what can't be unmounted now is tried again at the next call
		}
	}
	for _, name := range stale {
		if err := sn.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "remove snapshot %s", name)
		}
	}
	return nil
}

// List implements [worker.Runtime]. It costs two calls to containerd, however many containers run, and reads the limits from the
// kernel. A container whose process went with the machine's last boot is Lost.
func (r *Runtime) List(ctx context.Context) ([]worker.Container, error) {
	ctx = r.in(ctx)
	records, err := r.client.ContainerService().List(ctx, `labels."`+managedLabel+`"==true`)
	if err != nil {
		return nil, wrap(err, "list containers")
	}
	running, err := r.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, wrap(err, "list tasks")
	}
	byID := make(map[string]*tasktypes.Process, len(running.Tasks))
	for _, t := range running.Tasks {
		byID[t.ID] = t
	}
	out := make([]worker.Container, 0, len(records))
	for _, rec := range records {
		t := byID[rec.ID]
		if t == nil { // containerd 2 leaves out of its list whose shim does not answer
			if t, err = r.process(ctx, rec.ID); err != nil {
				return nil, err
			}
		}
		out = append(out, r.container(ctx, rec, t))
	}
	return out, nil
}

// process is containerd's word of a container's process; nil = there is none. Where the shim does not answer, containerd 1 says that the status is
// unknown, and containerd 2 that its time for the question is over; both are told as the first.
func (r *Runtime) process(ctx context.Context, id string) (*tasktypes.Process, error) {
	t, err := r.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	switch err = native(err); {
	case errdefs.IsNotFound(err):
		return nil, nil
	case errdefs.IsDeadlineExceeded(err) && ctx.Err() == nil:
		return &tasktypes.Process{ID: id, Status: tasktypes.Status_UNKNOWN}, nil
	case err != nil:
		return nil, wrap(err, "look at container %s", id)
	}
	return t.Process, nil
}

// Get implements [worker.Runtime].
func (r *Runtime) Get(ctx context.Context, id string) (worker.Container, error) {
	ctx = r.in(ctx)
	rec, err := r.client.ContainerService().Get(ctx, id)
	if err != nil {
		return worker.Container{}, wrap(err, "look at container %s", id)
	}
	t, err := r.process(ctx, id)
	if err != nil {
		return worker.Container{}, err
	}
	return r.container(ctx, rec, t), nil
}

func (r *Runtime) container(ctx context.Context, rec containers.Container, t *tasktypes.Process) worker.Container {
	c := worker.Container{ID: rec.ID, Image: rec.Labels[imageLabel], Digest: rec.Labels[digestLabel], Labels: userLabels(rec.Labels)}
	c.StartedAt = r.startedAt(rec.ID)
	if t == nil {
		c.Phase, c.ExitCode = worker.Lost, client.UnknownExitStatus
		return c
	}
	c.PID = int(t.Pid)
	switch t.Status {
	case tasktypes.Status_CREATED:
		c.Phase, c.StartedAt = worker.Created, time.Time{}
	case tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
		c.Phase = worker.Paused
	case tasktypes.Status_RUNNING:
		c.Phase = worker.Running
	case tasktypes.Status_UNKNOWN:
		r.unanswered(ctx, &c, rec)
	default:
		c.Phase, c.PID = worker.Exited, 0
		c.ExitCode = int(t.ExitStatus)
		c.ExitedAt = t.ExitedAt.AsTime()
	}
	cg := openCgroup(rec.Labels[cgroupLabel], r.host.unified)
	if c.Phase == worker.Exited {
		c.OOMKilled = c.ExitCode != 0 && cg.oomKills() > 0
		return c
	}
	c.Limits = cg.limits()
	return c
}

// shimTime is how long a shim that did not answer containerd is asked for the end of its container.
const shimTime = 10 * time.Second

// unanswered tells of a container whose shim did not answer containerd in time. On a busy machine that says nothing of the container: its processes do.
// How a container ended only the shim knows.
func (r *Runtime) unanswered(ctx context.Context, c *worker.Container, rec containers.Container) {
	group := openCgroup(rec.Labels[cgroupLabel], r.host.unified)
	c.PID = group.first()
	switch {
	case c.PID == 0:
		ctx, cancel := context.WithTimeout(ctx, shimTime)
		defer cancel()
		end, err := r.client.TaskService().Wait(ctx, &tasks.WaitRequest{ContainerID: rec.ID})
		if err != nil {
			c.Phase, c.ExitCode = worker.Lost, client.UnknownExitStatus
			return
		}
		c.Phase, c.ExitCode, c.ExitedAt = worker.Exited, int(end.ExitStatus), end.ExitedAt.AsTime()
	case c.StartedAt.IsZero():
		c.Phase = worker.Created
	case group.frozen():
		c.Phase = worker.Paused
	default:
		c.Phase = worker.Running
	}
}

func userLabels(labels map[string]string) map[string]string {
	out := make(map[string]string, len(labels))
	for k, v := range labels {
		if k != managedLabel && !strings.HasPrefix(k, internalLabel) {
			out[k] = strings.TrimPrefix(v, "=")
		}
	}
	return out
}

// encodeLabel keeps a value that containerd would drop: an empty one.
func encodeLabel(v string) string {
	if v == "" || v[0] == '=' {
		return "=" + v
	}
	return v
}

// The time of a start is kept beside containerd, which has no place for it.

func (r *Runtime) startFile(id string) string { return filepath.Join(r.o.StateDir, "started", id) }

func (r *Runtime) startedAt(id string) time.Time {
	info, err := os.Stat(r.startFile(id))
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

func (r *Runtime) noteStart(id string) error {
	file := r.startFile(id)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, nil, 0o600)
}

// Watch implements [worker.Runtime].
func (r *Runtime) Watch(ctx context.Context, changed func(worker.Event)) error {
	ctx, cancel := context.WithCancel(r.in(ctx))
	defer cancel()
	const ready = "/gitopsd/ready"
	envelopes, errs := r.client.EventService().Subscribe(ctx,
		`namespace==`+r.o.Namespace+`,topic~="^/tasks/(exit|oom|paused|resumed|delete)$"`,
		`namespace==`+r.o.Namespace+`,topic=="`+ready+`"`)
	// The subscription holds when an event of our own comes back. It is sent again, because those before the subscription are lost.
	hello := time.NewTicker(50 * time.Millisecond)
	defer hello.Stop()
	listening := false
	for {
		select {
		case <-hello.C:
			// Any registered message will do: only its topic is read.
			err := r.client.EventService().Publish(ctx, ready, &eventsapi.NamespaceCreate{Name: r.o.Namespace})
			if err != nil {
				return wrap(err, "watch containers")
			}
		case err := <-errs:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err == nil {
				return withKind(worker.ErrUnavailable, "watch containers: containerd ended the stream of events")
			}
			return wrap(err, "watch containers")
		case e := <-envelopes:
			if e == nil {
				continue
			}
			if e.Topic == ready {
				hello.Stop()
				if !listening {
					listening = true
					changed(worker.Event{Kind: worker.EventOther})
				}
				continue
			}
			if ev, ok := event(e.Event); ok {
				changed(ev)
			}
		}
	}
}

func event(payload typeurl.Any) (worker.Event, bool) {
	v, err := typeurl.UnmarshalAny(payload)
	if err != nil {
		return worker.Event{}, false
	}
	switch e := v.(type) {
	case *eventsapi.TaskExit:
		// The exit of a command that ran in the container has an id of its own.
		return worker.Event{ID: e.ContainerID, Kind: worker.EventExit}, e.ID == e.ContainerID
	case *eventsapi.TaskOOM:
		return worker.Event{ID: e.ContainerID, Kind: worker.EventOOM}, true
	case *eventsapi.TaskPaused:
		return worker.Event{ID: e.ContainerID, Kind: worker.EventOther}, true
	case *eventsapi.TaskResumed:
		return worker.Event{ID: e.ContainerID, Kind: worker.EventOther}, true
	case *eventsapi.TaskDelete:
		return worker.Event{ID: e.ContainerID, Kind: worker.EventOther}, e.ID == "" || e.ID == e.ContainerID
	}
	return worker.Event{}, false
}

// RemoveAll removes everything that was ever made in our namespace: containers, snapshots, images, leases and content, then the namespace
// itself, our cgroups and the state directory. For the end of a test and for the uninstallation of an agent. Log files are the caller's.
func (r *Runtime) RemoveAll(ctx context.Context) error {
	ctx = r.in(ctx)
	records, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return wrap(err, "list containers")
	}
	var wg sync.WaitGroup
	errs := make([]error, len(records))
	parents := map[string]bool{r.o.CgroupParent: true}
	limit := make(chan struct{}, 8)
	for i, rec := range records {
		if cg := rec.Labels[cgroupLabel]; cg != "" {
			parents[path.Dir(cg)] = true
		}
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			errs[i] = r.Remove(ctx, rec.ID)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	list, err := r.client.ImageService().List(ctx)
	if err != nil {
		return wrap(err, "list images")
	}
	if err := r.removeImages(ctx, list); err != nil {
		return err
	}
	if err := r.removeLeftovers(ctx); err != nil {
		return err
	}
	if err := r.client.NamespaceService().Delete(ctx, r.o.Namespace); err != nil && !errdefs.IsNotFound(err) {
		return wrap(err, "remove containerd namespace %s", r.o.Namespace)
	}
	for parent := range parents {
		if err := removeCgroups(ctx, parent); err != nil {
			return err
		}
	}
	if err := r.endShims(ctx); err != nil {
		return err
	}
	if err := r.unloadAppArmor(); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join("/run/containerd/runc", r.o.Namespace)); err != nil {
		return fmt.Errorf("remove the records of runc: %w", err)
	}
	if err := os.RemoveAll(r.o.StateDir); err != nil {
		return fmt.Errorf("remove the state directory: %w", err)
	}
	r.mu.Lock()
	clear(r.images)
	r.mu.Unlock()
	return nil
}

// endShims ends the shims of the namespace and waits until they are gone. Most are about to go; one that nobody knows of any more would wait for ever:
// a containerd that died while it removed a container forgets it. The containers themselves are gone by now.
func (r *Runtime) endShims(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTime)
	defer cancel()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range lines {
		line, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(line), "\x00-namespace\x00"+r.o.Namespace+"\x00") || !strings.Contains(string(line), "containerd-shim") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		ended, err := watchProcess(pid)
		if err != nil {
			continue // it is gone
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end the shim %d: %w", pid, err)
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return fmt.Errorf("end the shim %d: %w", pid, ctx.Err())
		}
	}
	return nil
}

// removeLeftovers removes leases, snapshots and content that nothing refers to any more.
func (r *Runtime) removeLeftovers(ctx context.Context) error {
	held, err := r.client.LeasesService().List(ctx)
	if err != nil {
		return wrap(err, "list leases")
	}
	for _, l := range held {
		if err := r.client.LeasesService().Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "remove lease %s", l.ID)
		}
	}
	// A snapshot can go when those that build on it are gone: remove leaves until none is left.
	sn := r.client.SnapshotService(r.o.Snapshotter)
	for {
		parents, names := map[string]bool{}, []string{}
		err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			parents[info.Parent] = true
			names = append(names, info.Name)
			return nil
		})
		if err != nil {
			return wrap(err, "list snapshots")
		}
		if len(names) == 0 {
			break
		}
		for _, name := range names {
			if parents[name] {
				continue
			}
			if err := sn.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
				return wrap(err, "remove snapshot %s", name)
			}
		}
	}
	return r.removeContent(ctx)
}
