package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Sync is how what a stack is stands to what Git asks.
type Sync string

// The sync statuses.
const (
	Synced    Sync = "Synced"
	OutOfSync Sync = "OutOfSync"
	Blocked   Sync = "Blocked" // policy, signature, prune budget, approval
	Failed    Sync = "Failed"  // does not render
)

// Health is how what runs of a stack or service does.
type Health string

// The healths, best first.
const (
	Healthy     Health = "Healthy"
	Suspended   Health = "Suspended"
	Progressing Health = "Progressing"
	Missing     Health = "Missing"
	Degraded    Health = "Degraded"
)

var healthRank = []Health{Healthy, Suspended, Progressing, Missing, Degraded}

// worse is the worse of two healths.
func worse(a, b Health) Health {
	if slices.Index(healthRank, b) > slices.Index(healthRank, a) {
		return b
	}
	return a
}

// StackStatus is what is true of a stack now.
type StackStatus struct {
	Name     string            `json:"name"`
	Source   string            `json:"source"`
	Revision manifest.Revision `json:"revision"` // newest one of the source that this stack follows
	Sync     Sync              `json:"sync"`
	Health   Health            `json:"health"`
	Ready    bool              `json:"ready"` // Synced and Healthy
	Outcome  state.Outcome     `json:"outcome"`
	// Reasons say why it is not Ready, most telling first; each id has a paragraph in `gitopsctl explain`.
	Reasons   []state.Reason     `json:"reasons,omitempty"`
	Problems  []manifest.Problem `json:"problems,omitempty"`
	Services  []ServiceStatus    `json:"services"`
	Suspended bool               `json:"suspended,omitempty"`
	Removing  bool               `json:"removing,omitempty"`
}

// ServiceStatus is what is true of a service now.
type ServiceStatus struct {
	Name     string            `json:"name"`
	Stack    string            `json:"stack"`
	Mode     manifest.Mode     `json:"mode,omitempty"`
	Desired  int               `json:"desired"`           // tasks that there should be
	Ready    int               `json:"ready"`             // tasks that do their work
	Updated  int               `json:"updated"`           // tasks of the target
	Drifted  int               `json:"drifted,omitempty"` // tasks that are not what they should be, see Report.Drift
	Health   Health            `json:"health"`
	Step     state.Step        `json:"step,omitempty"`
	Image    string            `json:"image"`
	Ports    []manifest.Port   `json:"ports,omitempty"`
	Revision manifest.Revision `json:"revision"`
	Reason   state.Reason      `json:"reason,omitzero"`
	Tasks    []TaskStatus      `json:"tasks,omitempty"`
}

// TaskStatus is what is true of a task now.
type TaskStatus struct {
	state.Task
	Report state.Report `json:"report"`
	// NodeName is what people call the node.
	NodeName string    `json:"nodeName,omitempty"`
	Since    time.Time `json:"since"` // log time of the last report
	Image    string    `json:"image"`
}

// StatusOf tells of one stack; ok is false when there is none of that name.
func StatusOf(v *state.View, name string) (StackStatus, bool) {
	e, ok := v.Stacks.Get(name)
	if !ok {
		return StackStatus{}, false
	}
	s := e.Value
	src, _ := v.Sources.Get(s.Source)
	st := StackStatus{Name: name, Source: s.Source, Revision: src.Value.Accepted, Outcome: s.Outcome, Problems: s.Wanted.Problems, Removing: s.Removing}
	var rel state.Release
	if s.Applied != nil {
		r, _ := v.Releases.Get(s.Applied.Release)
		rel = r.Value
	}
	for _, svc := range rel.Names() {
		st.Services = append(st.Services, serviceStatus(v, s, svc, rel.Services[svc]))
	}
	st.Suspended = s.Suspended != nil || suspendedInGit(s.Wanted)
	st.Health = stackHealth(s, st)
	if !s.Removing {
		st.Services = append(st.Services, leftServices(v, s, rel)...)
	}
	st.Sync, st.Reasons = syncOf(s, src.Value)
	var own []state.Reason
	for _, svc := range st.Services {
		said := func(r state.Reason) bool {
			return r.ID == svc.Reason.ID && strings.Contains(r.Message, svc.Reason.Message)
		}
		if svc.Reason.ID != "" && !slices.ContainsFunc(st.Reasons, said) {
			own = append(own, state.Reason{ID: svc.Reason.ID, Message: svc.Name + ": " + svc.Reason.Message})
		}
		if svc.Drifted > 0 && st.Sync == Synced {
			st.Sync = OutOfSync
		}
	}
	if n := len(st.Reasons) - 1; n >= 0 && st.Reasons[n].ID == ReasonProgress { // what holds a rollout up tells more than that there is one
		st.Reasons, own = st.Reasons[:n:n], append(own, st.Reasons[n])
	}
	st.Reasons = append(st.Reasons, own...)
	st.Ready = st.Sync == Synced && st.Health == Healthy
	return st, true
}

