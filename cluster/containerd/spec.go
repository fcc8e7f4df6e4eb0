package containerd

import (
	"context"
	"fmt"
	"maps"
	"math"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// defaultCaps are the capabilities that a container of Docker has when nothing is said.
var defaultCaps = []string{
	"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP", "NET_BIND_SERVICE",
	"SYS_CHROOT", "KILL", "AUDIT_WRITE",
}

// Paths below /proc and /sys that tell of, or change, the host: hidden and read-only as in Docker.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

const (
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// keeperPath is where the keeper is mounted in containers that ask for an init process or an open standard input.
	keeperPath    = "/sbin/gitops-init"
	defaultShm    = 64 << 20
	maxOpenFiles  = 1 << 20
	cpuPeriod     = 100_000 // microseconds, the kernel's default
	minCPUQuota   = 1_000   // microseconds; the kernel refuses less
	userNSDefault = "host"
)

// host is what the machine offers; it decides what a spec can ask for.
type host struct {
	unified   bool   // cgroup v2 only
	swap      bool   // swap can be limited
	openFiles uint64 // the most that a process may have open
	apparmor  string // name of the loaded default profile; "" = no AppArmor
	keeper    string // host path of the keeper
	kernel    string // its release
}

// kernel is the release of the running kernel.
func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// openFiles is maxOpenFiles, or less where this process could not raise its own limit so far: then neither could runc.
func openFiles() uint64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024
	}
	return min(maxOpenFiles, r.Max)
}

// process is how the image and the spec together say to start: Docker's rules.
type process struct {
	args []string
	env  []string
	cwd  string
	user string
}

func mergeProcess(c *worker.ContainerSpec, img *worker.ImageConfig) (process, error) {
	var p process
	entrypoint, command := img.Entrypoint, img.Cmd
	if c.Spec.Entrypoint != nil {
		entrypoint = *c.Spec.Entrypoint
		if len(entrypoint) > 0 {
			command = nil
		}
	}
	if c.Spec.Command != nil && len(*c.Spec.Command) > 0 {
		command = *c.Spec.Command
	}
	p.args = slices.Concat(entrypoint, command)
	if len(p.args) == 0 {
		return p, permanent("image %s names no program to run: set `command:`", c.Image)
	}
	p.env = mergeEnv(c, img)
	p.cwd = path.Join("/", firstOf(c.Spec.WorkingDir, img.WorkingDir))
	p.user = firstOf(c.Spec.User, img.User)
	return p, nil
}

func firstOf(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

func mergeEnv(c *worker.ContainerSpec, img *worker.ImageConfig) []string {
	base := []string{defaultPath, "HOSTNAME=" + c.Hostname}
	if c.Hostname == "" {
		base = base[:1]
	}
	if c.Spec.TTY {
		base = append(base, "TERM=xterm")
	}
	values := map[string]string{}
	var order []string
	set := func(k, v string) {
		if _, ok := values[k]; !ok {
			order = append(order, k)
		}
		values[k] = v
	}
	for _, kv := range slices.Concat(base, img.Env) {
		k, v, _ := strings.Cut(kv, "=")
		set(k, v)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Spec.Env)) {
		set(k, c.Spec.Env[k])
	}
	env := make([]string, 0, len(order))
	for _, k := range order {
		if _, given := c.Spec.Env[k]; !given && slices.Contains(c.Spec.EnvUnset, k) {
			continue
		}
		env = append(env, k+"="+values[k])
	}
	return env
}

