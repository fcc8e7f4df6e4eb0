package reconcile

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/rollout"
	"github.com/gitopsd/gitopsd/reconcile/schedule"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// maxMoves bounds the new tasks of one service in one plan, so that a plan's item stays a small log entry. The rest comes with the next plan.
const maxMoves = 100

// Reasons that Decide gives.
const (
	ReasonNoPlace    = "task.unplaced"
	ReasonNoAddress  = "network.full"
	ReasonDependency = "depends_on"
	ReasonRolledBack = "rollout.rolledback"
	ReasonDone       = "rollout.done"
)

// Decide says what has to change now so that what runs becomes what was accepted, and when to ask again. Deciding after all of it was done gives an empty plan.
func Decide(v *state.View, now Now) Plan {
	d := newDecision(v, now)
	for name, e := range v.Stacks.All() {
		d.stack(name, e)
	}
	return d.done()
}

// DecideStacks is Decide for some stacks only: those that something changed for. Together with the rest, of which nothing changed, it gives what Decide gives.
func DecideStacks(v *state.View, names []string, now Now) Plan {
	d := newDecision(v, now)
	for _, name := range names {
		if e, ok := v.Stacks.Get(name); ok {
			d.stack(name, e)
		}
	}
	return d.done()
}

// done is the plan.
func (d *decision) done() Plan {
	d.plan.Items = append(d.changedNetworks(), d.plan.Items...)
	return d.plan
}

// decision is one run of Decide. What it hands out (addresses, ports, subnets) counts at once for what comes after.
type decision struct {
	v    *state.View
	now  Now
	plan Plan

	nodes []schedule.Node           // built when the first task has to be placed
	addrs map[place]map[string]bool // addresses in use; built when first asked for, as the next two
	taken map[string][]part         // subnets of each node
	asked *wants
	nets  map[string]*state.Network // networks that this plan changes; nil = removes
	// volumed are the volumes that this plan records.
	volumed map[string]bool
	going   []state.Volume  // volumes that nodes are removing; listed when first asked for
	retired int             // the highest generation of tasks whose service is gone when this plan is in
	ports   map[uint16]bool // host ports that this plan chooses
}

func newDecision(v *state.View, now Now) *decision {
	retired, _ := v.Retired.Get(state.RetiredKey)
	return &decision{v: v, now: now, retired: retired.Value.Gen,
		nets: map[string]*state.Network{}, volumed: map[string]bool{}, ports: map[uint16]bool{}}
}

func (d *decision) stack(name string, e state.Entry[state.Stack]) {
	s := stackRun{decision: d, name: name, entry: e, next: e.Value}
	if e.Value.Removing {
		s.remove()
	} else if e.Value.Applied != nil {
		s.converge()
	}
	if !s.gone && !reflect.DeepEqual(s.next, e.Value) {
		d.plan.Items = append(d.plan.Items, state.Item{state.Put(name, e.Version, s.next)})
	}
}

// stackRun decides one stack.
type stackRun struct {
	*decision
	name    string
	entry   state.Entry[state.Stack]
	next    state.Stack
	release state.Release
	gone    bool
	// services as they will be when this plan is in.
	services map[string]state.Service
}

// converge brings each service of the stack nearer to the applied release, then prunes what the release does not name, then judges the outcome.
func (s *stackRun) converge() {
	rel, ok := s.v.Releases.Get(s.next.Applied.Release)
	if !ok {
		return // its entry is not here yet: the next index brings it
	}
	s.release = rel.Value
	s.services = map[string]state.Service{}
	for _, name := range s.order() {
		s.service(name)
	}
	s.prune()
	s.outcome()
}

// order lists the services such that dependencies come before what depends on them; among equals by name.
func (s *stackRun) order() []string {
	var out []string
	seen := map[string]bool{}
	var visit func(string)
	visit = func(name string) {
		if seen[name] {
			return
		}
		seen[name] = true
		if spec, ok := s.spec(s.release.Services[name]); ok {
			for _, d := range spec.DependsOn {
				if _, known := s.release.Services[d.Service]; known {
					visit(d.Service)
				}
			}
		}
		out = append(out, name)
	}
	for _, name := range s.release.Names() {
		visit(name)
	}
	return out
}

