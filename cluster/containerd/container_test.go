package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/tasklog"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/image"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

func TestProcessIsWhatImageAndSpecSay(t *testing.T) {
	n := newNode(t)
	s := n.spec("app")
	s.Domain = "example.org"
	s.Spec.WorkingDir = "/made/for/it"
	s.Spec.User = "app"
	s.Spec.Groups = []string{"1234"}
	s.Spec.Ulimits = []manifest.Ulimit{{Name: "nproc", Soft: 500, Hard: 600}}
	s.Spec.Resources.OOMScoreAdj = 321
	f := n.facts(s)
	for key, want := range map[string]string{
		"uid": "1000", "gid": "1000", "groups": "44 1000 1234", "cwd": "/made/for/it", "hostname": "app",
		"cap_eff": "0000000000000000", "nnp": "0", "seccomp": "2", "oom_score_adj": "321",
	} {
		if f[key] != want {
			t.Errorf("%s is %q, want %q", key, f[key], want)
		}
	}
	if !strings.Contains(f["limit"], "Max processes 500 600") {
		t.Errorf("limits:\n%s", f["limit"])
	}
}

// capMask is the set of capabilities as /proc shows it.
func capMask(numbers ...int) string {
	var m uint64
	for _, n := range numbers {
		m |= 1 << n
	}
	return fmt.Sprintf("%016x", m)
}

func TestHardeningIsDockersAndCanBeChanged(t *testing.T) {
	n := newNode(t)
	dockers := capMask(unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW,
		unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT,
		unix.CAP_KILL, unix.CAP_AUDIT_WRITE)
	tests := []struct {
		name string
		set  func(*manifest.Container)
		want map[string]string
	}{
		{"default", func(*manifest.Container) {},
			map[string]string{"cap_bnd": dockers, "cap_eff": dockers, "cap_inh": capMask(), "seccomp": "2", "nnp": "0"}},
		{"dropall", func(c *manifest.Container) { c.CapDrop, c.CapAdd = []string{"ALL"}, []string{"NET_BIND_SERVICE"} },
			map[string]string{"cap_bnd": capMask(unix.CAP_NET_BIND_SERVICE), "cap_eff": capMask(unix.CAP_NET_BIND_SERVICE)}},
		{"unconfined", func(c *manifest.Container) { c.SecurityOpt = []string{"seccomp=unconfined", "no-new-privileges:true"} },
			map[string]string{"seccomp": "0", "nnp": "1"}},
		{"privileged", func(c *manifest.Container) { c.Privileged = true }, map[string]string{"seccomp": "0"}},
	}
	for _, test := range tests {
		s := n.spec(test.name)
		test.set(&s.Spec)
		f := n.facts(s)
		for key, want := range test.want {
			if f[key] != want {
				t.Errorf("%s: %s is %s, want %s", test.name, key, f[key], want)
			}
		}
		masked := strings.Contains(f["mount"], " /proc/keys ")
		if privileged := test.name == "privileged"; masked == privileged {
			t.Errorf("%s: /proc/keys masked: %v", test.name, masked)
		}
	}
}

