package compose

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Options say what to load.
type Options struct {
	Root string // absolute directory of the tree: an immutable checkout, or a person's work tree
	Path string // subdirectory that holds the stacks; empty = the whole tree
	// Files makes one stack of these files (relative to Root, merged in order) and looks at no other: for one file of a person's choice.
	Files []string

	Source   string // the source's name: that of a stack at the root of the tree
	Revision manifest.Revision
	Cluster  string            // picks the entries of gitops.yaml under clusters:
	Vars     map[string]string // win over .env and gitops.yaml
	Profiles []string          // switched on, besides those of gitops.yaml

	// Hash is the object hash of a path of the commit (of a file, a directory or a link); false = the commit does not have it. It is called
	// from several goroutines at once. Nil for a work tree: then nothing is cached.
	Hash  func(path string) (string, bool)
	Cache *Cache // keeps what was rendered for the next Load; may be nil

	Limits Limits // zero fields have their defaults
}

// Limits bound what a tree may ask for. A thing over its limit is a Problem, or an error of Load where no stack could be named.
type Limits struct {
	FileSize     int64 // bytes of any one file; default 1 MiB
	ContentFiles int   // files of one mounted directory; default 5,000
	ContentSize  int64 // bytes of one mounted directory; default 64 MiB
	Stacks       int   // default 5,000
	Services     int   // of one stack; default 500
	Units        int   // YAML files of one stack, with those it includes and extends; default 200
	Directories  int   // of the tree; default 50,000
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	if l.FileSize == 0 {
		l.FileSize = 1 << 20
	}
	if l.ContentSize == 0 {
		l.ContentSize = 64 << 20
	}
	set(&l.ContentFiles, 5000)
	set(&l.Stacks, 5000)
	set(&l.Services, 500)
	set(&l.Units, 200)
	set(&l.Directories, 50_000)
	return l
}

// Load renders a tree. What is wrong with the files is among the Bundle's Problems; the error is for what kept Load from looking at all:
// a missing Root or Path, a tree over its limits, or the end of ctx.
//
// The maps of a Bundle may be shared with the Cache: they are for reading.
//
// A Problem without a stack (gitops.yaml does not read) means that the revision as a whole does not render: then Stacks is empty and Found
// holds what the layout alone tells.
func Load(ctx context.Context, o Options) (*manifest.Bundle, error) {
	l, err := newLoader(o)
	if err != nil {
		return nil, err
	}
	if err := l.readSettings(); err != nil {
		return nil, err
	}
	plans, err := l.layout()
	if err != nil {
		return nil, err
	}
	rendered, err := l.renderAll(ctx, plans)
	if err != nil {
		return nil, err
	}
	o.Cache.forget(plans)
	return l.assemble(rendered), nil
}

// loading is one Load.
type loading struct {
	opts     Options
	tree     *checkout // for what concerns no single stack
	base     string
	settings *settings
	problems []manifest.Problem // of no single stack
	broken   bool               // gitops.yaml does not read: nothing renders
}

func newLoader(o Options) (*loading, error) {
	o.Limits = o.Limits.withDefaults()
	t, err := newCheckout(o.Root, o.Limits, o.Hash)
	if err != nil {
		return nil, err
	}
	base := path.Clean("./" + o.Path)
	real, err := t.resolve(base)
	if errors.Is(err, errOutside) {
		return nil, fmt.Errorf("the path %s leaves the repository", o.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("the path %s is not in the repository: %w", o.Path, bare(err))
	}
	if info, err := t.stat(real); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("the path %s is not a directory of the repository: %w", o.Path, fs.ErrNotExist)
	}
	return &loading{opts: o, tree: t, base: real, settings: &settings{}}, nil
}

// plan is one stack as the layout found it: which files make it, and what gitops.yaml says of it.
type plan struct {
	name     string // empty: the file's name:, else the directory's
	dir      string // relative to the root
	files    []string
	entry    stackEntry
	line     int  // of the entry in gitops.yaml; 0 = found by the layout
	declared bool // by gitops.yaml or Options.Files: never part of another stack
	problem  *manifest.Problem
}

// rendering is the outcome of one plan.
type rendering struct {
	found    manifest.FoundStack
	stack    *manifest.Stack // nil with an error among problems
	problems []manifest.Problem
	blobs    map[string]manifest.BlobRef
	reads    []string // YAML files other than its own that it includes or extends
	unread   []byte   // the text of files that are no YAML: what they would include can only be guessed
	declared bool
	named    manifest.Pos // where the name was given
}

