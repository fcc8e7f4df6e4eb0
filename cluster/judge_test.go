package cluster

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/blob"
	"github.com/gitopsd/gitopsd/cluster/seal"
	"github.com/gitopsd/gitopsd/cluster/store"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/scenario"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// hub is where the sources of a test are: revisions of stacks in the language of fixtures/scenario, revisions of policy as files.
type hub struct {
	mu    sync.Mutex
	heads map[string]revision
	kicks chan struct{}
}

type revision struct {
	id     string
	stacks string
	policy fstest.MapFS
	err    error // it can't be fetched
}

func (h *hub) push(source string, r revision) {
	h.mu.Lock()
	h.heads[source] = r
	h.mu.Unlock()
	h.Trigger("")
}

func (h *hub) head(source string) revision {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.heads[source]
}

func (h *hub) Run(ctx context.Context, tip func(context.Context, Tip) error) error {
	for {
		h.mu.Lock()
		var names []string
		for name := range h.heads {
			names = append(names, name)
		}
		h.mu.Unlock()
		for _, name := range names {
			rev, err := h.Newest(ctx, Source{Source: state.Source{Name: name}})
			_ = tip(ctx, Tip{Source: name, Revision: rev, Err: err})
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.kicks:
		}
	}
}

func (h *hub) Follow([]Source) error { return nil }

func (h *hub) Trigger(string) {
	select {
	case h.kicks <- struct{}{}:
	default:
	}
}

func (h *hub) Load(_ context.Context, src Source, rev manifest.Revision) (*Loaded, error) {
	r := h.head(src.Name)
	if r.err != nil {
		return nil, r.err
	}
	if rev.Commit != "" && rev.Commit != scenario.Commit(r.id) {
		return nil, fmt.Errorf("%s has no commit %s", src.Name, rev.Commit)
	}
	in, err := scenario.Intake(src.Name, r.id, r.stacks)
	if err != nil {
		return nil, err
	}
	out := &Loaded{Bundle: in.Bundle}
	if src.Policy {
		out.Policy, err = policy.LoadSource(r.policy)
	}
	return out, err
}

func (h *hub) Newest(_ context.Context, src Source) (manifest.Revision, error) {
	r := h.head(src.Name)
	return manifest.Revision{Ref: "main", Commit: scenario.Commit(r.id)}, r.err
}

func (h *hub) Relation(context.Context, Source, string, string) (reconcile.Relation, error) {
	return reconcile.RelationForward, nil
}

func (h *hub) Tidy() error { return nil }

func (h *hub) Test(context.Context, Source) (api.SourceReport, error) {
	return api.SourceReport{}, nil
}

// shelf is a node's images, by their users, and the registries that have others.
type shelf struct {
	worker.Images
	users map[string]string
	far   *registries
}

// registries have images, as "digest user". What they lack, they are said not to answer for.
type registries struct {
	mu     sync.Mutex
	images map[string]string
	asked  []string
}

// set puts an image into its registry, or takes its registry away.
func (r *registries) set(ref, image string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.images[ref] = image
}

// questions are the images that were asked for since the last call, sorted.
func (r *registries) questions() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.Sort(r.asked)
	out := strings.Join(r.asked, " ")
	r.asked = nil
	return out
}

func (s shelf) Describe(_ context.Context, ref, _ string) (worker.Image, error) {
	if s.far == nil {
		return worker.Image{}, errors.New("registry " + ref + " does not answer")
	}
	s.far.mu.Lock()
	defer s.far.mu.Unlock()
	s.far.asked = append(s.far.asked, ref)
	digest, user, _ := strings.Cut(s.far.images[ref], " ")
	if digest == "" {
		return worker.Image{}, errors.New("registry of " + ref + " does not answer")
	}
	return worker.Image{Digest: digest, Config: worker.ImageConfig{User: user}}, nil
}

func (s shelf) Local(_ context.Context, ref, _ string) (worker.Image, error) {
	user, ok := s.users[ref]
	if !ok {
		return worker.Image{}, worker.ErrNotFound
	}
	return worker.Image{Config: worker.ImageConfig{User: user}}, nil
}

