package compose

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

const settingsFile = "gitops.yaml"

// settings are what gitops.yaml, at the top of the source's path, may hold. The doc tags become the descriptions of the JSON schema.
type settings struct {
	Stacks   []stackEntry            `yaml:"stacks" doc:"Stacks that the layout does not find by itself, and settings of those that it finds."`
	Discover *bool                   `yaml:"discover" doc:"false: only the stacks named here exist. Default true: each directory with a Compose file is a stack."`
	Exclude  []string                `yaml:"exclude" doc:"Directories that are not looked into, as patterns relative to this file: old, */examples."`
	Vars     map[string]scalar       `yaml:"vars" doc:"Variables for all Compose files. They win over .env."`
	Profiles []string                `yaml:"profiles" doc:"Compose profiles that are switched on."`
	Clusters map[string]clusterEntry `yaml:"clusters" doc:"What differs in one cluster, by its name."`
	Prune    pruneEntry              `yaml:"prune" doc:"What happens to stacks and services that are no longer here."`
	Defaults defaultsEntry           `yaml:"defaults" doc:"Limits for containers whose file sets none."`
	Policy   string                  `yaml:"policy" enum:"enforce warn off" doc:"How policy findings are taken, where the stack does not say."`
	DataRoot string                  `yaml:"dataRoot" doc:"Absolute directory of the host for relative paths that are not in the repository. Each stack has a directory of its name in it."`

	file  string
	lines *yaml.Node
}

// stackEntry is one stack of gitops.yaml.
type stackEntry struct {
	Name      string                  `yaml:"name" doc:"The stack's name. With neither path nor files: settings of the stack of this name."`
	Path      string                  `yaml:"path" doc:"Its directory, relative to gitops.yaml."`
	Files     []string                `yaml:"files" doc:"Its Compose files, merged in this order, relative to path."`
	Clusters  map[string]stackCluster `yaml:"clusters" doc:"What differs in one cluster, by its name."`
	Vars      map[string]scalar       `yaml:"vars" doc:"Variables for this stack. They win over those of all stacks."`
	Profiles  []string                `yaml:"profiles" doc:"Compose profiles that are switched on."`
	DependsOn []string                `yaml:"dependsOn" doc:"Stacks that must be Ready first."`
	Suspend   bool                    `yaml:"suspend" doc:"true: the stack does not follow Git. What runs is still healed."`
	Prune     *bool                   `yaml:"prune" doc:"false: services that are no longer here go on running."`
	Volumes   *bool                   `yaml:"pruneVolumes" doc:"Whether volumes are removed, with their data, with the stack or its services. Default: as prune.volumes says."`
	Drift     string                  `yaml:"drift" enum:"heal report" doc:"What happens to drift. Default heal."`
	Ignore    []string                `yaml:"ignoreDrift" doc:"Fields whose drift is left alone: web.resources.memory."`
	Policy    string                  `yaml:"policy" enum:"enforce warn off" doc:"How policy findings are taken."`
	DataRoot  string                  `yaml:"dataRoot" doc:"Absolute directory of the host for relative paths that are not in the repository."`
	Rollback  string                  `yaml:"rollback" enum:"service stack" doc:"stack: one failed service rolls the whole stack back."`
}

// stackCluster is what differs for one stack in one cluster.
type stackCluster struct {
	Files    []string          `yaml:"files" doc:"Override files, merged after the others, relative to the stack's directory."`
	Vars     map[string]scalar `yaml:"vars" doc:"Variables. They win over all others of this file."`
	Profiles []string          `yaml:"profiles" doc:"Compose profiles that are switched on as well."`
	Suspend  *bool             `yaml:"suspend" doc:"true: the stack does not follow Git in this cluster."`
}

// clusterEntry is what differs for all stacks in one cluster.
type clusterEntry struct {
	Vars     map[string]scalar `yaml:"vars" doc:"Variables for all stacks in this cluster."`
	Profiles []string          `yaml:"profiles" doc:"Compose profiles that are switched on as well."`
}

type pruneEntry struct {
	Enabled *bool `yaml:"enabled" doc:"false: nothing is removed. Default true."`
	Budget  int   `yaml:"budget" min:"1" max:"100" doc:"Percent of the stacks, services or volumes that one revision may remove unasked. Default 50."`
	Volumes bool  `yaml:"volumes" doc:"true: what is removed goes with its volumes and their data. Default false: they are kept."`
}

type defaultsEntry struct {
	Memory string `yaml:"memory" doc:"Memory limit, as 256m."`
	CPUs   scalar `yaml:"cpus" doc:"Limit in cores, as 0.5."`
	Pids   int64  `yaml:"pids" min:"1" max:"4194304" doc:"Limit of processes and threads."`
}

