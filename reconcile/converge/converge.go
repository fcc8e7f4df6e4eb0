// Package converge is the node's side of the work: from what is assigned to this node and what runs on it, to what to do next.
//
// The flow: the worker gathers its assignments from the node's own replica ([Assignment]), its containers from the runtime ([Container]) and what it
// remembers of each task ([Memory]), and calls [Next]. The answer is at most one [Action] a task, what to report of each task, and the time to ask again.
// A task goes pull, create, start, run; ends, backs off and is created anew as the next attempt; or is removed. One transition a call: the worker
// performs it, observes, and asks again.
//
// Everything that must survive the agent is in the containers' labels (attempt, streak, failures) or in the last report; memory holds only
// what may be forgotten.
package converge

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Limits of the restart backoff. The first restart is at once; the waits after it double from restart_policy.delay.
const (
	BackoffCap = 5 * time.Minute
	StreakEnds = 10 * time.Minute // a run of this length forgives all failures before it
)

// Assignment is a task of this node with its spec.
type Assignment struct {
	state.Task
	Spec manifest.Service
	Last state.Report // what was reported last
	// Gate says why the task may not start yet; empty = it may.
	Gate state.Reason
	// Report says that drift is only told, not healed. Ignore lists field paths (of a container: resources.memory) that are neither.
	Report bool
	Ignore []string
}

// Container is one container of a task as the runtime sees it, with its labels read.
type Container struct {
	ID       string
	Task     string
	Name     string // of the container in its spec
	Attempt  int
	Streak   int // restarts in a row before this attempt
	Failures int // ends that were failures before this attempt
	Digest   string
	Phase    ContainerPhase
	ExitCode int
	OOM      bool
	Started  time.Time
	Exited   time.Time
	Limits   manifest.Resources
}

// ContainerPhase is where a container is in its life.
type ContainerPhase string

// The phases of a container.
const (
	Created ContainerPhase = "created"
	Running ContainerPhase = "running"
	Paused  ContainerPhase = "paused"
	Exited  ContainerPhase = "exited"
	// Lost: the runtime knows the container, but nothing of it runs and nobody saw it end: the machine was restarted.
	Lost ContainerPhase = "lost"
)

// Memory is what the worker remembers of a task.
type Memory struct {
	Busy    bool              // an action of it is being performed
	Images  map[string]string // container -> digest, once pulled
	Health  state.Health      // of the attempt that runs, from its checks; Unhealthy asks for a restart
	Why     string            // what the last failed check said
	Trouble *Trouble          // the last action failed
	Killed  int               // attempt that was stopped for being unhealthy
	Network bool              // the task's network namespace is there
	Ended   state.Reason      // how the attempt before ended, as told last
	Ends    []time.Time       // when attempts ended by themselves, for restart_policy.window
}

// Trouble is an action that failed.
type Trouble struct {
	Reason    state.Reason
	Count     int
	At        time.Time
	Permanent bool // trying again with the same spec gives the same failure
	Fault     bool // the spec is at fault, not its surroundings: it counts as a failure of the task
}

// Verb is what to do.
type Verb string

// The verbs.
const (
	Pull   Verb = "pull"   // bring the images of the task
	Create Verb = "create" // network, mounts, containers: all of the next attempt, after removing those of earlier ones
	Start  Verb = "start"  // run the created containers, in order
	Kill   Verb = "kill"   // stop the containers of an unhealthy attempt; it is then restarted like any that ended
	Remove Verb = "remove" // take it out of names and ports, drain, stop, remove everything of it
	Limit  Verb = "limit"  // set limits as the spec has them
	Resume Verb = "resume" // go on after a pause by hand
	Reap   Verb = "reap"   // remove what is left of a task that is not assigned here
)

// Action is one thing to do.
type Action struct {
	Verb       Verb
	Task       string
	Attempt    int
	Streak     int
	Failures   int
	Containers []string // ids: Kill, Remove, Limit, Resume, Reap and what Create removes first
}