// rig is a node that leads, without a worker: the test says what tasks do.
type rig struct {
	*Node
	*hub
	t    *testing.T
	dir  string
	stop func()

	mu     sync.Mutex
	offset time.Duration // the wall clock's, against the real one
}

type setup struct {
	policy  policy.Options
	sources []state.Source
	images  map[string]string
	far     *registries
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), hub: &hub{heads: map[string]revision{}, kicks: make(chan struct{}, 1)}}
	return r
}

// start runs the node, as after a restart when it ran before.
func (r *rig) start(s setup) {
	r.t.Helper()
	st, err := store.Open(store.Options{Dir: filepath.Join(r.dir, "log"), ID: "n1"})
	if err != nil {
		r.t.Fatal(err)
	}
	blobs, err := blob.Open(blob.Options{Dir: filepath.Join(r.dir, "blobs")})
	if err != nil {
		r.t.Fatal(err)
	}
	key, err := seal.LoadKey(filepath.Join(r.dir, "key"))
	if err != nil {
		r.t.Fatal(err)
	}
	engine, err := policy.New(r.t.Context(), s.policy)
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := Config{
		ID: "n1", Record: state.Node{Name: "n1", Block: "10.1.0.0/20", Platform: "linux/amd64", CPU: 64e9, Memory: 64 << 30, SealKey: key.Public()},
		Store: st, Sources: r.hub, Blobs: blobs, Key: key, Policy: engine, Now: r.wall,
	}
	for _, src := range s.sources {
		src.Yes, src.URL = true, "/srv/"+src.Name
		cfg.Initial = append(cfg.Initial, Source{Source: src})
	}
	r.Node = New(cfg, worker.Config{Node: "n1", Images: shelf{users: s.images, far: s.far}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := st.Run(ctx); err != nil {
			r.t.Errorf("store: %v", err)
		}
	})
	wg.Go(func() {
		if err := st.Lead(ctx, r.leadTerm); err != nil {
			r.t.Errorf("lead: %v", err)
		}
	})
	r.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := blobs.Close(); err != nil {
			r.t.Error(err)
		}
	})
	r.t.Cleanup(r.stop)
}

// leads waits until the node leads.
func (r *rig) leads() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	if err := r.ask(ctx, func(*leader) error { return nil }); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wall() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Add(r.offset)
}

// at sets the wall clock, and has the leader look at it.
func (r *rig) at(day string) {
	r.t.Helper()
	to, err := time.Parse(time.RFC3339, day)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.offset = time.Until(to)
	r.mu.Unlock()
	if r.Node != nil {
		r.put(state.Set("x", state.Event{Kind: "tick"}))
	}
}

func (r *rig) put(changes ...state.Change) {
	r.t.Helper()
	if _, err := r.propose(r.t.Context(), state.Command{Actor: "test", Items: []state.Item{changes}}); err != nil {
		r.t.Fatal(err)
	}
}

// until waits for a condition of the view.
func (r *rig) until(what string, ok func(v *state.View) bool) {
	r.t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		v := r.View()
		if ok(v) {
			return
		}
		select {
		case <-r.Changed(v.Index):
		case <-deadline:
			var out strings.Builder
			for _, st := range reconcile.Statuses(r.View()) {
				fmt.Fprintf(&out, "\n%s %s %s %s %v", st.Name, st.Revision, st.Sync, st.Health, st.Reasons)
			}
			r.t.Fatalf("not in time: %s%s", what, out.String())
		}
	}
}

// obey reports of every task that it does as it is told; those of images that are named bad… crash.
func (r *rig) obey(v *state.View) {
	r.t.Helper()
	for id, task := range v.Tasks.All() {
		spec, _ := v.Specs.Get(task.Value.Spec)
		rep := state.Report{Node: "n1", Phase: state.PhaseRunning, Attempt: 1, Health: state.HealthHealthy}
		switch {
		case task.Value.Desired == state.DesiredStop:
			rep = state.Report{Node: "n1", Phase: state.PhaseGone, Attempt: 1}
		case task.Value.Desired == state.DesiredReady:
			rep = state.Report{Node: "n1", Phase: state.PhaseCreated}
		case strings.HasPrefix(spec.Value.Service.Main().Image, "bad"):
			rep.Phase, rep.Health, rep.Failures = state.PhaseWaiting, "", 1
		}
		if old, ok := v.Reports.Get(id); !ok || manifest.Hash(old.Value) != manifest.Hash(rep) {
			r.put(state.Set(id, rep))
		}
	}
}

