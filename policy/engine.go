package policy

import (
	"cmp"
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

//go:embed rules
var builtIn embed.FS

// The sets of rules.
const (
	Baseline   = "baseline"
	Restricted = "restricted"
	Custom     = "custom"
)

var setNames = []string{Baseline, Restricted, Custom}

// setDefaults are the levels of sets that nobody set.
var setDefaults = map[string]Level{Baseline: Enforce, Restricted: Off, Custom: Enforce}

// DefaultTimeout is how long one review may take when [Options] say nothing else. The built-in sets take well under a thousandth of it.
const DefaultTimeout = 2 * time.Second

// MaxFindings is how many findings a verdict holds, the worst first. The decision counts them all.
const MaxFindings = 200

const loadError = "load policy: " // what the errors of New begin with

const maxMessage = 500 // runes of a message that a rule of the users' writes

// Options say what an engine judges by.
type Options struct {
	// Level is the node's own, from its configuration (policy.level): it counts where the policy source names none. Empty is Enforce.
	Level Level
	// Source is the policy source; the zero one where there is none.
	Source Source
	// Timeout is the time limit of one review; 0 is DefaultTimeout.
	Timeout time.Duration
}

// Engine judges stacks. It is safe for concurrent use, and never changes: another policy is another Engine.
type Engine struct {
	opts  Options
	hash  string
	rules []Rule
	byID  map[string]Rule
	sets  map[string]func() (rego.PreparedEvalQuery, error) // the query of each set, prepared when it is first asked
	// planRules read input.plan. They judge what is done; all others judge what would run. A library of the users' that reads it makes all
	// of theirs such rules.
	planRules map[string]bool
	planLibs  bool
	reads     map[string]map[string]bool // by set: the fields of input that any of its modules reads
}

// New compiles the built-in sets and the rules of the policy source. It starts nothing. Its error holds one line FILE:LINE: what for each
// thing that is wrong with the source; nothing may be judged by a policy that has an error, so keep the old Engine then.
func New(ctx context.Context, o Options) (*Engine, error) {
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Level == "" {
		o.Level = Enforce
	}
	if _, err := ParseLevel(string(o.Level)); err != nil {
		return nil, fmt.Errorf("policy level: %w", err)
	}
	e := &Engine{opts: o, byID: map[string]Rule{}, sets: map[string]func() (rego.PreparedEvalQuery, error){}, planRules: map[string]bool{}, reads: map[string]map[string]bool{}}
	mods, err := e.load(o.Source.Modules)
	if err != nil {
		return nil, fmt.Errorf(loadError+"%w", err)
	}
	if err := e.checkExemptions(); err != nil {
		return nil, fmt.Errorf(loadError+"%w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf(loadError+"%w", err)
	}
	schemas := ast.NewSchemaSet()
	schemas.Put(ast.SchemaRootRef, inputSchema())
	compiler := ast.NewCompiler().WithCapabilities(capabilities()).WithSchemas(schemas).WithStrict(true)
	if compiler.Compile(mods); compiler.Failed() {
		return nil, fmt.Errorf(loadError+"%w", explain(compiler.Errors))
	}
	for _, set := range setNames {
		e.sets[set] = sync.OnceValues(func() (rego.PreparedEvalQuery, error) {
			// Strict errors: a rule that fails (a text that is no number, say) must block, not be passed over.
			return rego.New(rego.Compiler(compiler), rego.Query("data."+entryPackage(set)+".findings"), rego.StrictBuiltinErrors(true)).
				PrepareForEval(context.Background())
		})
	}
	e.hash = e.fingerprint()
	return e, nil
}

// builtInModules are the embedded Rego files, sorted by name: built-in/SET/RULE.rego.
func builtInModules() []Module {
	var out []Module
	err := fs.WalkDir(builtIn, "rules", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		src, err := builtIn.ReadFile(p)
		out = append(out, Module{Name: "built-in" + strings.TrimPrefix(p, "rules"), Source: string(src)})
		return err
	})
	if err != nil {
		panic(fmt.Sprintf("policy: read an embedded file: %v", err)) // the files are part of the program
	}
	return out
}

func entryPackage(set string) string { return "entry." + set }

// load parses all modules, collects the rules' descriptions, and adds a module for each set that gathers the findings of its rules.
func (e *Engine) load(custom []Module) (map[string]*ast.Module, error) {
	mods := map[string]*ast.Module{}
	var errs []error
	for _, b := range builtInModules() {
		m, err := e.parse(b.Name, b.Source, path.Base(path.Dir(b.Name)))
		if err != nil {
			return nil, err
		}
		mods[b.Name] = m
	}
	for _, c := range custom {
		m, err := e.parse(c.Name, c.Source, Custom)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		mods["source/"+c.Name] = m // their own names could be built-in/…
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	slices.SortFunc(e.rules, func(a, b Rule) int {
		return cmp.Or(slices.Index(setNames, a.Set)-slices.Index(setNames, b.Set), cmp.Compare(a.ID, b.ID))
	})
	for _, set := range setNames {
		m, err := e.entry(set, mods)
		if err != nil {
			return nil, err
		}
		mods["entry/"+set] = m
	}
	return mods, nil
}

var ruleName = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// heads are the names of the sets in which a rule puts its findings, and the severity of those.
var heads = map[string]manifest.Severity{"deny": manifest.Error, "warn": manifest.Warn}

// parse reads one Rego file and, when it denies or warns, the description of its rule.
func (e *Engine) parse(name, src, set string) (*ast.Module, error) {
	m, err := ast.ParseModuleWithOpts(name, src, ast.ParserOptions{ProcessAnnotation: true, Capabilities: capabilities()})
	if err != nil {
		return nil, explain(err)
	}
	fail := func(row int, format string, args ...any) error {
		return fmt.Errorf("%s:%d: %s", name, row, fmt.Sprintf(format, args...))
	}
	pkg := packagePath(m)
	row := m.Package.Location.Row
	if len(pkg) == 0 || pkg[0] != set {
		return nil, fail(row, "package %s: your own rules live in packages below custom, as `package custom.registry_mirror`", strings.Join(pkg, "."))
	}
	judges := false
	for _, r := range m.Rules {
		if head := headName(r); heads[head] == "" {
			continue
		} else if r.Head.RuleKind() != ast.MultiValue || len(r.Head.Ref()) != 1 {
			return nil, fail(r.Location.Row,
				"%s must be a set of findings: write `%s contains {\"service\": …, \"message\": …} if { … }`", head, head)
		}
		judges = true
	}
	fields := inputFields(m)
	if e.reads[set] == nil {
		e.reads[set] = map[string]bool{}
	}
	maps.Copy(e.reads[set], fields)
	plan := fields["plan"]
	if !judges {
		e.planLibs = e.planLibs || plan
		return m, nil
	}
	if len(pkg) != 2 || !ruleName.MatchString(pkg[1]) {
		return nil, fail(row, "package %s: a rule's package is %s and one name of small letters, digits and _", strings.Join(pkg, "."), set)
	}
	r := Rule{ID: set + "/" + strings.ReplaceAll(pkg[1], "_", "-"), Set: set}
	if set == Custom {
		r.File = name
	}
	if old, twice := e.byID[r.ID]; twice {
		return nil, fail(row, "package %s: %s already denies or warns in this package: one file holds one rule", strings.Join(pkg, "."), old.File)
	}
	for _, a := range m.Annotations {
		if a.Scope != "package" {
			continue
		}
		r.Title, r.Reason = oneLine(a.Title), oneLine(a.Description)
		if w, ok := a.Custom["way_out"].(string); ok {
			r.WayOut = oneLine(w)
		}
	}
	if r.Title == "" {
		return nil, fail(row, "the rule has no title: write a comment `# METADATA` with `# title: …` (and `# description: …`) above the package")
	}
	e.rules = append(e.rules, r)
	e.byID[r.ID] = r
	if plan {
		e.planRules[r.ID] = true
	}
	return m, nil
}

// headName is the first name of a rule: deny of `deny contains …`, but also of `deny.x := …`.
func headName(r *ast.Rule) string {
	name, _ := r.Head.Ref()[0].Value.(ast.Var)
	return string(name)
}

// inputFields are the fields of input that a module reads: all of them, where it reads input as a whole.
func inputFields(m *ast.Module) map[string]bool {
	out := map[string]bool{}
	ast.WalkRefs(m, func(r ast.Ref) bool {
		if !r[0].Equal(ast.InputRootDocument) {
			return false
		}
		if len(r) > 1 && r[1].IsGround() {
			name, _ := r[1].Value.(ast.String)
			out[string(name)] = true
			return false
		}
		for f := range structFields(reflect.TypeFor[inputDoc]()) {
			out[f.name] = true
		}
		return false
	})
	return out
}

func packagePath(m *ast.Module) []string {
	var out []string
	for _, t := range m.Package.Path[1:] { // after data
		s, _ := t.Value.(ast.String)
		out = append(out, string(s))
	}
	return out
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// entry writes the module that gathers the findings of a set, so that one query asks all of its rules.
func (e *Engine) entry(set string, mods map[string]*ast.Module) (*ast.Module, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "package %s\n\nfindings := set()", entryPackage(set))
	for _, name := range slices.Sorted(maps.Keys(mods)) {
		pkg := packagePath(mods[name])
		if len(pkg) != 2 || pkg[0] != set {
			continue
		}
		for _, head := range slices.Sorted(maps.Keys(heads)) {
			if !slices.ContainsFunc(mods[name].Rules, func(r *ast.Rule) bool { return headName(r) == head }) {
				continue
			}
			fmt.Fprintf(&b, " | {{\"rule\": %q, \"severity\": %q, \"finding\": f} | some f in data.%s[%q].%s}",
				set+"/"+strings.ReplaceAll(pkg[1], "_", "-"), heads[head], set, pkg[1], head)
		}
	}
	b.WriteByte('\n')
	m, err := ast.ParseModule(entryPackage(set)+".rego", b.String())
	if err != nil {
		return nil, fmt.Errorf("gather the rules of %s: %w", set, err)
	}
	return m, nil
}

func (e *Engine) checkExemptions() error {
	var errs []error
	for _, x := range e.opts.Source.Exemptions {
		if _, ok := e.byID[x.Rule]; !ok {
			known := strings.Join(slices.Sorted(maps.Keys(e.byID)), ", ")
			errs = append(errs, fmt.Errorf("%s:%d: no rule is called %q; there are %s", x.File, x.Line, x.Rule, known))
		}
	}
	return errors.Join(errs...)
}

// fingerprint identifies everything that a verdict depends on beside its input.
func (e *Engine) fingerprint() string {
	s := e.opts.Source
	return manifest.Hash(map[string]any{
		"input": inputVersion, "builtIn": builtInModules(), "level": e.opts.Level, "timeout": e.opts.Timeout.String(),
		"modules": s.Modules, "scope": s.Scope, "stacks": s.Stacks, "registries": s.Registries, "exemptions": s.Exemptions,
	})
}

// Hash identifies the whole policy: rules, levels, registries and exemptions. A verdict names it, and is renewed when it changes.
func (e *Engine) Hash() string { return e.hash }

// Rules describes all rules, built-in and the users' own, by set and id.
func (e *Engine) Rules() []Rule { return slices.Clone(e.rules) }

// Expired are the exemptions of the policy source that no longer count: somebody should remove them, or renew them.
func (e *Engine) Expired(now time.Time) []Exemption {
	return slices.DeleteFunc(slices.Clone(e.opts.Source.Exemptions), func(x Exemption) bool { return now.Before(x.Until) })
}

// With is the engine of the same node under another policy source. Its error is that of [New].
func (e *Engine) With(ctx context.Context, src Source) (*Engine, error) {
	o := e.opts
	o.Source = src
	return New(ctx, o)
}

// JudgesPlans says whether any rule asks what is done, or at which gate. If none does, the plan gate says what the revision gate said.
func (e *Engine) JudgesPlans() bool { return e.reads[Custom]["plan"] || e.reads[Custom]["gate"] }

// ReadsImages says whether the review of a stack looks at [Input.ImageUsers].
func (e *Engine) ReadsImages(s *manifest.Stack) bool {
	level := e.Level(s)
	return slices.ContainsFunc(setNames, func(set string) bool {
		return e.reads[set]["images"] && weaker(level, e.setLevel(set, &Input{Stack: *s})) != Off
	})
}

// RenewEvery is how often verdicts are made again that depend on more than the stack and the policy: on the time, or on images.
const RenewEvery = 10 * time.Minute

// Renew says when verdicts that were made at a time have to be made again: when the first exemption ends after it, or, where rules look at
// the time or at images, RenewEvery later. Zero: only another policy changes them.
func (e *Engine) Renew(made time.Time) time.Time {
	var at time.Time
	if e.reads[Custom]["now"] || e.reads[Custom]["images"] || e.restricts() {
		at = made.Add(RenewEvery)
	}
	for _, x := range e.opts.Source.Exemptions {
		if x.Until.After(made) && (at.IsZero() || x.Until.Before(at)) {
			at = x.Until
		}
	}
	return at
}

// restricts says whether the restricted set, which looks at images, is on for any stack.
func (e *Engine) restricts() bool {
	for _, s := range e.opts.Source.Stacks {
		if cmp.Or(s.Sets[Restricted], Off) != Off {
			return true
		}
	}
	return cmp.Or(e.opts.Source.Sets[Restricted], Off) != Off
}

// Level is the level that counts for a stack. The policy source and the node's configuration say how strict it is at least; the stack's
// own repository (`policy:` in gitops.yaml) can only make it stricter, so that no pull request weakens the policy that judges it.
func (e *Engine) Level(s *manifest.Stack) Level {
	floor := e.floor(s.Name)
	if own, err := ParseLevel(s.Policy); err == nil {
		return stricter(floor, own)
	}
	return floor
}

func (e *Engine) floor(stack string) Level {
	return cmp.Or(e.opts.Source.Stacks[stack].Level, e.opts.Source.Level, e.opts.Level)
}

func (e *Engine) setLevel(set string, in *Input) Level {
	if slices.Contains(in.Sets, set) {
		return Enforce
	}
	return cmp.Or(e.opts.Source.Stacks[in.Stack.Name].Sets[set], e.opts.Source.Sets[set], setDefaults[set])
}

// Review judges a stack as it would run. It returns within the time limit. With an error, nothing was decided: the verdict is Deny, and
// the error tells a person what to repair. Only the caller's own context ending is not to be shown as policy's refusal.
func (e *Engine) Review(ctx context.Context, in Input) (Verdict, error) {
	v := Verdict{Decision: Allow, Level: e.Level(&in.Stack), PolicyHash: e.hash}
	if v.Level == Off {
		return v, nil
	}
	var items []Item
	starts := map[string]bool{}
	if in.Gate == PlanGate {
		for _, i := range in.Items {
			if i.judged() {
				items = append(items, i)
				starts[i.Service] = starts[i.Service] || i.starts()
			}
		}
		if len(items) == 0 {
			return v, nil
		}
	}
	findings, err := e.ask(ctx, &in, items, v.Level)
	if err != nil {
		return Verdict{Decision: Deny, Level: v.Level, PolicyHash: e.hash}, err
	}
	if in.Gate == PlanGate {
		findings = slices.DeleteFunc(findings, func(f Finding) bool {
			aboutPlan := e.planRules[f.Rule] || e.planLibs && f.Set == Custom
			return !aboutPlan && !concerns(f, &in.Stack, starts)
		})
	}
	for i := range findings {
		f := &findings[i]
		e.exempt(f, in.Now, &v)
		pos := in.Stack.Origin(f.Path)
		f.File, f.Line = pos.File, pos.Line
		switch f.Severity {
		case manifest.Error:
			v.Decision = Deny
		case manifest.Warn:
			if v.Decision == Allow {
				v.Decision = Warn
			}
		}
	}
	if f, ok := e.levelNotice(&in.Stack, v.Level); ok {
		findings = append(findings, f)
	}
	v.Findings = trim(findings, in.Stack.Name)
	return v, nil
}

// concerns says whether a finding about what would run is about something that the plan starts: it has nothing against removing a
// service, nor against changing its neighbour.
func concerns(f Finding, s *manifest.Stack, starts map[string]bool) bool {
	if f.Service != "" {
		return starts[f.Service]
	}
	return slices.ContainsFunc(s.Services, func(svc manifest.Service) bool { return starts[svc.Name] })
}

// ask evaluates the sets that are on for the stack.
func (e *Engine) ask(ctx context.Context, in *Input, items []Item, level Level) ([]Finding, error) {
	limited, cancel := context.WithTimeout(ctx, e.opts.Timeout)
	defer cancel()
	var out []Finding
	var val ast.Value
	for _, set := range setNames {
		l := weaker(level, e.setLevel(set, in))
		if l == Off || set == Custom && len(e.opts.Source.Modules) == 0 {
			continue
		}
		if val == nil {
			var err error
			if val, err = inputValue(*in, items, e.config()); err != nil {
				return nil, err
			}
		}
		fs, err := e.eval(limited, set, val)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("judge stack %s: %w", in.Stack.Name, ctx.Err())
		case limited.Err() != nil:
			return nil, fmt.Errorf("judge stack %s: the %s rules took longer than %s, so the stack stays as it is: "+
				"make the rules simpler (a loop over all pairs is the usual cause)", in.Stack.Name, set, e.opts.Timeout)
		case err != nil:
			return nil, fmt.Errorf("judge stack %s by the %s rules: %w", in.Stack.Name, set, err)
		}
		for _, f := range fs {
			f.Stack = in.Stack.Name
			if l == Advise && f.Severity == manifest.Error {
				f.Severity = manifest.Warn
			}
			out = append(out, f)
		}
	}
	return out, nil
}

func (e *Engine) config() configFacts {
	return configFacts{Registries: append([]string{}, e.opts.Source.Registries...), DefaultCapabilities: DefaultCapabilities()}
}

func (e *Engine) eval(ctx context.Context, set string, input ast.Value) ([]Finding, error) {
	q, err := e.sets[set]()
	if err != nil {
		return nil, explain(err)
	}
	rs, err := q.Eval(ctx, rego.EvalParsedInput(input))
	if err != nil {
		var te *topdown.Error
		if errors.As(err, &te) && te.Location != nil {
			return nil, fmt.Errorf("%s:%d: %s; the stack stays as it is until the rule is repaired", te.Location.File, te.Location.Row, te.Message)
		}
		return nil, err
	}
	if len(rs) != 1 || len(rs[0].Expressions) != 1 {
		return nil, errors.New("the rules gave no answer")
	}
	list, ok := rs[0].Expressions[0].Value.([]any)
	if !ok {
		return nil, errors.New("the rules gave something that is no list of findings")
	}
	out := make([]Finding, 0, len(list))
	for _, el := range list {
		o, _ := el.(map[string]any)
		out = append(out, e.finding(o))
	}
	return out, nil
}

// finding reads what a rule reported: an object, or just the message. What is missing is taken from the rule's description.
func (e *Engine) finding(o map[string]any) Finding {
	r := e.byID[str(o["rule"])]
	f := Finding{Set: r.Set, Rule: r.ID, Severity: manifest.Severity(str(o["severity"])), WayOut: r.WayOut, Message: str(o["finding"])}
	if d, ok := o["finding"].(map[string]any); ok {
		f.Service, f.Container, f.Path, f.Message = str(d["service"]), str(d["container"]), str(d["path"]), str(d["message"])
		f.WayOut = cmp.Or(str(d["way_out"]), f.WayOut)
	}
	f.Message, f.WayOut = clean(cmp.Or(f.Message, r.Title+".")), clean(f.WayOut)
	if f.Path == "" {
		f.Path = cmp.Or(f.Container, f.Service)
	}
	return f
}

func str(v any) string {
	s, _ := v.(string)
	return s
}

// clean makes a text fit for one line of a terminal: what it tells comes from files that anybody may have written.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxMessage {
		return string(r[:maxMessage]) + "…"
	}
	return s
}

