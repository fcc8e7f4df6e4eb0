package compose

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/format"
	"github.com/compose-spec/compose-go/v2/paths"
	"github.com/compose-spec/compose-go/v2/types"
	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// unit is one YAML file in the role it plays for a stack.
type unit struct {
	file     string
	root     *yaml.Node
	base     string // directory that its relative paths start from
	vars     *variables
	includes []*unit
	extends  map[string]extension // by the service that has the key
}

// extension is where a service takes its base from.
type extension struct {
	unit    *unit // nil when that file did not read
	service string
}

// scanner reads the units of one stack before compose-go does: it finds what is wrong with its line, and lets no path out of the tree.
type scanner struct {
	tree     *checkout
	limits   Limits
	stack    string
	tops     []*unit // the stack's own files, in order
	known    map[string]*unit
	reads    map[string]bool // files that are included or extended
	problems []manifest.Problem
	homes    map[string]string // what compose-go makes of ~/x -> home/x
	hosts    map[string]bool   // absolute sources of mounts, as they are written
	unread   []byte            // the text of files that are no YAML
	full     bool
}

func newScanner(t *checkout, limits Limits, stack string) *scanner {
	return &scanner{tree: t, limits: limits, stack: stack, known: map[string]*unit{}, reads: map[string]bool{},
		homes: map[string]string{}, hosts: map[string]bool{}}
}

func (s *scanner) add(sev manifest.Severity, rule string, pos manifest.Pos, service, format string, args ...any) {
	s.problems = append(s.problems, manifest.Problem{Severity: sev, Rule: rule, Stack: s.stack, Service: service,
		File: pos.File, Line: pos.Line, Message: fmt.Sprintf(format, args...)})
}

func (s *scanner) errorf(rule string, pos manifest.Pos, format string, args ...any) {
	s.add(manifest.Error, rule, pos, "", format, args...)
}

// scan reads the stack's own files and all that they include and extend.
func (s *scanner) scan(files []string, dir string, vars *variables) {
	for _, f := range files {
		if u := s.visit(f, dir, vars, nil, manifest.Pos{File: f}); u != nil {
			s.tops = append(s.tops, u)
		}
	}
	for _, u := range s.tops {
		s.checkExtends(u)
	}
}

// visit reads one file. The trail holds the files that led to it, by is the place that names it.
func (s *scanner) visit(file, base string, vars *variables, trail []string, by manifest.Pos) *unit {
	if slices.Contains(trail, file) {
		s.errorf("include-circle", by, "files include each other in a circle: %s", strings.Join(append(slices.Clone(trail), file), " -> "))
		return nil
	}
	key := fmt.Sprintf("%s\x00%s\x00%p", file, base, vars)
	if u, ok := s.known[key]; ok {
		return u
	}
	if len(s.known) >= s.limits.Units {
		if !s.full {
			s.errorf("limit", by, "the stack consists of more than %d files", s.limits.Units)
		}
		s.full = true
		return nil
	}
	s.known[key] = nil
	data, err := s.tree.read(file)
	if err != nil {
		s.unreadable(file, err, by)
		return nil
	}
	root, f := parseYAML(data)
	if f == nil && root == nil {
		f = faultf(0, "yaml-empty", "the file is empty; it needs services:")
	}
	if f != nil {
		s.unread = append(s.unread, data...)
		s.errorf(f.rule, manifest.Pos{File: file, Line: f.line}, "%s", f.msg)
		return nil
	}
	u := &unit{file: file, root: root, base: base, vars: vars, extends: map[string]extension{}}
	s.known[key] = u
	lacking := len(vars.missing)
	readable := s.expandAll(u)
	if readable && len(vars.missing) == lacking {
		readable = s.validate(u)
	}
	if readable {
		s.checkServices(u)
		s.checkFiles(u)
	}
	trail = append(slices.Clone(trail), file)
	s.followIncludes(u, trail)
	s.followExtends(u)
	return u
}

func (s *scanner) unreadable(file string, err error, by manifest.Pos) {
	var big tooBig
	switch {
	case errors.Is(err, errOutside):
		s.errorf("path-outside", by, "the path %s leaves the repository; only files of the repository can be used", file)
	case errors.Is(err, fs.ErrNotExist):
		s.errorf("file-missing", by, "the file %s is not in the repository", file)
	case errors.As(err, &big):
		s.errorf("limit", by, "%s", big.what)
	default:
		s.errorf("file-unreadable", by, "%v", err)
	}
}

