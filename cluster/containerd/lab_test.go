package containerd

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"

	"github.com/gitopsd/gitopsd/cluster/tasklog"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/conform/runtime"
	"github.com/gitopsd/gitopsd/fixtures/image"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// The tests below run real containers in a private containerd, which all tests of this process share; each test has a namespace, a cgroup and
// a state directory of its own, and checks at its end that nothing of it is left.

const patience = 60 * time.Second

// lab is the shared containerd.
var lab struct {
	once   sync.Once
	skip   string
	err    error
	dir    string
	keeper string
	sup    *Supervisor
	end    func()
	images sync.Map // name -> *image.Image
}

func TestMain(m *testing.M) {
	code := m.Run()
	if code != 0 && lab.sup != nil {
		if log, err := os.ReadFile(lab.sup.LogFile()); err == nil {
			fmt.Fprintf(os.Stderr, "the end of containerd's log:\n%s\n", log[max(0, len(log)-8<<10):])
		}
	}
	if lab.end != nil {
		lab.end()
	}
	os.Exit(code)
}

func startLab() {
	if os.Getuid() != 0 {
		lab.skip = "needs root to run containers"
		return
	}
	for _, program := range []string{"containerd", "runc", "containerd-shim-runc-v2"} {
		if _, err := exec.LookPath(program); err != nil {
			lab.skip = "needs " + program + ", which is not installed"
			return
		}
	}
	dir, err := os.MkdirTemp("", "gitopsd-containerd-")
	if err != nil {
		lab.err = err
		return
	}
	lab.dir = dir
	lab.keeper = filepath.Join(dir, "gitops-keeper")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", lab.keeper, "github.com/gitopsd/gitopsd/cmd/gitops-keeper")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		lab.err = fmt.Errorf("build the keeper: %w: %s", err, out)
		return
	}
	lab.sup = &Supervisor{Dir: filepath.Join(dir, "containerd")}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- lab.sup.Run(ctx) }()
	lab.end = func() {
		cancel()
		err := <-ended
		stop, done := context.WithTimeout(context.Background(), patience)
		defer done()
		if err == nil {
			err = lab.sup.Stop(stop)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "end of the lab:", err)
		}
		os.RemoveAll(dir)
	}
	ready, done := context.WithTimeout(ctx, patience)
	defer done()
	lab.err = lab.sup.Ready(ready)
}

// node is a runtime in a namespace of its own.
type node struct {
	*Runtime
	t    testing.TB
	ctx  context.Context
	logs string
}

func needLab(t testing.TB) {
	t.Helper()
	lab.once.Do(startLab)
	if lab.skip != "" {
		t.Skip(lab.skip)
	}
	if lab.err != nil {
		t.Fatal(lab.err)
	}
}

func newNode(t testing.TB) *node {
	t.Helper()
	needLab(t)
	n := &node{t: t, logs: filepath.Join(t.TempDir(), "logs")}
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	n.ctx = ctx
	o := nodeOptions()
	n.open(o)
	t.Cleanup(func() {
		defer cancel()
		if err := n.RemoveAll(ctx); err != nil {
			t.Error("remove all:", err)
		}
		n.Close()
		for _, left := range leftovers(o) {
			t.Error("left behind:", left)
		}
	})
	return n
}

func nodeOptions() Options {
	name := "test-" + randomID()[:10]
	return Options{Address: lab.sup.Address(), Namespace: name, CgroupParent: "/" + name + "/node", KeeperPath: lab.keeper,
		StateDir: filepath.Join(lab.dir, "state", name)}
}

func (n *node) open(o Options) {
	n.t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	r, err := Open(n.ctx, o)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Runtime = r
}

// leftovers looks for what a removed node must not leave: shims, keepers, mounts, cgroups, files.
func leftovers(o Options) []string {
	var left []string
	if entries, err := os.ReadDir("/proc"); err == nil {
		for _, e := range entries {
			cmd, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
			if err == nil && strings.Contains(string(cmd), o.Namespace) {
				left = append(left, "process "+strings.ReplaceAll(string(cmd), "\x00", " "))
			}
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, o.Namespace) {
				left = append(left, "mount "+line)
			}
		}
	}
	for _, pattern := range []string{filepath.Join(cgroupRoot, o.Namespace), filepath.Join(cgroupRoot, "*", o.Namespace), o.StateDir,
		filepath.Join("/run/containerd/runc", o.Namespace), filepath.Join(lab.sup.runDir(), "state", "*", o.Namespace, "*")} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	return left
}