// status waits until a stack has a sync status and a reason with the text given, while its tasks do as they are told.
func (r *rig) status(stack string, want reconcile.Sync, text string) reconcile.StackStatus {
	r.t.Helper()
	var st reconcile.StackStatus
	r.until(fmt.Sprintf("%s is %s %s", stack, want, text), func(v *state.View) bool {
		r.obey(v)
		st, _ = reconcile.StatusOf(v, stack)
		return st.Sync == want && (text == "" || strings.Contains(fmt.Sprint(st.Reasons), text))
	})
	return st
}

// images are the images that tasks of a stack are told to run.
func (r *rig) tasks(stack string) string {
	var out []string
	v := r.View()
	for _, t := range v.Tasks.Below(stack + "/") {
		if t.Value.Desired != state.DesiredStop {
			spec, _ := v.Specs.Get(t.Value.Spec)
			out = append(out, spec.Value.Service.Main().Image)
		}
	}
	return strings.Join(out, " ")
}

func rule(name, body string) *fstest.MapFile {
	text := "# METADATA\n# title: The rule " + name + "\n# custom:\n#   way_out: Wait until Monday.\npackage custom." + name + "\n\n" + body + "\n"
	return &fstest.MapFile{Data: []byte(text)}
}

const friday, monday = "2030-01-04T12:00:00Z", "2030-01-07T12:00:00Z"

var noFridays = rule("fridays", `
deny contains {"service": step.service, "message": sprintf("%s would be replaced on a Friday.", [step.service])} if {
	input.stack.name == "shop"
	some step in input.plan
	step.action == "replace"
	time.weekday(time.parse_rfc3339_ns(input.now)) == "Friday"
}

deny contains {"message": "shop would be removed."} if {
	some step in input.plan
	step.action == "remove"
	not step.service
}`)

// What a user's rule at the plan gate denies is not begun: the stack is Blocked with the rule's words, everything else goes on, what runs is healed, and the gate is asked
// again as time passes.
func TestPlanGate(t *testing.T) {
	src, err := policy.LoadSource(fstest.MapFS{"fridays.rego": noFridays})
	if err != nil {
		t.Fatal(err)
	}
	s := setup{policy: policy.Options{Source: src}, sources: []state.Source{{Name: "fleet"}}}
	r := newRig(t)
	r.at(friday)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  web web:1 monitor=1ms\nblog\n  www www:1 monitor=1ms\nwiki\n  w w:1"})
	r.start(s)
	r.status("shop", reconcile.Synced, "")
	r.status("blog", reconcile.Synced, "")
	r.push("fleet", revision{id: "c2", stacks: "shop\n  web web:2 monitor=1ms\n  new new:1\nblog\n  www www:2 monitor=1ms\nwiki\n  w w:1"})
	st := r.status("shop", reconcile.Blocked, "web would be replaced on a Friday. Wait until Monday. [custom/fridays]")
	if st.Reasons[0].ID != reconcile.ReasonPolicy || st.Health != reconcile.Healthy {
		t.Errorf("%+v", st)
	}
	r.status("blog", reconcile.Synced, "")
	if e, _ := r.View().Stacks.Get("shop"); e.Value.Wanted.Verdict.Policy != r.policyHash() || !e.Value.Wanted.Verdict.Deny {
		t.Errorf("the verdict: %+v", e.Value.Wanted.Verdict)
	}
	if got := r.tasks("shop"); got != "web:1" {
		t.Errorf("shop runs %s", got)
	}
	task, _ := r.View().Tasks.Get("shop/web.1.1")
	r.put(state.Delete[state.Task]("shop/web.1.1", task.Version))
	r.until("shop is healed", func(*state.View) bool { return r.tasks("shop") == "web:1" })

	op := api.Operation{Kind: api.OpRestart, ID: "1", Stack: "shop"}
	if _, err := r.Operate(t.Context(), op); api.KindOf(err) != api.Denied || !strings.Contains(err.Error(), "custom/fridays") {
		t.Errorf("a restart by a person: %v", err)
	}
	op.ID, op.Stack = "2", "blog"
	if _, err := r.Operate(t.Context(), op); err != nil {
		t.Errorf("a restart of another stack: %v", err)
	}
	p, err := r.PlanRevision(t.Context(), "fleet", "")
	if err != nil || !strings.Contains(fmt.Sprint(p.Steps), "block") || !strings.Contains(fmt.Sprint(p.Findings), "custom/fridays") {
		t.Errorf("the plan does not show the denial: %v %v", p, err)
	}
	// A prune of the whole stack, and a person who takes the source away.
	r.push("fleet", revision{id: "c3", stacks: "blog\n  www www:2 monitor=1ms\nwiki\n  w w:1"})
	r.status("shop", reconcile.Blocked, "shop would be removed")
	if _, err := r.Operate(t.Context(), api.Operation{Kind: api.OpSourceRemove, ID: "3", Source: "fleet"}); api.KindOf(err) != api.Denied {
		t.Errorf("a source that holds shop was removed: %v", err)
	}
	r.push("fleet", revision{id: "c2", stacks: "shop\n  web web:2 monitor=1ms\n  new new:1\nblog\n  www www:2 monitor=1ms\nwiki\n  w w:1"})
	r.status("shop", reconcile.Blocked, "on a Friday")
	index := r.View().Index
	r.at(monday)
	r.status("shop", reconcile.Synced, "")
	if got := r.tasks("shop"); got != "new:1 web:2" {
		t.Errorf("on Monday shop runs %s", got)
	}
	if index == r.View().Index {
		t.Error("nothing happened")
	}
}

