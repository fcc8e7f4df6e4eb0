package containerd

import (
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// mounts lists what is mounted over the image: the system's file systems as in Docker, then the container's own mounts, outer ones first.
// A mount of the container at the place of a system one replaces it.
func mounts(c *worker.ContainerSpec, h host) []specs.Mount {
	shm := int64(c.Spec.Resources.ShmSize)
	if shm <= 0 {
		shm = defaultShm
	}
	access := "ro"
	if c.Spec.Privileged {
		access = "rw"
	}
	system := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{access, "nosuid", "noexec", "nodev"}},
	}
	// In the host's IPC namespace this shows the host's queues.
	system = append(system, specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue",
		Options: []string{"nosuid", "noexec", "nodev"}})
	switch c.IPCMode {
	case "host":
		system = append(system, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}})
	case "none":
	default:
		system = append(system, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}})
	}
	own := make([]specs.Mount, 0, len(c.Mounts)+1)
	for _, m := range c.Mounts {
		own = append(own, ownMount(m))
	}
	if c.Spec.Init || c.Spec.StdinOpen && !c.Spec.TTY {
		own = append(own, specs.Mount{Destination: keeperPath, Type: "bind", Source: h.keeper, Options: []string{"bind", "ro", "rprivate"}})
	}
	slices.SortStableFunc(own, func(a, b specs.Mount) int { return cmp.Compare(depth(a.Destination), depth(b.Destination)) })
	system = slices.DeleteFunc(system, func(s specs.Mount) bool {
		return slices.ContainsFunc(own, func(m specs.Mount) bool { return m.Destination == s.Destination })
	})
	return append(system, own...)
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

func ownMount(m worker.HostMount) specs.Mount {
	out := specs.Mount{Destination: path.Join("/", m.Target), Type: m.Type, Source: m.Source}
	if m.Type == "tmpfs" {
		out.Source = "tmpfs"
		out.Options = tmpfsOptions(m.Options)
		return out
	}
	var recursive, propagation bool
	for _, o := range m.Options {
		switch o {
		case "z", "Z", "nocopy", "cached", "delegated", "consistent":
			continue // SELinux labels, and words for engines on other systems
		case "bind", "rbind":
			recursive = true
		case "private", "rprivate", "shared", "rshared", "slave", "rslave":
			propagation = true
		}
		out.Options = append(out.Options, o)
	}
	if !recursive {
		out.Options = append(out.Options, "rbind")
	}
	if !propagation {
		out.Options = append(out.Options, "rprivate")
	}
	return out
}

// tmpfsOptions adds Docker's defaults for what the given options leave open.
func tmpfsOptions(given []string) []string {
	out := slices.Clone(given)
	for _, pair := range [][2]string{{"noexec", "exec"}, {"nosuid", "suid"}, {"nodev", "dev"}} {
		if !slices.Contains(given, pair[0]) && !slices.Contains(given, pair[1]) {
			out = append(out, pair[0])
		}
	}
	return out
}

// tmpfsMode is the mode that a tmpfs mount asks for in its options.
func tmpfsMode(options []string) (mode uint32, ok bool) {
	for _, o := range options {
		if v, found := strings.CutPrefix(o, "mode="); found {
			n, err := strconv.ParseUint(v, 8, 12)
			return uint32(n), err == nil
		}
	}
	return 0, false
}
