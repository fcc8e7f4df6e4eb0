package rollout_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/rollout"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Each file is one situation. Its commands:
//
//	service [POLICY] [fresh]        version v1 runs and is stable; fresh: nothing runs yet
//	version NAME [POLICY] [FATE]    Git asks for another version
//	scale N                         Git asks for another number of replicas of the same version
//	restart                         a person asks for new tasks of the same version
//	hold / stall / go               a dependency is being updated / stalled / is done
//	kill SLOT                       the running task of a slot ends with code 137 and is restarted by its node
//	lose SLOT                       the task of a slot is gone, without a trace
//	play [for=D]                    the service and its node run until nothing happens any more, or for D
//	slots                           what is in each slot now
//
// POLICY: replicas parallelism delay monitor order action ratio deadline, and rollback-… for rollback_config.
// FATE, of the slots named by slots=1,3 or of all: crash=D (after it runs), unhealthy (never gets healthy), no-image, heals=D (after a crash), gated, waits (its node
// does not start it: what it depends on stalled; until go). address: the service has a fixed address. stops=D: how long tasks take to stop.
// Pulling, starting and stopping take a second each.
func TestRollout(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		w := &world{stops: step, start: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), tasks: map[string]*task{}}
		w.now = w.start
		datadriven.RunTest(t, path, w.run)
	})
}

// step is how long a node takes to pull, to start, and to stop.
const step = time.Second

// horizon is how far play goes at most.
const horizon = time.Hour

type version struct {
	spec   manifest.Service
	fate   fate
	serial string
}

type fate struct {
	slots     []int
	crash     time.Duration
	heals     time.Duration
	unhealthy bool
	noImage   bool
	gated     bool
	waits     bool // gated, and waiting alone may help
}

// task is a task and what its node is about to do with it.
type task struct {
	rollout.Task
	next func()
	at   time.Time
}

type world struct {
	start, now time.Time
	versions   []*version
	cur        *version
	svc        state.Service
	tasks      map[string]*task
	hold       state.Reason
	stops      time.Duration // how long a task takes to stop
	out        strings.Builder
	least      int // fewest slots that served during a play
}

func (w *world) run(t *testing.T, d *datadriven.TestData) string {
	w.out.Reset()
	switch d.Cmd {
	case "service":
		w.version(t, "v1", d)
		w.svc = state.Service{Target: "v1", Revision: manifest.Revision{Commit: "v1"}, Step: state.StepUpdating, Started: w.now}
		if !d.HasArg("fresh") {
			w.svc.Step, w.svc.Stable, w.svc.StableRevision = state.StepDone, "v1", w.svc.Revision
			for slot := 1; slot <= w.cur.spec.Replicas; slot++ {
				tk := w.make(slot, false, state.Reason{})
				tk.Report = state.Report{Phase: state.PhaseRunning, Health: state.HealthHealthy, Attempt: 1}
				tk.Done, tk.Made, tk.next = w.now.Add(-time.Hour), w.now.Add(-time.Hour), nil
			}
			w.svc.Started = w.now.Add(-2 * time.Hour)
		}
	case "version":
		w.version(t, d.CmdArgs[0].Key, d)
		// As Decide does when another spec is accepted.
		w.svc.Target, w.svc.Revision = w.cur.serial, manifest.Revision{Commit: w.cur.serial}
		w.svc.Step, w.svc.Started, w.svc.Failed, w.svc.Reason, w.svc.Bad = state.StepUpdating, w.now, nil, state.Reason{}, ""
	case "scale":
		if _, err := fmt.Sscan(d.CmdArgs[0].Key, &w.cur.spec.Replicas); err != nil {
			t.Fatal(err)
		}
		w.svc.Step, w.svc.Started, w.svc.Failed = state.StepUpdating, w.now, nil
	case "restart":
		w.svc.Restart++
		w.svc.Step, w.svc.Started, w.svc.Failed = state.StepUpdating, w.now, nil
	case "hold":
		w.hold = state.Reason{ID: "depends_on", Message: "db is being updated"}
	case "stall":
		w.hold = state.Reason{ID: converge.ReasonDependedOn, Message: "db, which it depends on, stalled"}
	case "go":
		w.hold = state.Reason{}
		for _, tk := range w.sorted() {
			if converge.Gated(tk.Report.Reason) {
				w.begin(tk)
			}
		}
	case "kill", "lose":
		var slot int
		if _, err := fmt.Sscan(d.CmdArgs[0].Key, &slot); err != nil {
			t.Fatal(err)
		}
		for _, tk := range w.sorted() {
			if tk.Slot != slot || tk.Desired != state.DesiredRun {
				continue
			}
			if d.Cmd == "lose" {
				delete(w.tasks, tk.ID)
				continue
			}
			w.crash(tk, 137, step)
		}
	case "play":
		for_ := horizon
		if d.HasArg("for") {
			var s string
			d.ScanArgs(t, "for", &s)
			for_ = duration(t, s)
		}
		w.play(t, w.now.Add(for_), d.HasArg("for"))
	case "slots":
		w.slots()
	default:
		t.Fatalf("unknown command %s", d.Cmd)
	}
	if w.out.Len() == 0 {
		return "ok\n"
	}
	return w.out.String()
}