// Input is all that Next looks at.
type Input struct {
	Node       string
	Assigned   []Assignment // sorted by id
	Containers []Container
	Memory     map[string]Memory
	Settled    bool      // the node's replica has all that was decided; until then, what looks unassigned may be new
	Now        time.Time // the node's own clock
}

// Output is what follows.
type Output struct {
	Actions []Action
	Reports map[string]state.Report // of each assigned task
	Wake    time.Time               // zero = nothing changes with time alone
}

// Reasons that nodes give.
const (
	ReasonExit      = "task.exited"
	ReasonOOM       = "task.oom"
	ReasonUnhealthy = "task.unhealthy"
	ReasonBackoff   = "task.backoff"
	ReasonAttempts  = "task.attempts"
	ReasonLost      = "task.lost"
	ReasonRecovered = "task.recovered"
)

// Next says what to do now.
func Next(in Input) Output {
	out := Output{Reports: make(map[string]state.Report, len(in.Assigned))}
	byTask := map[string][]Container{}
	for _, c := range in.Containers {
		byTask[c.Task] = append(byTask[c.Task], c)
	}
	assigned := map[string]bool{}
	for i := range in.Assigned {
		a := &in.Assigned[i]
		assigned[a.ID] = true
		n := node{in: &in, out: &out, a: a, mem: in.Memory[a.ID], all: byTask[a.ID]}
		rep := n.next()
		rep.Node = in.Node
		out.Reports[a.ID] = rep
	}
	out.reap(in, assigned)
	return out
}

// wake asks to be asked again at that time, or earlier.
func (out *Output) wake(at time.Time) {
	if out.Wake.IsZero() || at.Before(out.Wake) {
		out.Wake = at
	}
}

// reap removes what is there of tasks that are not assigned here: containers and network namespaces. Nothing is taken for that before the node knows all that
// was decided.
func (out *Output) reap(in Input, assigned map[string]bool) {
	if !in.Settled {
		return
	}
	found := map[string][]string{}
	for _, c := range in.Containers {
		found[c.Task] = append(found[c.Task], c.ID)
	}
	for _, task := range slices.Sorted(maps.Keys(in.Memory)) {
		if in.Memory[task].Network && found[task] == nil {
			found[task] = []string{}
		}
	}
	for _, task := range slices.Sorted(maps.Keys(found)) {
		m := in.Memory[task]
		if assigned[task] || m.Busy {
			continue
		}
		if t := m.Trouble; t != nil {
			if at := t.At.Add(backoff(task, t.Count, time.Second)); in.Now.Before(at) {
				out.wake(at)
				continue
			}
		}
		out.Actions = append(out.Actions, Action{Verb: Reap, Task: task, Containers: found[task]})
	}
}

// node looks at one task.
type node struct {
	in  *Input
	out *Output
	a   *Assignment
	mem Memory
	all []Container // every container of the task, any attempt
	cur []Container // those of the newest attempt
}

func (n *node) do(v Verb, a Action) {
	a.Verb, a.Task = v, n.a.ID
	n.out.Actions = append(n.out.Actions, a)
}

func (n *node) wake(at time.Time) { n.out.wake(at) }

func ids(cs []Container) []string {
	var out []string
	for _, c := range cs {
		out = append(out, c.ID)
	}
	return out
}

// newest are the containers of the newest attempt, and its number; 0 = there is none.
func newest(all []Container) (cur []Container, attempt int) {
	for _, c := range all {
		attempt = max(attempt, c.Attempt)
	}
	for _, c := range all {
		if c.Attempt == attempt {
			cur = append(cur, c)
		}
	}
	return cur, attempt
}

