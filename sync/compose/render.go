package compose

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/sirupsen/logrus"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// render makes the stack of a plan. What is wrong is in the rendering; it has no error of its own.
func (l *loading) render(ctx context.Context, p plan, t *checkout) *rendering {
	defer silence()()
	r := &rendering{declared: p.declared, blobs: map[string]manifest.BlobRef{}}
	r.found = manifest.FoundStack{Name: p.name, Dir: p.dir, Files: p.files}
	s := newScanner(t, l.opts.Limits, "")
	p.files = l.withOverrides(p)
	r.found.Files = p.files
	l.name(p, t, r)
	s.stack = r.found.Name
	defer func() {
		for i := range r.problems {
			r.problems[i].Stack = r.found.Name
		}
		if manifest.HasErrors(r.problems) {
			r.stack, r.blobs = nil, nil
		}
	}()
	if p.problem != nil {
		r.problems = append(r.problems, *p.problem)
		return r
	}
	vars := l.stackVars(p, t, r)
	s.scan(p.files, p.dir, vars)
	r.reads, r.unread = slices.Sorted(maps.Keys(s.reads)), s.unread
	r.problems = append(r.problems, s.problems...)
	r.problems = append(r.problems, vars.problems(r.found.Name)...)
	if manifest.HasErrors(r.problems) {
		return r
	}
	if l.rename(p, r, s, vars); manifest.HasErrors(r.problems) {
		return r
	}
	s.stack, s.problems = r.found.Name, nil
	project := s.project(ctx, l, p, r.found.Name, vars)
	if n := serviceCount(project); n > l.opts.Limits.Services {
		s.errorf("limit", manifest.Pos{File: p.files[0]}, "the stack has %d services; %d are the limit", n, l.opts.Limits.Services)
	} else if project != nil {
		c := &converter{scanner: s, loader: l, plan: p, project: project, vars: vars, blobs: r.blobs}
		r.stack = c.stack()
	}
	r.problems = append(r.problems, s.problems...)
	if r.stack != nil && !manifest.HasErrors(r.problems) {
		r.problems = append(r.problems, manifest.Validate(r.stack)...)
	}
	return r
}

func serviceCount(p *types.Project) int {
	if p == nil {
		return 0
	}
	return len(p.Services) + len(p.DisabledServices)
}

// withOverrides adds the files that gitops.yaml gives for this cluster.
func (l *loading) withOverrides(p plan) []string {
	files := slices.Clone(p.files)
	for _, f := range p.entry.Clusters[l.opts.Cluster].Files {
		files = append(files, path.Join(p.dir, f))
	}
	return files
}

// name gives the rendering its name before the files are known to read: so a broken stack is still known by it.
func (l *loading) name(p plan, t *checkout, r *rendering) {
	r.named = manifest.Pos{File: l.settingsPath(), Line: p.line}
	if r.found.Name != "" {
		return
	}
	r.named = manifest.Pos{File: p.dir}
	for _, f := range p.files {
		r.named.File = p.files[0]
		data, err := t.read(f)
		if err != nil {
			continue
		}
		if n, line := topName(data); n != "" && !strings.Contains(n, "$") {
			r.found.Name, r.named = n, manifest.Pos{File: f, Line: line}
		}
	}
	if r.found.Name == "" {
		r.found.Name = l.dirName(p.dir)
	}
}

// rename reads name: as Compose does, with its variables.
func (l *loading) rename(p plan, r *rendering, s *scanner, vars *variables) {
	if p.name == "" {
		for _, u := range s.tops {
			if n := child(u.root, "name"); n != nil && u.text(n) != "" {
				r.found.Name, r.named = u.text(n), u.pos(n)
			}
		}
	}
	if name := r.found.Name; name == "" || normalName(name) != name || len(name) > maxName {
		r.problems = append(r.problems, manifest.Problem{Severity: manifest.Error, Rule: "stack-name", File: r.named.File, Line: r.named.Line,
			Message: fmt.Sprintf("the stack name %q must be of lower-case letters, digits, - and _, begin with a letter or digit and have at most %d characters; "+
				"give it a name: at the top of its file", name, maxName)})
	}
}