// A warning about what is done to a stack is of a moment; it stays to be seen, in whatever is looked at again, until the stack is told to be something else.
func TestPlanWarningStays(t *testing.T) {
	src, err := policy.LoadSource(fstest.MapFS{"busy.rego": rule("busy", `
warn contains {"service": step.service, "message": sprintf("%s is replaced at a busy hour.", [step.service])} if {
	some step in input.plan
	step.action == "replace"
}`)})
	if err != nil {
		t.Fatal(err)
	}
	s := setup{policy: policy.Options{Source: src}, sources: []state.Source{{Name: "fleet"}}}
	r := newRig(t)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  db db:1 monitor=1ms\n  web web:1 monitor=1ms"})
	r.start(s)
	r.status("shop", reconcile.Synced, "")
	warnings := func(want int) {
		t.Helper()
		r.status("shop", reconcile.Synced, "")
		e, _ := r.View().Stacks.Get("shop")
		n := 0
		for _, p := range e.Value.Wanted.Problems {
			if p.Rule == "custom/busy" && p.Service == "web" {
				n++
			}
		}
		if n != want {
			t.Errorf("%s has %d warnings, want %d: %v", e.Value.Wanted.Revision, n, want, e.Value.Wanted.Problems)
		}
	}
	sync := func(commit string) {
		t.Helper()
		if _, err := r.Operate(t.Context(), api.Operation{Kind: api.OpSync, ID: api.NewRequestID(), Source: "fleet"}); err != nil {
			t.Fatal(err)
		}
		r.until(commit+" is accepted", func(v *state.View) bool {
			e, _ := v.Sources.Get("fleet")
			return e.Value.Accepted.Commit == scenario.Commit(commit)
		})
	}
	warnings(0)
	r.push("fleet", revision{id: "c2", stacks: "shop\n  db db:1 monitor=1ms\n  web web:2 monitor=1ms"})
	sync("c2")
	warnings(1)
	sync("c2")
	warnings(1)
	index := r.View().Index
	sync("c2")
	if r.View().Index != index {
		t.Error("looking at the same revision again changes something")
	}
	r.push("fleet", revision{id: "c3", stacks: "shop\n  db db:1 monitor=1ms\n  web web:2 monitor=1ms\nblog\n  www www:1"})
	sync("c3")
	warnings(1)
	r.stop()
	r.start(s)
	r.leads()
	sync("c3")
	warnings(1)
	r.push("fleet", revision{id: "c4", stacks: "shop\n  db db:2 monitor=1ms\n  web web:2 monitor=1ms\nblog\n  www www:1"})
	sync("c4")
	warnings(0)
}