func duration(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// version makes a version from the last one and what the command changes.
func (w *world) version(t *testing.T, name string, d *datadriven.TestData) {
	t.Helper()
	v := &version{serial: name}
	if w.cur != nil {
		v.spec = w.cur.spec
	} else {
		v.spec = manifest.Service{Name: "web", Replicas: 1, Containers: []manifest.Container{{Name: "web"}}}
		v.spec.Update.Parallelism, v.spec.Rollback.Parallelism = 1, 1
		manifest.Resolve(&v.spec)
	}
	for _, a := range d.CmdArgs {
		key, policy := a.Key, &v.spec.Update
		if rest, ok := strings.CutPrefix(key, "rollback-"); ok {
			key, policy = rest, &v.spec.Rollback
		}
		val := ""
		if len(a.Vals) > 0 {
			val = a.Vals[0]
		}
		number := func(into *int) {
			if _, err := fmt.Sscan(val, into); err != nil {
				t.Fatalf("%s: %v", a.Key, err)
			}
		}
		switch key {
		case "replicas":
			number(&v.spec.Replicas)
		case "parallelism":
			number(&policy.Parallelism)
		case "delay":
			policy.Delay = manifest.Duration(duration(t, val))
		case "monitor":
			policy.Monitor = manifest.Duration(duration(t, val))
		case "deadline":
			policy.Deadline = manifest.Duration(duration(t, val))
		case "order":
			policy.StartFirst = val == "start-first"
		case "action":
			policy.FailureAction = manifest.FailureAction(val)
		case "ratio":
			var percent int
			if _, err := fmt.Sscanf(val, "%d%%", &percent); err != nil {
				t.Fatalf("%s: %v", a.Key, err)
			}
			policy.MaxFailures = percent * 1e4
		case "crash":
			v.fate.crash = duration(t, val)
		case "heals":
			v.fate.heals = duration(t, val)
		case "unhealthy":
			v.fate.unhealthy = true
		case "no-image":
			v.fate.noImage = true
		case "gated":
			v.fate.gated = true
		case "waits":
			v.fate.gated, v.fate.waits = true, true
		case "address":
			v.spec.Networks = []manifest.Attachment{{Network: "s_default", IPv4: "10.9.0.5"}}
		case "stops":
			w.stops = duration(t, val)
		case "slots":
			for _, s := range a.Vals {
				var n int
				if _, err := fmt.Sscan(s, &n); err != nil {
					t.Fatal(err)
				}
				v.fate.slots = append(v.fate.slots, n)
			}
		case "fresh", name:
		default:
			t.Fatalf("unknown argument %s", a.Key)
		}
	}
	w.versions = append(w.versions, v)
	w.cur = v
}

func (w *world) find(serial string) *version {
	at := slices.IndexFunc(w.versions, func(v *version) bool { return v.serial == serial })
	return w.versions[at]
}

func (w *world) sorted() []*task {
	var out []*task
	for _, tk := range w.tasks {
		out = append(out, tk)
	}
	slices.SortFunc(out, func(a, b *task) int { return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.Gen, b.Gen)) })
	return out
}