// A profile of the repository holds in place of the default one, also where the container is privileged, and its conditions are about the
// container's own capabilities.
func TestOwnSeccompProfileHolds(t *testing.T) {
	n := newNode(t)
	file := filepath.Join(t.TempDir(), "profile.json")
	n.must(os.WriteFile(file, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [
		{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}, {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []}],
		"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}}]}`), 0o644))
	tests := []struct {
		name string
		set  func(*manifest.Container)
		want string
	}{
		{"forbidden", func(*manifest.Container) {}, "operation not permitted"},
		{"excluded", func(c *manifest.Container) { c.CapAdd = []string{"SYS_ADMIN"} }, "made"},
		{"privileged", func(c *manifest.Container) { c.Privileged = true }, "made"},
		{"narrower", func(c *manifest.Container) { c.CapDrop = []string{"ALL"}; c.CapAdd = []string{"DAC_OVERRIDE"} }, "operation not permitted"},
	}
	for _, test := range tests {
		s := n.spec(test.name, "sh", "-c", "mkdir /made && ls /; cat /proc/self/status")
		s.Spec.SecurityOpt, s.Seccomp = []string{manifest.SeccompAllows + "sha256:00"}, file
		test.set(&s.Spec)
		out := n.output(s)
		if !strings.Contains(out, test.want) || !strings.Contains(out, "Seccomp:\t2") {
			t.Errorf("%s: want %q in\n%s", test.name, test.want, out)
		}
	}
	s := n.spec("bad")
	s.Spec.SecurityOpt, s.Seccomp = []string{manifest.SeccompDenies + "sha256:00"}, lab.keeper
	if err := n.Create(n.ctx, s); !errors.Is(err, worker.ErrPermanent) || !strings.Contains(fmt.Sprint(err), "the seccomp profile") {
		t.Errorf("a profile that is none: %v", err)
	}
	s.Seccomp = file + ".gone"
	if err := n.Create(n.ctx, s); err == nil || errors.Is(err, worker.ErrPermanent) {
		t.Errorf("a profile that is not there: %v, want a passing error", err)
	}
}

func TestReadOnlyRootLeavesItsMountsWritable(t *testing.T) {
	n := newNode(t)
	volume := t.TempDir()
	s := n.spec("app", "sh", "-c", "touch /x; touch /data/x; touch /volume/x && echo volume; touch /scratch/x && echo scratch; touch /ro/x")
	s.Spec.ReadOnly = true
	s.Mounts = []worker.HostMount{
		{Type: "bind", Source: volume, Target: "/volume", Options: []string{"rw"}},
		{Type: "bind", Source: volume, Target: "/ro", Options: []string{"ro"}},
		{Type: "tmpfs", Target: "/scratch"},
	}
	out := n.output(s)
	for _, want := range []string{"volume\n", "scratch\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if got := strings.Count(out, "read-only file system"); got != 3 {
		t.Errorf("%d writes refused, want 3:\n%s", got, out)
	}
}

// A tmpfs takes the mode that it asks for although the image has a narrower directory there, so that any user can write.
func TestTmpfsModeWinsOverTheImages(t *testing.T) {
	n := newNode(t)
	s := n.spec("app", "sh", "-c", "touch /narrow/x && ls -d /narrow; ls /narrow")
	s.Spec.User = "app"
	s.Mounts = []worker.HostMount{{Type: "tmpfs", Target: "/narrow", Options: []string{"mode=1777", "size=1m"}}}
	if out := n.output(s); strings.Contains(out, "denied") || !strings.Contains(out, "x") {
		t.Errorf("output:\n%s", out)
	}
	s = n.spec("kept", "info")
	s.Mounts = []worker.HostMount{{Type: "tmpfs", Target: "/narrow", Options: []string{"size=1m", "exec"}}}
	mount := ""
	for line := range strings.Lines(n.facts(s)["mount"]) {
		if strings.Contains(line, " /narrow ") {
			mount = line
		}
	}
	if !strings.Contains(mount, "size=1024k") || strings.Contains(mount, "noexec") || !strings.Contains(mount, "nosuid") {
		t.Errorf("mounted as %s", mount)
	}
}

func TestEmptyVolumeIsFilledFromTheImage(t *testing.T) {
	n := newNode(t)
	volume, used := t.TempDir(), t.TempDir()
	n.must(os.WriteFile(filepath.Join(used, "mine"), []byte("mine"), 0o600))
	s := n.spec("app", "sh", "-c", "cat /data/hello; ls /data; touch /data/new")
	s.Spec.User = "app"
	s.Mounts = []worker.HostMount{
		{Type: "bind", Source: volume, Target: "/data", CopyUp: true},
		{Type: "bind", Source: used, Target: "/way", CopyUp: true},
	}
	if out := n.output(s); !strings.HasPrefix(out, "hello") {
		t.Errorf("output:\n%s", out)
	}
	if _, err := os.Stat(filepath.Join(volume, "new")); err != nil {
		t.Error("the image's owner could not write:", err)
	}
	for name, want := range map[string]string{".": "1000:1000 750", "hello": "1000:44 640", "sub/tool": "0:0 4755"} {
		var st unix.Stat_t
		n.must(unix.Lstat(filepath.Join(volume, name), &st))
		if got := fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode&0o7777); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if to, err := os.Readlink(filepath.Join(volume, "out")); to != "/etc/passwd" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if names, _ := filepath.Glob(used + "/*"); len(names) != 1 {
		t.Errorf("a volume in use was changed: %v", names)
	}
	// The second container finds the volume as the first left it.
	n.must(os.Remove(filepath.Join(volume, "hello")))
	s.ID, s.LogDir = "again", s.LogDir+"2"
	if out := n.output(s); !strings.Contains(out, "no such file") {
		t.Errorf("the volume was filled again:\n%s", out)
	}
}

func TestTerminalAndEndlessInput(t *testing.T) {
	n := newNode(t)
	tty := n.spec("tty", "sh", "-c", "test -t 0 && echo a terminal; env TERM")
	tty.Spec.TTY = true
	n.start(tty)
	n.exited("tty")
	if out := n.log(tty); !strings.Contains(out, "xterm") {
		t.Errorf("output on a terminal:\n%s", out)
	}
	// Without an open input cat ends at once; with one it waits.
	n.start(n.spec("closed", "cat"))
	if c := n.exited("closed"); c.ExitCode != 0 {
		t.Errorf("cat without an input: %+v", c)
	}
	for _, init := range []bool{false, true} {
		open := n.spec(fmt.Sprint("open", init), "cat")
		open.Spec.StdinOpen, open.Spec.Init = true, init
		n.start(open)
		if _, err := n.Exec(n.ctx, open.ID, worker.ExecRequest{Command: []string{"/app", "true"}}); err != nil {
			t.Fatal(err)
		}
		if c := n.get(open.ID); c.Phase != worker.Running {
			t.Errorf("init %v: cat with an open input ended: %+v", init, c)
		}
	}
	silent := n.spec("silent", "echo", "nobody hears this")
	silent.Spec.TTY, silent.Spec.Logging.Off = true, true
	n.start(silent)
	n.exited("silent")
}

func TestInitReapsAndPassesSignalsOn(t *testing.T) {
	n := newNode(t)
	s := n.spec("app", "sleep", "600")
	s.Spec.Init = true
	n.start(s)
	var out bytes.Buffer
	if _, err := n.Exec(n.ctx, "app", worker.ExecRequest{Command: []string{"/app", "cat", "/proc/1/cmdline"}, Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), keeperPath+"\x00init\x00") {
		t.Errorf("the first process is %q", &out)
	}
	n.must(n.Stop(n.ctx, "app", "SIGTERM", patience))
	if c := n.get("app"); c.ExitCode != 143 {
		t.Errorf("exit code %d, want the program's 143", c.ExitCode)
	}
	for code, command := range map[int][]string{7: {"exit", "7"}, 127: nil} {
		s := n.spec(fmt.Sprint("code", code), command...)
		s.Spec.Init = true
		if command == nil {
			s.Spec.Entrypoint = &[]string{"nothing-of-this-name"}
		}
		n.start(s)
		if c := n.exited(s.ID); c.ExitCode != code {
			t.Errorf("exit code %d, want %d", c.ExitCode, code)
		}
	}
	bare, digest := n.image(image.Spec{Name: "lab/bare:1", Bare: true})
	b := n.spec("bare", "sleep", "600")
	b.Image, b.Digest, b.Spec.Init, b.Spec.ReadOnly = bare, digest, true, true
	n.start(b)
	if c := n.get("bare"); c.Phase != worker.Running {
		t.Errorf("in an image without anything: %+v", c)
	}
}

func TestMistakesArePermanentAndSayTheWayOut(t *testing.T) {
	n := newNode(t)
	tests := []struct {
		name, want string
		set        func(*worker.ContainerSpec)
	}{
		{"missing", `no executable "/bin/nothing"`, func(s *worker.ContainerSpec) { s.Spec.Entrypoint = &[]string{"/bin/nothing"} }},
		{"not on the path", `no executable "nothing"`, func(s *worker.ContainerSpec) { s.Spec.Entrypoint = &[]string{"nothing"} }},
		{"not executable", "permission denied", func(s *worker.ContainerSpec) { s.Spec.Entrypoint = &[]string{"/etc/not-a-program"} }},
		{"a directory", `"/data"`, func(s *worker.ContainerSpec) { s.Spec.Entrypoint = &[]string{"/data"} }},
		{"no such user", `user "nobody-here"`, func(s *worker.ContainerSpec) { s.Spec.User = "nobody-here" }},
		{"no such group", `group_add`, func(s *worker.ContainerSpec) { s.Spec.Groups = []string{"nogroup-here"} }},
		{"no such capability", `"FLY"`, func(s *worker.ContainerSpec) { s.Spec.CapAdd = []string{"FLY"} }},
		{"own profile", "profile.json", func(s *worker.ContainerSpec) { s.Spec.SecurityOpt = []string{"seccomp=profile.json"} }},
		{"bad option", `"frobnicate"`, func(s *worker.ContainerSpec) { s.Spec.SecurityOpt = []string{"frobnicate"} }},
		{"bad rule", "device_cgroup_rules", func(s *worker.ContainerSpec) { s.Spec.CgroupRules = []string{"x 1:3 rwm"} }},
		{"other platform", "linux/s390x", func(s *worker.ContainerSpec) { s.Spec.Platform = "linux/s390x" }},
		{"bad platform", `"///"`, func(s *worker.ContainerSpec) { s.Spec.Platform = "///" }},
		{"user namespace", "user namespace", func(s *worker.ContainerSpec) { s.UserNS = "own" }},
	}
	for _, test := range tests {
		s := n.spec("app")
		test.set(&s)
		err := n.Create(n.ctx, s)
		if err == nil {
			err = n.Start(n.ctx, s.ID)
			n.must(n.Remove(n.ctx, s.ID))
		}
		if !errors.Is(err, worker.ErrPermanent) || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("%s: error %v, want a permanent one with %q", test.name, err, test.want)
		}
	}
	// What is missing on the host may come back: no permanent error, but one that names it.
	for want, set := range map[string]func(*worker.ContainerSpec){
		"/no/such/place": func(s *worker.ContainerSpec) {
			s.Mounts = []worker.HostMount{{Type: "bind", Source: "/no/such/place", Target: "/x"}}
		},
		"/dev/no-such-device": func(s *worker.ContainerSpec) { s.Spec.Devices = []manifest.Device{{Source: "/dev/no-such-device"}} },
	} {
		s := n.spec("app")
		set(&s)
		if err := n.Create(n.ctx, s); err == nil || errors.Is(err, worker.ErrPermanent) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want a passing one with %q", err, want)
		}
	}
	if list, err := n.List(n.ctx); err != nil || len(list) > 0 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}

