package manifest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// profile is in the shape of Docker's own.
const profile = `{
  "defaultAction": "SCMP_ACT_ERRNO",
  "defaultErrnoRet": 1,
  "archMap": [
    {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}
  ],
  "syscalls": [
    {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
    {"name": "personality", "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 18446744073709551615, "op": "SCMP_CMP_EQ"}]},
    {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
    {"names": ["old"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "4.8"}},
    {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
    {"names": ["arm_only"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}},
    {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}},
    {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}}
  ]
}`

func (f SeccompFilter) names() string {
	var out []string
	for _, c := range f.Rules {
		out = append(out, c.Names...)
	}
	return strings.Join(out, " ")
}

// What a rule asks of processor, kernel and capabilities decides whether it holds, as in Docker: includes want all, excludes any.
func TestSeccompHoldsWhereItsRulesSay(t *testing.T) {
	p, err := ParseSeccomp([]byte(profile))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		on    SeccompMachine
		want  string
		archs string
	}{
		{SeccompMachine{Arch: "amd64", Kernel: "6.1.0-18-amd64"}, "read write personality ptrace arch_prctl clone", "[SCMP_ARCH_X86_64 SCMP_ARCH_X86]"},
		{SeccompMachine{Arch: "arm64", Kernel: "4.8"}, "read write personality ptrace arm_only clone", "[SCMP_ARCH_AARCH64 SCMP_ARCH_ARM]"},
		{SeccompMachine{Arch: "amd64", Kernel: "4.7.9"}, "read write personality old arch_prctl clone", "[SCMP_ARCH_X86_64 SCMP_ARCH_X86]"},
		{SeccompMachine{Arch: "amd64", Kernel: "4.19", Caps: []string{"CAP_SYS_ADMIN"}}, "read write personality ptrace arch_prctl", "[SCMP_ARCH_X86_64 SCMP_ARCH_X86]"},
		{SeccompMachine{Arch: "s390x", Kernel: "6.1", Caps: []string{"CAP_BPF", "CAP_SYS_ADMIN"}}, "read write personality ptrace arm_only bpf", "[]"},
	} {
		f := p.Filter(c.on)
		if got := f.names(); got != c.want || fmt.Sprint(f.Architectures) != c.archs {
			t.Errorf("on %+v: %s for %v, want %s for %s", c.on, got, f.Architectures, c.want, c.archs)
		}
	}
	f := p.Filter(SeccompMachine{Arch: "amd64"})
	if f.DefaultAction != "SCMP_ACT_ERRNO" || *f.DefaultErrnoRet != 1 || f.Rules[1].Args[0] != (SeccompArg{Value: 1<<64 - 1, Op: "SCMP_CMP_EQ"}) {
		t.Errorf("got %+v", f)
	}
	if last := f.Rules[len(f.Rules)-1]; *last.ErrnoRet != 38 {
		t.Errorf("got %+v", last)
	}
}