// expandAll looks at each text of the file once, to find variables without a value and texts that can't be read.
func (s *scanner) expandAll(u *unit) bool {
	ok := true
	seen := map[*yaml.Node]bool{}
	var walk func(n *yaml.Node)
	walk = func(n *yaml.Node) {
		n = target(n)
		if seen[n] || n.Tag == "!reset" {
			return
		}
		seen[n] = true
		if n.Kind == yaml.ScalarNode && strings.Contains(n.Value, "$") {
			pos := manifest.Pos{File: u.file, Line: n.Line}
			if _, err := u.vars.expand(n.Value, pos); err != nil {
				s.errorf("variable-syntax", pos, "%v", err)
				ok = false
			}
		}
		for i, c := range n.Content {
			if n.Kind != yaml.MappingNode || i%2 == 1 {
				walk(c)
			}
		}
	}
	walk(u.root)
	return ok
}

// text is a scalar with its variables replaced.
func (u *unit) text(n *yaml.Node) string {
	out, err := u.vars.expand(n.Value, manifest.Pos{File: u.file, Line: n.Line})
	if err != nil {
		return n.Value
	}
	return out
}

func (u *unit) pos(n *yaml.Node) manifest.Pos { return manifest.Pos{File: u.file, Line: n.Line} }

// pairs lists the keys and values of a mapping, merge keys resolved, in the order of the file.
func pairs(n *yaml.Node) [][2]*yaml.Node {
	n = target(n)
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	var out [][2]*yaml.Node
	have := map[string]bool{}
	var collect func(n *yaml.Node)
	collect = func(n *yaml.Node) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := target(n.Content[i])
			if k.ShortTag() != "!!merge" && !have[k.Value] {
				have[k.Value] = true
				out = append(out, [2]*yaml.Node{k, n.Content[i+1]})
			}
		}
		for _, m := range merged(n) {
			if m.Kind == yaml.MappingNode {
				collect(m)
			}
		}
	}
	collect(n)
	return out
}

// items lists the elements of a list; a plain value stands for a list of one.
func items(n *yaml.Node) []*yaml.Node {
	n = target(n)
	switch {
	case n == nil || isNull(n) || n.Tag == "!reset":
		return nil
	case n.Kind == yaml.SequenceNode:
		out := make([]*yaml.Node, len(n.Content))
		for i, e := range n.Content {
			out[i] = target(e)
		}
		return out
	}
	return []*yaml.Node{n}
}

func child(n *yaml.Node, key string) *yaml.Node {
	_, v := entry(n, key)
	return target(v)
}

// services of a unit, in the order of the file.
func (u *unit) services() [][2]*yaml.Node { return pairs(child(u.root, "services")) }

// checkServices looks at what each service writes in short forms, and at the paths of its mounts and env files.
func (s *scanner) checkServices(u *unit) {
	list := u.services()
	if len(list) > s.limits.Services {
		s.errorf("limit",
			u.pos(list[s.limits.Services][0]), "the file has %d services; %d are the limit of a stack", len(list), s.limits.Services)
		return
	}
	for _, kv := range list {
		name, svc := kv[0].Value, kv[1]
		for _, p := range items(child(svc, "ports")) {
			if p.Kind != yaml.ScalarNode {
				continue
			}
			if _, err := types.ParsePortConfig(u.text(p)); err != nil {
				s.add(manifest.Error,
					"port", u.pos(p), name, "the port %q can't be read; write HOST:CONTAINER, such as 8080:80, in quotes", shorten(u.text(p)))
			}
		}
		for _, h := range items(child(svc, "extra_hosts")) {
			if h.Kind == yaml.ScalarNode && !strings.ContainsAny(u.text(h), ":=") {
				s.add(manifest.Error, "extra-hosts", u.pos(h), name, "extra_hosts: %q has no address; write NAME=ADDRESS", shorten(u.text(h)))
			}
		}
		for _, v := range items(child(svc, "volumes")) {
			s.checkVolume(u, name, v)
		}
		for _, e := range items(child(svc, "env_file")) {
			file := e
			if e.Kind == yaml.MappingNode {
				file = child(e, "path")
			}
			s.confine(u, name, "env_file", file)
		}
		for _, e := range items(child(svc, "label_file")) {
			s.confine(u, name, "label_file", e)
		}
	}
}