// maxName is the most that a stack's or service's name may have: as much as a DNS label.
const maxName = 63

// stackVars reads the .env beside the stack's first file and lays the settings over it.
func (l *loading) stackVars(p plan, t *checkout, r *rendering) *variables {
	values := map[string]string{}
	file := path.Join(p.dir, dotenv.DotEnv)
	over := l.vars(p.entry, nil)
	data, err := t.read(file)
	if err == nil {
		f := parseEnv(file, data, values, "", func(k string) (string, bool) {
			if v, ok := over[k]; ok {
				return v, true
			}
			v, ok := values[k]
			return v, ok
		})
		if f != nil {
			r.problems = append(r.problems,
				manifest.Problem{Severity: manifest.Error, Rule: f.rule, File: file, Line: f.line, Message: f.msg})
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		s := newScanner(t, l.opts.Limits, r.found.Name)
		s.unreadable(file, err, manifest.Pos{File: file})
		r.problems = append(r.problems, s.problems...)
	}
	out := l.vars(p.entry, values)
	out["COMPOSE_PROJECT_NAME"] = r.found.Name
	return newVariables(out)
}

// project lets compose-go merge the files. Nil means that a Problem tells why not.
func (s *scanner) project(ctx context.Context, l *loading, p plan, name string, vars *variables) (project *types.Project) {
	// compose-go panics on some values that its schema lets through.
	defer func() {
		if v := recover(); v != nil {
			project = nil
			s.errorf("compose",
				manifest.Pos{File: p.files[0]}, "the Compose library failed on the files of this stack: %s", s.scrub(fmt.Sprint(v)))
		}
	}()
	details := types.ConfigDetails{WorkingDir: s.tree.abs(p.dir), Environment: maps.Clone(vars.values)}
	for _, f := range p.files {
		details.ConfigFiles = append(details.ConfigFiles, types.ConfigFile{Filename: s.tree.abs(f)})
	}
	var unknown []loader.UnsupportedAttribute
	configure := func(o *loader.Options) {
		o.SetProjectName(name, true)
		// Each file was validated by itself, with lines; and compose-go's own check reports any one error, at random.
		o.SkipValidation = true
		o.SkipConsistencyCheck = true
		// env_file and label_file are read here, inside the tree only.
		o.SkipResolveEnvironment = true
		o.SkipResolveLabels = true
		o.Profiles = l.profiles(p.entry)
		o.Interpolate.Substitute = substitute
		loader.WithSupportedAttributes(accepted(), func(found []loader.UnsupportedAttribute) { unknown = found })(o)
	}
	opts := loader.ToOptions(&details, []func(*loader.Options){configure})
	model, err := loader.LoadModelWithContext(ctx, details, configure)
	if err != nil {
		s.composeError(p, err)
		return nil
	}
	s.report(model, unknown)
	delete(model, "version")
	project, err = loader.ModelToProject(model, opts, details)
	if err != nil {
		s.composeError(p, err)
		return nil
	}
	return project
}

// report turns the attributes that compose-go's allow-list found into Problems.
func (s *scanner) report(model map[string]any, unknown []loader.UnsupportedAttribute) {
	seen := map[manifest.Problem]bool{}
	for _, a := range unknown {
		parts := a.Path.Parts()
		a := answer(a.Path)
		key := strings.Join(slices.DeleteFunc(slices.Clone(parts), func(p string) bool { return p == "[]" }), ".")
		service := ""
		if parts[0] == "services" && len(parts) > 2 {
			service = parts[1]
			key = strings.TrimPrefix(key, "services."+service+".")
		}
		p := a.finding(key)
		if a.path == "services.*.build" {
			p = buildFinding(model, service)
		}
		pos, _ := s.locate(parts...)
		p.Stack, p.Service, p.File, p.Line = s.stack, service, pos.File, pos.Line
		if !seen[p] {
			seen[p] = true
			s.problems = append(s.problems, p)
		}
	}
}

// RuleBuildOnly is the rule of a service that only says how to build its image.
const RuleBuildOnly = "build-only"

// buildFinding tells what to do about build:, which never runs here.
func buildFinding(model map[string]any, service string) manifest.Problem {
	services, _ := model["services"].(map[string]any)
	svc, _ := services[service].(map[string]any)
	if image, _ := svc["image"].(string); image != "" {
		return manifest.Problem{Severity: manifest.Notice, Rule: "build",
			Message: fmt.Sprintf("build: has no effect here: the image %s is pulled, so something has to build and push it", image)}
	}
	return manifest.Problem{Severity: manifest.Error, Rule: RuleBuildOnly,
		Message: "the service has build: but no image:, and nothing is built here; build and push the image in CI and name it under image:"}
}

// composeError makes a Problem of an error of compose-go.
func (s *scanner) composeError(p plan, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		s.errorf("compose", manifest.Pos{File: p.files[0]}, "the load was interrupted")
		return
	}
	if list, ok := strings.CutPrefix(err.Error(), "decoding failed due to the following error(s):"); ok {
		s.decodingErrors(p, list)
		return
	}
	text := s.scrub(err.Error())
	pos := manifest.Pos{File: p.files[0]}
	service := ""
	if m := mentioned.FindStringSubmatch(text); m != nil {
		parts := strings.FieldsFunc(m[0], func(r rune) bool { return r == '.' || r == '[' || r == ']' })
		if at, _ := s.locate(parts...); at.Line > 0 {
			pos = at
		}
		if parts[0] == "services" && len(parts) > 1 {
			service = parts[1]
		}
	}
	s.add(manifest.Error, "compose", pos, service, "%s", text)
}