// buildSpec translates a container into what runc reads. It looks at the host only for the device nodes that the container asks for.
func buildSpec(c *worker.ContainerSpec, img *worker.ImageConfig, users *userFiles, h host) (*specs.Spec, error) {
	p, err := mergeProcess(c, img)
	if err != nil {
		return nil, err
	}
	user, err := users.lookup(p.user, c.Spec.Groups)
	if err != nil {
		return nil, err
	}
	if c.UserNS != "" && c.UserNS != userNSDefault {
		return nil, permanent("user namespace mode %q is not supported: the modes are \"\" and \"host\"", c.UserNS)
	}
	sec, err := parseSecurity(&c.Spec, h)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(&c.Spec)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "rootfs", Readonly: c.Spec.ReadOnly},
		Process: &specs.Process{
			Terminal: c.Spec.TTY, User: user, Args: p.args, Env: p.env, Cwd: p.cwd,
			NoNewPrivileges: sec.noNewPrivileges, ApparmorProfile: sec.apparmor,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps},
		},
		Hostname: c.Hostname,
		Linux: &specs.Linux{
			CgroupsPath:       c.Cgroup,
			MaskedPaths:       maskedPaths,
			ReadonlyPaths:     readonlyPaths,
			RootfsPropagation: "",
		},
	}
	if user.UID == 0 {
		// A process of another user would lose these at exec; Docker does not give them either.
		s.Process.Capabilities.Permitted, s.Process.Capabilities.Effective = caps, caps
	}
	// Also where it is 0: without a word a container has that of containerd, which service managers protect from the OOM killer.
	s.Process.OOMScoreAdj = &c.Spec.Resources.OOMScoreAdj
	if s.Process.Rlimits, err = rlimits(c.Spec.Ulimits, h); err != nil {
		return nil, err
	}
	s.Linux.Namespaces, s.Linux.Sysctl = ownNamespaces(c, h)
	s.Linux.Resources = resources(&c.Spec.Resources, h)
	if err := devices(s, &c.Spec); err != nil {
		return nil, err
	}
	s.Mounts = mounts(c, h)
	if c.Spec.Privileged || sec.systemPathsOpen {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	}
	switch {
	case c.Spec.Init:
		s.Process.Args = append([]string{keeperPath, "init"}, initArgs(c, p.args)...)
	case c.Spec.StdinOpen && !c.Spec.TTY:
		s.Process.Args = append([]string{keeperPath, "exec"}, initArgs(c, p.args)...)
	}
	switch {
	case c.Spec.SeccompDigest() != "":
		if s.Linux.Seccomp, err = ownProfile(c.Seccomp, caps, h); err != nil {
			return nil, err
		}
	case !c.Spec.Privileged && !sec.seccompOff:
		profile := seccomp.DefaultProfile(s)
		// Docker's profile names the x32 ABI too, which distributions' kernels switch off: a third of what runc compiles at each start, for nothing.
		profile.Architectures = slices.DeleteFunc(profile.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
		s.Linux.Seccomp = profile
	}
	return s, nil
}

// ownProfile reads a seccomp profile of the repository and picks what holds for the container here.
func ownProfile(file string, caps []string, h host) (*specs.LinuxSeccomp, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the seccomp profile: %w", err)
	}
	profile, err := manifest.ParseSeccomp(data)
	if err != nil {
		return nil, permanent("the seccomp profile: %v", err)
	}
	f := profile.Filter(manifest.SeccompMachine{Arch: runtime.GOARCH, Kernel: h.kernel, Caps: caps})
	out := &specs.LinuxSeccomp{DefaultAction: specs.LinuxSeccompAction(f.DefaultAction), DefaultErrnoRet: f.DefaultErrnoRet}
	for _, a := range f.Architectures {
		out.Architectures = append(out.Architectures, specs.Arch(a))
	}
	for _, flag := range f.Flags {
		out.Flags = append(out.Flags, specs.LinuxSeccompFlag(flag))
	}
	for _, r := range f.Rules {
		call := specs.LinuxSyscall{Names: r.Names, Action: specs.LinuxSeccompAction(r.Action), ErrnoRet: r.ErrnoRet}
		for _, a := range r.Args {
			call.Args = append(call.Args, specs.LinuxSeccompArg{Index: a.Index, Value: a.Value, ValueTwo: a.ValueTwo, Op: specs.LinuxSeccompOperator(a.Op)})
		}
		out.Syscalls = append(out.Syscalls, call)
	}
	return out, nil
}

// initArgs are the keeper's arguments inside the container: whether standard input never ends, and the program.
func initArgs(c *worker.ContainerSpec, args []string) []string {
	if c.Spec.StdinOpen && !c.Spec.TTY {
		return append([]string{"-stdin", "--"}, args...)
	}
	return append([]string{"--"}, args...)
}

// security is what security_opt and its relatives say.
type security struct {
	noNewPrivileges bool
	seccompOff      bool
	systemPathsOpen bool
	apparmor        string
}

