package containerd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

func list(s ...string) *[]string { return &s }

func TestEntrypointAndCommandMergeAsInDocker(t *testing.T) {
	img := worker.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"cmd"}}
	tests := []struct {
		entrypoint, command *[]string
		want                string
	}{
		{nil, nil, "[/entry cmd]"},
		{nil, list("own"), "[/entry own]"},
		{list("/own"), nil, "[/own]"}, // the image's command is for the image's entrypoint
		{list("/own"), list("a", "b"), "[/own a b]"},
		{list(), nil, "[cmd]"},
		{list(), list("own"), "[own]"},
		{nil, list(), "[/entry cmd]"},
	}
	for _, test := range tests {
		c := worker.ContainerSpec{Spec: manifest.Container{Entrypoint: test.entrypoint, Command: test.command}}
		p, err := mergeProcess(&c, &img)
		if got := fmt.Sprint(p.args); err != nil || got != test.want {
			t.Errorf("%v %v: %s, %v, want %s", test.entrypoint, test.command, got, err, test.want)
		}
	}
	if _, err := mergeProcess(&worker.ContainerSpec{Image: "empty:1"}, &worker.ImageConfig{}); !errors.Is(err, worker.ErrPermanent) {
		t.Errorf("an image without a command: %v", err)
	}
}

func TestEnvironmentMergesAsInDocker(t *testing.T) {
	c := worker.ContainerSpec{Hostname: "h", Spec: manifest.Container{
		Env: map[string]string{"B": "own", "EMPTY": ""}, EnvUnset: []string{"C", "B"},
	}}
	img := worker.ImageConfig{Env: []string{"A=1", "B=image", "C=3", "D=x=y"}}
	got := strings.Join(mergeEnv(&c, &img), " ")
	if want := defaultPath + " HOSTNAME=h A=1 B=own D=x=y EMPTY="; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	img.Env = append(img.Env, "PATH=/image")
	if env := mergeEnv(&c, &img); !slices.Contains(env, "PATH=/image") || slices.Contains(env, defaultPath) {
		t.Errorf("path: %s", env)
	}
}

func TestCapabilitiesFollowDocker(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: only what the agent has can be given")
	}
	tests := []struct{ add, drop, want string }{
		{"NET_ADMIN", "", "+NET_ADMIN"},
		{"cap_net_admin", "", "+NET_ADMIN"},
		{"", "CHOWN MKNOD", "-CHOWN -MKNOD"},
		{"CHOWN", "CHOWN", "+CHOWN"},
		{"", "ALL", "none"},
		{"NET_ADMIN", "ALL", "none +NET_ADMIN"},
	}
	for _, test := range tests {
		want := map[string]bool{}
		for _, c := range defaultCaps {
			want["CAP_"+c] = true
		}
		for _, change := range strings.Fields(test.want) {
			switch change[0] {
			case '+':
				want["CAP_"+change[1:]] = true
			case '-':
				delete(want, "CAP_"+change[1:])
			default:
				clear(want)
			}
		}
		got, err := capabilities(&manifest.Container{CapAdd: strings.Fields(test.add), CapDrop: strings.Fields(test.drop)})
		if err != nil {
			t.Error(err)
		}
		if len(got) != len(want) || slices.ContainsFunc(got, func(c string) bool { return !want[c] }) {
			t.Errorf("add %q drop %q: %v", test.add, test.drop, got)
		}
	}
}