// checkFiles looks at the files of the top-level configs and secrets.
func (s *scanner) checkFiles(u *unit) {
	for _, section := range []string{"configs", "secrets"} {
		for _, kv := range pairs(child(u.root, section)) {
			file := child(kv[1], "file")
			if section == "secrets" && file != nil && (path.IsAbs(u.text(file)) || strings.HasPrefix(u.text(file), "~")) {
				continue // never read here; see secretValue
			}
			s.confine(u, "", section+"."+kv[0].Value+".file", file)
		}
	}
}

// confine checks that a file named in the unit lies in the tree. Whether it is there is asked when it is read.
func (s *scanner) confine(u *unit, service, what string, n *yaml.Node) {
	if n == nil || n.Kind != yaml.ScalarNode {
		return
	}
	name := u.text(n)
	switch {
	case name == "" || name == "/dev/null":
		return
	case strings.HasPrefix(name, "~"):
		s.add(manifest.Error,
			"path-home", u.pos(n), service, "%s: %s: there is no home directory here; keep the file in the repository", what, name)
		return
	case path.IsAbs(name):
		s.add(manifest.Error,
			"path-outside", u.pos(n), service, "%s: %s is a path of a machine; only files of the repository can be used", what, name)
		return
	}
	if _, err := s.tree.resolve(path.Join(u.base, name)); errors.Is(err, errOutside) {
		s.add(manifest.Error,
			"path-outside", u.pos(n), service, "%s: %s leaves the repository; only files of the repository can be used", what, name)
	}
}

var mountOptions = []string{"ro", "rw", "nocopy", "z", "Z", "cached", "delegated", "consistent",
	"rprivate", "private", "rshared", "shared", "rslave", "slave"}

func (s *scanner) checkVolume(u *unit, service string, v *yaml.Node) {
	var kind, source string
	switch v.Kind {
	case yaml.ScalarNode:
		text := u.text(v)
		parsed, err := format.ParseVolume(text)
		if err != nil {
			s.add(manifest.Error, "volume",
				u.pos(v), service, "the volume %q can't be read (is a variable in it empty?); write SOURCE:TARGET or SOURCE:TARGET:ro",
				shorten(text))
			return
		}
		if parts := strings.Split(text, ":"); len(parts) > 2 {
			for _, o := range strings.Split(parts[len(parts)-1], ",") {
				if !slices.Contains(mountOptions, o) {
					s.add(manifest.Error, "volume", u.pos(v),
						service, "the volume %q has the option %q, which is not known; %s", shorten(text), o, suggest(o, mountOptions))
				}
			}
		}
		kind, source = parsed.Type, parsed.Source
	case yaml.MappingNode:
		if k := child(v, "type"); k != nil {
			kind = u.text(k)
		}
		if src := child(v, "source"); src != nil {
			source = u.text(src)
		}
	}
	switch {
	case kind != types.VolumeTypeBind:
		return
	case source == "":
		s.add(manifest.Error, "volume", u.pos(v), service, "a bind mount needs a source; write a path of the repository or of the host")
	case strings.HasPrefix(source, "~"):
		expanded := paths.ExpandUser(source)
		if !path.IsAbs(expanded) {
			expanded = s.tree.abs(path.Join(u.base, expanded))
		}
		s.homes[path.Clean(expanded)] = path.Join("home", strings.TrimLeft(strings.TrimPrefix(source, "~"), "/"))
	case path.IsAbs(source):
		s.hosts[path.Clean(source)] = true
	default:
		if _, err := s.tree.resolve(path.Join(u.base, source)); errors.Is(err, errOutside) {
			s.add(manifest.Error, "path-outside",
				u.pos(v), service, "the mount of %s leaves the repository; write an absolute path to use a directory of the host", source)
		}
	}
}

var remote = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://|^git@|\.git(#|$)`)

