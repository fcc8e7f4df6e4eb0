package policy

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// inputVersion is part of the policy's hash. Raise it when what rules see, or how their findings are read, changes: all verdicts are
// renewed then.
const inputVersion = 2

// inputDoc is what rules see as `input`. The stack is written as JSON and then gets what [enrich] adds, which manifest itself does not
// hold.
type inputDoc struct {
	Gate   Gate                 `json:"gate"`
	Now    string               `json:"now"` // RFC 3339, UTC
	Stack  manifest.Stack       `json:"stack"`
	Images map[string]imageFact `json:"images"`
	Plan   []Item               `json:"plan"`
	Config configFacts          `json:"config"`
}

// imageFact has one of its fields.
type imageFact struct {
	User    *string `json:"user,omitempty"`
	Trouble string  `json:"trouble,omitempty"`
}

type configFacts struct {
	Registries          []string `json:"registries"`
	DefaultCapabilities []string `json:"defaultCapabilities"`
}

// The parts of an image reference: registry/path, tag and digest, each empty where it is not written.
type imageRef struct {
	Name   string `json:"name"`
	Tag    string `json:"tag"`
	Digest string `json:"digest"`
}

// added are the fields that enrich gives to objects of the stack, by the type that carries them.
var added = map[reflect.Type]map[string]reflect.Type{
	reflect.TypeFor[manifest.Container](): {"imageRef": reflect.TypeFor[imageRef](), "secretEnv": reflect.TypeFor[[]string]()},
	reflect.TypeFor[manifest.Mount]():     {"host": reflect.TypeFor[string](), "escapes": reflect.TypeFor[bool]()},
	reflect.TypeFor[manifest.Volume]():    {"host": reflect.TypeFor[string]()},
}

// inputValue makes the value that rules judge.
func inputValue(in Input, items []Item, cfg configFacts) (ast.Value, error) {
	images := make(map[string]imageFact, len(in.ImageUsers)+len(in.ImageTroubles))
	for ref, why := range in.ImageTroubles {
		images[ref] = imageFact{Trouble: why}
	}
	for ref, user := range in.ImageUsers {
		images[ref] = imageFact{User: &user}
	}
	doc := inputDoc{Gate: in.Gate, Now: in.Now.UTC().Format(time.RFC3339), Stack: in.Stack, Images: images, Plan: items, Config: cfg}
	if doc.Plan == nil {
		doc.Plan = []Item{}
	}
	var v map[string]any
	if err := throughJSON(doc, &v); err != nil {
		return nil, fmt.Errorf("write stack %s for policy: %w", in.Stack.Name, err)
	}
	services := objects(v["stack"].(map[string]any)["services"])
	for i, s := range in.Stack.Services {
		// One by one: a rule that looks for a port must find it in a range too.
		var ports []any
		if err := throughJSON([]manifest.Port(s.Ports), &ports); err != nil {
			return nil, fmt.Errorf("write the ports of stack %s for policy: %w", in.Stack.Name, err)
		}
		if len(ports) > 0 {
			services[i]["ports"] = ports
		}
	}
	enrich(v["stack"].(map[string]any), &in.Stack)
	val, err := ast.InterfaceToValue(v)
	if err != nil {
		return nil, fmt.Errorf("hand stack %s to policy: %w", in.Stack.Name, err)
	}
	return val, nil
}

func throughJSON(from, to any) error {
	data, err := json.Marshal(from)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	return dec.Decode(to)
}

// enrich adds to the stack's JSON what rules should not have to work out (real host paths, parts of image references, variables that look
// like secrets), and masks secret values: a rule can put what it sees into a message, and messages are shown, logged and sent to pull
// requests.
func enrich(doc map[string]any, s *manifest.Stack) {
	services := objects(doc["services"])
	for i := range s.Services {
		containers := objects(services[i]["containers"])
		for j := range s.Services[i].Containers {
			c, o := &s.Services[i].Containers[j], containers[j]
			o["imageRef"] = splitImage(c.Image).object()
			o["secretEnv"] = secretEnv(c.Env)
			mask(o["env"], "env")
			mask(o["labels"], "labels")
			mounts := objects(o["mounts"])
			for k, m := range c.Mounts {
				if host, escapes := hostOf(m, s.DataRoot); escapes {
					mounts[k]["escapes"] = true
				} else if host != "" {
					mounts[k]["host"] = host
				}
			}
		}
		mask(services[i]["labels"], "labels")
	}
	volumes := objects(doc["volumes"])
	for i, v := range s.Volumes {
		if host := hostOfVolume(v); host != "" {
			volumes[i]["host"] = host
		}
		mask(volumes[i]["labels"], "labels")
		mask(volumes[i]["options"], "options")
	}
	for _, n := range objects(doc["networks"]) {
		mask(n["labels"], "labels")
	}
}

func objects(v any) []map[string]any {
	list, _ := v.([]any)
	out := make([]map[string]any, len(list))
	for i, e := range list {
		out[i], _ = e.(map[string]any)
	}
	return out
}

// inMountOptions finds the credentials that cifs takes in its option string.
var inMountOptions = regexp.MustCompile(`(?i)\b(pass|passwd|password|password2|credentials|cred)=[^,]*`)

const masked = "***"

func mask(v any, kind string) {
	m, _ := v.(map[string]any)
	for k, val := range m {
		s, _ := val.(string)
		switch {
		case s == "":
		case manifest.Sensitive(kind + "." + k):
			m[k] = masked
		case kind == "options":
			m[k] = inMountOptions.ReplaceAllString(s, "$1="+masked)
		}
	}
}