func TestLimitsBecomeKernelLimits(t *testing.T) {
	swappiness := int64(10)
	r := manifest.Resources{Memory: 64 << 20, CPU: 5e8, CPUShares: 512, CPUSet: "0", Pids: 100, Swappiness: &swappiness, OOMKillDisable: true}
	v1 := resources(&r, host{swap: true})
	if *v1.Memory.Limit != 64<<20 || *v1.Memory.Swap != 128<<20 || *v1.Memory.Swappiness != 10 || !*v1.Memory.DisableOOMKiller ||
		*v1.CPU.Quota != 50000 || *v1.CPU.Period != 100000 || *v1.CPU.Shares != 512 || v1.CPU.Cpus != "0" || *v1.Pids.Limit != 100 {
		t.Errorf("%+v %+v", v1.Memory, v1.CPU)
	}
	v2 := resources(&r, host{unified: true, swap: true})
	if v2.Memory.Swappiness != nil || v2.Memory.DisableOOMKiller != nil {
		t.Errorf("the second version of cgroups lacks these: %+v", v2.Memory)
	}
	if without := resources(&r, host{}); without.Memory.Swap != nil {
		t.Error("swap is limited on a kernel that cannot")
	}
	soft := resources(&manifest.Resources{ReserveMemory: 32 << 20, Swappiness: &swappiness}, host{swap: true})
	if soft.Memory.Limit != nil || soft.Memory.Swap != nil || *soft.Memory.Reservation != 32<<20 || *soft.Memory.Swappiness != 10 {
		t.Errorf("what is no limit needs none: %+v", soft.Memory)
	}
	if tiny := resources(&manifest.Resources{CPU: 1e6}, host{}); *tiny.CPU.Quota != minCPUQuota {
		t.Errorf("quota %d is refused by the kernel", *tiny.CPU.Quota)
	}
	none := unlimited(resources(&manifest.Resources{Pids: -1}, host{swap: true}), host{swap: true})
	if *none.Memory.Limit != -1 || *none.Memory.Swap != -1 || *none.Memory.Reservation != -1 || *none.CPU.Quota != -1 || *none.Pids.Limit != -1 {
		t.Errorf("an update to no limits leaves some: %+v", none)
	}
	if none := unlimited(resources(&manifest.Resources{}, host{unified: true}), host{unified: true}); none.Memory.Reservation != nil {
		t.Error("with cgroup v2, no reservation became one of everything")
	}
}

func TestMountsAreOrderedAndReplaceTheSystems(t *testing.T) {
	c := worker.ContainerSpec{Mounts: []worker.HostMount{
		{Type: "bind", Source: "/b", Target: "/a/b/c"}, {Type: "bind", Source: "/a", Target: "/a/b/", Options: []string{"ro", "Z", "rslave"}},
		{Type: "tmpfs", Target: "/dev/shm", Options: []string{"size=1g", "exec"}},
	}}
	var order []string
	for _, m := range mounts(&c, host{}) {
		order = append(order, m.Destination+" "+strings.Join(m.Options, ","))
	}
	if got := slices.DeleteFunc(slices.Clone(order), func(s string) bool { return !strings.HasPrefix(s, "/dev/shm ") }); len(got) != 1 ||
		got[0] != "/dev/shm size=1g,exec,nosuid,nodev" {
		t.Errorf("shared memory: %q", got)
	}
	outer, inner := slices.Index(order, "/a/b ro,rslave,rbind"), slices.Index(order, "/a/b/c rbind,rprivate")
	if outer < 0 || inner < outer {
		t.Errorf("own mounts: %q", order)
	}
	for ipc, want := range map[string]int{"": 1, "private": 1, "shareable": 1, "host": 1, "none": 0} {
		n := 0
		for _, m := range mounts(&worker.ContainerSpec{IPCMode: ipc}, host{}) {
			if m.Destination == "/dev/shm" {
				n++
			}
		}
		if n != want {
			t.Errorf("ipc %q: %d shared memories", ipc, n)
		}
	}
}

func TestDeviceRules(t *testing.T) {
	for rule, want := range map[string]string{"c 42:* rwm": "c 42 - rwm", "b *:7 r": "b - 7 r", "a *:* rwm": "a - - rwm"} {
		d, err := deviceRule(rule)
		num := func(n *int64) string {
			if n == nil {
				return "-"
			}
			return fmt.Sprint(*n)
		}
		if got := strings.Join([]string{d.Type, num(d.Major), num(d.Minor), d.Access}, " "); err != nil || got != want {
			t.Errorf("%q: %s, %v", rule, got, err)
		}
	}
	for _, rule := range []string{"", "c", "c 1:2", "d 1:2 r", "c 1-2 r", "c -1:2 r", "c 1:2 x", "c 99999999999:1 r"} {
		if _, err := deviceRule(rule); !errors.Is(err, worker.ErrPermanent) {
			t.Errorf("%q: %v", rule, err)
		}
	}
}