func parseSecurity(c *manifest.Container, h host) (security, error) {
	sec := security{noNewPrivileges: c.NoNewPrivs, apparmor: h.apparmor}
	if c.Privileged {
		sec.apparmor = ""
	}
	for _, opt := range c.SecurityOpt {
		key, value, found := strings.Cut(opt, "=")
		if !found {
			key, value, _ = strings.Cut(opt, ":")
		}
		switch key {
		case "no-new-privileges":
			on := true
			if value != "" {
				v, err := strconv.ParseBool(value)
				if err != nil {
					return sec, permanent("security_opt %q: want no-new-privileges, or with :true or :false", opt)
				}
				on = v
			}
			sec.noNewPrivileges = on
		case "seccomp":
			if sec.seccompOff = value == "unconfined"; !sec.seccompOff && c.SeccompDigest() == "" {
				return sec, permanent("security_opt %q: want seccomp=unconfined, or a profile that was read from the repository", opt)
			}
		case "apparmor":
			switch {
			case value == "unconfined":
				sec.apparmor = ""
			case h.apparmor == "":
				return sec, permanent("security_opt %q: this node's kernel has no AppArmor", opt)
			default:
				sec.apparmor = value
			}
		case "systempaths":
			if value != "unconfined" {
				return sec, permanent("security_opt %q: want systempaths=unconfined", opt)
			}
			sec.systemPathsOpen = true
		case "label":
			// Labels are SELinux's. Without it they say nothing; Docker takes them all the same.
		default:
			return sec, permanent("security_opt %q is not known", opt)
		}
	}
	return sec, nil
}

// capabilities follows Docker: ALL dropped leaves what is added; ALL added leaves what is not dropped; else the default list, less
// what is dropped, and what is added.
func capabilities(c *manifest.Container) ([]string, error) {
	all, err := cap.Current()
	if err != nil {
		return nil, fmt.Errorf("read this process's capabilities: %w", err)
	}
	if c.Privileged {
		return all, nil
	}
	known := cap.Known()
	norm := func(list []string) ([]string, bool, error) {
		out, everything := make([]string, 0, len(list)), false
		for _, name := range list {
			name = strings.TrimPrefix(strings.ToUpper(name), "CAP_")
			if name == "ALL" {
				everything = true
				continue
			}
			if !slices.Contains(known, "CAP_"+name) {
				return nil, false, permanent("capability %q is not known", name)
			}
			out = append(out, "CAP_"+name)
		}
		return out, everything, nil
	}
	add, addAll, err := norm(c.CapAdd)
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := norm(c.CapDrop)
	if err != nil {
		return nil, err
	}
	var caps []string
	switch {
	case dropAll && addAll:
		caps = slices.Clone(all)
	case dropAll:
		caps = add
	case addAll:
		caps = without(all, drop)
	default:
		base := make([]string, len(defaultCaps))
		for i, name := range defaultCaps {
			base[i] = "CAP_" + name
		}
		caps = append(without(base, drop), add...)
	}
	slices.Sort(caps)
	caps = slices.Compact(caps)
	for _, name := range caps {
		if !slices.Contains(all, name) {
			return nil, permanent("capability %s cannot be given: this node's agent does not have it", strings.TrimPrefix(name, "CAP_"))
		}
	}
	return caps, nil
}

func without(list, drop []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(drop, s) })
}

func rlimits(list []manifest.Ulimit, h host) ([]specs.POSIXRlimit, error) {
	// As many open files as a service on the host may have; without a line runc would pass on the limit of whoever started containerd.
	out := []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: h.openFiles, Hard: h.openFiles}}
	value := func(v int64) uint64 {
		if v < 0 {
			return math.MaxUint64
		}
		return uint64(v)
	}
	names := []string{
		"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
		"sigpending", "stack",
	}
	for _, u := range list {
		name := strings.ToLower(u.Name)
		if !slices.Contains(names, name) {
			return nil, permanent("ulimit %q is not known", u.Name)
		}
		r := specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(name), Soft: value(u.Soft), Hard: value(u.Hard)}
		if r.Soft > r.Hard {
			return nil, permanent("ulimit %s: the soft limit is above the hard one", u.Name)
		}
		if name == "nofile" {
			out[0] = r
			continue
		}
		out = append(out, r)
	}
	return out, nil
}