// An agent that comes back with another policy while Git is out of reach judges what runs from the log, and what runs goes on.
func TestNewPolicyWithoutGit(t *testing.T) {
	r := newRig(t)
	stacks := "shop\n  web web:1 monitor=1ms\nblog\n  www www:1 monitor=1ms"
	r.push("fleet", revision{id: "c1", stacks: stacks})
	s := setup{sources: []state.Source{{Name: "fleet"}}}
	r.start(s)
	r.status("shop", reconcile.Synced, "")
	r.status("blog", reconcile.Synced, "")
	r.stop()

	src, err := policy.LoadSource(fstest.MapFS{"noweb.rego": rule("noweb", `
deny contains {"service": service.name, "message": "web:1 is too old."} if {
	some service in input.stack.services
	some container in service.containers
	container.image == "web:1"
}`)})
	if err != nil {
		t.Fatal(err)
	}
	r.push("fleet", revision{err: errors.New("no route to host")})
	s.policy.Source = src
	r.start(s)
	st := r.status("shop", reconcile.Blocked, "web:1 is too old. Wait until Monday. [custom/noweb]")
	if st.Health != reconcile.Healthy || r.tasks("shop") != "web:1" {
		t.Errorf("what runs does not go on: %s, %s", st.Health, r.tasks("shop"))
	}
	r.status("blog", reconcile.Synced, "")
	r.push("fleet", revision{id: "c1", stacks: stacks})
	r.until("the source is read again", func(v *state.View) bool { e, _ := v.Sources.Get("fleet"); return e.Value.Trouble == nil })
	r.status("shop", reconcile.Blocked, "web:1 is too old")
	r.push("fleet", revision{id: "c2", stacks: strings.ReplaceAll(stacks, "web:1", "web:2")})
	r.status("shop", reconcile.Synced, "")
}