// Each mistake is told with its line and what to write.
func TestSeccompMistakes(t *testing.T) {
	const rule = `{"defaultAction": "SCMP_ACT_ERRNO",` + "\n" + `"syscalls": [` + "\n" + `{"names": ["a"], "action": "SCMP_ACT_ALLOW"},` + "\n%s]}"
	in := func(text string) string { return fmt.Sprintf(rule, text) }
	for _, c := range []struct {
		profile string
		line    int
		want    string
	}{
		{"", 1, "not JSON"},
		{"{\n\"defaultAction\": \n}", 3, "not JSON"},
		{profile + "\n{}", 19, "not JSON"},
		{"[]", 1, "a profile is an object"},
		{"null", 1, "a profile is an object"},
		{"\n{}", 1, "defaultAction is missing"},
		{`{"syscalls": null}`, 1, "defaultAction is missing"},
		{"{\n\n\"defaultAction\": \"ALLOW\"}", 3, `defaultAction: "ALLOW" is not known; want one of SCMP_ACT_KILL`},
		{`{"defaultAction": 1}`, 1, "defaultAction: want a text, not number"},
		{"{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"syscals\": []}", 2, "syscals: this key is not known"},
		{"{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"defaultAction\": \"SCMP_ACT_KILL\"}", 2, "defaultAction is there twice"},
		{"{\"defaultAction\": \"SCMP_ACT_NOTIFY\"}", 1, "no program of the host"},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"listenerPath\": \"/x\"}", 2, "no program of the host"},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"defaultErrnoRet\": 5000}", 1, "defaultErrnoRet: 5000 is not the number"},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n \"flags\": [\"FAST\"]}", 2, `flags: "FAST" is not known`},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"architectures\": [\"amd64\"]}", 1, `"amd64" is not a processor such as`},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"archMap\": [{\"architecture\": \"x\"}]}", 1, `"x" is not a processor such as`},
		{"{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"architectures\": [\"SCMP_ARCH_X86\"], \"archMap\": [{\"architecture\": \"SCMP_ARCH_X86\"}]}", 1, "both architectures and archMap"},
		{`{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": {}}`, 1, "syscalls: want a list"},
		{in(`3`), 4, "syscalls: want an object, not number"},
		{in(`{"names": "b", "action": "SCMP_ACT_ALLOW"}`), 4, "names: want a list, not string"},
		{in(`{"names": ["b"], "name": "b", "action": "SCMP_ACT_ALLOW"}`), 4, "both name and names"},
		{in(`{"action": "SCMP_ACT_ALLOW"}`), 4, "names no system call"},
		{in(`{"names": [""], "action": "SCMP_ACT_ALLOW"}`), 4, "a name is empty"},
		{in(`{"names": ["b"]}`), 4, `action: "" is not known`},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ERRNO", "errnoRet": -1}`), 4, "errnoRet: want a whole number from 0"},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}`), 4, "arguments 0 to 5"},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "op": "="}]}`), 4, `op: "=" is not known`},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "include": {}}`), 4, `unknown field "include"`},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["sys_admin"]}}`), 4, "such as CAP_SYS_ADMIN"},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "new"}}`), 4, `"new" is not a version such as 4.8`},
		{in(`{"names": ["b"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": 4.8}}`), 4, "want a text, not number"},
	} {
		_, err := ParseSeccomp([]byte(c.profile))
		var e *SeccompError
		if !errors.As(err, &e) || e.Line != c.line || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "json:") {
			t.Errorf("%s\ngives %+v, want line %d and %q", c.profile, err, c.line, c.want)
		}
	}
}

// An option says what a profile does with what it does not name, and leads back to its bytes.
func TestSeccompOption(t *testing.T) {
	for action, allows := range map[string]bool{"SCMP_ACT_ALLOW": true, "SCMP_ACT_LOG": true, "SCMP_ACT_ERRNO": false, "SCMP_ACT_KILL_PROCESS": false} {
		p, err := ParseSeccomp(fmt.Appendf(nil, `{"defaultAction": %q}`, action))
		if err != nil {
			t.Fatal(err)
		}
		c := Container{SecurityOpt: []string{"apparmor=unconfined", p.Option("sha256:00")}}
		if p.AllowsByDefault() != allows || c.SeccompDigest() != "sha256:00" {
			t.Errorf("%s: %v, %s", action, p.AllowsByDefault(), c.SecurityOpt)
		}
	}
	if got := (&Container{SecurityOpt: []string{"seccomp=unconfined"}}).SeccompDigest(); got != "" {
		t.Errorf("unconfined is the blob %q", got)
	}
}

// FuzzSeccomp: whatever the bytes are, they are a profile with words that the runtime knows, or an error in one of their lines.
func FuzzSeccomp(f *testing.F) {
	f.Add([]byte(profile))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"name":"a","action":"SCMP_ACT_TRACE","excludes":null}],"flags":null}`))
	f.Add([]byte("{\n\"syscalls\": [{}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseSeccomp(data)
		if err != nil {
			var e *SeccompError
			if !errors.As(err, &e) || e.Line < 1 || e.Line > strings.Count(string(data), "\n")+1 || e.Error() == "" {
				t.Errorf("error %#v", err)
			}
			return
		}
		f := p.Filter(SeccompMachine{Arch: "amd64", Kernel: "6.1.0"})
		if !slices.Contains(seccompActions, f.DefaultAction) {
			t.Errorf("default action %q", f.DefaultAction)
		}
		for _, r := range f.Rules {
			if !slices.Contains(seccompActions, r.Action) || len(r.Names) == 0 {
				t.Errorf("rule %+v", r)
			}
		}
	})
}