func TestImagesVolumesHealthAndConfigAreRead(t *testing.T) {
	n := newNode(t)
	ref, digest := n.image(image.Spec{
		Name: "lab/config:2", Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, User: "app:video",
		WorkingDir: "/data", Volumes: []string{"/b", "/a"},
		ExposedPorts: []string{"9090/udp", "8080/tcp"}, StopSignal: "SIGINT", Env: map[string]string{"K": "v"},
		Users:  workload.Users,
		Health: &image.Health{Test: []string{"CMD-SHELL", "true"}, Interval: 3 * time.Second, Timeout: 2 * time.Second, Retries: 4},
	})
	img, err := n.Ensure(n.ctx, ref, digest, "")
	n.must(err)
	c := img.Config
	if fmt.Sprintf("%v %v %v %v %v %v %v", c.Volumes, c.Ports, c.StopSignal, c.WorkingDir, c.User, c.Entrypoint, c.Cmd) !=
		"[/a /b] [8080/tcp 9090/udp] SIGINT /data app:video [/app] [serve]" || !slices.Contains(c.Env, "K=v") {
		t.Errorf("config %+v", c)
	}
	want := manifest.Health{Test: []string{"CMD-SHELL", "true"},
		Interval: manifest.Duration(3 * time.Second), Timeout: manifest.Duration(2 * time.Second), Retries: 4}
	if c.Health == nil || fmt.Sprint(*c.Health) != fmt.Sprint(want) {
		t.Errorf("health %+v, want %+v", c.Health, want)
	}
	s := n.spec("app", "info")
	s.Image, s.Digest, s.Spec.Entrypoint = ref, digest, nil
	if f := n.facts(s); f["gid"] != "44" || f["cwd"] != "/data" {
		t.Errorf("gid %s in %s", f["gid"], f["cwd"])
	}
}

