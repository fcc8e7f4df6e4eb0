package reconcile_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/gitopsd/gitopsd/fixtures/scenario"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Each file is one situation. A revision is written in the language of fixtures/scenario. Commands:
//
//	node NAME [memory=N] [block=CIDR]     a node joins
//	source NAME [yes]                     a source is added; yes: its first revision needs no approval
//	commit ID [source=NAME] [rewind|unsigned|unreadable] [frozen=STACK] [restarts]    a revision of the source is judged: what Accept says; frozen: policy denies
//	                                      what it does to the stack; restarts: services depend on others with restart
//	again                                 the newest revision is judged again, as after a person's word
//	approve / suspend STACK / resume STACK / pin STACK / restart STACK/SERVICE     a person's words
//	ban STACK                             policy denies what the stack would be rolled back to
//	decide                                one plan of Decide, which goes into the log
//	settle [steps]                        nodes work and plans go in until nothing happens; steps: shows the plans
//	report TASK PHASE [failures=N] [why=TEXT]    what a node says
//	advance D                             log time passes
//	preview ID                            a revision as a dry run
//	back STACK                            the revision before as a dry run
//	users KEY                             who uses a volume
//	forget KEY                            a person's word: a volume is not known any more
//	image-volume TASK NAME                a node found a volume in the image of a task
//	status [STACK] / tasks / networks / volumes / ports / history STACK
//
// An image named crash… ends with code 1, sick… never gets healthy, missing… does not exist, done… ends with 0.
func TestReconcile(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		w := &world{t: t, state: state.New(), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), last: map[string]reconcile.Intake{}}
		datadriven.RunTest(t, path, w.run)
	})
}

type world struct {
	t     *testing.T
	state *state.State
	now   time.Time
	index uint64
	last  map[string]reconcile.Intake // by source
	from  string                      // source of the last commit
	out   strings.Builder
}

func (w *world) view() *state.View { return w.state.View() }

func (w *world) time() reconcile.Now { return reconcile.Now{Log: w.now, Wall: w.now} }

func (w *world) say(format string, args ...any) { fmt.Fprintf(&w.out, format+"\n", args...) }

// put writes objects as a person's command would.
func (w *world) put(changes ...state.Change) {
	w.t.Helper()
	w.apply(state.Command{At: w.now, Items: []state.Item{changes}})
}