// workload is the plain image of the workload, with a shell, users and a few files.
var workload = image.Spec{
	Name:  "lab/app:1",
	Users: []image.User{{Name: "app", UID: 1000, GID: 1000, Groups: map[string]int{"video": 44}}},
	Files: map[string]image.File{
		"/data":              {Dir: true, Mode: 0o750, UID: 1000, GID: 1000},
		"/data/hello":        {Content: "hello", Mode: 0o640, UID: 1000, GID: 44},
		"/data/sub/tool":     {Content: "#!/bin/sh\n", Mode: fs.ModeSetuid | 0o755},
		"/data/out":          {Link: "/etc/passwd"},
		"/narrow":            {Dir: true, Mode: 0o755},
		"/etc/not-a-program": {Content: "x", Mode: 0o644},
		"/way/in":            {Link: "/data"},
	},
}

// image brings an image to the node and returns its reference and digest.
func (n *node) image(spec image.Spec) (ref, digest string) {
	n.t.Helper()
	var img *image.Image
	if have, ok := lab.images.Load(spec.Name); ok {
		img = have.(*image.Image)
	} else {
		built, err := image.Build(n.ctx, spec)
		if err != nil {
			n.t.Fatal(err)
		}
		img = built
		lab.images.Store(spec.Name, img)
	}
	var tar bytes.Buffer
	if err := image.WriteTar(&tar, img); err != nil {
		n.t.Fatal(err)
	}
	refs, err := n.Import(n.ctx, &tar)
	if err != nil {
		n.t.Fatal(err)
	}
	if len(refs) != 1 {
		n.t.Fatalf("imported %q", refs)
	}
	return refs[0], img.Digest()
}

func (n *node) spec(id string, command ...string) worker.ContainerSpec {
	n.t.Helper()
	ref, digest := n.image(workload)
	return worker.ContainerSpec{
		ID: id, Image: ref, Digest: digest, Hostname: id, LogDir: filepath.Join(n.logs, id),
		Spec: manifest.Container{Name: id, Image: ref, Command: &command},
	}
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) start(s worker.ContainerSpec) {
	n.t.Helper()
	n.must(n.Create(n.ctx, s))
	n.must(n.Start(n.ctx, s.ID))
}

func (n *node) get(id string) worker.Container {
	n.t.Helper()
	list, err := n.List(n.ctx)
	n.must(err)
	for _, c := range list {
		if c.ID == id {
			return c
		}
	}
	n.t.Fatalf("container %s is not there", id)
	return worker.Container{}
}

// until waits for a condition.
func (n *node) until(what string, cond func() bool) {
	n.t.Helper()
	for end := time.Now().Add(patience); !cond(); {
		if time.Now().After(end) {
			n.t.Fatalf("waited too long for %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (n *node) exited(id string) worker.Container {
	n.t.Helper()
	n.until(id+" to end", func() bool { return n.get(id).Phase == worker.Exited })
	return n.get(id)
}

// output runs a container to its end and returns what it wrote.
func (n *node) output(s worker.ContainerSpec) string {
	n.t.Helper()
	n.start(s)
	n.exited(s.ID)
	return n.log(s)
}

// log returns a container's log so far. Removing the container makes it complete.
func (n *node) log(s worker.ContainerSpec) string {
	n.t.Helper()
	n.must(n.Remove(n.ctx, s.ID))
	return n.logged(s.LogDir)
}

func (n *node) logged(dir string) string {
	n.t.Helper()
	var b strings.Builder
	n.must(tasklog.Read(n.ctx, dir, tasklog.Query{}, func(e tasklog.Entry) error {
		b.Write(e.Text)
		b.WriteByte('\n')
		return nil
	}))
	return b.String()
}

// facts runs the workload's `info` with a spec and returns its lines by key; keys that repeat are joined by newlines.
func (n *node) facts(s worker.ContainerSpec) map[string]string {
	n.t.Helper()
	s.Spec.Command = &[]string{"info"}
	m := map[string]string{}
	for line := range strings.Lines(n.output(s)) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if m[k] != "" {
			v = m[k] + "\n" + v
		}
		m[k] = v
	}
	return m
}

func (n *node) pause(ctx context.Context, id string) error {
	_, err := n.client.TaskService().Pause(n.in(ctx), &tasks.PauseTaskRequest{ContainerID: id})
	return err
}

func TestRuntimeKeepsItsContract(t *testing.T) {
	needLab(t)
	runtime.Run(t, func(t *testing.T) runtime.World {
		n := newNode(t)
		ref, digest := n.image(workload)
		return runtime.World{Runtime: n.Runtime, Images: n.Runtime, Inspector: n.Runtime, Image: ref, Digest: digest, Pause: n.pause}
	})
}

func newNetNS() *syscall.SysProcAttr { return &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET} }

// serve runs an HTTP server on a loopback port and returns its address.
func serve(t *testing.T, s *http.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return l.Addr().String()
}