var decodingError = regexp.MustCompile(`^'([^']+)' (.*)$`)

// decodingErrors makes a Problem of each value that is not what its key wants: a time, an amount, a command.
func (s *scanner) decodingErrors(p plan, list string) {
	for _, line := range strings.Split(list, "\n") {
		line = strings.TrimSpace(line)
		m := decodingError.FindStringSubmatch(line)
		if m == nil {
			if line != "" {
				s.errorf("schema", manifest.Pos{File: p.files[0]}, "%s", s.scrub(line))
			}
			continue
		}
		parts := strings.FieldsFunc(m[1], func(r rune) bool { return r == '.' || r == '[' || r == ']' })
		pos, _ := s.locate(parts...)
		service := ""
		if parts[0] == "services" && len(parts) > 1 {
			service = parts[1]
		}
		what := strings.TrimPrefix(s.scrub(m[2]), "time: ")
		if strings.HasPrefix(what, "strconv.") {
			what = "not a number"
		}
		s.add(manifest.Error, "schema", pos, service, "%s: %s", strings.Join(parts, "."), what)
	}
}

var mentioned = regexp.MustCompile(`\b(services|networks|volumes|configs|secrets)[.\[][A-Za-z0-9_.\-\[\]]+`)

// scrub takes the checkout's place on this machine out of a text, and joins its lines.
func (s *scanner) scrub(text string) string {
	text = strings.ReplaceAll(text, s.tree.root+"/", "")
	text = strings.ReplaceAll(text, s.tree.root, ".")
	text = strings.TrimSuffix(text, ": invalid compose project")
	return strings.Join(strings.Fields(text), " ")
}

// silence keeps compose-go's warnings from the process's log: each of them is a Problem here. They go through the one global logger of
// logrus, so another library's words are lost for as long as a file renders, some milliseconds.
func silence() (restore func()) {
	quiet.Lock()
	defer quiet.Unlock()
	if quiet.users++; quiet.users == 1 {
		quiet.out = logrus.StandardLogger().Out
		logrus.SetOutput(io.Discard)
	}
	return func() {
		quiet.Lock()
		defer quiet.Unlock()
		if quiet.users--; quiet.users == 0 {
			logrus.SetOutput(quiet.out)
		}
	}
}

var quiet struct {
	sync.Mutex
	users int
	out   io.Writer
}
