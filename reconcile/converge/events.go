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
	switch was, is := describe(old.Drift), describe(now.Drift); {
	case is != "" && is != was:
		tell(EventDrift, state.Reason{ID: "drift." + now.Drift[0].Kind, Message: is})
	case is == "" && was != "" && now.Running():
		tell(EventHeal, state.Reason{ID: "drift." + old.Drift[0].Kind, Message: "set right: " + was})
	}
	return out
}

// describe writes drift as a sentence.
func describe(drift []state.Drift) string {
	var parts []string
	for _, d := range drift {
		parts = append(parts, fmt.Sprintf("%s is %s, not %s", d.Path, d.Have, d.Want))
	}
	return strings.Join(parts, ", ")
}