func (d *decision) spec(hash string) (*manifest.Service, bool) {
	e, ok := d.v.Specs.Get(hash)
	return &e.Value.Service, ok
}

// service decides one service of the release.
func (s *stackRun) service(name string) {
	key := state.ServiceKey(s.name, name)
	e, known := s.v.Services.Get(key)
	svc := e.Value
	want := s.release.Services[name]
	var item state.Item
	switch {
	case (!known || svc.Removing) && s.denied().ID != "":
		return
	case s.denied().ID != "" && svc.Target != want: // not begun: what runs is healed
	case !known:
		svc = state.Service{Target: want, Revision: s.next.Applied.Revision, Step: state.StepUpdating, Started: s.now.Log, Gen: s.retired}
	case svc.Removing:
		svc = state.Service{Target: want, Revision: s.next.Applied.Revision, Step: state.StepUpdating, Started: s.now.Log, Restart: svc.Restart, Gen: svc.Gen}
	case svc.Target != want && svc.Bad != want:
		svc.Target, svc.Revision = want, s.next.Applied.Revision
		svc.Step, svc.Started, svc.Failed, svc.Reason, svc.Bad, svc.BadRevision = state.StepUpdating, s.now.Log, nil, state.Reason{}, "", manifest.Revision{}
	case svc.Bad != "" && svc.Bad != want: // Git itself went back to what runs: what was bad may be tried again
		svc.Revision, svc.Reason, svc.Bad, svc.BadRevision = s.next.Applied.Revision, state.Reason{}, "", manifest.Revision{}
		if svc.Step != state.StepDone {
			svc.Step, svc.Started, svc.Failed = state.StepUpdating, s.now.Log, nil
		}
	}
	target, ok := s.spec(svc.Target)
	if !ok {
		return
	}
	s.follow(name, &svc, target)
	svc.Ports = s.hostPorts(svc.Ports, target)
	slots, adopt := s.slots(key, svc, target)
	for _, t := range adopt { // what changed needs no new task: the node sets it on the one that runs
		was, _ := s.spec(t.Spec)
		_, fields := manifest.Compare(was, target)
		t.Task.Spec, t.Task.Revision = svc.Target, svc.Revision
		item = append(item, state.Put(t.ID, t.Version, t.Task))
		s.step(Step{Action: ActUpdate, Cause: CauseRevision, Service: name, Task: t.ID, Node: t.Node, Revision: svc.Revision, Fields: fields})
	}
	adopted := len(item)
	if s.goesBack(name, svc) {
		svc.Reason = *s.entry.Value.Back
		stable, _ := s.v.Releases.Get(s.next.Stable.Release)
		svc.Stable, svc.StableRevision = stable.Value.Services[name], s.next.Stable.Revision
		s.rollback(name, &svc)
		s.services[name] = svc
		s.plan.Items = append(s.plan.Items, append(item, state.Put(key, e.Version, svc)))
		return
	}
	out := rollout.Next(rollout.Input{Target: *target, Service: svc, Slots: slots, Hold: s.hold(name, target), CanRollBack: s.canRollBack(svc), Now: s.now.Log})
	svc = out.Service
	s.plan.wake(s.name, out.Wake)
	if out.Rollback {
		s.rollback(name, &svc)
	} else if adopted == 0 { // a task is changed once a plan: its version is that of the log
		item = append(item, s.moves(name, &svc, target, slots, out.Moves)...)
		out.Ended = s.unplaced(name, &svc, target) || out.Ended
	}
	if out.Ended {
		s.ended(name, svc)
	}
	s.services[name] = svc
	if !known || !reflect.DeepEqual(svc, e.Value) {
		item = append(item, state.Put(key, e.Version, svc))
	}
	if len(item) > 0 {
		s.plan.Items = append(s.plan.Items, item)
	}
}

