package converge

import (
	"fmt"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Reasons why a task does not start yet. The second says that waiting alone does not help: what the task depends on stalled, ended as it should not have, or may
// not run.
const (
	ReasonDependency = "depends_on.waiting"
	ReasonDependedOn = "depends_on.failed"
	ReasonStackOrder = "stack.order"
)

// Gated says whether a reason is one that [Gate] gives.
func Gated(why state.Reason) bool {
	return why.ID == ReasonDependency || why.ID == ReasonDependedOn || why.ID == ReasonStackOrder
}

// Gate says why a task may not start yet; empty = it may. It is Compose's depends_on, and dependsOn between stacks, asked each time a task is to start: so
// what was shut down together comes back in order. A condition is met as soon as one task of the other service meets it, so that
// a service with one unhealthy replica holds nobody back. report tells how a task does: what the node sees of its own, which after a reboot is not
// what it last reported, and the log's word for the others.
func Gate(v *state.View, t state.Task, spec *manifest.Service, report func(state.Task) state.Report) state.Reason {
	for _, dep := range spec.DependsOn {
		if r := waitsFor(v, t.Stack, dep, report); r.ID != "" {
			return r
		}
	}
	st, ok := v.Stacks.Get(t.Stack)
	if !ok || st.Value.Applied == nil {
		return state.Reason{}
	}
	rel, _ := v.Releases.Get(st.Value.Applied.Release)
	for _, other := range rel.Value.Stack.DependsOn {
		o, ok := v.Stacks.Get(other)
		if !ok {
			return state.Reason{ID: ReasonStackOrder, Message: fmt.Sprintf("waits for stack %s, which there is none of", other)}
		}
		r := state.Reason{ID: ReasonStackOrder, Message: fmt.Sprintf("waits for stack %s to be deployed", other)}
		if o.Value.Stable != nil {
			r = waitsForStack(v, other, o.Value.Stable.Release, report)
		}
		if r.ID != "" {
			if why := stalled(o.Value); why.ID != "" {
				return state.Reason{ID: ReasonDependedOn, Message: fmt.Sprintf("stack %s, which it depends on, %s", other, why.Message)}
			}
			return r
		}
	}
	return state.Reason{}
}

// stalled says why a stack will not get well by itself: its rollout stalled, or it was never let in.
func stalled(s state.Stack) state.Reason {
	switch {
	case s.Applied == nil && s.Wanted.Decision != state.DecisionAccepted && len(s.Wanted.Reasons) > 0:
		return state.Reason{ID: s.Wanted.Reasons[0].ID, Message: fmt.Sprintf("is %s: %s", s.Wanted.Decision, s.Wanted.Reasons[0].Message)}
	case s.Applied != nil && s.Outcome.Kind == state.Stalled:
		return state.Reason{ID: s.Outcome.Reason.ID, Message: "stalled: " + s.Outcome.Reason.Message}
	}
	return state.Reason{}
}

// waitsForStack wants one task that does its work of each service that another stack had when it was last well.
func waitsForStack(v *state.View, stack, release string, report func(state.Task) state.Report) state.Reason {
	rel, _ := v.Releases.Get(release)
	for _, name := range rel.Value.Names() {
		if r := waitsFor(v, stack, manifest.Dependency{Service: name, Condition: manifest.Healthy, Optional: true}, report); r.ID != "" {
			return state.Reason{ID: ReasonStackOrder, Message: fmt.Sprintf("waits for stack %s: %s does not do its work yet", stack, name)}
		}
	}
	return state.Reason{}
}

func waitsFor(v *state.View, stack string, dep manifest.Dependency, report func(state.Task) state.Report) state.Reason {
	svc, ok := v.Services.Get(state.ServiceKey(stack, dep.Service))
	switch spec, _ := v.Specs.Get(svc.Value.Target); {
	case !ok && dep.Optional:
		return state.Reason{}
	case !ok:
		return state.Reason{ID: ReasonDependedOn, Message: fmt.Sprintf("%s, which it depends on, is not there", dep.Service)}
	case spec.Version > 0 && spec.Value.Service.Replicas == 0 && spec.Value.Service.Mode == manifest.Replicated: // as in Compose: there is nothing to wait for
		return state.Reason{}
	}
	var failed state.Reason
	for _, t := range v.Tasks.Below(state.TaskPrefix(stack, dep.Service)) {
		r := report(t.Value)
		if t.Value.Desired != state.DesiredRun {
			continue
		}
		var met bool
		switch dep.Condition {
		case manifest.Completed:
			met = r.Phase == state.PhaseComplete
		case manifest.Healthy:
			met = r.Ready()
		default:
			met = r.Running() || r.Phase == state.PhaseComplete
		}
		if met {
			return state.Reason{}
		}
		if r.Phase == state.PhaseFailed {
			failed = r.Reason
		}
	}
	// While its rollout goes on, what failed may be replaced yet.
	switch step := svc.Value.Step; {
	case step == state.StepPaused:
		return state.Reason{ID: ReasonDependedOn, Message: fmt.Sprintf("%s, which it depends on, stalled: %s", dep.Service, svc.Value.Reason.Message)}
	case step == state.StepDone && failed.ID != "":
		return state.Reason{ID: ReasonDependedOn, Message: fmt.Sprintf("%s, which it depends on, failed: %s", dep.Service, failed.Message)}
	}
	return state.Reason{ID: ReasonDependency, Message: fmt.Sprintf("waits for %s (%s)", dep.Service, dep.Condition)}
}
