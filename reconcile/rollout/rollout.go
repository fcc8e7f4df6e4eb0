// Package rollout is the state machine of one service that moves from one spec to the next.
//
// The flow: Decide gathers where each slot of the service stands ([Slot]) and calls [Next]; it answers with at most one [Move] a slot — make a
// task, let one run, mark one as done, stop one — with the service's new step and outcome, and the time to ask again. Nothing is performed here, and
// asking twice gives the same answer.
//
// The meaning of update_config and rollback_config is Swarm's: parallelism counts slots, delay is slept after each slot, monitor is how long a task is
// watched after it became healthy, and max_failure_ratio is over the slots of the rollout. Three things differ, for the user's good: every wait has a
// deadline; with stop-first the old task stops only when the new one is pulled and created; and without a failure_action a failed rollout goes
// back to the last stable spec where there is one. What waits for a service or stack that stalled, or that policy denies, is paused at once, and goes on when that came
// right.
package rollout

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Task is a task of the service with what its node said of it.
type Task struct {
	state.Task
	Version uint64
	Report  state.Report
	Since   time.Time // log time of the report
	// Current says that the task is of the target: nothing that changed since it was made needs a replacement.
	Current bool
}

// Slot is one place of the service with the tasks in it, oldest first. More than one task means that it is being replaced.
type Slot struct {
	Number int
	Tasks  []Task
	// Extra slots are beyond what the service should have: their tasks are stopped.
	Extra bool
}

// Input is all that Next looks at.
type Input struct {
	Target  manifest.Service
	Service state.Service // as recorded
	Slots   []Slot        // by number
	// Hold says why no running task may be replaced now (a dependency is being updated, a sync window); empty = go on. What is missing is made all the same.
	// With the id [converge.ReasonDependedOn] or [ReasonPolicy] it says that waiting alone does not help.
	Hold state.Reason
	// CanRollBack says that there is a stable spec, other than the target, that may run again.
	CanRollBack bool
	Now         time.Time // log time
}

// Verb is what to do with a slot or a task.
type Verb string

// The verbs.
const (
	Make Verb = "make" // a new task in Slot, to be run at once, or only made ready
	Run  Verb = "run"  // let a ready task run
	Done Verb = "done" // record that the task became ready
	Stop Verb = "stop"
)

// Move is one thing to do.
type Move struct {
	Verb  Verb
	Slot  int
	Task  string // Run, Done, Stop
	Ready bool   // Make: pull and create only
	Why   state.Reason
}

// Output is what follows from an Input.
type Output struct {
	Moves   []Move
	Service state.Service // as it should be recorded now; equal to the input's when nothing changed
	// Rollback asks for the stable spec to become the target; the reason is in Service.Reason.
	Rollback bool
	// Ended says that the rollout ended now: Service.Step is StepDone or StepPaused.
	Ended bool
	Wake  time.Time // when time alone changes the answer; zero = never
}

// Reasons that rollouts give. `gitopsctl explain` has a paragraph for each.
const (
	ReasonMissing    = "task.missing"
	ReasonUpdate     = "task.update"
	ReasonScale      = "task.scale"
	ReasonSuperseded = "task.superseded"
	ReasonRestart    = "task.restart"
	ReasonFailed     = "rollout.failed"
	ReasonDeadline   = "rollout.deadline"
	ReasonPaused     = "rollout.paused"
	ReasonPolicy     = "policy.denied"
)

// Next says what to do now.
func Next(in Input) Output {
	in.Service = resumed(in)
	m := machine{in: in, out: Output{Service: in.Service}, policy: in.Target.Update}
	if in.Service.Step == state.StepRollback {
		m.policy = in.Target.Rollback
	}
	if in.Target.FixedAddress() {
		m.policy.StartFirst = false
	}
	m.judge()
	if m.out.Rollback {
		return m.out
	}
	m.move()
	m.finish()
	return m.out
}

// outside says whether a reason is one that only a change elsewhere can take away.
func outside(why state.Reason) bool {
	return why.ID == converge.ReasonDependedOn || why.ID == ReasonPolicy
}

// resumed is the service as it is now that what it depends on came right, or policy allows it, where it was paused for that.
func resumed(in Input) state.Service {
	svc := in.Service
	if svc.Step != state.StepPaused || !outside(svc.Reason) || outside(in.Hold) || gated(in.Slots, converge.Gated).ID != "" {
		return svc
	}
	svc.Step = state.StepUpdating
	if svc.Bad != "" {
		svc.Step = state.StepRollback
	}
	svc.Started, svc.Failed, svc.Reason = in.Now, nil, state.Reason{}
	return svc
}