func (s *stackRun) step(st Step) {
	st.Stack = s.name
	s.plan.Steps = append(s.plan.Steps, st)
}

// denied says why policy denies what the stack was told to be, since a newer policy or the end of an exemption. What runs of it is healed; the rest of it does not start.
func (s *stackRun) denied() state.Reason {
	if w := s.next.Wanted; w.Decision == state.DecisionBlocked && w.Verdict.Deny && w.Release == s.next.Applied.Release {
		return w.Reasons[0]
	}
	return state.Reason{}
}

// follow restarts a service once a rollout that replaced tasks of one that it depends on with restart is over, and left that one well: as it was to be, or as it was
// before, since its tasks are new ones either way. What heals such a service, or scales it, restarts nobody.
func (s *stackRun) follow(name string, svc *state.Service, target *manifest.Service) {
	was := svc.After
	svc.After = nil
	for _, dep := range target.DependsOn {
		if !dep.Restart {
			continue
		}
		newest := 0
		for _, t := range s.v.Tasks.Below(state.TaskPrefix(s.name, dep.Service)) {
			if t.Value.Why.ID == rollout.ReasonUpdate && t.Value.Desired == state.DesiredRun {
				newest = max(newest, t.Value.Gen)
			}
		}
		seen, known := was[dep.Service]
		if !known {
			seen = newest
		}
		if newest > seen && s.services[dep.Service].Step == state.StepDone && s.denied().ID == "" {
			seen = newest
			svc.Restart++
			svc.Started, svc.Failed = s.now.Log, nil
			if svc.Step != state.StepRollback {
				svc.Step = state.StepUpdating
			}
			if svc.Bad == "" {
				svc.Reason = state.Reason{}
			}
			s.step(Step{Action: ActReplace, Cause: CauseRevision, Service: name, Revision: svc.Revision,
				Reason: state.Reason{ID: rollout.ReasonRestart, Message: fmt.Sprintf("%s, which it depends on with restart, was replaced", dep.Service)}})
		}
		if svc.After == nil {
			svc.After = map[string]int{}
		}
		svc.After[dep.Service] = seen
	}
}

// hold says why running tasks of a service may not be replaced now: policy denies it, or a service that it depends on is itself being updated, or stalled.
func (s *stackRun) hold(name string, target *manifest.Service) state.Reason {
	stalled := s.denied()
	for _, dep := range target.DependsOn {
		switch up := s.services[dep.Service]; {
		case up.Step == state.StepUpdating, up.Step == state.StepRollback, up.Step == state.StepMonitoring && dep.Restart: // else it would be replaced twice
			return state.Reason{ID: ReasonDependency, Message: fmt.Sprintf("%s waits for %s to be updated", name, dep.Service)}
		case up.Step == state.StepPaused:
			stalled = state.Reason{ID: converge.ReasonDependedOn, Message: fmt.Sprintf("%s, which it depends on, stalled: %s", dep.Service, up.Reason.Message)}
		}
	}
	return stalled
}

func (s *stackRun) canRollBack(svc state.Service) bool {
	return svc.Stable != "" && svc.Stable != svc.Target && s.entry.Value.Banned == nil && has(s.v.Specs, svc.Stable)
}

// goesBack says whether a service that is fine goes back because another one of its stack failed (rollback: stack).
func (s *stackRun) goesBack(name string, svc state.Service) bool {
	back := s.entry.Value.Back
	if back == nil || s.entry.Value.Banned != nil || s.next.Stable == nil || svc.Target != s.release.Services[name] || svc.Bad != "" {
		return false
	}
	stable, ok := s.v.Releases.Get(s.next.Stable.Release)
	was := stable.Value.Services[name]
	return ok && was != "" && was != svc.Target && has(s.v.Specs, was)
}