func TestNetworkNamespaceIsJoinedAndSysctlsSet(t *testing.T) {
	n := newNode(t)
	// Any namespace will do: that of a process with one of its own.
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = newNetNS()
	n.must(cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	s := n.spec("app", "sh", "-c", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/core/somaxconn /proc/sys/kernel/domainname")
	s.NetNS = fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
	s.Domain = "lab.example"
	s.Sysctls = map[string]string{"net.core.somaxconn": "99"}
	if out := n.output(s); out != "0\n99\nlab.example\n" {
		t.Errorf("output %q", out)
	}
	s = n.spec("ns", "info")
	s.NetNS = fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
	want, err := os.Readlink(s.NetNS)
	n.must(err)
	if f := n.facts(s); f["ns_net"] != want {
		t.Errorf("network namespace %s, want %s", f["ns_net"], want)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	n.must(err)
	s = n.spec("host", "info")
	s.PIDMode, s.IPCMode = "host", "host"
	f := n.facts(s)
	pid, _ := os.Readlink("/proc/self/ns/pid")
	ipc, _ := os.Readlink("/proc/self/ns/ipc")
	if f["ns_net"] != own || f["ns_pid"] != pid || f["ns_ipc"] != ipc {
		t.Errorf("namespaces %s %s %s", f["ns_net"], f["ns_pid"], f["ns_ipc"])
	}
}

// Logs go on while the agent and containerd are dead, and nothing is missing.
func TestContainersAndLogsOutliveTheAgentAndContainerd(t *testing.T) {
	if testing.Short() {
		t.Skip("kills containerd")
	}
	// It kills containerd, so it has one of its own.
	needLab(t)
	sup := &Supervisor{Dir: filepath.Join(t.TempDir(), "own")}
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	runCtx, stopRun := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- sup.Run(runCtx) }()
	if err := sup.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	o := nodeOptions()
	o.Address = sup.Address()
	n := &node{t: t, ctx: ctx, logs: filepath.Join(t.TempDir(), "logs")}
	n.open(o)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := n.RemoveAll(ctx); err != nil {
			t.Error("remove all:", err)
		}
		n.Close()
		if err := sup.Stop(ctx); err != nil {
			t.Error("stop containerd:", err)
		}
		for _, left := range leftovers(o) {
			t.Error("left behind:", left)
		}
	})
	s := n.spec("talker", "log", "0", "5ms", "0", "both")
	s.Labels = map[string]string{"task": "shop/web.1.1"}
	n.start(s)
	n.start(n.spec("short", "exit", "5", "600ms"))
	before := n.get("talker")

	// The supervisor ends with the agent; containerd does not.
	stopRun()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	n.Close()
	pid, err := sup.running()
	n.must(err)
	n.must(unix.Kill(pid, unix.SIGKILL))
	lines := func() int { return strings.Count(n.logged(s.LogDir), "\n") }
	from := lines()
	n.until("lines while all is dead", func() bool { return lines() > from+200 })

	again := &Supervisor{Dir: sup.Dir}
	runCtx, stopRun = context.WithCancel(ctx)
	defer func() {
		stopRun()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	go func() { ended <- again.Run(runCtx) }()
	n.must(again.Ready(ctx))
	n.until("containerd's answer", func() bool {
		r, err := Open(ctx, o)
		if err == nil {
			n.Runtime = r
		}
		return err == nil
	})
	after := n.get("talker")
	if after.Phase != worker.Running || after.PID != before.PID || !after.StartedAt.Equal(before.StartedAt) ||
		after.Labels["task"] != "shop/web.1.1" {
		t.Errorf("adopted %+v, was %+v", after, before)
	}
	version, err := n.client.Version(ctx)
	n.must(err)
	n.until("what ended meanwhile to be told of", func() bool {
		c := n.get("short")
		// containerd 2 may forget what ended while it was down, and its exit code with it.
		forgotten := c.Phase == worker.Lost && !strings.HasPrefix(strings.TrimPrefix(version.Version, "v"), "1.")
		return c.Phase == worker.Exited && c.ExitCode == 5 || forgotten
	})
	n.must(n.Stop(ctx, "talker", "SIGKILL", patience))
	n.must(n.Remove(ctx, "talker"))
	next := map[tasklog.Stream]int{tasklog.Stdout: 1, tasklog.Stderr: 1}
	n.must(tasklog.Read(ctx, s.LogDir, tasklog.Query{}, func(e tasklog.Entry) error {
		if want := "line " + strconv.Itoa(next[e.Stream]); string(e.Text) != want {
			return fmt.Errorf("%s has %q, want %q", e.Stream, e.Text, want)
		}
		next[e.Stream]++
		return nil
	}))
	if next[tasklog.Stdout] < from/2+100 {
		t.Errorf("only %d lines", next[tasklog.Stdout])
	}
}

// Watch ends when containerd goes away, and the same runtime works again when it is back.
func TestConnectionComesBack(t *testing.T) {
	needLab(t)
	sup := &Supervisor{Dir: filepath.Join(t.TempDir(), "own")}
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	runCtx, stopRun := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- sup.Run(runCtx) }()
	if err := sup.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	o := nodeOptions()
	o.Address = sup.Address()
	n := &node{t: t, ctx: ctx}
	n.open(o)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := n.RemoveAll(ctx); err != nil {
			t.Error("remove all:", err)
		}
		n.Close()
		stopRun()
		if err := errors.Join(<-ended, sup.Stop(ctx)); err != nil {
			t.Error(err)
		}
	})
	ready, broken := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		broken <- n.Watch(ctx, func(worker.Event) {
			select {
			case ready <- struct{}{}:
			default:
			}
		})
	}()
	<-ready
	pid, err := sup.running()
	n.must(err)
	n.must(unix.Kill(pid, unix.SIGKILL))
	if err := <-broken; !errors.Is(err, worker.ErrUnavailable) {
		t.Errorf("the watch ended with %v, want unavailable", err)
	}
	// The supervisor starts it again.
	n.until("containerd to be back", func() bool { _, err := n.List(ctx); return err == nil })
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	keeper := filepath.Join(t.TempDir(), "keeper")
	if err := os.WriteFile(keeper, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Options{Address: filepath.Join(t.TempDir(), "none.sock"), KeeperPath: keeper})
	if !errors.Is(err, worker.ErrUnavailable) || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("error %v, want unavailable with the socket's name", err)
	}
	for _, o := range []Options{{Address: "relative.sock", KeeperPath: keeper}, {KeeperPath: "/no/keeper"}} {
		if _, err := Open(t.Context(), o); err == nil {
			t.Errorf("opened with %+v", o)
		}
	}
}

