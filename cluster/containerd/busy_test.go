package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// The tests below stage what otherwise only a busy machine shows.

// A shim that does not answer says nothing of its container.
func TestShimThatDoesNotAnswer(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("paused", "sleep", "600"))
	n.must(n.pause(n.ctx, "paused"))
	n.start(n.spec("ended", "exit", "3"))
	n.exited("ended")
	for _, id := range []string{"paused", "ended"} {
		was := n.get(id)
		shim := n.shim(id)
		n.must(unix.Kill(shim, unix.SIGSTOP))
		t.Cleanup(func() { _ = unix.Kill(shim, unix.SIGCONT) }) // before the node is removed
		n.until("the shim to stand still", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", shim))
			n.must(err)
			return strings.Contains(string(stat), ") T ")
		})
		// containerd gives up on it once, in which time the next call begins.
		got, err := n.client.TaskService().Get(n.in(n.ctx), &tasks.GetRequest{ContainerID: id})
		if !errdefs.IsDeadlineExceeded(native(err)) { // containerd 2
			n.must(err)
			if got.Process.Status != tasktypes.Status_UNKNOWN {
				t.Fatalf("%s: containerd says %v of a stopped shim", id, got.Process.Status)
			}
		}
		time.AfterFunc(5*time.Second, func() { _ = unix.Kill(shim, unix.SIGCONT) })
		all, err := n.List(n.ctx)
		n.must(err)
		now := all[slices.IndexFunc(all, func(c worker.Container) bool { return c.ID == id })]
		if now.Phase != was.Phase || now.PID != was.PID || now.ExitCode != was.ExitCode || !now.ExitedAt.Equal(was.ExitedAt) {
			t.Errorf("%s: while its shim does not answer it is %+v, before that %+v", id, now, was)
		}
		n.must(unix.Kill(shim, unix.SIGCONT))
	}
}

// shim finds the shim of a container.
func (n *node) shim(id string) int {
	n.t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	n.must(err)
	for _, file := range lines {
		line, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(line), "\x00-namespace\x00"+n.o.Namespace+"\x00-id\x00"+id+"\x00") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			n.must(err)
			return pid
		}
	}
	n.t.Fatalf("container %s has no shim", id)
	return 0
}

// A command whose time is over before it has started is ended all the same.
func TestCommandThatTimesOutWhileItStarts(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("app", "sleep", "600"))
	for _, limit := range []int{1, 5, 10, 20, 40, 80} {
		_, err := n.Exec(n.ctx, "app", worker.ExecRequest{Command: []string{"/app", "stubborn"}, Timeout: time.Duration(limit) * time.Millisecond})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("limit %d ms: %v", limit, err)
		}
	}
	n.until("the commands to be gone", func() bool {
		s, err := n.Stats(n.ctx, "app")
		n.must(err)
		group := openCgroup("/"+n.o.Namespace+"/node/app", n.host.unified)
		return s.Pids > 0 && len(strings.Fields(group.read("pids", "cgroup.procs"))) == 1
	})
	if left, _ := filepath.Glob(filepath.Join(n.o.StateDir, "fifo", "*")); len(left) > 0 {
		t.Errorf("pipes left behind: %v", left)
	}
}

// collect makes containerd collect what nobody holds, again and again until the test ends.
func (n *node) collect(d digest.Digest) {
	n.t.Helper()
	desc, err := n.descriptor(n.in(n.ctx), d)
	n.must(err)
	ctx, cancel := context.WithCancel(n.in(n.ctx))
	ended := make(chan error, 1)
	go func() {
		ended <- func() error {
			for i := 0; ctx.Err() == nil; i++ {
				rec := images.Image{Name: fmt.Sprintf("garbage:%d", i), Target: desc}
				if _, err := n.client.ImageService().Create(ctx, rec); err != nil {
					return err
				}
				if err := n.client.ImageService().Delete(ctx, rec.Name, images.SynchronousDelete()); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	n.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && ctx.Err() == nil {
			n.t.Error("collect:", err)
		}
	})
}

func TestGroupThatIsEmptyLate(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make control groups")
	}
	name := "/test-" + randomID()[:10]
	root := cgroupRoot
	if !unified() {
		root = filepath.Join(cgroupRoot, "pids")
	}
	dir := filepath.Join(root, name, "inner")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skip("control groups cannot be made here:", err)
	}
	t.Cleanup(func() { _, _ = os.Remove(dir), os.Remove(filepath.Dir(dir)) })
	idle := exec.Command("sleep", "600")
	if err := idle.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = idle.Wait() })
	t.Cleanup(func() { _ = idle.Process.Kill() })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(idle.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := removeCgroups(short, name); !errors.Is(err, unix.EBUSY) {
		t.Errorf("with a process that stays: %v", err)
	}
	removed := make(chan error, 1)
	go func() { removed <- removeCgroups(t.Context(), name) }()
	time.AfterFunc(100*time.Millisecond, func() { _ = idle.Process.Kill() })
	if err := <-removed; err != nil {
		t.Errorf("with a process that goes: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(dir)); !os.IsNotExist(err) {
		t.Errorf("the group is there: %v", err)
	}
}