// gated says why the node of a new task does not start it, where that is a reason of that kind.
func gated(slots []Slot, kind func(state.Reason) bool) state.Reason {
	for _, slot := range slots {
		for _, t := range slot.Tasks {
			if t.Current && t.Desired == state.DesiredRun && t.Report.Phase == state.PhaseWaiting && kind(t.Report.Reason) {
				return t.Report.Reason
			}
		}
	}
	return state.Reason{}
}

type machine struct {
	in     Input
	out    Output
	policy manifest.UpdatePolicy

	busy   int // slots that are being replaced, or were less than the delay ago
	unmade int // slots that are not of the target yet
	unwell int // slots whose task is not ready
	lost   int // slots whose new task failed while the old one is still there
	broken int // slots whose only task failed, or was ready once and is not ready by its deadline: nobody waits for them
}

func (m *machine) wake(at time.Time) {
	if m.out.Wake.IsZero() || at.Before(m.out.Wake) {
		m.out.Wake = at
	}
}

func (m *machine) add(mv Move) { m.out.Moves = append(m.out.Moves, mv) }

// active says whether a rollout is under way.
func (m *machine) active() bool {
	s := m.out.Service.Step
	return s == state.StepUpdating || s == state.StepMonitoring || s == state.StepRollback
}

// judge finds the tasks of this rollout that failed and what that means for it.
func (m *machine) judge() {
	svc := &m.out.Service
	if !m.active() {
		return
	}
	total := 0
	for _, slot := range m.in.Slots {
		if slot.Extra {
			continue
		}
		total++
		for _, t := range slot.Tasks {
			if !t.Current || t.Desired == state.DesiredStop || slices.Contains(svc.Failed, t.ID) {
				continue
			}
			if why, bad := m.failed(t); bad {
				svc.Failed = slices.Clone(svc.Failed)
				at, _ := slices.BinarySearch(svc.Failed, t.ID)
				svc.Failed = slices.Insert(svc.Failed, at, t.ID)
				svc.Reason = why
			}
		}
	}
	held := m.held()
	if len(svc.Failed) == 0 || total == 0 || !held && int64(len(svc.Failed))*1e6 <= int64(m.policy.MaxFailures)*int64(total) {
		return
	}
	action := m.action()
	if held && action != manifest.ActionRollback {
		action = manifest.ActionPause
		svc.Reason.ID = converge.ReasonDependedOn // so that it goes on when that came right
	}
	switch action {
	case manifest.ActionContinue:
	case manifest.ActionRollback:
		m.out.Rollback = true
	default:
		if svc.Step != state.StepPaused {
			svc.Step = state.StepPaused
			m.out.Ended = true
		}
	}
}

// held says whether a task that counts as failed did not even start, because of what it depends on. The tasks of the slots that are still to come would wait for the same:
// no policy goes on to those, and takes from people what still serves them.
func (m *machine) held() bool {
	return slices.ContainsFunc(m.in.Slots, func(slot Slot) bool {
		return !slot.Extra && slices.ContainsFunc(slot.Tasks, func(t Task) bool {
			return t.Current && t.Desired == state.DesiredRun && slices.Contains(m.out.Service.Failed, t.ID) &&
				t.Report.Phase == state.PhaseWaiting && t.Report.Failures == 0 && converge.Gated(t.Report.Reason)
		})
	})
}

func (m *machine) action() manifest.FailureAction {
	a := m.policy.FailureAction
	if m.in.Service.Step == state.StepRollback && a == manifest.ActionRollback {
		a = "" // a rollback is never rolled back
	}
	switch {
	case a == manifest.ActionRollback && !m.in.CanRollBack:
		return manifest.ActionPause
	case a != "":
		return a
	case m.in.CanRollBack && m.in.Service.Step != state.StepRollback:
		return manifest.ActionRollback
	}
	return manifest.ActionPause
}

// adopted says whether the task was there before this rollout began: what changed was set on it in place.
func (m *machine) adopted(t *Task) bool { return t.Made.Before(m.in.Service.Started) }

// from is when a task's time in this rollout began: at the moment given, or with the rollout.
func (m *machine) from(t *Task, at time.Time) time.Time {
	if m.adopted(t) && at.Before(m.in.Service.Started) {
		return m.in.Service.Started
	}
	return at
}

