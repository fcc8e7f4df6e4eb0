package manifest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Canonical is the one byte form of an object of this package: JSON with sorted keys, unset fields left out, no HTML escapes.
// It panics on a type that JSON can't hold, which none here is.
func Canonical(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(fmt.Sprintf("manifest: write %T: %v", v, err))
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// Hash identifies an object: the SHA-256 of its canonical form, in hex.
func Hash(v any) string {
	sum := sha256.Sum256(Canonical(v))
	return hex.EncodeToString(sum[:])
}

// Effect is what a change of a service means for the tasks that run.
type Effect int

// The effects, least first.
const (
	Same    Effect = iota // nothing to do
	InPlace               // the running task is changed; nothing restarts
	Replace               // each task is replaced by a new one
)

func (e Effect) String() string { return [...]string{"same", "in-place", "replace"}[e] }

// Change is one field that differs between two specs.
type Change struct {
	Path   string `json:"path"`          // as containers[web].resources.memory
	Old    string `json:"old,omitempty"` // JSON of the value; empty = unset
	New    string `json:"new,omitempty"`
	Effect Effect `json:"effect"`
}

// inPlace lists the paths whose change needs no new task. `[]` stands for any element. A path covers all below it.
// Replicas, the policies and placement are the orchestrator's; ports, aliases and health checks are the agent's; limits are the kernel's
// and can be set on a running cgroup.
var inPlace = []string{
	"replicas", "update", "rollback", "restart", "placement", "labels", "stopGrace", "dependsOn", "ports", "endpoint",
	"networks[].aliases",
	"containers[].health", "containers[].probe", "containers[].pullPolicy",
	"containers[].resources.memory", "containers[].resources.memorySwap", "containers[].resources.cpu", "containers[].resources.cpuShares",
	"containers[].resources.cpuset", "containers[].resources.pids", "containers[].resources.reserveMemory", "containers[].resources.reserveCPU",
	"containers[].resources.generic",
}

// Compare says field by field what changed from old to new, in the order of the paths, and the greatest effect among them.
func Compare(old, new *Service) (Effect, []Change) {
	a, b := Canonical(old), Canonical(new)
	if bytes.Equal(a, b) {
		return Same, nil
	}
	changes := Fields(a, b)
	effect := Same
	for i := range changes {
		changes[i].Effect = effectOf(changes[i].Path)
		effect = max(effect, changes[i].Effect)
	}
	return effect, changes
}

func effectOf(path string) Effect {
	var b strings.Builder
	for in, i := false, 0; i < len(path); i++ {
		switch c := path[i]; {
		case c == '[':
			in = true
			b.WriteString("[]")
		case c == ']':
			in = false
		case !in:
			b.WriteByte(c)
		}
	}
	p := b.String()
	for _, q := range inPlace {
		if p == q || strings.HasPrefix(p, q) && (p[len(q)] == '.' || p[len(q)] == '[') {
			return InPlace
		}
	}
	return Replace
}

// Fields compares two JSON objects field by field. Elements of lists are matched by the field that names them (name, target, network,
// service, secret), else by position.
func Fields(old, new []byte) []Change {
	var out []Change
	walk(&out, "", decode(old), decode(new))
	return out
}

func decode(b []byte) any {
	if len(b) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		panic(fmt.Sprintf("manifest: compare something that is not canonical: %v", err))
	}
	return v
}

func walk(out *[]Change, path string, a, b any) {
	if am, ok := a.(map[string]any); ok {
		if bm, ok := b.(map[string]any); ok {
			join(out, path, am, bm, func(k string) string {
				if path == "" {
					return k
				}
				return path + "." + k
			})
			return
		}
	}
	if al, ok := a.([]any); ok {
		if bl, ok := b.([]any); ok {
			am, bm := keyed(al, bl)
			join(out, path, am, bm, func(k string) string { return path + "[" + k + "]" })
			return
		}
	}
	if as, bs := text(a), text(b); as != bs {
		*out = append(*out, Change{Path: path, Old: as, New: bs})
	}
}

func join(out *[]Change, path string, a, b map[string]any, at func(string) string) {
	keys := slices.Sorted(maps.Keys(a))
	for _, k := range slices.Sorted(maps.Keys(b)) {
		if _, both := a[k]; !both {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		av, inA := a[k]
		bv, inB := b[k]
		if inA && inB {
			walk(out, at(k), av, bv)
			continue
		}
		*out = append(*out, Change{Path: at(k), Old: text(av), New: text(bv)})
	}
}

// identity lists the fields that name an element of a list, in order of preference.
var identity = []string{"name", "target", "network", "service", "secret"}

// keyed turns two lists into maps with matching keys: by identity where all elements of both have the same one and no two share it.
func keyed(a, b []any) (map[string]any, map[string]any) {
	for _, id := range identity {
		am, okA := byField(a, id)
		bm, okB := byField(b, id)
		if okA && okB {
			return am, bm
		}
	}
	return byIndex(a), byIndex(b)
}

func byField(list []any, id string) (map[string]any, bool) {
	m := make(map[string]any, len(list))
	for _, e := range list {
		o, ok := e.(map[string]any)
		if !ok {
			return nil, false
		}
		key := text(o[id])
		if s, isString := o[id].(string); isString {
			key = s
		}
		if _, twice := m[key]; key == "" || twice {
			return nil, false
		}
		m[key] = e
	}
	return m, true
}

func byIndex(list []any) map[string]any {
	m := make(map[string]any, len(list))
	for i, e := range list {
		m[strconv.Itoa(i)] = e
	}
	return m
}

func text(v any) string {
	if v == nil {
		return ""
	}
	return string(Canonical(v))
}

// Masked is what stands for a secret value in anything that a person or a log gets to see.
const Masked = `"***"`

// Mask hides the values of a change whose path looks like a secret's: an environment variable, label or option named like a password, token or key.
func (c Change) Mask() Change {
	if !Sensitive(c.Path) {
		return c
	}
	if c.Old != "" {
		c.Old = Masked
	}
	if c.New != "" {
		c.New = Masked
	}
	return c
}

var sensitiveWords = []string{"password", "passwd", "passphrase", "secret", "token", "apikey", "api_key", "credential", "private_key", "privatekey", "access_key", "auth", "_dsn", "database_url"}

// Sensitive says whether the field at the path may hold a secret value, judged by its name. A name that ends in _FILE holds a path, not a secret.
func Sensitive(path string) bool {
	p := strings.ToLower(path)
	if i := strings.Index(p, "env."); i >= 0 {
		p = p[i+len("env."):]
	} else if !strings.Contains(p, "options") && !strings.Contains(p, "labels") {
		return false
	}
	if strings.HasSuffix(p, "_file") {
		return false
	}
	if p == "key" || strings.HasSuffix(p, "_key") || strings.HasSuffix(p, "_pass") || p == "pass" {
		return true
	}
	return slices.ContainsFunc(sensitiveWords, func(w string) bool { return strings.Contains(p, w) })
}
