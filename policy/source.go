package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Limits of a policy source.
const (
	MaxModules    = 200
	MaxModuleSize = 256 << 10 // bytes of one Rego file
	MaxSourceSize = 4 << 20   // bytes of all Rego files
	MaxYAMLSize   = 1 << 20   // bytes of policy.yaml and of exemptions.yaml
)

// The files of a policy source that are not Rego.
const (
	SettingsFile   = "policy.yaml"
	ExemptionsFile = "exemptions.yaml"
)

// Source is what a policy source says: a directory that the machines' owners write and that the applications' repositories can't change.
// It is the only place that can loosen policy. The zero Source says nothing: baseline is enforced.
type Source struct {
	Scope                       // for all stacks
	Stacks     map[string]Scope // by stack, before the one for all
	Registries []string         // trusted ones, with or without a path: ghcr.io/acme
	Exemptions []Exemption
	Modules    []Module // sorted by name
}

// Scope says how strictly stacks are judged.
type Scope struct {
	Level Level            // empty: the enclosing scope's
	Sets  map[string]Level // by set; missing: the enclosing scope's. In the end baseline and custom are enforced, restricted is off
}

// Module is one Rego file of the users' own rules.
type Module struct {
	Name   string // path in the policy source
	Source string
}

// Exemption lets one stack break one rule for a time.
type Exemption struct {
	Rule    string    `json:"rule"`
	Stack   string    `json:"stack"`
	Service string    `json:"service,omitempty"` // empty: all of the stack
	Reason  string    `json:"reason"`
	Until   time.Time `json:"until"` // the first instant at which it no longer counts: midnight UTC after the day that is written
	File    string    `json:"file,omitempty"`
	Line    int       `json:"line,omitzero"`
}

func (e Exemption) covers(f Finding) bool {
	return e.Rule == f.Rule && e.Stack == f.Stack && (e.Service == "" || e.Service == f.Service || e.Service == f.Container)
}

const dayLayout = "2006-01-02"

func lastDay(until time.Time) string { return until.Add(-time.Nanosecond).UTC().Format(dayLayout) }

// LoadSource reads a policy source: policy.yaml, exemptions.yaml and every *.rego file, but for *_test.rego and what lies in directories
// whose name starts with a dot or is testdata. All is optional. Anything that it does not understand is an error that names file and
// line.
func LoadSource(fsys fs.FS) (Source, error) {
	var src Source
	var errs []error
	for _, file := range []struct {
		name string
		load func(string, []byte) error
	}{{ExemptionsFile, src.readExemptions}, {SettingsFile, src.readSettings}} {
		wrong := strings.TrimSuffix(file.name, ".yaml") + ".yml"
		if _, err := fs.Stat(fsys, wrong); err == nil {
			errs = append(errs, fmt.Errorf("%s: rename it to %s", wrong, file.name))
		}
		data, err := readLimited(fsys, file.name, MaxYAMLSize)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = file.load(file.name, data)
		}
		errs = append(errs, err)
	}
	var err error
	src.Modules, err = LoadModules(fsys)
	if err := errors.Join(append(errs, err)...); err != nil {
		return Source{}, err
	}
	return src, nil
}