// The policy source judges before anything is accepted, its newest good revision is in force, and what runs is judged by it at once.
func TestPolicySource(t *testing.T) {
	noWeb := rule("noweb", `deny contains {"service": s.name, "message": "web:1 is old."} if { some s in input.stack.services; s.containers[_].image == "web:1" }`)
	s := setup{sources: []state.Source{{Name: "fleet"}, {Name: "rules", Policy: true}}}
	r := newRig(t)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  web web:1 monitor=1ms"})
	r.push("rules", revision{id: "p0", err: errors.New("the remote end hung up")})
	r.start(s)
	r.until("the source waits for the policy", func(v *state.View) bool {
		e, _ := v.Sources.Get("fleet")
		return e.Value.Trouble != nil && e.Value.Trouble.ID == ReasonNoPolicy
	})
	if n := r.View().Stacks.Len(); n != 0 {
		t.Fatalf("%d stacks were accepted without the policy", n)
	}
	r.push("rules", revision{id: "p1", policy: fstest.MapFS{}})
	r.status("shop", reconcile.Synced, "")
	first := r.policyHash()

	r.push("rules", revision{id: "p2", policy: fstest.MapFS{"noweb.rego": noWeb}})
	st := r.status("shop", reconcile.Blocked, "web:1 is old. Wait until Monday. [custom/noweb]")
	if st.Health != reconcile.Healthy || r.tasks("shop") != "web:1" {
		t.Errorf("what runs was touched: %s %s", st.Health, r.tasks("shop"))
	}
	e, _ := r.View().Sources.Get("rules")
	if stack, _ := r.View().Stacks.Get("shop"); e.Value.PolicyHash == first || stack.Value.Wanted.Verdict.Policy != e.Value.PolicyHash || e.Value.Accepted.Commit != scenario.Commit("p2") {
		t.Errorf("the source says %s, the verdict %s", e.Value.PolicyHash, stack.Value.Wanted.Verdict.Policy)
	}
	task, _ := r.View().Tasks.Get("shop/web.1.1")
	r.put(state.Delete[state.Task]("shop/web.1.1", task.Version))
	r.until("the denied stack is healed", func(*state.View) bool { return r.tasks("shop") == "web:1" })

	broken := fstest.MapFS{"noweb.rego": &fstest.MapFile{Data: []byte("package custom.noweb\n\ndeny contains x")}}
	r.push("rules", revision{id: "p3", policy: broken})
	r.until("the broken policy is refused in words", func(v *state.View) bool {
		e, _ := v.Sources.Get("rules")
		return e.Value.Trouble != nil && e.Value.Trouble.ID == reconcile.ReasonBadPolicy && strings.Contains(e.Value.Trouble.Message, "noweb.rego:1") &&
			e.Value.Accepted.Commit == scenario.Commit("p2")
	})
	if _, err := r.Operate(t.Context(), api.Operation{Kind: api.OpSync, ID: "sync", Source: "rules"}); api.KindOf(err) != api.Denied || !strings.Contains(err.Error(), "noweb.rego:1") {
		t.Errorf("a sync of the broken policy: %v", err)
	}
	r.push("fleet", revision{id: "c2", stacks: "shop\n  web web:1 monitor=1ms\nblog\n  web web:1"})
	r.status("blog", reconcile.Blocked, "custom/noweb")

	// After a restart, nothing is judged by anything else than the policy that was accepted last.
	r.stop()
	r.push("rules", revision{id: "p2", policy: fstest.MapFS{"noweb.rego": noWeb}})
	r.push("fleet", revision{id: "c3", stacks: "shop\n  web web:1 monitor=1ms\nblog\n  web web:1\nwiki\n  web web:1"})
	r.start(s)
	r.status("wiki", reconcile.Blocked, "custom/noweb")

	for _, bad := range []api.SourceSpec{
		{Name: "more", URL: "/srv/more", Policy: true}, // a second one
		{Name: "rules", URL: "/srv/rules"},             // as a source of stacks
		{Name: "fleet", URL: "/srv/fleet", Policy: true},
	} {
		if _, err := r.Operate(t.Context(), api.Operation{Kind: api.OpSourceAdd, ID: bad.Name, SourceSpec: &bad}); api.KindOf(err) != api.Conflict {
			t.Errorf("%s: %v", bad.Name, err)
		}
	}
	if _, err := r.PlanRevision(t.Context(), "rules", ""); api.KindOf(err) != api.Invalid {
		t.Errorf("a plan of policy: %v", err)
	}
	if _, err := r.Operate(t.Context(), api.Operation{Kind: api.OpSourceRemove, ID: "rm", Source: "rules"}); err != nil {
		t.Fatal(err)
	}
	r.status("shop", reconcile.Synced, "")
	r.status("wiki", reconcile.OutOfSync, "")
}