// due is when a task has to be ready. The time of a task that was only made ready begins anew when it is told to run: until then the slot was another's.
func (m *machine) due(t *Task) time.Time { return m.from(t, t.Made).Add(m.policy.Deadline.Std()) }

// failed says whether a task of this rollout counts as failed: it ended or turned unhealthy before it was ready or while it was watched, or it
// was not ready by the deadline.
func (m *machine) failed(t Task) (state.Reason, bool) {
	if t.Done.IsZero() || m.in.Now.Before(m.from(&t, t.Done).Add(m.policy.Monitor.Std())) {
		bad := t.Report.Failures > 0
		if m.adopted(&t) { // what it did before it was changed in place is not this rollout's doing
			bad = t.Report.Health == state.HealthUnhealthy
		}
		if bad || t.Report.Phase == state.PhaseFailed {
			why := t.Report.Reason
			if why.Message == "" {
				why = state.Reason{ID: ReasonFailed, Message: fmt.Sprintf("exit code %d", t.Report.ExitCode)}
			}
			return state.Reason{ID: why.ID, Message: fmt.Sprintf("%s: %s", t.ID, why.Message)}, true
		}
	}
	if !t.Done.IsZero() {
		return state.Reason{}, false
	}
	if t.Desired == state.DesiredRun && !t.Report.Ready() {
		end := m.due(&t)
		if !m.in.Now.Before(end) {
			msg := fmt.Sprintf("%s is not healthy %s after it was made", t.ID, m.policy.Deadline)
			if r := t.Report.Reason.Message; r != "" {
				msg += ": " + r
			}
			return state.Reason{ID: ReasonDeadline, Message: msg}, true
		}
		m.wake(end)
	}
	return state.Reason{}, false
}

// move goes over the slots: those that lack a task first, then those whose task is not ready, then the rest, each by number.
func (m *machine) move() {
	var waiting []Slot
	for _, slot := range m.in.Slots {
		if slot.Extra {
			m.drop(slot)
			continue
		}
		cur, old := split(slot.Tasks)
		if cur != nil && m.settle(slot, cur, old) {
			continue
		}
		if cur != nil {
			if slices.Contains(m.out.Service.Failed, cur.ID) {
				m.lost++ // the batch goes on without it; it may still come right
			} else {
				m.busy++
			}
			m.progress(slot, cur, old)
			continue
		}
		m.unmade++
		waiting = append(waiting, slot)
	}
	slices.SortStableFunc(waiting, func(a, b Slot) int { return rank(a) - rank(b) })
	for _, slot := range waiting {
		m.replace(slot)
	}
}

// rank puts slots that serve nobody before those that do.
func rank(s Slot) int {
	_, old := split(s.Tasks)
	switch {
	case len(old) == 0:
		return 0
	case !slices.ContainsFunc(old, func(t *Task) bool { return t.Report.Ready() }):
		return 1
	}
	return 2
}

// split finds the newest task of the target that is to live, and all others that are not told to stop yet.
func split(tasks []Task) (cur *Task, old []*Task) {
	for i := range tasks {
		t := &tasks[i]
		if t.Desired == state.DesiredStop {
			continue
		}
		if t.Current {
			if cur != nil {
				old = append(old, cur)
			}
			cur = t
			continue
		}
		old = append(old, t)
	}
	return cur, old
}

// leaving is a task of the slot that is still on its way out; nil = there is none.
func leaving(tasks []Task) *Task {
	at := slices.IndexFunc(tasks, func(t Task) bool { return t.Desired == state.DesiredStop && t.Report.Phase != state.PhaseGone })
	if at < 0 {
		return nil
	}
	return &tasks[at]
}

func (m *machine) drop(slot Slot) {
	for _, t := range slot.Tasks {
		if t.Desired != state.DesiredStop {
			m.add(Move{Verb: Stop, Slot: slot.Number, Task: t.ID, Why: state.Reason{ID: ReasonScale, Message: fmt.Sprintf("the service has %d replicas", m.in.Target.Replicas)}})
		}
	}
}