// input is what Decide would hand to Next.
func (w *world) input() rollout.Input {
	in := rollout.Input{Target: w.cur.spec, Service: w.svc, Hold: w.hold, Now: w.now, CanRollBack: w.svc.Stable != "" && w.svc.Stable != w.svc.Target}
	for n := 1; n <= w.cur.spec.Replicas; n++ {
		in.Slots = append(in.Slots, rollout.Slot{Number: n})
	}
	for _, tk := range w.sorted() {
		tk.Current = tk.Spec == w.svc.Target && tk.Restart >= w.svc.Restart
		if tk.Slot > len(in.Slots) {
			in.Slots = append(in.Slots, rollout.Slot{Number: tk.Slot, Extra: true})
		}
		at := tk.Slot - 1
		if tk.Slot > w.cur.spec.Replicas {
			in.Slots[at].Extra = true
		}
		in.Slots[at].Tasks = append(in.Slots[at].Tasks, tk.Task)
	}
	return in
}

func (w *world) say(format string, args ...any) {
	fmt.Fprintf(&w.out, "%6s  %s\n", w.now.Sub(w.start), fmt.Sprintf(format, args...))
}

// play alternates decisions and the node's work until neither has anything to do.
func (w *world) play(t *testing.T, until time.Time, bounded bool) {
	w.least = len(w.tasks)
	for range 10000 {
		in := w.input()
		out := rollout.Next(in)
		again := rollout.Next(in)
		if fmt.Sprint(out) != fmt.Sprint(again) {
			t.Fatalf("asked twice, two answers:\n%v\n%v", out, again)
		}
		if w.perform(out) {
			continue
		}
		served := 0
		for n := 1; n <= w.cur.spec.Replicas; n++ {
			if slices.ContainsFunc(w.sorted(), func(tk *task) bool {
				return tk.Slot == n && tk.Desired == state.DesiredRun && tk.Report.Ready()
			}) {
				served++
			}
		}
		w.least = min(w.least, served)
		next := out.Wake
		for _, tk := range w.tasks {
			if tk.next != nil && (next.IsZero() || tk.at.Before(next)) {
				next = tk.at
			}
		}
		if next.IsZero() || next.After(until) {
			if bounded {
				w.now = until
			}
			w.say("%s; of %d slots never fewer than %d served", w.step(), w.cur.spec.Replicas, w.least)
			return
		}
		if next.After(w.now) {
			w.now = next
		}
		for _, tk := range w.sorted() {
			if tk.next != nil && !tk.at.After(w.now) {
				f := tk.next
				tk.next = nil
				f()
			}
		}
	}
	t.Fatal("it never comes to rest")
}

func (w *world) step() string {
	if w.svc.Step == state.StepDone {
		return "done on " + w.svc.Target
	}
	out := string(w.svc.Step) + " on " + w.svc.Target
	if w.svc.Step == state.StepPaused {
		out += ": " + w.svc.Reason.Message
	}
	return out
}

// perform does what Decide would with the answer. It says whether anything changed.
func (w *world) perform(out rollout.Output) bool {
	changed := manifest.Hash(out.Service) != manifest.Hash(w.svc)
	before := w.svc.Step
	w.svc = out.Service
	if out.Rollback {
		w.svc.Bad, w.svc.Target, w.svc.Revision = w.svc.Target, w.svc.Stable, w.svc.StableRevision
		w.svc.Step, w.svc.Started, w.svc.Failed = state.StepRollback, w.now, nil
		replicas := w.cur.spec.Replicas
		w.cur = w.find(w.svc.Target)
		w.cur.spec.Replicas = replicas
		w.say("roll back to %s: %s", w.svc.Target, w.svc.Reason.Message)
		return true
	}
	for _, m := range out.Moves {
		switch m.Verb {
		case rollout.Make:
			tk := w.make(m.Slot, m.Ready, m.Why)
			how := "and run"
			if m.Ready {
				how = "ready"
			}
			w.say("make %s (%s) %s: %s", short(tk.ID), tk.Spec, how, m.Why.Message)
		case rollout.Run:
			tk := w.tasks[m.Task]
			tk.Desired, tk.Made = state.DesiredRun, w.now
			w.say("run  %s", short(m.Task))
			if w.fateOf(tk).gated {
				w.gate(tk)
			} else {
				w.begin(tk)
			}
		case rollout.Done:
			w.tasks[m.Task].Done = w.now
			w.say("done %s", short(m.Task))
		case rollout.Stop:
			tk := w.tasks[m.Task]
			tk.Desired, tk.Report.Phase = state.DesiredStop, state.PhaseStopping
			w.say("stop %s: %s", short(m.Task), strings.ReplaceAll(m.Why.Message, "s/web.", ""))
			tk.Since = w.now
			w.after(tk, w.stops, func() { delete(w.tasks, tk.ID) })
		}
	}
	if before != w.svc.Step && !out.Ended {
		w.say("%s", w.svc.Step)
	}
	if out.Ended {
		w.say("ended: %s", w.step())
	}
	return changed || len(out.Moves) > 0
}