// rollback makes the stable spec the target again and remembers the bad one, so that it is not tried again until Git changes.
func (s *stackRun) rollback(name string, svc *state.Service) {
	why := svc.Reason
	if s.release.Stack.RollbackStack && s.next.Back == nil {
		s.next.Back = &state.Reason{ID: why.ID, Message: name + ": " + why.Message}
	}
	svc.Bad, svc.BadRevision = svc.Target, svc.Revision
	svc.Target, svc.Revision = svc.Stable, svc.StableRevision
	svc.Step, svc.Started, svc.Failed = state.StepRollback, s.now.Log, nil
	s.step(Step{Action: ActRollback, Cause: CauseRevision, Service: name, Revision: svc.Revision, Reason: why})
	s.plan.wake(s.name, s.now.Log)
}

func (s *stackRun) ended(name string, svc state.Service) {
	st := Step{Action: ActFinish, Cause: CauseRevision, Service: name, Revision: svc.Revision, Reason: state.Reason{ID: ReasonDone, Message: "all tasks are healthy"}}
	switch {
	case svc.Step == state.StepPaused:
		st.Reason = state.Reason{ID: cmp.Or(svc.Reason.ID, rollout.ReasonPaused), Message: "the rollout stopped: " + svc.Reason.Message}
	case svc.Bad != "":
		st.Reason = state.Reason{ID: cmp.Or(svc.Reason.ID, ReasonRolledBack), Message: fmt.Sprintf("%s runs again: %s", svc.Revision, svc.Reason.Message)}
	}
	s.step(st)
}

// slots gathers the service's tasks by slot, and those whose spec changed in ways that need no new task.
func (s *stackRun) slots(key string, svc state.Service, target *manifest.Service) (slots []rollout.Slot, adopt []rollout.Task) {
	n := s.replicas(target)
	slots = make([]rollout.Slot, n)
	for i := range slots {
		slots[i].Number = i + 1
	}
	extra := map[int]int{}
	for _, e := range s.v.Tasks.Below(key + ".") {
		t := rollout.Task{Task: e.Value, Version: e.Version}
		if r, ok := s.v.Reports.Get(t.ID); ok {
			t.Report, t.Since = r.Value, r.At
		}
		t.Current = t.Restart >= svc.Restart
		if t.Current && t.Spec != svc.Target {
			was, ok := s.spec(t.Spec)
			effect := manifest.Replace
			if ok {
				effect, _ = manifest.Compare(was, target)
			}
			t.Current = effect != manifest.Replace && (slices.Equal(was.Ports, target.Ports) || s.portsFree(t.Node, key, target))
			if t.Current && t.Desired != state.DesiredStop {
				adopt = append(adopt, t)
			}
		}
		at := t.Slot - 1
		if t.Slot > n {
			i, ok := extra[t.Slot]
			if !ok {
				i = len(slots)
				extra[t.Slot] = i
				slots = append(slots, rollout.Slot{Number: t.Slot, Extra: true})
			}
			at = i
		}
		slots[at].Tasks = append(slots[at].Tasks, t)
	}
	for i := range slots {
		slices.SortFunc(slots[i].Tasks, func(a, b rollout.Task) int { return cmp.Compare(a.Gen, b.Gen) })
	}
	return slots, adopt
}

// portsFree says whether the service may have the host ports of its target on a node, and takes them if so: what changes in place is not placed, so nobody else asks.
func (d *decision) portsFree(node, key string, target *manifest.Service) bool {
	nodes := d.places()
	at := slices.IndexFunc(nodes, func(n schedule.Node) bool { return n.ID == node })
	return at < 0 || nodes[at].Publish(key, target)
}

// replicas is the number of slots that a service should have.
func (d *decision) replicas(target *manifest.Service) int {
	if target.Mode == manifest.Global || target.Mode == manifest.GlobalJob {
		return d.v.Nodes.Len()
	}
	return target.Replicas
}