func (n *node) next() state.Report {
	rep := state.Report{Ended: n.ending(), Attempt: n.a.Last.Attempt, Images: n.images(), Failures: n.a.Last.Failures, ExitCode: n.a.Last.ExitCode}
	var attempt int
	n.cur, attempt = newest(n.all)
	if attempt > 0 {
		rep.Attempt, rep.Failures = attempt, max(rep.Failures, n.cur[0].Failures)
	}
	if n.mem.Busy { // what is seen now is half of something: what was told last stands
		return n.busy()
	}
	if n.a.Desired == state.DesiredStop {
		return n.stop(rep)
	}
	if t := n.mem.Trouble; t != nil && !n.up() {
		if done := n.trouble(&rep, t); done {
			return rep
		}
	}
	switch {
	case len(n.cur) == 0:
		return n.absent(rep)
	case n.has(Lost):
		rep.Phase, rep.Reason = state.PhaseWaiting, state.Reason{ID: ReasonLost, Message: "it was not running any more when the node came up"}
		if n.ended(&rep) {
			return rep
		}
		return n.create(rep, attempt+1, n.cur[0].Streak, n.cur[0].Failures)
	case n.ends():
		return n.restart(rep)
	case n.has(Created) || len(n.cur) < len(n.a.Spec.Containers):
		return n.start(rep)
	}
	return n.running(rep)
}

// ending is how the attempt before this one ended.
func (n *node) ending() state.Reason {
	if n.mem.Ended.ID != "" {
		return n.mem.Ended
	}
	return n.a.Last.Ended
}

// busy is the report of a task while an action of it is under way.
func (n *node) busy() state.Report {
	rep := n.a.Last
	switch {
	case n.a.Desired == state.DesiredStop:
		rep.Phase = state.PhaseStopping
	case rep.Phase == state.PhasePending:
		rep.Phase = state.PhasePulling
	}
	return rep
}

func (n *node) images() map[string]string {
	if len(n.mem.Images) > 0 {
		return n.mem.Images
	}
	if len(n.a.Last.Images) > 0 {
		return n.a.Last.Images
	}
	return n.a.Images
}

func (n *node) has(p ContainerPhase) bool {
	return slices.ContainsFunc(n.cur, func(c Container) bool { return c.Phase == p })
}

// up says whether all containers of the task run, or would but for a pause.
func (n *node) up() bool {
	for _, c := range n.cur {
		if c.Phase != Running && c.Phase != Paused {
			return false
		}
	}
	return len(n.cur) > 0 && len(n.cur) == len(n.a.Spec.Containers)
}

// ends says whether the attempt is over: one of its containers ended.
func (n *node) ends() bool { return n.has(Exited) }

func (n *node) stop(rep state.Report) state.Report {
	if len(n.all) == 0 && !n.mem.Network {
		rep.Phase = state.PhaseGone
		return rep
	}
	rep.Phase = state.PhaseStopping
	if t := n.mem.Trouble; t != nil {
		rep.Reason = t.Reason
		tried := n.a.Last.Phase == state.PhaseStopping // what failed before the task was told to stop is no reason to wait
		if at := t.At.Add(backoff(n.a.ID, t.Count, time.Second)); tried && n.in.Now.Before(at) {
			n.wake(at)
			return rep
		}
	}
	n.do(Remove, Action{Containers: ids(n.all), Attempt: rep.Attempt})
	return rep
}

// trouble handles a task whose last action failed. It says whether to leave it alone now.
func (n *node) trouble(rep *state.Report, t *Trouble) bool {
	rep.Reason, rep.Phase = t.Reason, state.PhaseWaiting
	if len(n.cur) == 0 && len(n.images()) == 0 {
		rep.Phase = state.PhasePulling
	}
	if t.Fault {
		rep.Failures = max(rep.Failures, n.a.Last.Failures, 1)
	}
	if t.Permanent {
		rep.Phase = state.PhaseFailed
		return true
	}
	rep.Retry = true
	if at := t.At.Add(backoff(n.a.ID, t.Count, time.Second)); n.in.Now.Before(at) {
		n.wake(at)
		return true
	}
	return false
}

// ended keeps a task that had come to its end where it was.
func (n *node) ended(rep *state.Report) bool {
	if p := n.a.Last.Phase; p == state.PhaseComplete || p == state.PhaseFailed {
		rep.Phase, rep.Reason, rep.Health = p, n.a.Last.Reason, n.a.Last.Health
		return true
	}
	return false
}