func TestExecTakesUserEnvironmentAndTerminal(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("app", "sleep", "600"))
	run := func(req worker.ExecRequest) string {
		t.Helper()
		var out bytes.Buffer
		req.Stdout, req.Stderr = &out, &out
		if _, err := n.Exec(n.ctx, "app", req); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if out := run(worker.ExecRequest{Command: []string{"/app", "id"}, User: "app"}); out != "uid=1000 gid=1000 groups=44 1000\n" {
		t.Errorf("as app: %q", out)
	}
	if out := run(worker.ExecRequest{Command: []string{"/app", "sh", "-c", "env A; hostname"}, Env: []string{"A=b"}}); out != "b\napp\n" {
		t.Errorf("environment: %q", out)
	}
	if out := run(worker.ExecRequest{Command: []string{"/app", "info", "cwd"}, WorkingDir: "/data"}); out != "cwd: /data\n" {
		t.Errorf("directory: %q", out)
	}
	sizes := make(chan [2]uint16, 1)
	sizes <- [2]uint16{100, 40}
	if out := run(worker.ExecRequest{Command: []string{"/app", "echo", "x"}, TTY: true, Resize: sizes}); out != "x\r\n" {
		t.Errorf("terminal: %q", out)
	}
	if _, err := n.Exec(n.ctx, "app", worker.ExecRequest{Command: []string{"/app", "id"}, User: "stranger"}); !errors.Is(err, worker.ErrPermanent) {
		t.Errorf("unknown user: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(n.o.StateDir, "fifo", "*")); len(left) > 0 {
		t.Errorf("pipes left behind: %v", left)
	}
}

func TestFiftyAtOnce(t *testing.T) {
	n := newNode(t)
	const count = 50
	specs := make([]worker.ContainerSpec, count)
	for i := range specs {
		specs[i] = n.spec(fmt.Sprint("app", i), "sleep", "600")
		specs[i].Spec.Resources = manifest.Resources{Memory: 64 << 20, Pids: 100}
	}
	n.all(count, func(i int) error {
		if err := n.Create(n.ctx, specs[i]); err != nil {
			return err
		}
		return n.Start(n.ctx, specs[i].ID)
	})
	list, err := n.List(n.ctx)
	n.must(err)
	for _, c := range list {
		if c.Phase != worker.Running || c.Limits.Memory != 64<<20 {
			t.Errorf("%+v", c)
		}
	}
	if len(list) != count {
		t.Errorf("%d containers", len(list))
	}
	var anon int
	for _, kb := range keepers(n.logs) {
		anon += kb
	}
	t.Logf("memory of %d keepers: RssAnon %d KiB in all", count, anon)
	n.all(count, func(i int) error { return n.Remove(n.ctx, specs[i].ID) })
}

// all runs fn for 0 to count-1 at once.
func (n *node) all(count int, fn func(int) error) {
	n.t.Helper()
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			if err := fn(i); err != nil {
				n.t.Error(err)
			}
		})
	}
	wg.Wait()
}

// keepers returns the anonymous memory in KiB of each keeper that writes below dir.
func keepers(dir string) []int {
	var out []int
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		cmd, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(cmd), dir) {
			continue
		}
		status, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "status"))
		for line := range strings.Lines(string(status)) {
			if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
				kb, _ := strconv.Atoi(strings.Fields(v)[0])
				out = append(out, kb)
			}
		}
	}
	return out
}