// moves turns the rollout's moves into changes of tasks.
func (s *stackRun) moves(name string, svc *state.Service, target *manifest.Service, slots []rollout.Slot, moves []rollout.Move) state.Item {
	var item state.Item
	tasks := map[string]rollout.Task{}
	learnt := map[string]bool{}
	for _, slot := range slots {
		for _, t := range slot.Tasks {
			tasks[t.ID] = t
			item = append(item, s.learn(t, learnt)...)
			if t.Desired == state.DesiredStop && t.Report.Phase == state.PhaseGone {
				item = append(item, forget(s.v, t.ID, t.Version)...)
			}
		}
	}
	made := 0
	for _, m := range moves {
		t := tasks[m.Task]
		switch m.Verb {
		case rollout.Make:
			if made++; made > maxMoves {
				s.plan.wake(s.name, s.now.Log)
				continue
			}
			item = append(item, s.make(name, svc, target, m)...)
		case rollout.Run:
			t.Task.Desired, t.Task.Made = state.DesiredRun, s.now.Log // the slot is free: its time begins now
			item = append(item, state.Put(t.ID, t.Version, t.Task))
			s.step(Step{Action: ActStart, Cause: CauseRevision, Service: name, Task: t.ID, Node: t.Node, Revision: t.Revision, Reason: t.Why})
		case rollout.Done:
			t.Task.Done = s.now.Log
			item = append(item, state.Put(t.ID, t.Version, t.Task))
		case rollout.Stop:
			t.Task.Desired, t.Task.StopWhy = state.DesiredStop, m.Why
			item = append(item, state.Put(t.ID, t.Version, t.Task))
			s.step(Step{Action: ActStop, Cause: CauseRevision, Service: name, Task: t.ID, Node: t.Node, Revision: t.Revision, Reason: m.Why})
		}
	}
	return item
}

// forget removes a task that nothing is left of.
func forget(v *state.View, id string, version uint64) state.Item {
	item := state.Item{state.Delete[state.Task](id, version)}
	if r, ok := v.Reports.Get(id); ok {
		item = append(item, state.Delete[state.Report](id, r.Version))
	}
	return item
}

// make places a new task and gives it addresses.
func (s *stackRun) make(name string, svc *state.Service, target *manifest.Service, m rollout.Move) state.Item {
	key := state.ServiceKey(s.name, name)
	if why := s.leaving(target, m.Slot); why != "" {
		s.refuse(name, svc, state.Reason{ID: ReasonNoPlace, Message: why})
		return nil
	}
	ask := schedule.Ask{Service: key, Slot: m.Slot, Home: s.home(target, m.Slot), Spec: target}
	nodes := s.places()
	if m.Ready {
		nodes = s.without(nodes, key, m.Slot)
	}
	place := schedule.Place(ask, nodes)
	if place.Node == "" {
		s.refuse(name, svc, state.Reason{ID: ReasonNoPlace, Message: place.Refusal})
		return nil
	}
	addrs, why := s.addresses(place.Node, target)
	if why.ID != "" {
		s.refuse(name, svc, why)
		return nil
	}
	if svc.Reason.ID == ReasonNoPlace || svc.Reason.ID == ReasonNoAddress {
		svc.Reason = state.Reason{}
	}
	svc.Gen++
	t := state.Task{
		ID: state.TaskID(s.name, name, m.Slot, svc.Gen), Stack: s.name, Service: name, Slot: m.Slot, Gen: svc.Gen, Node: place.Node,
		Spec: svc.Target, Revision: svc.Revision, Restart: svc.Restart, Desired: state.DesiredRun, Addrs: addrs, Made: s.now.Log, Why: m.Why,
		Images: s.images(svc.Target, target),
	}
	if m.Ready {
		t.Desired = state.DesiredReady
	}
	s.took(place.Node, key, target)
	item := append(s.volumes(place.Node, target, m.Slot), state.Put(t.ID, 0, t))
	st := Step{Action: ActCreate, Cause: CauseRevision, Service: name, Task: t.ID, Node: t.Node, Revision: t.Revision, Reason: m.Why}
	if m.Why.ID == rollout.ReasonUpdate {
		st.Action = ActReplace
	} else if svc.Step == state.StepDone {
		st.Cause = CauseHeal
	}
	s.step(st)
	return item
}