// settle handles a slot that has a running task of the target and nothing older. It says whether the slot needs nothing more.
func (m *machine) settle(slot Slot, cur *Task, old []*Task) bool {
	if len(old) > 0 {
		return false
	}
	if cur.Desired != state.DesiredRun { // it waits for a task that leaves: nobody serves in this slot
		m.unwell++
		return false
	}
	failed := slices.Contains(m.out.Service.Failed, cur.ID)
	switch {
	case cur.Report.Ready() && cur.Done.IsZero():
		m.add(Move{Verb: Done, Slot: slot.Number, Task: cur.ID})
		fallthrough
	case cur.Report.Ready():
		m.rest(cur)
		return true
	case !cur.Done.IsZero() || failed:
		// It was ready once, or counts as failed: the node goes on with it by its restart policy; the rollout does not wait for it.
		m.unwell++
		if end := m.due(cur); failed || !m.in.Now.Before(end) {
			m.broken++
			m.blame(cur)
		} else if m.active() {
			m.wake(end)
		}
		return true
	}
	m.unwell++
	return false
}

// blame names a task that was ready once as the reason why a rollout does not end, where there is none yet.
func (m *machine) blame(t *Task) {
	if svc := &m.out.Service; m.active() && svc.Reason.ID == "" {
		svc.Reason = state.Reason{ID: ReasonDeadline, Message: fmt.Sprintf("%s was healthy, but is not any more: %s", t.ID, t.Report.Reason.Message)}
	}
}

// rest counts a slot as busy for the delay after it was done, and keeps watching it.
func (m *machine) rest(t *Task) {
	done := t.Done
	if done.IsZero() {
		done = m.in.Now
	}
	if !m.active() {
		return
	}
	if d := m.policy.Delay.Std(); d > 0 && !t.Made.Before(m.in.Service.Started) && m.in.Now.Before(done.Add(d)) {
		m.busy++
		m.wake(done.Add(d))
	}
}

// progress carries the replacement of a slot on: the new task exists.
func (m *machine) progress(slot Slot, cur *Task, old []*Task) {
	switch {
	case cur.Desired == state.DesiredReady:
		if cur.Report.Phase != state.PhaseCreated {
			m.expire(cur, m.due(cur), "could not be made ready within %s: %s", m.policy.Deadline, cur.Report.Reason.Message)
			return // the old task goes on until the new one could start
		}
		if len(old) > 0 {
			m.stop(slot, old, state.Reason{ID: ReasonUpdate, Message: "replaced by " + cur.ID})
			return
		}
		last := leaving(slot.Tasks)
		switch {
		case last == nil:
			m.add(Move{Verb: Run, Slot: slot.Number, Task: cur.ID})
		case last.Report.Phase == state.PhaseStopping:
			end := last.Since.Add(m.in.Target.StopGrace.Std() + m.policy.Deadline.Std())
			m.expire(cur, end, "waits for %s, which does not stop: %s", last.ID, last.Report.Reason.Message)
		}
	case cur.Report.Ready() && len(old) > 0:
		m.stop(slot, old, state.Reason{ID: ReasonUpdate, Message: "replaced by " + cur.ID})
	default:
		m.stop(slot, dead(old), state.Reason{ID: ReasonSuperseded, Message: "never became ready; replaced by " + cur.ID})
	}
}

// expire fails a replacement that can't begin to run by a time: the rollout would wait for ever while the old task serves, or does not go.
func (m *machine) expire(t *Task, end time.Time, format string, args ...any) {
	svc := &m.out.Service
	if m.in.Now.Before(end) {
		m.wake(end)
		return
	}
	if m.active() && !slices.Contains(svc.Failed, t.ID) {
		svc.Failed = append(slices.Clone(svc.Failed), t.ID)
		slices.Sort(svc.Failed)
		svc.Reason = state.Reason{ID: ReasonDeadline, Message: t.ID + " " + strings.TrimSuffix(fmt.Sprintf(format, args...), ": ")}
		m.wake(m.in.Now)
	}
}

func (m *machine) stop(slot Slot, tasks []*Task, why state.Reason) {
	for _, t := range tasks {
		m.add(Move{Verb: Stop, Slot: slot.Number, Task: t.ID, Why: why})
	}
}

