package containerd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// device makes a block device with an ext4 file system, gone with the test.
func device(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	for _, args := range [][]string{{"truncate", "-s", "16M", file}, {"mkfs.ext4", "-q", file}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("needs a file system to mount: %s: %v: %s", args[0], err, out)
		}
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skipf("needs a loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// A volume with a file system of its own is mounted by the host, whatever networks the container has, and shared by all that mount it, each as writable
// as it says. The host has no mount of it left once a container is made, and what a container has stays.
func TestVolumeWithAFileSystemOfItsOwn(t *testing.T) {
	n := newNode(t)
	dev := device(t)
	on := func(id, access string, command ...string) worker.ContainerSpec {
		s := n.spec(id, command...)
		s.Mounts = []worker.HostMount{{Type: "bind", Source: "sub/dir", Target: "/share", Options: []string{"rbind", access},
			From: &worker.FileSystem{Type: "ext4", Device: dev, Options: []string{"rw", "noatime"}}}}
		return s
	}
	writer := on("writer", "rw", "sh", "-c", "touch /share/mine; sleep 600")
	n.start(writer)
	if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(table), dev) {
		t.Errorf("%s is still mounted on the host (%v)", dev, err)
	}
	reader := on("reader", "ro", "sh", "-c", "touch /share/other; ls /share; cat /proc/self/mountinfo")
	try := 0
	n.until("the writer to have written", func() bool {
		try++
		reader.ID = fmt.Sprint("reader-", try)
		reader.LogDir = filepath.Join(n.logs, reader.ID)
		out := n.output(reader)
		if !strings.Contains(out, "read-only file system") || !strings.Contains(out, "noatime") {
			t.Fatalf("the reader says\n%s", out)
		}
		return strings.Contains(out, "mine")
	})
	n.must(n.Remove(n.ctx, "writer"))
}

func TestMountErrorsTellTheWayOutAndNoPassword(t *testing.T) {
	n := newNode(t)
	for _, test := range []struct {
		from      worker.FileSystem
		want      string
		permanent bool
	}{
		{worker.FileSystem{Type: "nosuchfs", Device: "//nas/films", Options: []string{"password=hush"}}, "no file systems of the type nosuchfs: install", false},
		{worker.FileSystem{Type: "ext4", Device: "/no/such/device"}, "mount /no/such/device at /share: no such file", false},
		{worker.FileSystem{Type: "tmpfs", Device: "x", Options: []string{"password=hush"}}, "does not take it with these options", false},
		{worker.FileSystem{Type: "fuse3.touch", Device: "/tmp/run-by-a-volume"}, "FUSE file systems are not mounted here", true},
	} {
		s := n.spec("app", "info")
		s.Mounts = []worker.HostMount{{Type: "bind", Target: "/share", Options: []string{"rbind"}, From: &test.from}}
		err := n.Create(n.ctx, s)
		if text := fmt.Sprint(err); err == nil || !strings.Contains(text, test.want) || strings.Contains(text, "hush") || errors.Is(err, worker.ErrPermanent) != test.permanent {
			t.Errorf("%+v: got %v, want %q, permanent: %v", test.from, err, test.want, test.permanent)
		}
	}
	if left, err := filepath.Glob(filepath.Join(n.o.StateDir, mountPrefix+"*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