// scalar is a text, a number or a truth value of YAML, kept as it is written.
type scalar string

// UnmarshalYAML takes any plain value.
func (s *scalar) UnmarshalYAML(n *yaml.Node) error {
	n = target(n)
	if n.Kind != yaml.ScalarNode {
		return errors.New("want one value")
	}
	*s = ""
	if !isNull(n) {
		*s = scalar(n.Value)
	}
	return nil
}

// readSettings reads gitops.yaml, if there is one. What is wrong with it is recorded; the error is a tree that can't be read.
func (l *loading) readSettings() error {
	file := path.Join(l.base, settingsFile)
	data, err := l.tree.read(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		l.fail(0, "settings", err.Error())
		return nil
	}
	root, f := parseYAML(data)
	if f != nil {
		l.fail(f.line, f.rule, f.msg)
		return nil
	}
	if root == nil {
		return nil
	}
	s := &settings{file: file, lines: root}
	faults := strict(root, reflect.TypeOf(*s), "")
	if len(faults) == 0 {
		if err := root.Decode(s); err != nil {
			faults = append(faults, yamlFault(err))
		}
		faults = append(faults, s.check()...)
	}
	for _, f := range faults {
		l.fail(f.line, f.rule, f.msg)
	}
	if len(faults) == 0 {
		l.settings = s
	}
	return nil
}

// strict compares a document with a type: unknown keys, wrong kinds of values and values outside of an enumeration are faults.
func strict(n *yaml.Node, t reflect.Type, at string) []*fault {
	n = target(n)
	if isNull(n) {
		return nil
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	wrong := func(want string) []*fault {
		return []*fault{faultf(n.Line, "settings-type", "%s must be %s", orTop(at), want).at(at)}
	}
	switch t.Kind() {
	case reflect.Struct:
		if n.Kind != yaml.MappingNode {
			return wrong("a mapping of keys and values")
		}
		return strictStruct(n, t, at)
	case reflect.Map:
		if n.Kind != yaml.MappingNode {
			return wrong("a mapping of keys and values")
		}
		var out []*fault
		for i := 0; i+1 < len(n.Content); i += 2 {
			out = append(out, strict(n.Content[i+1], t.Elem(), join(at, n.Content[i].Value))...)
		}
		return out
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			return wrong("a list")
		}
		var out []*fault
		for i, e := range n.Content {
			out = append(out, strict(e, t.Elem(), fmt.Sprintf("%s[%d]", at, i))...)
		}
		return out
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
			return wrong("true or false")
		}
	case reflect.Int, reflect.Int64:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" {
			return wrong("a whole number")
		}
	default:
		if n.Kind != yaml.ScalarNode {
			return wrong("a text")
		}
	}
	return nil
}

func orTop(at string) string {
	if at == "" {
		return "the file"
	}
	return at
}

func join(at, key string) string {
	if at == "" {
		return key
	}
	return at + "." + key
}

func strictStruct(n *yaml.Node, t reflect.Type, at string) []*fault {
	fields := map[string]reflect.StructField{}
	for i := range t.NumField() {
		if f := t.Field(i); f.IsExported() {
			fields[f.Tag.Get("yaml")] = f
		}
	}
	var out []*fault
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], target(n.Content[i+1])
		if key.ShortTag() == "!!merge" {
			out = append(out, faultf(key.Line, "settings-key", "merge keys (<<) are not read in %s; write the keys out", settingsFile))
			continue
		}
		f, ok := fields[key.Value]
		if !ok {
			if strings.HasPrefix(key.Value, "x-") {
				continue
			}
			out = append(out, faultf(key.Line, "settings-key", "%s is not a key here; %s",
				join(at, key.Value), suggest(key.Value, slices.Sorted(maps.Keys(fields)))).at(join(at, key.Value)))
			continue
		}
		faults := strict(value, f.Type, join(at, key.Value))
		if len(faults) == 0 && !isNull(value) {
			faults = bounds(value, f, join(at, key.Value))
		}
		out = append(out, faults...)
	}
	return out
}

// bounds checks a value against the enum, min and max tags of its field.
func bounds(n *yaml.Node, f reflect.StructField, at string) []*fault {
	if enum := strings.Fields(f.Tag.Get("enum")); len(enum) > 0 && !slices.Contains(enum, n.Value) {
		return []*fault{faultf(n.Line, "settings-value", "%s is %q; want one of %s", at, n.Value, strings.Join(enum, ", ")).at(at)}
	}
	low, err1 := strconv.ParseInt(f.Tag.Get("min"), 10, 64)
	high, err2 := strconv.ParseInt(f.Tag.Get("max"), 10, 64)
	if err1 == nil && err2 == nil {
		if v, err := strconv.ParseInt(n.Value, 0, 64); err != nil || v < low || v > high {
			return []*fault{faultf(n.Line, "settings-value", "%s is %s; want a number from %d to %d", at, n.Value, low, high).at(at)}
		}
	}
	return nil
}