func (l *loading) renderAll(ctx context.Context, plans []plan) ([]*rendering, error) {
	out := make([]*rendering, len(plans))
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, p := range plans {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			r, err := l.cached(ctx, p)
			out[i] = r
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("render the stacks: %w", err)
	}
	return out, nil
}

// assemble drops the parts of other stacks, judges what concerns several stacks, and puts all in order.
func (l *loading) assemble(all []*rendering) *manifest.Bundle {
	b := &manifest.Bundle{Source: l.opts.Source,
		Revision: l.opts.Revision, Settings: l.settings.bundle(), Blobs: map[string]manifest.BlobRef{}}
	kept, parts := withoutParts(all)
	problems := append(slices.Clone(l.problems), parts...)
	double := sameNames(kept)
	ports := map[portKey][]*manifest.Stack{}
	for _, r := range kept {
		b.Found = append(b.Found, r.found)
		if p, ok := double[r]; ok {
			problems = append(problems, p)
			continue
		}
		problems = append(problems, r.problems...)
		if r.stack == nil || l.broken {
			continue
		}
		b.Stacks = append(b.Stacks, handOut(r.stack))
		maps.Copy(b.Blobs, r.blobs)
	}
	slices.SortFunc(b.Stacks, func(a, b manifest.Stack) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(b.Found, func(a, b manifest.FoundStack) int {
		return slices.Compare([]string{a.Name, a.Dir}, []string{b.Name, b.Dir})
	})
	for i := range b.Stacks {
		for _, k := range hostPorts(&b.Stacks[i]) {
			ports[k] = append(ports[k], &b.Stacks[i])
		}
	}
	problems = append(problems, sharedPorts(ports)...)
	problems = append(problems, sharedVolumes(b)...)
	problems = append(problems, unknownStacks(b)...)
	manifest.SortProblems(problems)
	b.Problems = slices.Compact(problems)
	return b
}

// handOut copies a stack as far as the caller will change it: a cached rendering stays what it is. Maps are shared and not to be
// written to.
func handOut(s *manifest.Stack) manifest.Stack {
	out := *s
	out.Secrets = slices.Clone(s.Secrets)
	out.Networks = slices.Clone(s.Networks)
	out.Volumes = slices.Clone(s.Volumes)
	out.Services = slices.Clone(s.Services)
	for i := range out.Services {
		svc := &out.Services[i]
		svc.Containers = slices.Clone(svc.Containers)
		for j := range svc.Containers {
			c := &svc.Containers[j]
			c.Secrets = slices.Clone(c.Secrets)
			c.Mounts = slices.Clone(c.Mounts)
			if c.Health != nil {
				h := *c.Health
				c.Health = &h
			}
			if c.Probe != nil {
				p := *c.Probe
				c.Probe = &p
			}
		}
	}
	return out
}

// mentions says whether the stack's files that do not read hold the path of another file. While they are broken, what they used to include must
// not turn into stacks of its own and start.
func (r *rendering) mentions(file string) bool {
	if len(r.unread) == 0 {
		return false
	}
	rel, err := filepath.Rel(filepath.FromSlash(r.found.Dir), filepath.FromSlash(file))
	return err == nil && bytes.Contains(r.unread, []byte(filepath.ToSlash(rel)))
}

// withoutParts leaves out the directories whose files belong to a stack elsewhere by include or extends. Files that only point at each
// other stay: their own rendering tells of the cycle.
func withoutParts(all []*rendering) ([]*rendering, []manifest.Problem) {
	owner := map[string]*rendering{} // by file
	for _, r := range all {
		for _, f := range r.found.Files {
			owner[f] = r
		}
	}
	into := map[*rendering]*rendering{} // part -> the stack that uses it
	for _, r := range all {
		for _, f := range r.reads {
			if part := owner[f]; part != nil && part != r && !part.declared && into[part] == nil {
				into[part] = r
			}
		}
	}
	for _, r := range all {
		for f, part := range owner {
			if part != r && !part.declared && into[part] == nil && r.mentions(f) {
				into[part] = r
			}
		}
	}
	var kept []*rendering
	var notices []manifest.Problem
	for _, r := range all {
		user, steps := into[r], 0
		for user != nil && into[user] != nil && steps < len(all) {
			user, steps = into[user], steps+1
		}
		if user == nil || into[user] != nil {
			kept = append(kept, r)
			continue
		}
		notices = append(notices, manifest.Problem{Severity: manifest.Notice, Rule: "part", File: r.found.Files[0],
			Message: fmt.Sprintf("it is part of the stack %s (%s) and no stack of its own; name its path under stacks: in %s to run it by itself as well",
				user.found.Name, user.found.Files[0], settingsFile)})
	}
	return kept, notices
}

// sameNames finds the stacks whose name another one has too.
func sameNames(all []*rendering) map[*rendering]manifest.Problem {
	byName := map[string][]*rendering{}
	for _, r := range all {
		byName[r.found.Name] = append(byName[r.found.Name], r)
	}
	out := map[*rendering]manifest.Problem{}
	for name, rs := range byName {
		if len(rs) < 2 {
			continue
		}
		for i, r := range rs {
			other := rs[(i+1)%len(rs)]
			where := other.named.File
			if other.named.Line > 0 {
				where += fmt.Sprintf(":%d", other.named.Line)
			}
			out[r] = manifest.Problem{Severity: manifest.Error, Rule: "stack-name-twice", Stack: name, File: r.named.File, Line: r.named.Line,
				Message: fmt.Sprintf("the stack name %q is taken by %s too, so neither is rendered; give one of them another name: at the top of its file",
					name, where)}
		}
	}
	return out
}

type portKey struct {
	port  uint16
	proto string
}

func hostPorts(s *manifest.Stack) []portKey {
	seen := map[portKey]bool{}
	for _, svc := range s.Services {
		for _, p := range svc.Ports {
			if p.Published != 0 {
				seen[portKey{p.Published, p.Proto()}] = true
			}
		}
	}
	return slices.SortedFunc(maps.Keys(seen), func(a, b portKey) int {
		return cmp.Or(cmp.Compare(a.port, b.port), cmp.Compare(a.proto, b.proto))
	})
}

// sharedPorts warns where stacks publish one port of the node: the later one to start would not get it.
func sharedPorts(ports map[portKey][]*manifest.Stack) []manifest.Problem {
	var out []manifest.Problem
	for k, stacks := range ports {
		if len(stacks) < 2 {
			continue
		}
		for i, s := range stacks {
			other := stacks[(i+1)%len(stacks)]
			pos := portOrigin(s, k)
			out = append(out, manifest.Problem{Severity: manifest.Warn, Rule: "port-shared", Stack: s.Name, File: pos.File, Line: pos.Line,
				Message: fmt.Sprintf("port %d/%s is published by the stack %s too; on one node only one of them gets it",
					k.port, k.proto, other.Name)})
		}
	}
	return out
}

func portOrigin(s *manifest.Stack, k portKey) manifest.Pos {
	for _, svc := range s.Services {
		for _, p := range svc.Ports {
			if (portKey{p.Published, p.Proto()}) == k {
				return s.Origin(svc.Name + ".ports")
			}
		}
	}
	return s.Origin("")
}

// unknownStacks finds dependsOn that names no stack of the revision, and circles.
func unknownStacks(b *manifest.Bundle) []manifest.Problem {
	found := map[string]bool{}
	for _, f := range b.Found {
		found[f.Name] = true
	}
	var out []manifest.Problem
	graph := map[string][]string{}
	for i := range b.Stacks {
		s := &b.Stacks[i]
		graph[s.Name] = s.DependsOn
		for _, d := range s.DependsOn {
			if !found[d] {
				pos := s.Origin("dependsOn")
				out = append(out,
					manifest.Problem{Severity: manifest.Warn, Rule: "depends-on-unknown", Stack: s.Name, File: pos.File, Line: pos.Line,
						Message: fmt.Sprintf("it depends on the stack %q, which this revision does not have: it waits until another source brings it", d)})
			}
		}
	}
	if circle := manifest.Cycle(graph); circle != nil {
		for _, name := range circle[1:] {
			for i := range b.Stacks {
				if s := &b.Stacks[i]; s.Name == name {
					pos := s.Origin("dependsOn")
					out = append(out,
						manifest.Problem{Severity: manifest.Error, Rule: "depends-on-circle", Stack: name, File: pos.File, Line: pos.Line,
							Message: "stacks wait for each other in a circle: " + strings.Join(circle, " -> ") + "; take one dependsOn out"})
				}
			}
		}
		b.Stacks = slices.DeleteFunc(b.Stacks, func(s manifest.Stack) bool { return slices.Contains(circle, s.Name) })
	}
	return out
}