// When an exemption ends, what used it is judged again: not at the next look at Git, and not ten minutes later.
func TestAnExemptionEnds(t *testing.T) {
	src, err := policy.LoadSource(fstest.MapFS{
		"noweb.rego":      rule("noweb", `deny contains {"service": "web", "message": "web."} if input.stack.name == "shop"`),
		"exemptions.yaml": &fstest.MapFile{Data: []byte("exemptions:\n  - {rule: custom/noweb, stack: shop, reason: until Friday, until: 2030-01-03}")},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	r.at("2030-01-03T23:59:58Z")
	r.push("fleet", revision{id: "c1", stacks: "shop\n  web web:1 monitor=1ms"})
	r.start(setup{policy: policy.Options{Source: src}, sources: []state.Source{{Name: "fleet"}}})
	r.until("shop is accepted", func(v *state.View) bool {
		e, _ := v.Stacks.Get("shop")
		return e.Value.Wanted.Decision == state.DecisionAccepted && !e.Value.Wanted.Verdict.Until.IsZero()
	})
	r.status("shop", reconcile.Blocked, "Its exemption ended on 2030-01-03.")
}

// Neither a failed rollout nor a person starts again what policy denies today.
func TestNoRollbackToWhatPolicyDenies(t *testing.T) {
	old := rule("old", `deny contains {"service": s.name, "message": "web:1 is old."} if { some s in input.stack.services; s.containers[_].image == "web:1" }`)
	r := newRig(t)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  web web:1 monitor=1ms"})
	r.push("rules", revision{id: "p1", policy: fstest.MapFS{}})
	r.start(setup{sources: []state.Source{{Name: "fleet"}, {Name: "rules", Policy: true}}})
	r.status("shop", reconcile.Synced, "")
	r.push("fleet", revision{id: "c2", stacks: "shop\n  web bad:2 monitor=1ms"})
	r.until("the rollout begins", func(v *state.View) bool { return strings.Contains(r.tasks("shop"), "bad:2") })
	r.push("rules", revision{id: "p2", policy: fstest.MapFS{"old.rego": old}})
	r.until("going back is denied", func(v *state.View) bool {
		e, _ := v.Stacks.Get("shop")
		return e.Value.Banned != nil && strings.Contains(e.Value.Banned.Message, "custom/old")
	})
	r.until("the rollout stalls", func(v *state.View) bool {
		r.obey(v)
		e, _ := v.Stacks.Get("shop")
		return e.Value.Outcome.Kind == state.Stalled
	})
	if got := r.tasks("shop"); got != "bad:2" {
		t.Errorf("shop runs %s", got)
	}
	op := api.Operation{Kind: api.OpRollback, ID: "back", Stack: "shop", Revision: "c1"}
	if _, err := r.Operate(t.Context(), op); api.KindOf(err) != api.Denied || !strings.Contains(err.Error(), "custom/old") {
		t.Errorf("a person's rollback: %v", err)
	}
	r.push("rules", revision{id: "p3", policy: fstest.MapFS{}})
	r.until("the failed rollout goes back once it may", func(v *state.View) bool {
		e, _ := v.Stacks.Get("shop")
		return e.Value.Banned == nil
	})
	op.ID = "again"
	if _, err := r.Operate(t.Context(), op); err != nil {
		t.Errorf("a rollback that is allowed again: %v", err)
	}
}

// The users of images that are on the node count for the rules about them.
func TestImageUsers(t *testing.T) {
	src, err := policy.LoadSource(fstest.MapFS{"policy.yaml": &fstest.MapFile{Data: []byte("sets: {restricted: warn}")}})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  a root:1\n  b user:1\n  c unknown:1"})
	r.start(setup{policy: policy.Options{Source: src}, sources: []state.Source{{Name: "fleet"}}, images: map[string]string{"root:1": "", "user:1": "1000"}})
	r.until("shop is judged", func(v *state.View) bool { e, ok := v.Stacks.Get("shop"); return ok && e.Value.Wanted.Release != "" })
	st, _ := r.View().Stacks.Get("shop")
	var got []string
	for _, p := range st.Value.Wanted.Problems {
		if p.Rule == "restricted/non-root" {
			got = append(got, p.Service+": "+p.Message)
		}
	}
	text := strings.Join(got, "\n")
	if !strings.Contains(text, "neither the file nor the image names a user") || !strings.Contains(text, "c: c may run as root: the file names no user, and the image's is not known: registry unknown:1 does not answer.") || strings.Contains(text, "b:") {
		t.Errorf("findings about users:\n%s", text)
	}
}

var noRoot = rule("no_root", `
deny contains {"service": service.name, "message": "the image is root's."} if {
	some service in input.stack.services
	input.images[service.containers[0].image].user == ""
}

deny contains {"service": service.name, "message": sprintf("not known: %s.", [trouble])} if {
	some service in input.stack.services
	trouble := input.images[service.containers[0].image].trouble
}`)

// Images that were never pulled are judged by what their registry says of them. It is asked once; again only where it did not answer, and where its answer was denied.
func TestImagesAreLookedUp(t *testing.T) {
	r := newRig(t)
	far := &registries{images: map[string]string{"user:1": "sha256:u 1000", "root:1": "sha256:r"}}
	asked := 0
	count := func() {
		t.Helper()
		if asked += strings.Count(far.questions(), "user:1"); asked > 1 {
			t.Errorf("a registry was asked %d times for one image", asked)
		}
	}
	r.push("rules", revision{id: "p1", policy: fstest.MapFS{"r.rego": noRoot}})
	r.push("fleet", revision{id: "c1", stacks: "a\n  a user:1\nb\n  b root:1\nc\n  c down:1\nd\n  d user:1"})
	r.start(setup{sources: []state.Source{{Name: "rules", Policy: true}, {Name: "fleet"}}, far: far})
	// runs waits until a stack has a task of the image that was judged.
	runs := func(stack, digest string) {
		t.Helper()
		r.until(stack+" runs "+digest, func(v *state.View) bool {
			for _, task := range v.Tasks.Below(stack + "/") {
				if task.Value.Images[stack] == digest {
					return true
				}
			}
			return false
		})
	}
	runs("a", "sha256:u")
	r.status("b", reconcile.Blocked, "the image is root's.")
	r.status("c", reconcile.Blocked, "not known: registry of down:1 does not answer.")
	runs("d", "sha256:u")
	count()

	far.set("down:1", "sha256:d 1000")
	r.at(time.Now().Add(2 * time.Minute).Format(time.RFC3339)) // no word of a person
	runs("c", "sha256:d")

	far.set("root:1", "sha256:r2 1000")
	r.Trigger("fleet") // as sync does
	runs("b", "sha256:r2")
	count()

	r.push("fleet", revision{id: "c2", stacks: "a\n  a user:1\nb\n  b root:1\nc\n  c down:1\nd\n  d other:1"})
	r.status("d", reconcile.Blocked, "registry of other:1 does not answer.")
	far.set("other:1", "sha256:o 1000")
	far.set("user:1", "")
	r.at(time.Now().Add(time.Hour).Format(time.RFC3339)) // all verdicts are made again
	runs("d", "sha256:o")
	if st, _ := reconcile.StatusOf(r.View(), "a"); st.Sync == reconcile.Blocked {
		t.Errorf("a renewal forgot what was known: %v", st.Reasons)
	}
	count()
}

// A policy that begins to ask about images has registries asked about what runs, too.
func TestNewPolicyLooksImagesUp(t *testing.T) {
	r := newRig(t)
	far := &registries{images: map[string]string{"user:1": "sha256:u 1000", "root:1": "sha256:r"}}
	r.push("rules", revision{id: "p1", policy: fstest.MapFS{}})
	r.push("fleet", revision{id: "c1", stacks: "a\n  a user:1\nb\n  b root:1\n"})
	r.start(setup{sources: []state.Source{{Name: "rules", Policy: true}, {Name: "fleet"}}, far: far})
	r.status("a", reconcile.Synced, "")
	r.status("b", reconcile.Synced, "")
	if got := far.questions(); got != "" {
		t.Errorf("nobody wants to know, but asked was for %s", got)
	}
	r.push("rules", revision{id: "p2", policy: fstest.MapFS{"r.rego": noRoot}})
	r.status("b", reconcile.Blocked, "the image is root's.")
	r.status("a", reconcile.Synced, "")
}

// An image that is never to be pulled is not asked for, and neither is one whose user the file names.
func TestImagesThatAreNotLookedUp(t *testing.T) {
	far := &registries{images: map[string]string{}}
	engine, err := policy.New(t.Context(), policy.Options{Source: policy.Source{Scope: policy.Scope{Sets: map[string]policy.Level{policy.Restricted: policy.Enforce}}}})
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{images: shelf{users: map[string]string{"here:1": "1"}, far: far}, cfg: Config{Now: time.Now}}
	svc := manifest.Service{Name: "web", Containers: []manifest.Container{
		{Name: "a", Image: "never:1", PullPolicy: "never"}, {Name: "b", Image: "user:1", User: "7"}, {Name: "c", Image: "here:1"}, {Name: "d", Image: "far:1"},
	}}
	in := &intake{loaded: &Loaded{Bundle: &manifest.Bundle{Stacks: []manifest.Stack{{Name: "shop", Services: []manifest.Service{svc}}}}}}
	n.describe(t.Context(), engine, in, nil)
	if got := far.questions(); got != "far:1" {
		t.Errorf("asked for %q", got)
	}
}
