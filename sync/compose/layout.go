package compose

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// stems are the names of Compose files that make their directory a stack, without the ending.
var stems = []string{"compose", "docker-compose", "docker-stack"}

var endings = []string{".yaml", ".yml"}

// skipped directories hold other people's files or test data.
var skipped = map[string]bool{"vendor": true, "node_modules": true, "testdata": true}

// layout finds the stacks of the tree.
func (l *loading) layout() ([]plan, error) {
	if len(l.opts.Files) > 0 {
		files := make([]string, len(l.opts.Files))
		for i, f := range l.opts.Files {
			files[i] = path.Clean(f)
		}
		return []plan{{dir: path.Dir(files[0]), files: files, declared: true}}, nil
	}
	plans, covered := l.declared()
	adjust := map[string]int{} // entries that only change a stack found by the layout
	for i, e := range l.settings.Stacks {
		if e.Path == "" && len(e.Files) == 0 {
			adjust[e.Name] = i
		}
	}
	if l.settings.Discover == nil || *l.settings.Discover {
		w := walker{loading: l, covered: covered, adjust: adjust}
		if err := w.walk(l.base); err != nil {
			return nil, err
		}
		plans = append(plans, w.plans...)
		for name, i := range adjust {
			if !w.adjusted[name] {
				plans = append(plans, plan{name: name, dir: l.base, entry: l.settings.Stacks[i], declared: true,
					problem: l.entryProblem(l.settings.line("stacks", i), "stack-unknown",
						fmt.Sprintf("no directory holds a stack named %q; give the entry a path: or files:", name))})
			}
		}
	}
	if len(plans) > l.opts.Limits.Stacks {
		return nil, fmt.Errorf("the tree holds %d stacks; %d are the limit", len(plans), l.opts.Limits.Stacks)
	}
	return plans, nil
}

// declared lists the stacks that gitops.yaml names, and the directories that they cover.
func (l *loading) declared() ([]plan, map[string]bool) {
	var out []plan
	covered := map[string]bool{}
	for i, e := range l.settings.Stacks {
		if e.Path == "" && len(e.Files) == 0 {
			continue
		}
		line := l.settings.line("stacks", i)
		p := plan{name: e.Name, entry: e, line: line, declared: true, dir: path.Join(l.base, e.Path)}
		if real, err := l.tree.resolve(p.dir); err == nil {
			p.dir = real
		} else {
			p.problem = l.entryProblem(line,
				"stack-path", fmt.Sprintf("the path %q of the stack %s is not a directory of this repository", e.Path, e.Name))
		}
		covered[p.dir] = true
		if len(e.Files) > 0 {
			for _, f := range e.Files {
				name := path.Join(p.dir, f)
				p.files = append(p.files, name)
				covered[path.Dir(name)] = true
			}
			p.dir = path.Dir(p.files[0])
		} else if p.problem == nil {
			p.files, p.problem = l.candidates(p.dir)
			if len(p.files) == 0 && p.problem == nil {
				p.problem = l.entryProblem(line,
					"stack-path", fmt.Sprintf("the directory %q holds no Compose file; name them under files:", e.Path))
			}
		}
		out = append(out, p)
	}
	return out, covered
}

// walker finds the directories with Compose files.
type walker struct {
	*loading
	covered  map[string]bool
	adjust   map[string]int
	adjusted map[string]bool
	seen     int
	plans    []plan
}

func (w *walker) walk(dir string) error {
	if w.seen++; w.seen > w.opts.Limits.Directories {
		return fmt.Errorf("the tree has more than %d directories; narrow the source's path", w.opts.Limits.Directories)
	}
	list, err := os.ReadDir(w.tree.abs(dir))
	if err != nil {
		return fmt.Errorf("list the directory %s: %w", dir, bare(err))
	}
	if !w.covered[dir] {
		w.add(dir, list)
	}
	for _, e := range list {
		name := path.Join(dir, e.Name())
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") || skipped[e.Name()] || w.settings.excluded(w.below(name)) {
			continue
		}
		if err := w.walk(name); err != nil {
			return err
		}
	}
	return nil
}

// below is a path relative to the source's path.
func (l *loading) below(name string) string {
	if l.base == "." {
		return name
	}
	return strings.TrimPrefix(name, l.base+"/")
}

func (w *walker) add(dir string, list []fs.DirEntry) {
	files, problem := pick(dir, list)
	if len(files) == 0 && problem == nil {
		return
	}
	p := plan{dir: dir, files: files, problem: problem}
	if i, ok := w.adjust[w.peek(p)]; ok {
		p.entry, p.line = w.settings.Stacks[i], w.settings.line("stacks", i)
		if w.adjusted == nil {
			w.adjusted = map[string]bool{}
		}
		w.adjusted[p.entry.Name] = true
	}
	w.plans = append(w.plans, p)
}