// replace begins with a slot that has no task of the target, as far as the policy allows.
func (m *machine) replace(slot Slot) {
	_, old := split(slot.Tasks)
	if len(old) == 0 {
		why := state.Reason{ID: ReasonMissing, Message: "the slot has no task"}
		m.add(Move{Verb: Make, Slot: slot.Number, Ready: leaving(slot.Tasks) != nil, Why: why})
		m.busy++
		return
	}
	if m.in.Hold.ID != "" || m.out.Service.Step == state.StepPaused || m.out.Service.Step == state.StepDone {
		return
	}
	if p := m.policy.Parallelism; p > 0 && m.busy >= p {
		return
	}
	m.busy++
	m.add(Move{Verb: Make, Slot: slot.Number, Ready: !m.policy.StartFirst, Why: state.Reason{ID: ReasonUpdate, Message: "replaces " + old[len(old)-1].ID}})
	m.stop(slot, dead(old), state.Reason{ID: ReasonSuperseded, Message: "never became ready"})
	m.stop(slot, spare(old), state.Reason{ID: ReasonSuperseded, Message: "another task of the slot serves until it is replaced"})
}

// spare are the tasks that were ready once beside the one that serves best: where one rollout came in the middle of another.
func spare(tasks []*Task) []*Task {
	var keep *Task
	var out []*Task
	for _, t := range tasks {
		if t.Report.Ready() {
			keep = t
		}
	}
	for _, t := range tasks {
		switch {
		case t.Done.IsZero() && !t.Report.Ready(): // dead
		case keep == nil:
			keep = t
		case t != keep:
			out = append(out, t)
		}
	}
	return out
}

// dead are the tasks that never became ready: they serve nobody and are in the way.
func dead(tasks []*Task) []*Task {
	var out []*Task
	for _, t := range tasks {
		if !t.Report.Ready() && t.Done.IsZero() {
			out = append(out, t)
		}
	}
	return out
}

// stuck says why the rollout can't go on: what the service depends on stalled, or policy denies the rest of it; what was begun is ended first then.
func (m *machine) stuck() state.Reason {
	begun := m.in.Hold.ID == ReasonPolicy && (m.busy > 0 || len(m.out.Moves) > 0)
	if outside(m.in.Hold) && m.unmade > 0 && !begun {
		return m.in.Hold
	}
	return gated(m.in.Slots, outside)
}

// finish moves the service's step on.
func (m *machine) finish() {
	svc := &m.out.Service
	if !m.active() {
		m.recover()
		return
	}
	if why := m.stuck(); why.ID != "" {
		svc.Step, svc.Reason = state.StepPaused, why
		m.out.Ended = true
		return
	}
	lost := m.lost > 0 || m.broken > 0 && m.broken == m.unwell && !m.inFlight()
	if m.unmade == 0 && lost && m.busy == 0 && len(m.out.Moves) == 0 {
		svc.Step = state.StepPaused
		m.out.Ended = true
		return
	}
	if m.unmade > 0 || m.unwell > 0 || len(m.out.Moves) > 0 || m.inFlight() {
		if svc.Step == state.StepMonitoring {
			svc.Step = state.StepUpdating
		}
		return
	}
	var watched time.Time
	for _, slot := range m.in.Slots {
		for _, t := range slot.Tasks {
			if end := m.from(&t, t.Done).Add(m.policy.Monitor.Std()); end.After(watched) {
				watched = end
			}
		}
	}
	if m.in.Now.Before(watched) {
		if svc.Step == state.StepUpdating {
			svc.Step = state.StepMonitoring
		}
		m.wake(watched)
		return
	}
	m.done()
}

// recover ends a paused rollout that became well after all.
func (m *machine) recover() {
	if m.out.Service.Step != state.StepPaused || m.unmade > 0 || m.unwell > 0 || len(m.out.Moves) > 0 || m.inFlight() {
		return
	}
	for _, slot := range m.in.Slots { // what crashes again and again is well for a moment each time
		for _, t := range slot.Tasks {
			if end := t.Since.Add(m.policy.Monitor.Std()); m.in.Now.Before(end) {
				m.wake(end)
				return
			}
		}
	}
	m.done()
}

func (m *machine) done() {
	svc := &m.out.Service
	if svc.Bad == "" { // else it says why the bad spec was left, as long as Git asks for that
		svc.Reason = state.Reason{}
	}
	svc.Step = state.StepDone
	svc.Failed = nil
	svc.Stable, svc.StableRevision = svc.Target, svc.Revision
	m.out.Ended = true
}

// inFlight says whether any slot still holds more than its one task.
func (m *machine) inFlight() bool {
	for _, slot := range m.in.Slots {
		live := 0
		for _, t := range slot.Tasks {
			if t.Report.Phase != state.PhaseGone || t.Desired != state.DesiredStop {
				live++
			}
		}
		if slot.Extra && live > 0 || live > 1 {
			return true
		}
	}
	return false
}