// hostLinks are the symbolic links that a Debian system has in its root: an address through them is an address of what they point to.
var hostLinks = []struct{ link, target string }{
	{"/var/run", "/run"}, {"/var/lock", "/run/lock"}, {"/bin", "/usr/bin"}, {"/sbin", "/usr/sbin"}, {"/lib", "/usr/lib"},
	{"/lib32", "/usr/lib32"}, {"/lib64", "/usr/lib64"}, {"/libx32", "/usr/libx32"},
}

// realPath is the host path as the kernel will find it, as far as its name tells: clean, absolute, the usual links followed. Links that
// somebody made are not seen.
func realPath(p string) string {
	p = path.Clean("/" + p)
	for _, l := range hostLinks {
		if rest, ok := strings.CutPrefix(p, l.link); ok && (rest == "" || rest[0] == '/') {
			return l.target + rest
		}
	}
	return p
}

// hostOf tells which path of the host a mount shows; empty for those that show none that policy cares about. Escapes: it climbs out of
// its place.
func hostOf(m manifest.Mount, dataRoot string) (host string, escapes bool) {
	switch m.Kind {
	case manifest.MountBind:
		return realPath(m.Source), false
	case manifest.MountData:
		if climbs(m.Source) {
			return "", true
		}
		if dataRoot != "" {
			return realPath(path.Join(dataRoot, m.Source)), false
		}
	case manifest.MountVolume, manifest.MountAnonymous:
		return "", climbs(m.Subpath)
	}
	return "", false
}

func climbs(rel string) bool {
	c := path.Clean(rel)
	return c == ".." || strings.HasPrefix(c, "../")
}

// hostOfVolume tells which path of the host the options of a volume hide: any device that is a local path. NFS and CIFS devices are paths
// of a server, unless the options say bind: the kernel then forgets the type.
func hostOfVolume(v manifest.Volume) string {
	device := v.Options["device"]
	bind := slices.ContainsFunc(strings.Split(strings.ToLower(v.Options["o"]), ","), func(o string) bool {
		o = strings.TrimSpace(o)
		return o == "bind" || o == "rbind"
	})
	switch kind := strings.ToLower(strings.TrimSpace(v.Options["type"])); {
	case device == "":
		return ""
	case bind:
		return realPath(device)
	case kind == "tmpfs" || kind == "cifs" || kind == "smb3" || strings.HasPrefix(kind, "nfs"):
		return ""
	}
	return realPath(device)
}

func splitImage(ref string) imageRef {
	var r imageRef
	ref, r.Digest, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref, r.Tag = ref[:i], ref[i+1:]
	}
	// A reference that nobody normalised: Docker Hub is the registry of names without one, library/ the folder of those without a folder.
	if first, _, ok := strings.Cut(ref, "/"); !ok {
		ref = "docker.io/library/" + ref
	} else if !strings.ContainsAny(first, ".:") && first != "localhost" {
		ref = "docker.io/" + ref
	}
	r.Name = ref
	return r
}

func (r imageRef) object() map[string]any {
	return map[string]any{"name": r.Name, "tag": r.Tag, "digest": r.Digest}
}

var (
	// Values of variables with a secret-looking name that hold no secret: switches, numbers, durations, paths, lists of scopes.
	plainValue = regexp.MustCompile(`(?i)^(|true|false|yes|no|on|off|none|null|enabled?|disabled?|optional|required` +
		`|basic|bearer|oauth2?|oidc|ldap|[0-9]+(ms|[smhd])?|/(run/secrets|etc|var|opt|srv|data|app|config)(/.*)?)$`)
	// Names that say what the value is, and that it is no secret although a word such as auth is in them.
	plainName = regexp.MustCompile(`(?i)(_(host|hostname|port|type|method|mode|manager|provider|backend|class|realm|role|user|username|id|name|path` +
		`|dir|enabled|algorithm|alg|ttl|expiry|issuer|audience|domain|domains|scope|scopes)|authorities|authority|author|authors)$`)
	address     = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://`)
	hasPassword = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://[^/@]*:[^/@]+@`)
)

// secretEnv names the variables whose value looks like a secret, sorted. An address is one when it holds a password, whatever the
// variable is called.
func secretEnv(env map[string]string) []any {
	out := []any{}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		v := strings.TrimSpace(env[name])
		if address.MatchString(v) {
			if hasPassword.MatchString(v) {
				out = append(out, name)
			}
			continue
		}
		if manifest.Sensitive("env."+name) && !plainName.MatchString(name) && !plainValue.MatchString(v) {
			out = append(out, name)
		}
	}
	return out
}

// inputSchema describes `input` to the compiler, from the types themselves, so that a rule which reads a field that does not exist is an
// error when it is loaded, and not a rule that never fires.
func inputSchema() any { return schemaOf(reflect.TypeFor[inputDoc]()) }

var textMarshaler = reflect.TypeFor[encoding.TextMarshaler]()

func schemaOf(t reflect.Type) map[string]any {
	if t.Kind() != reflect.Pointer && t.Implements(textMarshaler) {
		return map[string]any{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return schemaOf(t.Elem())
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem())}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": schemaOf(t.Elem())}
	case reflect.Struct:
		props := map[string]any{}
		for f := range structFields(t) {
			props[f.name] = schemaOf(f.typ)
		}
		for name, ft := range added[t] {
			props[name] = schemaOf(ft)
		}
		return map[string]any{"type": "object", "properties": props, "additionalProperties": false}
	default:
		return map[string]any{"type": "number"}
	}
}

type structField struct {
	name string
	typ  reflect.Type
}

// structFields yields the fields of a struct as JSON writes them.
func structFields(t reflect.Type) func(yield func(structField) bool) {
	return func(yield func(structField) bool) {
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "-" || !f.IsExported() {
				continue
			}
			if name == "" {
				name = f.Name
			}
			if !yield(structField{name, f.Type}) {
				return
			}
		}
	}
}