// peek is the name that a stack found by the layout will have, but for variables in it.
func (w *walker) peek(p plan) string {
	if len(w.adjust) == 0 || len(p.files) == 0 {
		return ""
	}
	name := ""
	for _, f := range p.files {
		if data, err := w.tree.read(f); err == nil {
			if n, _ := topName(data); n != "" {
				name = n
			}
		}
	}
	if name == "" {
		name = w.dirName(p.dir)
	}
	return name
}

// candidates finds the Compose files of one directory.
func (l *loading) candidates(dir string) ([]string, *manifest.Problem) {
	list, err := os.ReadDir(l.tree.abs(dir))
	if err != nil {
		return nil, nil
	}
	return pick(dir, list)
}

// pick chooses the Compose file of a directory and the override beside it. Several to choose from are a Problem.
func pick(dir string, list []fs.DirEntry) ([]string, *manifest.Problem) {
	have := map[string]bool{}
	for _, e := range list {
		if !e.IsDir() {
			have[e.Name()] = true
		}
	}
	var mains []string
	var files []string
	for _, stem := range stems {
		for _, end := range endings {
			if have[stem+end] {
				mains = append(mains, stem+end)
			}
		}
	}
	if len(mains) == 0 {
		return nil, nil
	}
	files = append(files, path.Join(dir, mains[0]))
	if len(mains) > 1 {
		return files, &manifest.Problem{Severity: manifest.Error, Rule: "layout-several", File: path.Join(dir, mains[0]),
			Message: fmt.Sprintf("the directory holds several Compose files (%s); "+
				"say under stacks: in %s which files make which stack, or remove all but one",
				strings.Join(mains, ", "), settingsFile)}
	}
	stem := strings.TrimSuffix(strings.TrimSuffix(mains[0], ".yaml"), ".yml")
	var overrides []string
	for _, end := range endings {
		if have[stem+".override"+end] {
			overrides = append(overrides, stem+".override"+end)
		}
	}
	if len(overrides) > 1 {
		return files, &manifest.Problem{Severity: manifest.Error, Rule: "layout-several", File: path.Join(dir, overrides[0]),
			Message: fmt.Sprintf("the directory holds two override files (%s); remove one of them", strings.Join(overrides, ", "))}
	}
	for _, o := range overrides {
		files = append(files, path.Join(dir, o))
	}
	return files, nil
}

var topNameLine = regexp.MustCompile(`(?m)^name:[ \t]*["']?([^\s"'#]+)`)

// topName reads the name: of a Compose file from its text, so that a stack keeps its name while the file is broken.
func topName(data []byte) (string, int) {
	m := topNameLine.FindSubmatchIndex(data)
	if m == nil {
		return "", 0
	}
	line := 1
	for _, c := range data[:m[0]] {
		if c == '\n' {
			line++
		}
	}
	return string(data[m[2]:m[3]]), line
}

var nameChars = regexp.MustCompile(`[^a-z0-9_-]+`)

// normalName makes a project name of a directory's name, as Compose does.
func normalName(s string) string {
	return strings.TrimLeft(nameChars.ReplaceAllString(strings.ToLower(s), ""), "_-")
}

// dirName names the stack of a directory: after the directory, or after the source for the root of the tree.
func (l *loading) dirName(dir string) string {
	if dir != "." {
		return normalName(path.Base(dir))
	}
	if n := normalName(l.opts.Source); n != "" {
		return n
	}
	return normalName(path.Base(l.tree.root))
}

// entryProblem is an error of one entry of gitops.yaml. It concerns that stack alone.
func (l *loading) entryProblem(line int, rule, msg string) *manifest.Problem {
	return &manifest.Problem{Severity: manifest.Error, Rule: rule, File: l.settingsPath(), Line: line, Message: msg}
}

// fail records an error of gitops.yaml as a whole: nothing renders.
func (l *loading) fail(line int, rule, msg string) {
	l.broken = true
	l.problems = append(l.problems, manifest.Problem{Severity: manifest.Error, Rule: rule, File: l.settingsPath(), Line: line, Message: msg})
}

func (l *loading) settingsPath() string { return path.Join(l.base, settingsFile) }

func sorted(names []string) []string {
	out := slices.Clone(names)
	slices.Sort(out)
	return slices.Compact(out)
}
