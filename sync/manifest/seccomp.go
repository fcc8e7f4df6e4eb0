package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Seccomp is a seccomp profile of a repository, as ParseSeccomp read it: which system calls a container may make.
type Seccomp struct {
	defaultAction   string
	defaultErrnoRet *uint
	architectures   []string
	archMap         []seccompArch
	flags           []string
	rules           []seccompRule
}

type seccompArch struct {
	Architecture     string   `json:"architecture"`
	SubArchitectures []string `json:"subArchitectures"`
}

type seccompRule struct {
	Name     string       `json:"name"` // older profiles have one name a rule
	Names    []string     `json:"names"`
	Action   string       `json:"action"`
	ErrnoRet *uint        `json:"errnoRet"`
	Args     []SeccompArg `json:"args"`
	Comment  string       `json:"comment"`
	Includes seccompWhen  `json:"includes"`
	Excludes seccompWhen  `json:"excludes"`
}

// seccompWhen is the condition of a rule. Includes want all of it, excludes any.
type seccompWhen struct {
	Caps      []string      `json:"caps"`
	Arches    []string      `json:"arches"`
	MinKernel kernelVersion `json:"minKernel"`
}

// kernelVersion is the first two numbers of a kernel's release; zero = none is asked for.
type kernelVersion [2]int

// UnmarshalJSON reads "4.8".
func (k *kernelVersion) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil || text == "" {
		return err
	}
	v, rest, ok := parseKernel(text)
	if !ok || rest != "" || v == (kernelVersion{}) {
		return fmt.Errorf("minKernel: %q is not a version such as 4.8", text)
	}
	*k = v
	return nil
}

// parseKernel reads the first two numbers of a release such as 6.1.0-18-amd64.
func parseKernel(release string) (v kernelVersion, rest string, ok bool) {
	rest = release
	for i := range v {
		n := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		var err error
		if v[i], err = strconv.Atoi(rest[:n]); err != nil {
			return kernelVersion{}, release, false
		}
		rest = rest[n:]
		if i == 0 {
			if rest, ok = strings.CutPrefix(rest, "."); !ok {
				return kernelVersion{}, release, false
			}
		}
	}
	return v, rest, true
}

func (k kernelVersion) within(have kernelVersion) bool { return slices.Compare(k[:], have[:]) <= 0 }

// SeccompArg is what an argument of a system call must be for a rule to apply, as in the OCI runtime specification.
type SeccompArg struct {
	Index    uint   `json:"index"` // 0 to 5
	Value    uint64 `json:"value"`
	ValueTwo uint64 `json:"valueTwo"`
	Op       string `json:"op"`
}

// SeccompMachine is where a profile is to hold: its rules may depend on it.
type SeccompMachine struct {
	Arch   string   // as in GOARCH
	Kernel string   // the kernel's release
	Caps   []string // the container's capabilities (the bounding set), with CAP_
}

// SeccompFilter is a profile for one container on one machine. The words are those of the OCI runtime specification.
type SeccompFilter struct {
	DefaultAction   string
	DefaultErrnoRet *uint
	Architectures   []string
	Flags           []string
	Rules           []SeccompCalls
}

// SeccompCalls is what happens to some system calls.
type SeccompCalls struct {
	Names    []string
	Action   string
	ErrnoRet *uint
	Args     []SeccompArg
}

// SeccompError is what is wrong with a profile.
type SeccompError struct {
	Line int // from 1
	err  error
}

func (e *SeccompError) Error() string { return e.err.Error() }

// seccompArches are the names of processors by GOARCH: as rules call them in includes and excludes, and as archMap does.
var seccompArches = map[string][2]string{
	"386": {"x86", "SCMP_ARCH_X86"}, "amd64": {"amd64", "SCMP_ARCH_X86_64"}, "arm": {"arm", "SCMP_ARCH_ARM"}, "arm64": {"arm64", "SCMP_ARCH_AARCH64"},
	"loong64": {"loong64", "SCMP_ARCH_LOONGARCH64"}, "mips64le": {"mipsel64", "SCMP_ARCH_MIPSEL64"}, "mipsle": {"mipsel", "SCMP_ARCH_MIPSEL"},
	"ppc64le": {"ppc64le", "SCMP_ARCH_PPC64LE"}, "riscv64": {"riscv64", "SCMP_ARCH_RISCV64"}, "s390x": {"s390x", "SCMP_ARCH_S390X"},
}

// The words of a profile, of which the runtime knows no others. SCMP_ACT_NOTIFY is not among them: it asks a program of the host.
var (
	seccompActions = []string{"SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE",
		seccompAllow, seccompLog}
	seccompOps   = []string{"SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"}
	seccompFlags = []string{"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"}
)

const (
	seccompAllow = "SCMP_ACT_ALLOW"
	seccompLog   = "SCMP_ACT_LOG" // allows, and tells
	maxErrno     = 4095           // of the kernel
)

