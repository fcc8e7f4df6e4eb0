package containerd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

const cgroupRoot = "/sys/fs/cgroup"

// unified says whether the machine has only the second version of cgroups. With both, the controllers are on the first.
func unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// swapLimits says whether the kernel can limit swap: it may be built or booted without.
func swapLimits() bool {
	if unified() {
		// The root has no limits; any group below it that has the memory controller shows it.
		found, err := filepath.Glob(filepath.Join(cgroupRoot, "*", "memory.swap.max"))
		return err == nil && len(found) > 0
	}
	_, err := os.Stat(filepath.Join(cgroupRoot, "memory", "memory.memsw.limit_in_bytes"))
	return err == nil
}

// cgroup is a container's control group, read directly: that is a hundred times cheaper than asking containerd.
type cgroup struct {
	path    string // as in the container's spec: absolute below the root of each hierarchy
	unified bool
}

func openCgroup(p string, unified bool) cgroup { return cgroup{path: p, unified: unified} }

// read returns a file of the group; "" where it cannot be read.
func (g cgroup) read(controller, file string) string {
	if g.path == "" {
		return ""
	}
	p := path.Join(cgroupRoot, g.path, file)
	if !g.unified {
		p = path.Join(cgroupRoot, controller, g.path, file)
	}
	b, err := os.ReadFile(p)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// number reads a file of one number; 0 for "max", -1 and what is not there.
func (g cgroup) number(controller, file string) int64 { return number(g.read(controller, file)) }

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// field reads one line of a file of "name value" lines.
func (g cgroup) field(controller, file, name string) int64 {
	lines := bufio.NewScanner(bytes.NewBufferString(g.read(controller, file)))
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), " "); ok && k == name {
			return number(v)
		}
	}
	return 0
}

// limits are what the kernel enforces now.
func (g cgroup) limits() manifest.Resources {
	var r manifest.Resources
	if g.unified {
		r.Memory = manifest.Bytes(g.number("", "memory.max"))
		r.Pids = g.number("", "pids.max")
		if quota, period, ok := strings.Cut(g.read("", "cpu.max"), " "); ok {
			r.CPU = cpus(number(quota), number(period))
		}
		return r
	}
	// Without a limit the file shows the largest number of whole pages.
	if n := g.number("memory", "memory.limit_in_bytes"); n < 1<<62 {
		r.Memory = manifest.Bytes(n)
	}
	r.Pids = g.number("pids", "pids.max")
	r.CPU = cpus(g.number("cpu", "cpu.cfs_quota_us"), g.number("cpu", "cpu.cfs_period_us"))
	return r
}

func cpus(quota, period int64) manifest.CPU {
	if quota <= 0 || period <= 0 {
		return 0
	}
	return manifest.CPU(quota * 1e9 / period)
}

// oomKills counts the processes that the kernel killed because the group was over its memory limit. The group outlives its processes
// until the container is removed.
func (g cgroup) oomKills() int64 {
	if g.unified {
		return g.field("", "memory.events", "oom_kill")
	}
	return g.field("memory", "memory.oom_control", "oom_kill")
}

// first is the process of the group with the lowest number, which is the one that runc began with; 0 = there is none.
func (g cgroup) first() int {
	found := 0
	for line := range strings.Lines(g.read("pids", "cgroup.procs")) {
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && (found == 0 || pid < found) {
			found = pid
		}
	}
	return found
}

// frozen says whether the processes of the group are stopped as a whole.
func (g cgroup) frozen() bool {
	if g.unified {
		return g.read("", "cgroup.freeze") == "1"
	}
	return g.read("freezer", "freezer.state") == "FROZEN"
}

// Stats implements [worker.Inspector].
func (r *Runtime) Stats(ctx context.Context, id string) (worker.Stats, error) {
	rec, err := r.client.ContainerService().Get(r.in(ctx), id)
	if err != nil {
		return worker.Stats{}, wrap(err, "read what container %s uses", id)
	}
	g := openCgroup(rec.Labels[cgroupLabel], r.host.unified)
	var s worker.Stats
	var used, cache int64
	if g.unified {
		// The cache first: read after the whole, it could have grown beyond it.
		cache, used = g.field("", "memory.stat", "inactive_file"), g.number("", "memory.current")
		s.CPUTotal = time.Duration(g.field("", "cpu.stat", "usage_usec")) * time.Microsecond
		s.Pids = g.number("", "pids.current")
	} else {
		cache, used = g.field("memory", "memory.stat", "total_inactive_file"), g.number("memory", "memory.usage_in_bytes")
		s.CPUTotal = time.Duration(g.number("cpuacct", "cpuacct.usage"))
		s.Pids = g.number("pids", "pids.current")
	}
	if s.Pids == 0 && used == 0 && s.CPUTotal == 0 {
		return s, withKind(worker.ErrNotFound, "read what container %s uses: it does not run", id)
	}
	s.Memory = manifest.Bytes(max(used-cache, 0))
	return s, nil
}

// removeCgroups removes a group and all below it, in each hierarchy, and those above it that runc made on the way and that are empty now.
// A group that still has processes after a while is left, with an error.
func removeCgroups(ctx context.Context, parent string) error {
	if path.Clean(parent) == "/" {
		return nil
	}
	roots := []string{cgroupRoot}
	if !unified() {
		entries, err := os.ReadDir(cgroupRoot)
		if err != nil {
			return fmt.Errorf("list cgroup hierarchies: %w", err)
		}
		roots = roots[:0]
		for _, e := range entries {
			if e.IsDir() {
				roots = append(roots, filepath.Join(cgroupRoot, e.Name()))
			}
		}
	}
	for _, root := range roots {
		var dirs []string
		err := filepath.WalkDir(filepath.Join(root, parent), func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("list cgroups below %s: %w", parent, err)
		}
		for i := len(dirs) - 1; i >= 0; i-- { // children come after their parents
			if err := removeGroup(ctx, dirs[i]); err != nil {
				return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
			}
		}
		for above := path.Dir(parent); above != "/"; above = path.Dir(above) {
			if err := unix.Rmdir(filepath.Join(root, above)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				break // others use it
			}
		}
	}
	return nil
}

// emptyTime is how long a group may take to become empty: the kernel takes processes out of theirs some time after they were waited for.
const emptyTime = 10 * time.Second

// removeGroup removes one directory of a hierarchy, when it is empty.
func removeGroup(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, emptyTime)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