// LoadModules reads the Rego files of a policy source, as [LoadSource] does.
func LoadModules(fsys fs.FS) ([]Module, error) {
	var mods []Module
	total := 0
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read the policy source: %w", err)
		}
		base := path.Base(p)
		if d.IsDir() {
			if p != "." && (strings.HasPrefix(base, ".") || base == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(base) != ".rego" || strings.HasSuffix(base, "_test.rego") || strings.HasPrefix(base, ".") {
			return nil
		}
		data, err := readLimited(fsys, p, MaxModuleSize)
		if err != nil {
			return err
		}
		total += len(data)
		if len(mods) == MaxModules || total > MaxSourceSize {
			return fmt.Errorf("%s: the policy source is too large: it may hold %d Rego files and %d bytes of them", p, MaxModules, MaxSourceSize)
		}
		mods = append(mods, Module{Name: p, Source: string(data)})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return mods, nil
}

var atLine = regexp.MustCompile(`^([^:\s]+):([0-9]+): (.*)$`)

// Problems tells of the error of [LoadSource] or [New] line by line, each with its file and line where it has one. The rule is the caller's word for them.
func Problems(rule string, err error) []manifest.Problem {
	var out []manifest.Problem
	for _, line := range strings.Split(strings.TrimPrefix(err.Error(), loadError), "\n") {
		if line == "" || line[0] == '\t' { // the text around it
			continue
		}
		p := manifest.Problem{Severity: manifest.Error, Rule: rule, Message: line}
		if m := atLine.FindStringSubmatch(line); m != nil {
			p.File, p.Message = m[1], m[3]
			p.Line, _ = strconv.Atoi(m[2])
		}
		out = append(out, p)
	}
	return out
}

func readLimited(fsys fs.FS, name string, limit int64) ([]byte, error) {
	info, err := fs.Lstat(fsys, name)
	if err != nil {
		return nil, fmt.Errorf("read the policy source: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a plain file: put the text itself there, not a link", name)
	}
	f, err := fsys.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read the policy source: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read the policy source: %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: larger than %d bytes", name, limit)
	}
	return data, nil
}

// ParseExemptions reads a file of exemptions. Rule names are checked by [New], which knows the rules.
func ParseExemptions(file string, data []byte) ([]Exemption, error) {
	var src Source
	err := src.readExemptions(file, data)
	return src.Exemptions, err
}

func (s *Source) readExemptions(file string, data []byte) error {
	d, root := parseYAML(file, data)
	d.fields(root, map[string]func(*yaml.Node){"exemptions": func(n *yaml.Node) {
		for _, item := range d.list(n) {
			e := Exemption{File: file, Line: item.Line}
			ok := d.fields(item, map[string]func(*yaml.Node){
				"rule":    func(n *yaml.Node) { e.Rule = d.text(n) },
				"stack":   func(n *yaml.Node) { e.Stack = d.text(n) },
				"service": func(n *yaml.Node) { e.Service = d.text(n) },
				"reason":  func(n *yaml.Node) { e.Reason = d.text(n) },
				"until":   func(n *yaml.Node) { e.Until = d.day(n) },
			})
			for _, need := range []struct {
				missing  bool
				name, as string
			}{
				{e.Rule == "", "rule", "rule: baseline/engine-sockets"},
				{e.Stack == "", "stack", "stack: the stack's name"},
				{strings.TrimSpace(e.Reason) == "", "reason", "reason: why, for who reads it later"},
				{e.Until.IsZero(), "until", "until: 2027-01-31, its last day"},
			} {
				if ok && need.missing && !d.failed(item.Line) {
					d.fail(item, "an exemption needs %q: write `%s`", need.name, need.as)
				}
			}
			s.Exemptions = append(s.Exemptions, e)
		}
	}})
	if err := d.err(); err != nil {
		s.Exemptions = nil
		return err
	}
	return nil
}

func (s *Source) readSettings(file string, data []byte) error {
	d, root := parseYAML(file, data)
	scope := func(sc *Scope, more map[string]func(*yaml.Node)) map[string]func(*yaml.Node) {
		fields := map[string]func(*yaml.Node){
			"level": func(n *yaml.Node) { sc.Level = d.level(n) },
			"sets": func(n *yaml.Node) {
				sc.Sets = map[string]Level{}
				for name, v := range d.pairs(n) {
					if !slices.Contains(setNames, name.Value) {
						d.fail(name, "no rule set is called %q: there are %s", name.Value, strings.Join(setNames, ", "))
						continue
					}
					sc.Sets[name.Value] = d.level(v)
				}
			},
		}
		for k, f := range more {
			fields[k] = f
		}
		return fields
	}
	d.fields(root, scope(&s.Scope, map[string]func(*yaml.Node){
		"registries": func(n *yaml.Node) {
			for _, item := range d.list(n) {
				r := strings.TrimSuffix(d.text(item), "/")
				if r == "" || strings.Contains(r, "://") || strings.ContainsAny(r, "* \t@") {
					d.fail(item, "%q is no registry: write it as images name it, as ghcr.io or ghcr.io/acme", item.Value)
				}
				s.Registries = append(s.Registries, r)
			}
		},
		"stacks": func(n *yaml.Node) {
			s.Stacks = map[string]Scope{}
			for name, v := range d.pairs(n) {
				var sc Scope
				d.fields(v, scope(&sc, nil))
				s.Stacks[name.Value] = sc
			}
		},
	}))
	return d.err()
}