// leftServices tells of the services that run although the release does not name them. The health of the stack is not theirs.
func leftServices(v *state.View, s state.Stack, rel state.Release) []ServiceStatus {
	var out []ServiceStatus
	for key, e := range v.Services.Below(s.Name + "/") {
		name := key[len(s.Name)+1:]
		if _, named := rel.Services[name]; named || s.Applied == nil {
			continue
		}
		why := "it is removed once all came up that it does name"
		switch {
		case e.Value.Removing:
			why = "it is being removed"
		case rel.Stack.PruneOff:
			why = "prune is off, so it stays"
		}
		st := serviceStatus(v, s, name, e.Value.Target)
		st.Reason = state.Reason{ID: ReasonPruned, Message: fmt.Sprintf("%s does not name it any more: %s", s.Applied.Revision, why)}
		out = append(out, st)
	}
	return out
}

func suspendedInGit(w state.Wanted) bool {
	return w.Decision == state.DecisionAccepted && slices.ContainsFunc(w.Reasons, func(r state.Reason) bool { return r.ID == ReasonSuspended })
}

// Statuses tells of all stacks, by name.
func Statuses(v *state.View) []StackStatus {
	out := make([]StackStatus, 0, v.Stacks.Len())
	for name := range v.Stacks.All() {
		st, _ := StatusOf(v, name)
		out = append(out, st)
	}
	return out
}

func stackHealth(s state.Stack, st StackStatus) Health {
	switch {
	case s.Removing: // that its services go down is what is meant
		return Progressing
	case s.Applied == nil:
		return Missing
	}
	h := Healthy
	for _, svc := range st.Services {
		h = worse(h, svc.Health)
	}
	if h == Healthy && s.Outcome.Kind == "" {
		return Progressing
	}
	if h == Healthy && st.Suspended {
		return Suspended
	}
	return h
}

func syncOf(s state.Stack, src state.Source) (Sync, []state.Reason) {
	var why []state.Reason
	switch {
	case s.Removing:
		return OutOfSync, []state.Reason{{ID: ReasonPruned, Message: "it is being removed: its source no longer names it"}}
	case s.Wanted.Decision == state.DecisionFailed:
		return Failed, s.Wanted.Reasons
	case len(src.Waiting) > 0:
		return Blocked, src.Waiting
	case src.Trouble != nil && src.Trouble.ID == ReasonRender:
		return Failed, []state.Reason{*src.Trouble}
	case s.Wanted.Decision == state.DecisionBlocked:
		return Blocked, s.Wanted.Reasons
	case s.Pinned != nil:
		return OutOfSync, []state.Reason{*s.Pinned}
	case s.Suspended != nil:
		why = append(why, *s.Suspended)
	default:
		why = slices.Clone(s.Wanted.Reasons) // suspend: true in Git
	}
	switch {
	case s.Applied == nil || s.Applied.Release != s.Wanted.Release:
		return OutOfSync, why
	case s.Outcome.Kind == state.Deployed:
		return Synced, why
	case s.Outcome.Kind == "":
		return OutOfSync, append(why, state.Reason{ID: ReasonProgress, Message: fmt.Sprintf("%s is being rolled out", s.Outcome.Revision)})
	case s.Outcome.Kind == state.RolledBack:
		return OutOfSync, append(why, state.Reason{ID: cmp.Or(s.Outcome.Reason.ID, ReasonRolledBack), Message: fmt.Sprintf("%s was rolled back to %s: %s; push a fix to try again", s.Outcome.Revision, s.Outcome.To, s.Outcome.Reason.Message)})
	}
	return OutOfSync, append(why, s.Outcome.Reason)
}