// absent handles a task that has no container.
func (n *node) absent(rep state.Report) state.Report {
	if n.ended(&rep) {
		return rep
	}
	if n.a.Report && n.a.Last.Phase == state.PhaseRunning {
		rep.Phase = state.PhaseRunning
		rep.Health, rep.Reason = state.HealthUnhealthy, state.Reason{ID: ReasonDriftMissing, Message: "its container was removed by somebody"}
		rep.Drift = n.compare()
		return rep
	}
	if len(n.images()) < len(n.a.Spec.Containers) {
		if rep.Reason.ID == "" {
			rep.Phase = state.PhasePulling
		}
		n.do(Pull, Action{})
		return rep
	}
	return n.create(rep, n.a.Last.Attempt+1, 0, n.a.Last.Failures)
}

// create begins an attempt, unless the task has to wait for another: what waits needs no container, but having one saves time at the start.
func (n *node) create(rep state.Report, attempt, streak, failures int) state.Report {
	if rep.Phase == "" {
		rep.Phase = state.PhasePulling
		if n.a.Last.Phase == state.PhaseCreated {
			rep.Phase = state.PhaseCreated // it was told to be ready, without a container yet
		}
	}
	if len(n.images()) < len(n.a.Spec.Containers) {
		n.do(Pull, Action{})
		return rep
	}
	if n.a.Desired != state.DesiredRun && n.a.Spec.FixedAddress() {
		rep.Phase = state.PhaseCreated // all but its network: the address is the old task's until that is gone
		return rep
	}
	n.do(Create, Action{Attempt: attempt, Streak: streak, Failures: failures, Containers: ids(n.all)})
	return rep
}

// start handles an attempt whose containers are there and do not run.
func (n *node) start(rep state.Report) state.Report {
	if len(n.cur) < len(n.a.Spec.Containers) { // a create that was cut off
		return n.create(rep, n.cur[0].Attempt, n.cur[0].Streak, n.cur[0].Failures)
	}
	rep.Phase = state.PhaseCreated
	if n.a.Desired != state.DesiredRun {
		return rep
	}
	if n.a.Gate.ID != "" {
		rep.Phase, rep.Reason = state.PhaseWaiting, n.a.Gate
		return rep
	}
	n.do(Start, Action{Attempt: n.cur[0].Attempt, Containers: ids(n.cur)})
	return rep
}

// restart handles an attempt that ended: it is over for good, or the next one begins after the backoff.
func (n *node) restart(rep state.Report) state.Report {
	c := n.first()
	killed := n.mem.Killed == c.Attempt && c.Attempt > 0
	failure := c.ExitCode != 0 || c.OOM || killed
	rep.ExitCode, rep.Reason = c.ExitCode, why(c, killed, n.mem.Why)
	rep.Ended = rep.Reason
	if failure {
		rep.Failures = max(rep.Failures, c.Failures+1)
	}
	again := false
	switch n.a.Spec.Restart.Condition {
	case manifest.RestartAny:
		again = !n.a.Spec.Job() || failure
	case manifest.RestartOnFailure:
		again = failure
	}
	if !again {
		rep.Phase = state.PhaseComplete
		if failure {
			rep.Phase = state.PhaseFailed
		} else {
			rep.Reason, rep.Health = state.Reason{}, state.HealthHealthy
		}
		return rep
	}
	if used, of := n.attempts(), n.a.Spec.Restart.MaxAttempts; of > 0 && used >= of {
		rep.Phase = state.PhaseFailed
		rep.Reason = state.Reason{ID: ReasonAttempts, Message: fmt.Sprintf("%s; restarted %d times, as many as restart_policy.max_attempts allows", rep.Reason.Message, of)}
		return rep
	}
	streak := c.Streak + 1
	if !c.Started.IsZero() && c.Exited.Sub(c.Started) >= StreakEnds {
		streak = 1
	}
	rep.Phase, rep.Retry = state.PhaseWaiting, true
	if wait := backoff(n.a.ID, streak-1, n.a.Spec.Restart.Delay.Std()); streak > 1 {
		if at := c.Exited.Add(wait); n.in.Now.Before(at) {
			rep.Reason.Message += fmt.Sprintf("; restart %d waits %s", streak, wait.Round(time.Second/10))
			n.wake(at)
			return rep
		}
	}
	return n.create(rep, c.Attempt+1, streak, rep.Failures)
}