// followIncludes reads the files of `include`.
func (s *scanner) followIncludes(u *unit, trail []string) {
	for _, n := range items(child(u.root, "include")) {
		pathNode := n
		if n.Kind == yaml.MappingNode {
			pathNode = child(n, "path")
		}
		dirNode, envNode := child(n, "project_directory"), child(n, "env_file")
		if len(trail) > 1 && (dirNode != nil || envNode != nil) {
			s.errorf("include",
				u.pos(n), "project_directory and env_file are read only in the stack's own files; put a .env beside the included file")
			continue
		}
		var files []string
		for _, p := range items(pathNode) {
			name := u.text(p)
			if remote.MatchString(name) {
				s.errorf("include-remote",
					u.pos(p), "include: %s is not a file of this repository; nothing is fetched while rendering: copy the file here", name)
				continue
			}
			before := len(s.problems)
			s.confine(u, "", "include", p)
			if len(s.problems) == before && name != "" {
				files = append(files, path.Join(u.base, name))
			}
		}
		if len(files) == 0 {
			continue
		}
		dir := path.Dir(files[0])
		if dirNode != nil {
			before := len(s.problems)
			s.confine(u, "", "include.project_directory", dirNode)
			if len(s.problems) > before {
				continue
			}
			dir = path.Join(u.base, u.text(dirNode))
		}
		vars, ok := s.includeVars(u, dir, envNode)
		if !ok {
			continue
		}
		for i, f := range files {
			s.reads[f] = true
			if inc := s.visit(f, dir, vars, trail, u.pos(items(pathNode)[i])); inc != nil {
				u.includes = append(u.includes, inc)
			}
		}
	}
}

// includeVars are the variables of an included file: those of the including one, and of its own .env or env_file where that has none.
func (s *scanner) includeVars(u *unit, dir string, envNode *yaml.Node) (*variables, bool) {
	values := map[string]string{}
	lookup := func(k string) (string, bool) {
		if v, ok := u.vars.lookup(k); ok {
			return v, true
		}
		v, ok := values[k]
		return v, ok
	}
	load := func(file string, by manifest.Pos, needed bool) bool {
		data, err := s.tree.read(file)
		if errors.Is(err, fs.ErrNotExist) && !needed {
			return true
		}
		if err != nil {
			s.unreadable(file, err, by)
			return false
		}
		if f := parseEnv(file, data, values, "", lookup); f != nil {
			s.errorf(f.rule, manifest.Pos{File: file, Line: f.line}, "%s", f.msg)
			return false
		}
		return true
	}
	ok := true
	if envNode == nil {
		ok = load(path.Join(dir, dotenv.DotEnv), manifest.Pos{File: u.file}, false)
	}
	for _, e := range items(envNode) {
		if u.text(e) == "/dev/null" {
			continue
		}
		before := len(s.problems)
		s.confine(u, "", "include.env_file", e)
		ok = ok && len(s.problems) == before && load(path.Join(u.base, u.text(e)), u.pos(e), true)
	}
	if len(values) == 0 {
		return u.vars, ok
	}
	maps.Copy(values, u.vars.values)
	return u.vars.with(values), ok
}

// followExtends reads the files that services extend.
func (s *scanner) followExtends(u *unit) {
	for _, kv := range u.services() {
		n := child(kv[1], "extends")
		if n == nil {
			continue
		}
		if n.Kind == yaml.ScalarNode {
			u.extends[kv[0].Value] = extension{unit: u, service: u.text(n)}
			continue
		}
		ref := child(n, "service")
		if ref == nil {
			continue // the schema check told
		}
		file := child(n, "file")
		if file == nil {
			u.extends[kv[0].Value] = extension{unit: u, service: u.text(ref)}
			continue
		}
		if remote.MatchString(u.text(file)) {
			s.add(manifest.Error, "include-remote", u.pos(file), kv[0].Value,
				"extends: %s is not a file of this repository; nothing is fetched while rendering: copy the file here", u.text(file))
			continue
		}
		before := len(s.problems)
		s.confine(u, kv[0].Value, "extends.file", file)
		if len(s.problems) > before {
			continue
		}
		name := path.Join(u.base, u.text(file))
		other := u // a file may extend its own services by name
		if name != u.file {
			s.reads[name] = true
			// A circle of files is fine as long as their services form none: only the service chain counts, see checkExtends.
			other = s.visit(name, path.Dir(name), u.vars, nil, u.pos(file))
		}
		u.extends[kv[0].Value] = extension{unit: other, service: u.text(ref)}
	}
}