// ReasonProgress is given while a rollout goes on.
const ReasonProgress = "rollout.progress"

// serviceStatus tells of a service that the release asks for with that spec.
func serviceStatus(v *state.View, stack state.Stack, name, asked string) ServiceStatus {
	key := state.ServiceKey(stack.Name, name)
	e, known := v.Services.Get(key)
	svc := e.Value
	st := ServiceStatus{Name: name, Stack: stack.Name, Step: svc.Step, Revision: svc.Revision, Reason: svc.Reason}
	if !known && stack.Outcome.Kind == state.Stalled { // it will not begin by itself
		svc.Target, svc.Step, known = asked, state.StepPaused, true
	}
	spec, ok := v.Specs.Get(svc.Target)
	if !known || !ok {
		st.Health = Progressing
		return st
	}
	target := &spec.Value.Service
	st.Mode, st.Desired, st.Image = target.Mode, (&decision{v: v}).replicas(target), target.Main().Image
	for _, p := range target.Ports {
		if p.Published == 0 {
			p.Published = svc.Ports[converge.PortName(p)]
		}
		st.Ports = append(st.Ports, p)
	}
	var trouble, drift state.Reason
	for id, t := range v.Tasks.Below(key + ".") {
		r, _ := v.Reports.Get(id)
		node, _ := v.Nodes.Get(t.Value.Node)
		if r.Value.Phase == state.PhaseRunning && r.At.Before(node.Value.Booted) {
			r.Value.Phase, r.Value.Health = state.PhaseWaiting, state.HealthUnknown
			r.Value.Reason = state.Reason{ID: converge.ReasonLost, Message: "its machine was restarted, and has not told of it since"}
		}
		ts := TaskStatus{Task: t.Value, Report: r.Value, NodeName: node.Value.Name, Since: r.At}
		if was, ok := v.Specs.Get(t.Value.Spec); ok {
			ts.Image = was.Value.Service.Main().Image
		}
		st.Tasks = append(st.Tasks, ts)
		if t.Value.Desired == state.DesiredStop {
			continue
		}
		if t.Value.Spec == svc.Target {
			st.Updated++
		}
		if len(r.Value.Drift) > 0 {
			if st.Drifted++; st.Drifted == 1 {
				drift = converge.DriftReason(r.Value.Drift)
				drift.Message = fmt.Sprintf("task %d: %s", t.Value.Slot, drift.Message)
			}
		}
		if r.Value.Ready() && t.Value.Desired == state.DesiredRun {
			st.Ready++
		} else if r.Value.Reason.ID != "" && trouble.ID == "" {
			trouble = state.Reason{ID: r.Value.Reason.ID, Message: fmt.Sprintf("task %d: %s", t.Value.Slot, r.Value.Reason.Message)}
		}
	}
	if st.Reason.ID == "" || svc.Step != state.StepPaused && trouble.ID != "" {
		st.Reason = trouble
	}
	if st.Reason.ID == "" {
		st.Reason = drift
	}
	st.Health = serviceHealth(svc, st)
	return st
}

func serviceHealth(svc state.Service, st ServiceStatus) Health {
	moving := svc.Step == state.StepUpdating || svc.Step == state.StepMonitoring || svc.Step == state.StepRollback
	switch {
	case svc.Removing:
		return Progressing
	case st.Ready >= st.Desired && !moving && svc.Step != state.StepPaused:
		return Healthy
	case st.Ready >= st.Desired && svc.Step == state.StepPaused:
		return Degraded
	case moving && st.Reason.ID == "", moving && st.Ready >= st.Desired:
		return Progressing
	case moving && len(svc.Failed) == 0:
		return Progressing
	case len(st.Tasks) == 0:
		return Missing
	}
	return Degraded
}