// first is the container whose end ended the attempt: the one that ended first.
func (n *node) first() Container {
	var first Container
	for _, c := range n.cur {
		if c.Phase == Exited && (first.ID == "" || c.Exited.Before(first.Exited)) {
			first = c
		}
	}
	return first
}

// attempts counts the restarts that max_attempts is about: all after a failure, and those of what ends well again and again, or what ended within the window.
// A start after a reboot, a drift or a removal by hand is none.
func (n *node) attempts() int {
	w := n.a.Spec.Restart.Window.Std()
	if w == 0 {
		return max(n.cur[0].Failures, n.cur[0].Streak)
	}
	used := 0
	for _, end := range n.mem.Ends {
		if n.in.Now.Sub(end) < w {
			used++
		}
	}
	return max(used-1, 0)
}

func why(c Container, killed bool, said string) state.Reason {
	switch {
	case c.OOM:
		return state.Reason{ID: ReasonOOM, Message: "ran out of memory: raise deploy.resources.limits.memory, or find the leak"}
	case killed:
		msg := "was stopped for failing its health check"
		if said != "" {
			msg += ": " + said
		}
		return state.Reason{ID: ReasonUnhealthy, Message: msg}
	}
	return state.Reason{ID: ReasonExit, Message: fmt.Sprintf("exited with code %d", c.ExitCode)}
}

// running handles an attempt whose containers all run.
func (n *node) running(rep state.Report) state.Report {
	rep.Phase, rep.Health = state.PhaseRunning, n.mem.Health
	if rep.Health == state.HealthUnknown {
		rep.Health = state.HealthStarting
	}
	rep.Drift = n.drift()
	if rep.Health == state.HealthUnhealthy {
		rep.Reason = state.Reason{ID: ReasonUnhealthy, Message: "fails its health check"}
		if n.mem.Why != "" {
			rep.Reason.Message += ": " + n.mem.Why
		}
		// What is paused can't answer: to go on is what it needs, or, where drift is only told, to be left alone.
		if n.a.Spec.Restart.Condition != manifest.RestartNever && !n.has(Paused) && !n.resting() {
			n.do(Kill, Action{Attempt: n.cur[0].Attempt, Containers: ids(n.cur)})
			return rep
		}
	}
	if len(rep.Drift) > 0 && !n.a.Report && !n.resting() {
		n.heal(rep.Drift)
	}
	return rep
}

// resting says whether the last action on a running task failed and it is too early to try again. The task runs on meanwhile.
func (n *node) resting() bool {
	t := n.mem.Trouble
	if t == nil {
		return false
	}
	at := t.At.Add(backoff(n.a.ID, t.Count, time.Second))
	if n.in.Now.Before(at) {
		n.wake(at)
		return true
	}
	return false
}

// heal begins to set right what drifted, one kind at a time.
func (n *node) heal(drift []state.Drift) {
	c := n.cur[0]
	switch drift[0].Kind {
	case DriftPaused:
		n.do(Resume, Action{Containers: ids(n.cur)})
	case DriftLimits:
		n.do(Limit, Action{Attempt: c.Attempt, Containers: ids(n.cur)})
	case DriftImage:
		n.create(state.Report{}, c.Attempt+1, 0, c.Failures)
	}
}

// PortName names a port that has no number on the host: the key under which the chosen one is kept.
func PortName(p manifest.Port) string { return fmt.Sprintf("%s/%d", p.Proto(), p.Target) }

// backoff is how long to wait before try number n (from 1): base doubled n-1 times, capped, plus up to a tenth that depends on the id, so that
// what failed together does not come back together.
func backoff(id string, n int, base time.Duration) time.Duration {
	if n <= 0 {
		return 0
	}
	d := BackoffCap
	if n < 20 && base<<(n-1) < BackoffCap && base<<(n-1) > 0 {
		d = base << (n - 1)
	}
	h := fnv.New32a()
	fmt.Fprintf(h, "%s/%d", id, n)
	return d + d/10*time.Duration(h.Sum32()%100)/100
}