func short(id string) string { return strings.TrimPrefix(id, "s/web.") }

func (w *world) after(tk *task, d time.Duration, f func()) { tk.next, tk.at = f, w.now.Add(d) }

func (w *world) make(slot int, ready bool, why state.Reason) *task {
	w.svc.Gen++
	tk := &task{Task: rollout.Task{Task: state.Task{
		ID: state.TaskID("s", "web", slot, w.svc.Gen), Stack: "s", Service: "web", Slot: slot, Gen: w.svc.Gen, Spec: w.cur.serial,
		Restart: w.svc.Restart, Desired: state.DesiredRun, Made: w.now, Why: why,
	}}}
	if ready {
		tk.Desired = state.DesiredReady
	}
	w.tasks[tk.ID] = tk
	tk.Report.Phase = state.PhasePulling
	w.after(tk, step, func() {
		if f := w.fateOf(tk); f.noImage {
			tk.Report.Reason = state.Reason{ID: "image.missing", Message: "image web:" + tk.Spec + " does not exist"}
			tk.Report.Failures = 1
			return
		}
		tk.Report.Phase = state.PhaseCreated
		switch {
		case tk.Desired != state.DesiredRun:
		case w.fateOf(tk).gated:
			w.gate(tk)
		default:
			w.begin(tk)
		}
	})
	return tk
}

// gate has the node say that it may not start a task.
func (w *world) gate(tk *task) {
	tk.Report.Phase = state.PhaseWaiting
	tk.Report.Reason = state.Reason{ID: converge.ReasonDependedOn, Message: "db, which it depends on, stalled"}
	if w.fateOf(tk).waits {
		tk.Report.Reason = state.Reason{ID: converge.ReasonStackOrder, Message: "waits for stack base"}
	}
}

func (w *world) fateOf(tk *task) fate {
	f := w.find(tk.Spec).fate
	if len(f.slots) > 0 && !slices.Contains(f.slots, tk.Slot) {
		return fate{}
	}
	return f
}

// begin has the node start a task that is created.
func (w *world) begin(tk *task) {
	w.after(tk, step, func() {
		f := w.fateOf(tk)
		tk.Report.Phase, tk.Report.Health, tk.Report.Reason = state.PhaseRunning, state.HealthHealthy, state.Reason{}
		if f.unhealthy {
			tk.Report.Health = state.HealthStarting
		}
		if f.crash > 0 && tk.Report.Failures == 0 {
			w.after(tk, f.crash, func() { w.crash(tk, 1, f.heals) })
		}
	})
}

// crash ends a task. Its node starts it again after the time given; 0 = not during this test.
func (w *world) crash(tk *task, code int, again time.Duration) {
	w.say("!    %s exits with code %d", short(tk.ID), code)
	tk.Report.Phase, tk.Report.Health = state.PhaseWaiting, state.HealthUnknown
	tk.Report.Failures++
	tk.Report.ExitCode = code
	tk.Report.Reason = state.Reason{ID: "task.exited", Message: fmt.Sprintf("exited with code %d", code)}
	if again > 0 {
		w.after(tk, again, func() { w.begin(tk) })
	}
}

func (w *world) slots() {
	for _, tk := range w.sorted() {
		what := string(tk.Report.Phase)
		if tk.Report.Ready() {
			what = "serves"
		}
		fmt.Fprintf(&w.out, "%s %s %s\n", short(tk.ID), tk.Spec, what)
	}
}