func TestUsersAreLookedUpAsInDocker(t *testing.T) {
	u := &userFiles{
		passwd: []byte("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home:/bin/sh\nbroken line\n"),
		group:  []byte("root:x:0:\napp:x:1001:\nvideo:x:44:app,other\n"),
	}
	for name, want := range map[string]string{
		"": "0 0 [0]", "app": "1000 1001 [1001 44]", "1000": "1000 1001 [1001 44]", "app:video": "1000 44 [44]", "7:8": "7 8 [8]", "7": "7 0 [0]",
	} {
		got, err := u.lookup(name, nil)
		if s := fmt.Sprint(got.UID, got.GID, got.AdditionalGids); err != nil || s != want {
			t.Errorf("%q: %s, %v, want %s", name, s, err, want)
		}
	}
	if got, err := u.lookup("app", []string{"video", "5"}); err != nil || fmt.Sprint(got.AdditionalGids) != "[1001 44 5]" {
		t.Errorf("with groups: %v, %v", got.AdditionalGids, err)
	}
	for _, name := range []string{"nobody", "app:nogroup", "-1", "99999999999"} {
		if _, err := u.lookup(name, nil); !errors.Is(err, worker.ErrPermanent) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestUserFilesCannotLeadOutOrHang(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	secret := filepath.Join(t.TempDir(), "secret")
	for _, err := range []error{os.Mkdir(etc, 0o755), os.WriteFile(secret, []byte("evil:x:6:6:::\n"), 0o600),
		os.Symlink(secret, filepath.Join(etc, "passwd")), unix.Mkfifo(filepath.Join(etc, "group"), 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	u, err := imageUsers(root)
	if err != nil || len(u.passwd)+len(u.group) > 0 {
		t.Errorf("read %q %q, %v", u.passwd, u.group, err)
	}
	// A link inside is followed, an absolute one too.
	if err := errors.Join(os.Remove(filepath.Join(etc, "passwd")), os.Symlink("/usr/passwd", filepath.Join(etc, "passwd")),
		os.Mkdir(filepath.Join(root, "usr"), 0o755), os.WriteFile(filepath.Join(root, "usr/passwd"), []byte("in\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if u, err = imageUsers(root); err != nil || string(u.passwd) != "in\n" {
		t.Errorf("read %q, %v", u.passwd, err)
	}
	if u, err = runningUsers(os.Getpid()); err != nil || !bytes.HasPrefix(u.passwd, []byte("root:")) {
		t.Errorf("this process has users %.20q, %v", u.passwd, err)
	}
}

// A spec never gives more than the default unless the container asks for it.
func TestNothingOpensTheSandboxUnasked(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: only what the agent has can be given")
	}
	rapid.Check(t, func(t *rapid.T) {
		c := worker.ContainerSpec{ID: "x", NetNS: "/run/netns/x", Hostname: rapid.StringMatching(`[a-z]{0,5}`).Draw(t, "hostname")}
		c.Spec = manifest.Container{
			Command: list("x"), User: rapid.SampledFrom([]string{"", "0", "1000", "1:2"}).Draw(t, "user"),
			Init: rapid.Bool().Draw(t, "init"), TTY: rapid.Bool().Draw(t, "tty"), StdinOpen: rapid.Bool().Draw(t, "stdin"),
			ReadOnly: rapid.Bool().Draw(t, "ro"), NoNewPrivs: rapid.Bool().Draw(t, "nnp"),
			CapDrop: rapid.SliceOf(rapid.SampledFrom(append([]string{"ALL"}, defaultCaps...))).Draw(t, "drop"),
			Resources: manifest.Resources{Memory: manifest.Bytes(rapid.IntRange(0, 1<<30).Draw(t, "memory")),
				CPU: manifest.CPU(rapid.IntRange(0, 4e9).Draw(t, "cpu"))},
		}
		h := host{unified: rapid.Bool().Draw(t, "unified"), apparmor: "p", keeper: "/keeper", openFiles: 1024}
		s, err := buildSpec(&c, &worker.ImageConfig{}, &userFiles{}, h)
		if err != nil {
			t.Fatal(err)
		}
		if s.Linux.Seccomp == nil || s.Process.ApparmorProfile != "p" || len(s.Linux.MaskedPaths) == 0 || len(s.Linux.ReadonlyPaths) == 0 {
			t.Fatal("hardening is missing")
		}
		for _, set := range [][]string{s.Process.Capabilities.Bounding, s.Process.Capabilities.Effective, s.Process.Capabilities.Permitted} {
			for _, name := range set {
				if !slices.Contains(defaultCaps, strings.TrimPrefix(name, "CAP_")) {
					t.Fatalf("capability %s was not asked for", name)
				}
			}
		}
		if len(s.Process.Capabilities.Inheritable)+len(s.Process.Capabilities.Ambient) > 0 {
			t.Fatal("capabilities are inherited")
		}
		if d := s.Linux.Resources.Devices; len(d) != 1 || d[0].Allow {
			t.Fatalf("devices %+v", d)
		}
		for _, want := range []specs.LinuxNamespaceType{
			specs.PIDNamespace, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.NetworkNamespace,
		} {
			if !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == want }) {
				t.Fatalf("no %s namespace", want)
			}
		}
		for _, m := range s.Mounts {
			if m.Type == "sysfs" && !slices.Contains(m.Options, "ro") {
				t.Fatal("sysfs is writable")
			}
		}
	})
}