func ownNamespaces(c *worker.ContainerSpec, h host) ([]specs.LinuxNamespace, map[string]string) {
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.UTSNamespace}}
	if c.PIDMode != "host" {
		ns = append(ns, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if c.IPCMode != "host" {
		ns = append(ns, specs.LinuxNamespace{Type: specs.IPCNamespace})
	}
	if h.unified && !c.Spec.Privileged {
		ns = append(ns, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	sysctls := map[string]string{}
	if c.NetNS != "" {
		ns = append(ns, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: c.NetNS})
		// Any user may bind any port and ping, as in Docker.
		sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
		sysctls["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	if c.Domain != "" {
		sysctls["kernel.domainname"] = c.Domain
	}
	maps.Copy(sysctls, c.Sysctls)
	return ns, sysctls
}

// resources translates limits for a new container: what is not limited is left out.
func resources(r *manifest.Resources, h host) *specs.LinuxResources {
	out := &specs.LinuxResources{Memory: memory(r, h), CPU: &specs.LinuxCPU{Cpus: r.CPUSet}}
	if r.CPU > 0 {
		quota, period := cpuQuota(r.CPU), uint64(cpuPeriod)
		out.CPU.Quota, out.CPU.Period = &quota, &period
	}
	if r.CPUShares > 0 {
		out.CPU.Shares = &r.CPUShares
	}
	if r.Pids > 0 {
		out.Pids = &specs.LinuxPids{Limit: &r.Pids}
	}
	return out
}

func cpuQuota(c manifest.CPU) int64 { return max(int64(c)/(1e9/cpuPeriod), minCPUQuota) }

func memory(r *manifest.Resources, h host) *specs.LinuxMemory {
	m := &specs.LinuxMemory{}
	if limit := int64(r.Memory); limit > 0 {
		m.Limit = &limit
		if h.swap {
			swap := int64(r.MemorySwap)
			if swap == 0 {
				swap = 2 * limit // Docker's default: as much swap as memory
			}
			m.Swap = &swap
		}
	}
	if soft := int64(r.ReserveMemory); soft > 0 {
		m.Reservation = &soft // what the kernel leaves the container when memory is short
	}
	if !h.unified {
		if r.Swappiness != nil && *r.Swappiness >= 0 {
			v := uint64(*r.Swappiness)
			m.Swappiness = &v
		}
		if r.OOMKillDisable {
			m.DisableOOMKiller = &r.OOMKillDisable
		}
	}
	return m
}

// unlimited fills in what resources leaves out, so that an update also takes limits away.
func unlimited(r *specs.LinuxResources, h host) *specs.LinuxResources {
	none, shares := int64(-1), uint64(1024)
	if r.Memory.Limit == nil {
		r.Memory.Limit = &none
		if h.swap {
			r.Memory.Swap = &none
		}
	}
	if r.Memory.Reservation == nil && !h.unified { // with cgroup v2 the same number would protect all that it uses
		r.Memory.Reservation = &none
	}
	if r.CPU.Quota == nil {
		period := uint64(cpuPeriod)
		r.CPU.Quota, r.CPU.Period = &none, &period
	}
	if r.CPU.Shares == nil {
		r.CPU.Shares = &shares
	}
	if r.Pids == nil {
		r.Pids = &specs.LinuxPids{Limit: &none}
	}
	return r
}

// devices adds the device nodes and the rules for them. Everything but the harmless nodes that every container has (null, zero, random,
// tty …; runc adds those itself) is denied first.
func devices(s *specs.Spec, c *manifest.Container) error {
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	if c.Privileged {
		list, err := oci.HostDevices()
		if err != nil {
			return fmt.Errorf("list the host's devices: %w", err)
		}
		s.Linux.Devices = list
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	for _, d := range c.Devices {
		target := firstOf(d.Target, d.Source)
		access := firstOf(d.Permissions, "rwm")
		if strings.Trim(access, "rwm") != "" {
			return permanent("device %s: permissions %q: want letters of rwm", d.Source, access)
		}
		if err := oci.WithDevices(d.Source, target, access)(context.Background(), nil, nil, s); err != nil {
			if os.IsNotExist(err) {
				return fmt.Errorf("device %s is not on this node", d.Source)
			}
			return fmt.Errorf("device %s: %w", d.Source, err)
		}
	}
	for _, rule := range c.CgroupRules {
		d, err := deviceRule(rule)
		if err != nil {
			return err
		}
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, d)
	}
	return nil
}

// deviceRule reads the form of the kernel's device cgroup: "c 42:* rwm".
func deviceRule(rule string) (specs.LinuxDeviceCgroup, error) {
	bad := permanent("device_cgroup_rules %q: want a rule such as `c 42:* rmw`", rule)
	f := strings.Fields(rule)
	if len(f) != 3 || !slices.Contains([]string{"a", "b", "c"}, f[0]) || strings.Trim(f[2], "rwm") != "" {
		return specs.LinuxDeviceCgroup{}, bad
	}
	major, minor, ok := strings.Cut(f[1], ":")
	if !ok {
		return specs.LinuxDeviceCgroup{}, bad
	}
	d := specs.LinuxDeviceCgroup{Allow: true, Type: f[0], Access: f[2]}
	for _, part := range []struct {
		text string
		to   **int64
	}{{major, &d.Major}, {minor, &d.Minor}} {
		if part.text == "*" {
			continue
		}
		n, err := strconv.ParseInt(part.text, 10, 32)
		if err != nil || n < 0 {
			return specs.LinuxDeviceCgroup{}, bad
		}
		*part.to = &n
	}
	return d, nil
}
