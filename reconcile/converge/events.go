package converge

import (
	"fmt"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// The kinds of events that nodes tell of.
const (
	EventRestart   = "restart"   // an attempt ended and the next one began
	EventFail      = "fail"      // a task ended and will not start again
	EventUnhealthy = "unhealthy" // a health check fails
	EventRecovered = "recovered" // it does its work again
	EventDrift     = "drift"     // what runs is not what should
	EventHeal      = "heal"      // drift is gone
	EventTrouble   = "trouble"   // something about it failed and is tried again: its image, its volumes
)

// Events tells of what is worth remembering between two reports of a task.
func Events(t state.Task, old, now state.Report) []state.Event {
	var out []state.Event
	tell := func(kind string, why state.Reason) {
		out = append(out, state.Event{Kind: kind, Stack: t.Stack, Service: t.Service, Task: t.ID, Revision: t.Revision, Reason: why})
	}
	if now.Attempt > old.Attempt && old.Attempt > 0 {
		tell(EventRestart, now.Ended)
	}
	if now.Phase == state.PhaseFailed && old.Phase != state.PhaseFailed {
		tell(EventFail, now.Reason)
	}
	if now.Health == state.HealthUnhealthy && old.Health != state.HealthUnhealthy {
		tell(EventUnhealthy, now.Reason)
	}
	if now.Running() && now.Ready() && !old.Ready() && (now.Attempt > 1 || old.Health == state.HealthUnhealthy) {
		why := state.Reason{ID: ReasonRecovered, Message: "healthy again"}
		if now.Ended.Message != "" {
			why.Message += ", after it " + now.Ended.Message
		}
		tell(EventRecovered, why)
	}
	if now.Retry && now.Attempt == old.Attempt && now.Reason.ID != old.Reason.ID && now.Reason.ID != now.Ended.ID {
		tell(EventTrouble, now.Reason)
	}
	switch was, is := describe(old.Drift), describe(now.Drift); {
	case is != "" && is != was:
		tell(EventDrift, DriftReason(now.Drift))
	case is == "" && was != "" && now.Running():
		tell(EventHeal, state.Reason{ID: DriftReason(old.Drift).ID, Message: "set right: " + was})
	}
	return out
}

// DriftReason is the reason that drift gives for a task not to be as it should.
func DriftReason(drift []state.Drift) state.Reason {
	id := ReasonDriftMissing
	switch drift[0].Kind {
	case DriftPaused:
		id = ReasonDriftPaused
	case DriftLimits:
		id = ReasonDriftLimits
	case DriftImage:
		id = ReasonDriftImage
	}
	return state.Reason{ID: id, Message: describe(drift)}
}

// describe writes drift as a sentence.
func describe(drift []state.Drift) string {
	var parts []string
	for _, d := range drift {
		parts = append(parts, fmt.Sprintf("%s is %s, not %s", d.Path, d.Have, d.Want))
	}
	return strings.Join(parts, ", ")
}