// suggest says what an unknown key may have been meant to be.
func suggest(key string, known []string) string {
	if best := nearest(key, known); best != "" {
		return fmt.Sprintf("did you mean %s?", best)
	}
	return "known are: " + strings.Join(known, ", ")
}

// nearest is the known word that a key is a slip of the pen away from; empty when there is none.
func nearest(key string, known []string) string {
	best, distance := "", 3
	for _, k := range known {
		if d := edits(strings.ToLower(key), strings.ToLower(k)); d < distance {
			best, distance = k, d
		}
	}
	return best
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

// check finds what no single value shows.
func (s *settings) check() []*fault {
	var out []*fault
	names := map[string]int{}
	for i, e := range s.Stacks {
		line := s.line("stacks", i)
		if e.Name == "" && e.Path == "" && len(e.Files) == 0 {
			out = append(out, faultf(line, "settings-value", "stacks[%d] names nothing; give it a name:, path: or files:", i))
			continue
		}
		if e.Name != "" {
			if normalName(e.Name) != e.Name {
				out = append(out, faultf(line, "settings-value",
					"the stack name %q must be of lower-case letters, digits, - and _, and begin with a letter or digit", e.Name))
			}
			if first, twice := names[e.Name]; twice {
				out = append(out,
					faultf(line, "settings-value", "the stack %s is here for the second time; it is first in line %d", e.Name, first))
			}
			names[e.Name] = line
		}
		out = append(out, s.checkDataRoot(e.DataRoot, line)...)
	}
	out = append(out, s.checkDataRoot(s.DataRoot, s.line("dataRoot", -1))...)
	for _, pattern := range s.Exclude {
		if _, err := path.Match(pattern, "x"); err != nil {
			out = append(out,
				faultf(s.line("exclude", -1), "settings-value", "exclude: the pattern %q can't be read; escape [ and \\ with \\", pattern))
		}
	}
	if _, err := parseBytes(s.Defaults.Memory); err != nil {
		out = append(out, faultf(s.line("defaults", -1), "settings-value", "defaults.memory: %v", err))
	}
	if s.Defaults.CPUs != "" {
		if c, err := manifest.ParseCPU(string(s.Defaults.CPUs)); err != nil || c <= 0 {
			out = append(out,
				faultf(s.line("defaults", -1), "settings-value", "defaults.cpus is %q; want a number of cores such as 0.5", s.Defaults.CPUs))
		}
	}
	return out
}

func (s *settings) checkDataRoot(root string, line int) []*fault {
	if root != "" && (!path.IsAbs(root) || path.Clean(root) != root || root == "/") {
		return []*fault{faultf(line, "settings-value", "dataRoot is %q; want an absolute directory without . and .., other than /", root)}
	}
	return nil
}

// line is where a key of the file stands, or an element of the list under it.
func (s *settings) line(key string, index int) int {
	k, v := entry(s.lines, key)
	if k == nil {
		return 0
	}
	if v = target(v); index >= 0 && index < len(v.Content) {
		return v.Content[index].Line
	}
	return k.Line
}

func (s *settings) excluded(dir string) bool {
	return slices.ContainsFunc(s.Exclude, func(pattern string) bool {
		ok, _ := path.Match(strings.TrimSuffix(pattern, "/"), dir)
		return ok
	})
}

// bundle is the part that concerns the source as a whole.
func (s *settings) bundle() manifest.Settings {
	return manifest.Settings{
		PruneOff:     s.Prune.Enabled != nil && !*s.Prune.Enabled,
		PruneBudget:  s.Prune.Budget,
		PruneVolumes: s.Prune.Volumes,
	}
}

// vars merges the variables for a stack: its own win over the cluster's, these over the source's.
func (l *loading) vars(e stackEntry, dotenv map[string]string) map[string]string {
	out := maps.Clone(dotenv)
	if out == nil {
		out = map[string]string{}
	}
	add := func(m map[string]scalar) {
		for k, v := range m {
			out[k] = string(v)
		}
	}
	add(l.settings.Vars)
	add(l.settings.Clusters[l.opts.Cluster].Vars)
	add(e.Vars)
	add(e.Clusters[l.opts.Cluster].Vars)
	maps.Copy(out, l.opts.Vars)
	return out
}

func (l *loading) profiles(e stackEntry) []string {
	return sorted(slices.Concat(l.opts.Profiles, l.settings.Profiles, l.settings.Clusters[l.opts.Cluster].Profiles,
		e.Profiles, e.Clusters[l.opts.Cluster].Profiles))
}