// exempt marks a finding that an exemption covers, and notes when the verdict must be renewed for it. Of several that count, the last to
// end is used, so that one more exemption never makes a verdict worse or shorter.
func (e *Engine) exempt(f *Finding, now time.Time, v *Verdict) {
	var used *Exemption
	for i := range e.opts.Source.Exemptions {
		x := &e.opts.Source.Exemptions[i]
		if x.covers(*f) && (used == nil || x.Until.After(used.Until)) {
			used = x
		}
	}
	if used == nil {
		return
	}
	f.Exemption, f.Until = used.Reason, used.Until
	if !now.Before(used.Until) {
		f.Message += fmt.Sprintf(" Its exemption ended on %s.", lastDay(used.Until))
		return
	}
	f.Exempted, f.Severity = true, manifest.Notice
	if v.Until.IsZero() || used.Until.Before(v.Until) {
		v.Until = used.Until
	}
}

// The ids of findings that no rule makes.
const (
	LevelRule = "policy/level" // a notice: the stack's own `policy:` has no effect
	MoreRule  = "policy/more"  // there are more findings than a verdict holds
)

func (e *Engine) levelNotice(s *manifest.Stack, level Level) (Finding, bool) {
	own, err := ParseLevel(s.Policy)
	if err != nil || own == level {
		return Finding{}, false
	}
	pos := s.Origin("policy")
	return Finding{
		Set: "policy", Rule: LevelRule, Severity: manifest.Notice, Stack: s.Name, Path: "policy", File: pos.File, Line: pos.Line,
		Message: fmt.Sprintf("`policy: %s` has no effect: the level of this stack is %s, and a repository can only make policy stricter.", own, level),
		WayOut: fmt.Sprintf("Loosen it where the machines' owners decide: `stacks: {%s: {level: %s}}` in policy.yaml of the policy source, "+
			"or policy.level in the daemon's configuration.", s.Name, own),
	}, true
}

var bySeverity = []manifest.Severity{manifest.Error, manifest.Warn, manifest.Notice}

// trim keeps the worst findings and puts them in the order of the files.
func trim(fs []Finding, stack string) []Finding {
	sortFindings(fs)
	if over := len(fs) - MaxFindings; over > 0 {
		slices.SortStableFunc(fs, func(a, b Finding) int {
			return slices.Index(bySeverity, a.Severity) - slices.Index(bySeverity, b.Severity)
		})
		worst := fs[MaxFindings].Severity
		fs = fs[:MaxFindings:MaxFindings]
		sortFindings(fs)
		fs = append(fs, Finding{Set: "policy", Rule: MoreRule, Severity: worst, Stack: stack, Message: fmt.Sprintf("And %d more findings.", over)})
	}
	return fs
}