// checkExtends follows the chain of each service to its end.
func (s *scanner) checkExtends(u *unit) {
	for _, kv := range u.services() {
		at, name := u, kv[0].Value
		seen := []string{}
		for {
			ext, ok := at.extends[name]
			if !ok || ext.unit == nil {
				break
			}
			step := at.file + ":" + name
			pos := at.pos(child(child(child(at.root, "services"), name), "extends"))
			if slices.Contains(seen, step) {
				s.add(manifest.Error,
					"extends-circle", pos, name, "services extend each other in a circle: %s", strings.Join(append(seen, step), " -> "))
				break
			}
			seen = append(seen, step)
			if k, _ := entry(child(ext.unit.root, "services"), ext.service); k == nil && !ext.unit.includesService(ext.service) {
				s.add(manifest.Error,
					"extends-missing", pos, name, "it extends the service %q, which %s does not have", ext.service, ext.unit.file)
				break
			}
			at, name = ext.unit, ext.service
		}
	}
	for _, inc := range u.includes {
		s.checkExtends(inc)
	}
}

func (u *unit) includesService(name string) bool {
	return slices.ContainsFunc(u.includes, func(inc *unit) bool {
		k, _ := entry(child(inc.root, "services"), name)
		return k != nil || inc.includesService(name)
	})
}

// locate finds where a path of the merged model is written: in the last file that sets it. It returns the place of the deepest part
// of the path that is written anywhere, and whether that is the whole.
func (s *scanner) locate(parts ...string) (manifest.Pos, bool) {
	best, depth := manifest.Pos{}, -1
	for i := len(s.tops) - 1; i >= 0; i-- {
		if pos, d := s.tops[i].locate(parts, 0); d > depth {
			best, depth = pos, d
		}
	}
	return best, depth == len(parts)
}

func (u *unit) locate(parts []string, hops int) (manifest.Pos, int) {
	best, depth := u.descend(parts)
	better := func(pos manifest.Pos, d int) {
		if d > depth {
			best, depth = pos, d
		}
	}
	if hops > 50 {
		return best, depth
	}
	if len(parts) > 2 && parts[0] == "services" && depth < len(parts) {
		if ext, ok := u.extends[parts[1]]; ok && ext.unit != nil {
			pos, d := ext.unit.locate(slices.Concat([]string{"services", ext.service}, parts[2:]), hops+1)
			// A base only counts for more than its name: else the extending service itself is the better place.
			if d > 2 {
				better(pos, d)
			}
		}
	}
	for i := len(u.includes) - 1; i >= 0 && depth < len(parts); i-- {
		better(u.includes[i].locate(parts, hops+1))
	}
	return best, depth
}

func (u *unit) descend(parts []string) (manifest.Pos, int) {
	pos, n := manifest.Pos{File: u.file}, u.root
	for i, p := range parts {
		n = target(n)
		switch n.Kind {
		case yaml.MappingNode:
			k, v := entry(n, p)
			if k == nil || target(v).Tag == "!reset" {
				return pos, i
			}
			pos, n = u.pos(k), v
		case yaml.SequenceNode:
			e := u.element(n, p, parts[i+1:])
			if e == nil {
				return pos, i
			}
			pos, n = u.pos(e), e
		default:
			return pos, i
		}
	}
	return pos, len(parts)
}

// element finds the element of a list that a part of a path means: by position, by what it names, or by what it has below.
func (u *unit) element(list *yaml.Node, part string, rest []string) *yaml.Node {
	if part == "[]" {
		for _, e := range items(list) {
			if len(rest) == 0 {
				return e
			}
			if k, _ := entry(e, rest[0]); k != nil {
				return e
			}
		}
		return nil
	}
	for _, e := range items(list) {
		if u.names(e, part) {
			return e
		}
	}
	if i, err := strconv.Atoi(part); err == nil && i >= 0 && i < len(list.Content) {
		return target(list.Content[i])
	}
	return nil
}

func (u *unit) names(e *yaml.Node, part string) bool {
	if e.Kind == yaml.ScalarNode {
		text := u.text(e)
		return text == part || slices.ContainsFunc(strings.FieldsFunc(text, func(r rune) bool { return r == ':' || r == '=' }),
			func(f string) bool { return f == part || path.Clean(f) == part })
	}
	for _, key := range []string{"target", "source", "path", "name"} {
		if v := child(e, key); v != nil && v.Kind == yaml.ScalarNode && (u.text(v) == part || path.Clean(u.text(v)) == part) {
			return true
		}
	}
	return false
}