// refuse records why a task has no place. It is told once, not at each try.
func (s *stackRun) refuse(name string, svc *state.Service, why state.Reason) {
	if svc.Reason == why {
		return
	}
	svc.Reason = why
	s.step(Step{Action: ActRefuse, Service: name, Revision: svc.Revision, Reason: why})
}

// unplaced ends a rollout that finds no place for a task until the deadline: it goes back where it can, else it is paused, and goes on as soon as there is room.
// It says whether the rollout ended.
func (s *stackRun) unplaced(name string, svc *state.Service, target *manifest.Service) bool {
	if svc.Reason.ID != ReasonNoPlace && svc.Reason.ID != ReasonNoAddress || svc.Step == state.StepDone || svc.Step == state.StepPaused {
		return false
	}
	policy := target.Update
	if svc.Step == state.StepRollback {
		policy = target.Rollback
	}
	if end := svc.Started.Add(policy.Deadline.Std()); s.now.Log.Before(end) {
		s.plan.wake(s.name, end)
		return false
	}
	back := policy.FailureAction == "" || policy.FailureAction == manifest.ActionRollback
	if back && svc.Step != state.StepRollback && s.canRollBack(*svc) {
		s.rollback(name, svc)
		return false
	}
	svc.Step = state.StepPaused
	return true
}

// images are the digests that the spec's references were resolved to before: a tag is resolved once for a spec.
func (d *decision) images(hash string, spec *manifest.Service) map[string]string {
	var out map[string]string
	for i := range spec.Containers {
		if e, ok := d.v.Images.Get(hash + "/" + spec.Containers[i].Name); ok {
			if out == nil {
				out = map[string]string{}
			}
			out[spec.Containers[i].Name] = e.Value.Digest
		}
	}
	return out
}

// learn records the digests that a node resolved the references of a spec to, so that all its tasks run the same bytes.
func (d *decision) learn(t rollout.Task, learnt map[string]bool) state.Item {
	var item state.Item
	for _, name := range sortedKeys(t.Report.Images) {
		key := t.Spec + "/" + name
		if learnt[key] || has(d.v.Images, key) {
			continue
		}
		learnt[key] = true
		ref := ""
		if spec, ok := d.spec(t.Spec); ok {
			if at := slices.IndexFunc(spec.Containers, func(c manifest.Container) bool { return c.Name == name }); at >= 0 {
				ref = spec.Containers[at].Image
			}
		}
		item = append(item, state.Set(key, state.Image{Ref: ref, Digest: t.Report.Images[name]}))
	}
	return item
}

// prune stops the services that the release does not name, once those that it names came up, and forgets them when nothing of them is left. Those of a release that was
// rolled back or stalled may still be needed: by what runs on as it was, or by people, who had nothing else yet.
func (s *stackRun) prune() {
	whole := true
	for _, name := range sortedKeys(s.services) {
		whole = whole && s.services[name].Step == state.StepDone && s.services[name].Bad == ""
	}
	for key, e := range s.v.Services.Below(s.name + "/") {
		name := key[len(s.name)+1:]
		if _, kept := s.release.Services[name]; kept || s.release.Stack.PruneOff || !whole && !e.Value.Removing {
			continue
		}
		s.removeService(name, state.Reason{ID: ReasonPruned, Message: fmt.Sprintf("%s no longer names it", s.next.Applied.Revision)})
	}
}