func (w *world) apply(c state.Command) {
	w.t.Helper()
	data, err := state.Encode(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.index++
	res, err := w.state.Apply(w.index, 1, data)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(res.Refused) > 0 || res.Stale || res.Again {
		w.t.Fatalf("the log did not take what was decided on its newest state: %+v", res)
	}
}

// propose puts a plan into the log.
func (w *world) propose(p reconcile.Plan) {
	w.t.Helper()
	for _, c := range p.Commands(1, w.view().Index, w.time()) {
		w.apply(c)
	}
}

func (w *world) run(t *testing.T, d *datadriven.TestData) string {
	w.out.Reset()
	text := func(key string) string {
		for _, a := range d.CmdArgs {
			if a.Key == key && len(a.Vals) > 0 {
				return a.Vals[0]
			}
		}
		return ""
	}
	arg := func(i int) string {
		if i < len(d.CmdArgs) {
			return d.CmdArgs[i].Key
		}
		return ""
	}
	switch d.Cmd {
	case "node":
		n := state.Node{Name: arg(0), Block: "10.1.0.0/20", Platform: "linux/amd64", CPU: 4e9, Memory: 8 << 30}
		if b := text("block"); b != "" {
			n.Block = b
		}
		if m := text("memory"); m != "" {
			if err := n.Memory.UnmarshalText([]byte(m)); err != nil {
				t.Fatal(err)
			}
		}
		w.put(state.Put(arg(0), 0, n))
	case "reboot":
		e, _ := w.view().Nodes.Get(arg(0))
		w.now = w.now.Add(time.Second)
		e.Value.Booted = w.now
		w.put(state.Put(arg(0), e.Version, e.Value))
	case "source":
		w.put(state.Put(arg(0), 0, state.Source{Name: arg(0), URL: "/srv/" + arg(0), Yes: d.HasArg("yes")}))
	case "commit":
		w.commit(d)
	case "again":
		w.accept(w.last[w.from])
	case "approve":
		e, _ := w.view().Sources.Get(w.from)
		e.Value.Approved = e.Value.Seen.Commit
		w.put(state.Put(w.from, e.Version, e.Value))
	case "suspend", "resume", "pin":
		e, _ := w.view().Stacks.Get(arg(0))
		e.Value.Suspended = nil
		why := &state.Reason{ID: reconcile.ReasonSuspended, Message: "suspended: by alice"}
		if d.Cmd == "suspend" {
			e.Value.Suspended = why
		} else if d.Cmd == "pin" {
			o := e.Value.History[0]
			reconcile.Follow(&e.Value, state.Applied{Revision: o.Revision, Release: o.Release}, w.now)
			e.Value.Pinned = &state.Reason{ID: reconcile.ReasonPinned, Message: fmt.Sprintf("rolled back to %s: by alice", o.Revision)}
		}
		w.put(state.Put(arg(0), e.Version, e.Value))
	case "ban":
		e, _ := w.view().Stacks.Get(arg(0))
		e.Value.Banned = &state.Reason{ID: reconcile.ReasonPolicy, Message: "policy denies it today"}
		w.put(state.Put(arg(0), e.Version, e.Value))
	case "back":
		e, _ := w.view().Stacks.Get(arg(0))
		o := e.Value.History[0]
		steps, err := reconcile.Back(w.view(), arg(0), state.Applied{Revision: o.Revision, Release: o.Release}, w.time())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps {
			w.say("%s (%s)", line(s), s.Cause)
		}
	case "unpin":
		e, _ := w.view().Stacks.Get(arg(0))
		e.Value.Pinned = nil
		w.put(state.Put(arg(0), e.Version, e.Value))
	case "restart":
		e, _ := w.view().Services.Get(arg(0))
		e.Value.Restart++
		e.Value.Step, e.Value.Started, e.Value.Failed = state.StepUpdating, w.now, nil
		w.put(state.Put(arg(0), e.Version, e.Value))
	case "decide":
		p := w.decide()
		w.steps(p)
		w.propose(p)
	case "settle":
		w.settle(d.HasArg("steps"))
	case "report":
		e, _ := w.view().Reports.Get(arg(0))
		r := e.Value
		r.Node, r.Phase, r.Attempt = "n1", state.Phase(arg(1)), max(r.Attempt, 1)
		r.Health = ""
		if r.Phase == state.PhaseRunning {
			r.Health = state.HealthHealthy
		}
		if f := text("failures"); f != "" {
			fmt.Sscan(f, &r.Failures)
		}
		if why := text("why"); why != "" {
			r.Reason = state.Reason{ID: "task.exited", Message: why}
		}
		w.put(state.Set(arg(0), r))
	case "advance":
		by, err := time.ParseDuration(arg(0))
		if err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(by)
	case "preview":
		w.preview(d)
	case "status":
		w.status(arg(0))
	case "tasks":
		for id, e := range w.view().Tasks.All() {
			r, _ := w.view().Reports.Get(id)
			w.say("%-14s %-6s on %s at %v as %s: %s", id, e.Value.Desired, e.Value.Node, slices.Sorted(maps.Values(e.Value.Addrs)), w.image(e.Value.Spec), r.Value.Phase)
		}
	case "networks":
		for name, e := range w.view().Networks.All() {
			w.say("%s: %v", name, e.Value.Subnets)
		}
	case "volumes":
		for key, e := range w.view().Volumes.All() {
			orphan := ""
			if e.Value.Orphan {
				orphan = ", orphan"
			}
			if !e.Value.Own {
				orphan += ", not its own"
			}
			if e.Value.Removing != nil {
				orphan += ", being removed"
			}
			w.say("%s of %s%s", key, e.Value.Stack, orphan)
		}
	case "forget":
		e, _ := w.view().Volumes.Get(arg(0))
		w.put(state.Delete[state.Volume](arg(0), e.Version))
	case "image-volume":
		e, _ := w.view().Tasks.Get(arg(0))
		t := e.Value
		vol := state.Volume{Name: reconcile.SlotVolumes(t.Stack, t.Service, t.Slot) + arg(1), Kind: manifest.MountAnonymous, Stack: t.Stack, Service: t.Service, Slot: t.Slot, Node: t.Node, Own: true}
		w.put(state.Set(state.VolumeKey(vol.Node, vol.Kind, vol.Name), vol))
	case "users":
		services, tasks := reconcile.VolumeUsers(w.view(), arg(0))
		w.say("services %v, tasks %v", services, tasks)
	case "ports":
		for key, e := range w.view().Services.All() {
			w.say("%s %v", key, e.Value.Ports)
		}
	case "history":
		e, _ := w.view().Stacks.Get(arg(0))
		for _, o := range append([]state.Outcome{e.Value.Outcome}, e.Value.History...) {
			w.say("%s %s", o.Revision, outcome(o))
		}
	case "collect":
		p := reconcile.Collect(w.view())
		for _, item := range p.Items {
			for _, c := range item {
				switch {
				case c.Table == "events":
				case len(c.Object) > 0:
					w.say("change %s %s", c.Table, shorten(c.Key))
				default:
					w.say("drop %s %s", c.Table, shorten(c.Key))
				}
			}
		}
		w.propose(p)
	default:
		t.Fatalf("unknown command %s", d.Cmd)
	}
	if w.out.Len() == 0 {
		return "ok\n"
	}
	return w.out.String()
}

// shorten makes hashes in keys readable.
func shorten(key string) string {
	if len(key) >= 64 && !strings.Contains(key[:64], "/") {
		return key[:8] + key[64:]
	}
	return key
}

func outcome(o state.Outcome) string {
	s := string(o.Kind)
	if s == "" {
		s = "in progress"
	}
	if o.To.Commit != "" {
		s += " to " + o.To.String()
	}
	if o.Reason.Message != "" {
		s += ": " + o.Reason.Message
	}
	return s
}

func (w *world) image(spec string) string {
	e, _ := w.view().Specs.Get(spec)
	return e.Value.Service.Main().Image
}

func (w *world) intake(d *datadriven.TestData) reconcile.Intake {
	w.t.Helper()
	source := ""
	for name := range w.view().Sources.All() {
		if source == "" {
			source = name
		}
	}
	if d.HasArg("source") {
		d.ScanArgs(w.t, "source", &source)
	}
	in, err := scenario.Intake(source, d.CmdArgs[0].Key, d.Input)
	if err != nil {
		w.t.Fatal(err)
	}
	if d.HasArg("restarts") {
		for i := range in.Bundle.Stacks {
			for _, svc := range in.Bundle.Stacks[i].Services {
				for k := range svc.DependsOn {
					svc.DependsOn[k].Restart = true
				}
			}
		}
	}
	if d.HasArg("rewind") {
		in.Relation = reconcile.RelationRewind
	}
	if d.HasArg("unsigned") {
		in.Unsigned = &state.Reason{ID: reconcile.ReasonUnsigned, Message: "the commit has no signature of an allowed signer"}
	}
	if d.HasArg("unreadable") {
		in.Bundle.Problems = []manifest.Problem{{Severity: manifest.Error, Rule: "settings-key", File: "gitops.yaml", Line: 3, Message: "stakcs is not a key here"}}
	}
	if d.HasArg("frozen") {
		var stack string
		d.ScanArgs(w.t, "frozen", &stack)
		in.Reviews[stack] = reconcile.Review{Deny: true, Policy: "p2",
			Findings: []manifest.Problem{{Severity: manifest.Error, Rule: "custom/freeze", Stack: stack, Message: "nothing changes on Fridays"}}}
	}
	return in
}

func (w *world) commit(d *datadriven.TestData) {
	in := w.intake(d)
	w.from = in.Source
	w.last[in.Source] = in
	w.accept(in)
}

// accept judges a revision, and once more: that may change nothing.
func (w *world) accept(in reconcile.Intake) {
	w.t.Helper()
	p := reconcile.Accept(w.view(), in)
	w.steps(p)
	w.propose(p)
	if again := reconcile.Accept(w.view(), in); !again.Empty() {
		w.say("BUG: judged again, it changes %d objects more", len(again.Items))
	}
}

// decide asks for a plan, and for the same one again.
func (w *world) decide() reconcile.Plan {
	p, again := reconcile.Decide(w.view(), w.time()), reconcile.Decide(w.view(), w.time())
	if a, b := manifest.Hash(p), manifest.Hash(again); a != b || manifest.Hash(p.Items) != manifest.Hash(again.Items) {
		w.say("BUG: decided twice, two plans")
	}
	return p
}

func (w *world) steps(p reconcile.Plan) {
	if p.Empty() {
		w.say("nothing")
	}
	for _, s := range p.Steps {
		w.say("%s", line(s))
	}
}

func line(s reconcile.Step) string {
	what := s.Stack
	switch {
	case s.Volume != "":
		what = "volume " + s.Volume
	case s.Task != "":
		what = s.Task
	case s.Service != "":
		what = s.Stack + "/" + s.Service
	case s.Stack == "":
		what = "source " + s.Source
	}
	out := fmt.Sprintf("%-8s %s", s.Action, what)
	if s.Node != "" && s.Action != reconcile.ActStop {
		out += " on " + s.Node
	}
	if s.Reason.ID != "" || s.Reason.Message != "" {
		out += ": " + s.Reason.Message + " [" + s.Reason.ID + "]"
	}
	for _, f := range s.Fields {
		out += fmt.Sprintf("\n           %s: %s -> %s", f.Path, f.Old, f.New)
	}
	return out
}

// settle lets nodes do what they are told and plans go in until nothing changes and nothing asks to be woken.
func (w *world) settle(show bool) {
	w.t.Helper()
	began := w.now
	for range 1000 {
		p := w.decide()
		if show && !p.Empty() {
			w.say("after %s:", w.now.Sub(began))
			w.steps(p)
		}
		w.propose(p)
		if w.nodes() || !p.Empty() {
			continue
		}
		var wake time.Time
		for _, at := range p.Wakes {
			if wake.IsZero() || at.Before(wake) {
				wake = at
			}
		}
		if !wake.After(w.now) {
			return
		}
		w.now = wake
	}
	w.t.Fatal("it never settles")
}

// nodes report that every task did as it was told, and remove what volumes they are told to. It says whether that was news.
func (w *world) nodes() bool {
	w.t.Helper()
	news := false
	for key, e := range w.view().Volumes.All() {
		if e.Value.Removing != nil {
			w.put(state.Delete[state.Volume](key, e.Version))
			news = true
		}
	}
	for id, e := range w.view().Tasks.All() {
		r := state.Report{Node: e.Value.Node, Attempt: 1, Images: map[string]string{e.Value.Service: "sha256:" + w.image(e.Value.Spec)}}
		image := w.image(e.Value.Spec)
		switch {
		case e.Value.Desired == state.DesiredStop:
			r = state.Report{Node: e.Value.Node, Phase: state.PhaseGone, Attempt: 1}
		case strings.HasPrefix(image, "missing"):
			r.Phase, r.Failures, r.Images, r.Reason = state.PhaseFailed, 1, nil, state.Reason{ID: "image.missing", Message: "image " + image + " does not exist"}
		case e.Value.Desired == state.DesiredReady:
			r.Phase = state.PhaseCreated
		case strings.HasPrefix(image, "crash"):
			r.Phase, r.Failures, r.Retry, r.Reason = state.PhaseWaiting, 1, true, state.Reason{ID: "task.exited", Message: "exited with code 1"}
		case strings.HasPrefix(image, "sick"):
			r.Phase, r.Health = state.PhaseRunning, state.HealthStarting
		case strings.HasPrefix(image, "done"):
			r.Phase = state.PhaseComplete
		default:
			r.Phase, r.Health = state.PhaseRunning, state.HealthHealthy
		}
		if old, ok := w.view().Reports.Get(id); !ok || manifest.Hash(old.Value) != manifest.Hash(r) {
			w.put(state.Set(id, r))
			news = true
		}
	}
	return news
}

func (w *world) preview(d *datadriven.TestData) {
	w.t.Helper()
	in := w.intake(d)
	before := w.view().Hash()
	p, err := reconcile.Preview(w.view(), in, w.time())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, s := range p.Steps {
		w.say("%s", line(s))
	}
	for _, n := range reconcile.Data(w.view(), in.Bundle) {
		w.say("data     %s: %s %s %s", n.Stack, n.Kind, n.Name, n.Message)
	}
	if w.view().Hash() != before {
		w.say("BUG: the preview changed the state")
	}
	if w.out.Len() == 0 {
		w.say("nothing")
	}
}

func (w *world) status(stack string) {
	for _, st := range reconcile.Statuses(w.view()) {
		if stack != "" && st.Name != stack {
			continue
		}
		ready := ""
		if st.Ready {
			ready = ", Ready"
		}
		w.say("%s %s: %s, %s%s; %s", st.Name, st.Revision, st.Sync, st.Health, ready, outcome(st.Outcome))
		for _, r := range st.Reasons {
			w.say("  %s", r)
		}
		for _, s := range st.Services {
			w.say("  %s %d/%d %s %s%s", s.Name, s.Ready, s.Desired, s.Health, s.Image, step(s.Step))
		}
	}
}

func step(s state.Step) string {
	if s == state.StepDone {
		return ""
	}
	return ", " + string(s)
}
