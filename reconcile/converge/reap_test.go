package converge_test

import (
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// What can't be removed is tried again, but not at once and for ever.
func TestReapBacksOff(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	in := converge.Input{
		Settled: true, Now: now,
		Memory: map[string]converge.Memory{"old/web.1.1": {Network: true, Trouble: &converge.Trouble{Reason: state.Reason{ID: "task.stop"}, Count: 3, At: now}}},
	}
	out := converge.Next(in)
	if len(out.Actions) != 0 || !out.Wake.After(now) {
		t.Fatalf("right after it failed: %+v, wake %s", out.Actions, out.Wake)
	}
	in.Now = out.Wake
	if out := converge.Next(in); len(out.Actions) != 1 || out.Actions[0].Verb != converge.Reap {
		t.Errorf("when its time has come: %+v", out.Actions)
	}
}