// removeService stops all tasks of a service, then forgets it. It says whether the service is gone when this plan is in.
func (s *stackRun) removeService(name string, why state.Reason) bool {
	key := state.ServiceKey(s.name, name)
	e, _ := s.v.Services.Get(key)
	var item state.Item
	left := 0
	for id, t := range s.v.Tasks.Below(key + ".") {
		r, _ := s.v.Reports.Get(id)
		switch {
		case t.Value.Desired == state.DesiredStop && r.Value.Phase == state.PhaseGone:
			item = append(item, forget(s.v, id, t.Version)...)
		case t.Value.Desired != state.DesiredStop:
			left++
			next := t.Value
			next.Desired, next.StopWhy = state.DesiredStop, why
			item = append(item, state.Put(id, t.Version, next))
			s.step(Step{Action: ActStop, Cause: CausePrune, Service: name, Task: id, Node: next.Node, Reason: why})
		default:
			left++
		}
	}
	if left == 0 {
		item = append(item, state.Delete[state.Service](key, e.Version))
		if e.Value.Gen > s.retired {
			s.retired = e.Value.Gen
			item = append(item, state.Set(state.RetiredKey, state.Retired{Gen: s.retired}))
		}
		s.step(Step{Action: ActRemove, Cause: CausePrune, Service: name, Reason: why})
		if !s.entry.Value.Removing {
			item = append(item, s.leaveService(name, why)...)
		}
	} else if !e.Value.Removing {
		next := e.Value
		next.Removing = true
		item = append(item, state.Put(key, e.Version, next))
	}
	if len(item) > 0 {
		s.plan.Items = append(s.plan.Items, item)
	}
	return left == 0
}

// remove takes a stack down: its tasks, its services, then what it alone had.
func (s *stackRun) remove() {
	why := state.Reason{ID: ReasonPruned, Message: "its source no longer names it"}
	left := false
	for key := range s.v.Services.Below(s.name + "/") {
		if !s.removeService(key[len(s.name)+1:], why) {
			left = true
		}
	}
	if left {
		return
	}
	s.gone = true
	item := state.Item{state.Delete[state.Stack](s.name, s.entry.Version)}
	s.leaveNetworks()
	for name, sec := range s.v.Secrets.All() {
		if sec.Value.Stack == s.name {
			item = append(item, state.Delete[state.Secret](name, sec.Version))
		}
	}
	s.step(Step{Action: ActRemove, Cause: CausePrune, Reason: why})
	rel := state.Entry[state.Release]{}
	if a := s.entry.Value.Applied; a != nil {
		rel, _ = s.v.Releases.Get(a.Release)
	}
	s.plan.Items = append(s.plan.Items, append(item, s.leave("", rel.Value, s.entry.Value.WithVolumes, why)...))
}

// outcome says what became of the applied revision, once that is known.
func (s *stackRun) outcome() {
	o := &s.next.Outcome
	var stalled, back *state.Service
	denied, held := s.denied(), false
	for _, name := range s.release.Names() {
		svc, there := s.services[name]
		switch {
		case svc.Step == state.StepPaused:
			if stalled == nil || stalled.Reason.ID == converge.ReasonDependedOn { // what stalled by itself tells more than what waits for it
				stalled = &svc
			}
		case denied.ID != "" && (!there || svc.Step != state.StepDone || svc.Target != s.release.Services[name] && svc.Bad != s.release.Services[name]):
			held = true
		case !there || svc.Step != state.StepDone: // not known yet
			if o.Kind == state.Stalled && o.Reason.ID == ReasonPolicy { // it goes on
				o.Kind, o.Reason, o.Ended = "", state.Reason{}, time.Time{}
			}
			return
		case svc.Bad != "" && svc.Bad == s.release.Services[name]:
			back = &svc
		}
	}
	kind, why, to := state.Deployed, state.Reason{ID: ReasonDone, Message: "every service is healthy"}, manifest.Revision{}
	switch {
	case stalled != nil:
		kind, why = state.Stalled, state.Reason{ID: cmp.Or(stalled.Reason.ID, rollout.ReasonPaused), Message: stalled.Reason.Message}
	case held:
		kind, why = state.Stalled, denied
	case back != nil:
		kind, why, to = state.RolledBack, back.Reason, back.Revision
	}
	if o.Kind == kind {
		return
	}
	o.Kind, o.Reason, o.To, o.Ended = kind, why, to, s.now.Log
	if kind == state.Deployed {
		s.next.Stable, o.Reason = s.next.Applied, state.Reason{}
	}
	s.step(Step{Action: ActFinish, Cause: CauseRevision, Revision: o.Revision, Reason: state.Reason{ID: cmp.Or(why.ID, ReasonRolledBack), Message: string(kind) + ": " + why.Message}})
}