// document reads YAML node by node, so that each complaint has its line, and what it does not know is a complaint.
type document struct {
	file string
	errs []error
	bad  map[int]bool // lines with a complaint
}

func parseYAML(file string, data []byte) (*document, *yaml.Node) {
	d := &document{file: file, bad: map[int]bool{}}
	var root, second yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	err := dec.Decode(&root)
	if errors.Is(err, io.EOF) {
		return d, nil
	}
	if err != nil {
		d.errs = append(d.errs, fmt.Errorf("%s: %w", file, err))
		return d, nil
	}
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		d.errs = append(d.errs, fmt.Errorf("%s: one YAML document is expected, without a line ---", file))
	}
	if len(root.Content) == 0 {
		return d, nil
	}
	return d, root.Content[0]
}

func (d *document) fail(n *yaml.Node, format string, args ...any) {
	d.bad[n.Line] = true
	d.errs = append(d.errs, fmt.Errorf("%s:%d: %s", d.file, n.Line, fmt.Sprintf(format, args...)))
}

func (d *document) failed(line int) bool { return d.bad[line] }

func (d *document) err() error { return errors.Join(d.errs...) }

func null(n *yaml.Node) bool { return n == nil || n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// pairs yields the keys and values of a mapping, in order.
func (d *document) pairs(n *yaml.Node) func(yield func(k, v *yaml.Node) bool) {
	return func(yield func(k, v *yaml.Node) bool) {
		if null(n) {
			return
		}
		if n.Kind != yaml.MappingNode {
			d.fail(n, "expected keys and values here")
			return
		}
		seen := map[string]int{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			k, v := n.Content[i], n.Content[i+1]
			if k.Kind != yaml.ScalarNode || k.Tag == "!!merge" {
				d.fail(k, "expected a plain key here; anchors and merges are not read in this file")
				return
			}
			if first, twice := seen[k.Value]; twice {
				d.fail(k, "%q is written twice: first in line %d", k.Value, first)
				continue
			}
			seen[k.Value] = k.Line
			if !yield(k, v) {
				return
			}
		}
	}
}

// fields reads a mapping whose keys are known. False: it was no mapping.
func (d *document) fields(n *yaml.Node, known map[string]func(*yaml.Node)) bool {
	for k, v := range d.pairs(n) {
		read, ok := known[k.Value]
		if !ok {
			names := make([]string, 0, len(known))
			for name := range known {
				names = append(names, name)
			}
			slices.Sort(names)
			d.fail(k, "unknown key %q: there are %s", k.Value, strings.Join(names, ", "))
			continue
		}
		read(v)
	}
	return null(n) || n.Kind == yaml.MappingNode
}

func (d *document) list(n *yaml.Node) []*yaml.Node {
	if null(n) {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		d.fail(n, "expected a list here")
		return nil
	}
	return n.Content
}

func (d *document) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode {
		d.fail(n, "expected a text here")
		return ""
	}
	if null(n) {
		return ""
	}
	return n.Value
}

func (d *document) level(n *yaml.Node) Level {
	// The text as written: YAML 1.1 would read off as false.
	l, err := ParseLevel(d.text(n))
	if err != nil && !d.failed(n.Line) {
		d.fail(n, "%v", err)
	}
	return l
}

func (d *document) day(n *yaml.Node) time.Time {
	t, err := time.Parse(dayLayout, d.text(n))
	if err != nil {
		d.fail(n, "%q is no day: write the last day on which it counts, as 2027-01-31", n.Value)
		return time.Time{}
	}
	return t.AddDate(0, 0, 1)
}