// ParseSeccomp reads a profile in Docker's format: that of the OCI runtime specification with archMap, and with includes and excludes in rules.
// A key that it does not know is an error, because a misspelt one would leave a door open. The error is a [*SeccompError].
func ParseSeccomp(data []byte) (*Seccomp, error) {
	var whole json.RawMessage
	if err := json.Unmarshal(data, &whole); err != nil {
		offset := int64(len(data))
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			offset = syntax.Offset
		}
		return nil, &SeccompError{lineAt(data, offset), fmt.Errorf("it is not JSON: %w", err)}
	}
	r := &seccompReader{data: data, dec: json.NewDecoder(bytes.NewReader(data)), seen: map[string]bool{}}
	r.dec.DisallowUnknownFields()
	if err := r.read(); err != nil {
		return nil, &SeccompError{lineAt(data, r.at), plainJSON(err)}
	}
	return &r.out, nil
}

func lineAt(data []byte, offset int64) int {
	return 1 + bytes.Count(data[:min(offset, int64(len(data)))], []byte("\n"))
}

// plainJSON says what the decoder found in words for who wrote the file.
func plainJSON(err error) error {
	var kind *json.UnmarshalTypeError
	if !errors.As(err, &kind) {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	want := "a text"
	switch kind.Type.Kind() {
	case reflect.Slice:
		want = "a list"
	case reflect.Struct:
		want = "an object"
	case reflect.Uint, reflect.Uint64:
		want = "a whole number from 0"
	}
	if kind.Field != "" {
		return fmt.Errorf("%s: want %s, not %s", kind.Field, want, kind.Value)
	}
	return fmt.Errorf("want %s, not %s", want, kind.Value)
}

// seccompReader goes through valid JSON one value at a time, so that it can tell where it is.
type seccompReader struct {
	data []byte
	dec  *json.Decoder
	at   int64 // where the last key or value began
	seen map[string]bool
	out  Seccomp
}

// step notes where the next token begins.
func (r *seccompReader) step() {
	r.at = r.dec.InputOffset()
	r.at += int64(len(r.data[r.at:]) - len(bytes.TrimLeft(r.data[r.at:], " \t\r\n,:")))
}

// next decodes one value.
func (r *seccompReader) next(into any) error {
	r.step()
	return r.dec.Decode(into)
}

func (r *seccompReader) read() error {
	if t, err := r.dec.Token(); err != nil || t != json.Delim('{') {
		return errors.New("a profile is an object with defaultAction and syscalls")
	}
	for r.dec.More() {
		r.step()
		t, err := r.dec.Token()
		if err != nil {
			return err
		}
		key := t.(string) // the text is JSON, so a key is one
		if r.seen[key] {
			return fmt.Errorf("%s is there twice", key)
		}
		r.seen[key] = true
		if err := r.field(key); err != nil {
			return fmt.Errorf("%s: %w", key, plainJSON(err))
		}
	}
	switch r.at = 0; {
	case r.out.defaultAction == "":
		return errors.New("defaultAction is missing: it says what becomes of the system calls that no rule names")
	case len(r.out.architectures) > 0 && len(r.out.archMap) > 0:
		return errors.New("it has both architectures and archMap; keep one of them")
	}
	return nil
}

func (r *seccompReader) field(key string) error {
	switch key {
	case "defaultAction":
		if err := r.next(&r.out.defaultAction); err != nil {
			return err
		}
		return checkAction(r.out.defaultAction)
	case "defaultErrnoRet":
		if err := r.next(&r.out.defaultErrnoRet); err != nil {
			return err
		}
		return checkErrno(r.out.defaultErrnoRet)
	case "architectures":
		if err := r.next(&r.out.architectures); err != nil {
			return err
		}
		return checkArches(r.out.architectures)
	case "archMap":
		if err := r.next(&r.out.archMap); err != nil {
			return err
		}
		for _, m := range r.out.archMap {
			if err := checkArches(append([]string{m.Architecture}, m.SubArchitectures...)); err != nil {
				return err
			}
		}
		return nil
	case "flags":
		if err := r.next(&r.out.flags); err != nil {
			return err
		}
		for _, f := range r.out.flags {
			if !slices.Contains(seccompFlags, f) {
				return fmt.Errorf("%q is not known; want %s", f, strings.Join(seccompFlags, ", "))
			}
		}
		return nil
	case "comment":
		var any json.RawMessage
		return r.next(&any)
	case "syscalls":
		return r.syscalls()
	case "listenerPath", "listenerMetadata":
		return errors.New("no program of the host is asked about system calls here; remove it")
	}
	return errors.New("this key is not known")
}

func (r *seccompReader) syscalls() error {
	switch t, err := r.dec.Token(); {
	case err != nil:
		return err
	case t == nil:
		return nil
	case t != json.Delim('['):
		return errors.New("want a list")
	}
	for r.dec.More() {
		var rule seccompRule
		if err := r.next(&rule); err != nil {
			return err
		}
		if err := rule.check(); err != nil {
			return err
		}
		if rule.Name != "" {
			rule.Names = []string{rule.Name}
		}
		r.out.rules = append(r.out.rules, rule)
	}
	_, err := r.dec.Token()
	return err
}

func (c *seccompRule) check() error {
	switch {
	case c.Name != "" && len(c.Names) > 0:
		return errors.New("a rule has both name and names; keep names")
	case c.Name == "" && len(c.Names) == 0:
		return errors.New("a rule names no system call")
	case slices.Contains(c.Names, ""):
		return errors.New("names: a name is empty")
	}
	if err := checkAction(c.Action); err != nil {
		return fmt.Errorf("action: %w", err)
	}
	if err := checkErrno(c.ErrnoRet); err != nil {
		return fmt.Errorf("errnoRet: %w", err)
	}
	for _, a := range c.Args {
		if a.Index > 5 {
			return fmt.Errorf("args: a system call has the arguments 0 to 5, not %d", a.Index)
		}
		if !slices.Contains(seccompOps, a.Op) {
			return fmt.Errorf("args: op: %q is not known; want one of %s", a.Op, strings.Join(seccompOps, ", "))
		}
	}
	for _, name := range slices.Concat(c.Includes.Caps, c.Excludes.Caps) {
		if !strings.HasPrefix(name, "CAP_") {
			return fmt.Errorf("caps: %q is not a capability such as CAP_SYS_ADMIN", name)
		}
	}
	return nil
}

func checkAction(a string) error {
	if a == "SCMP_ACT_NOTIFY" {
		return errors.New("SCMP_ACT_NOTIFY: no program of the host is asked about system calls here; want SCMP_ACT_ERRNO or SCMP_ACT_ALLOW")
	}
	if !slices.Contains(seccompActions, a) {
		return fmt.Errorf("%q is not known; want one of %s", a, strings.Join(seccompActions, ", "))
	}
	return nil
}

func checkErrno(n *uint) error {
	if n != nil && *n > maxErrno {
		return fmt.Errorf("%d is not the number of an error: they end at %d", *n, maxErrno)
	}
	return nil
}

func checkArches(list []string) error {
	for _, a := range list {
		if !strings.HasPrefix(a, "SCMP_ARCH_") {
			return fmt.Errorf("%q is not a processor such as SCMP_ARCH_X86_64", a)
		}
	}
	return nil
}

// AllowsByDefault says whether a container may make the system calls that the profile does not name. Then it closes only the doors it knows of.
func (s *Seccomp) AllowsByDefault() bool {
	return s.defaultAction == seccompAllow || s.defaultAction == seccompLog
}

// Filter picks what holds on a machine.
func (s *Seccomp) Filter(on SeccompMachine) SeccompFilter {
	f := SeccompFilter{DefaultAction: s.defaultAction, DefaultErrnoRet: s.defaultErrnoRet, Architectures: s.architectures, Flags: s.flags}
	names := seccompArches[on.Arch]
	for _, m := range s.archMap {
		if m.Architecture == names[1] {
			f.Architectures = append([]string{m.Architecture}, m.SubArchitectures...)
			break
		}
	}
	kernel, _, _ := parseKernel(on.Kernel)
	has := func(name string) bool { return slices.Contains(on.Caps, name) }
	for _, c := range s.rules {
		in, ex := c.Includes, c.Excludes
		switch {
		case slices.Contains(ex.Arches, names[0]), slices.ContainsFunc(ex.Caps, has), ex.MinKernel != kernelVersion{} && ex.MinKernel.within(kernel):
		case len(in.Arches) > 0 && !slices.Contains(in.Arches, names[0]), !in.MinKernel.within(kernel):
		case slices.ContainsFunc(in.Caps, func(name string) bool { return !has(name) }):
		default:
			f.Rules = append(f.Rules, SeccompCalls{Names: c.Names, Action: c.Action, ErrnoRet: c.ErrnoRet, Args: c.Args})
		}
	}
	return f
}

// The resolved forms of security_opt for a profile of the repository. They say what policy has to know of it, and the blob that holds it.
const (
	SeccompDenies = "seccomp=deny-by-default@"
	SeccompAllows = "seccomp=allow-by-default@"
)

// Option is the profile as an element of [Container.SecurityOpt]; digest is that of its bytes.
func (s *Seccomp) Option(digest string) string {
	if s.AllowsByDefault() {
		return SeccompAllows + digest
	}
	return SeccompDenies + digest
}

// SeccompDigest is the blob of the container's own seccomp profile; empty when it has none.
func (c *Container) SeccompDigest() string {
	for _, o := range c.SecurityOpt {
		for _, prefix := range []string{SeccompDenies, SeccompAllows} {
			if digest, ok := strings.CutPrefix(o, prefix); ok {
				return digest
			}
		}
	}
	return ""
}
