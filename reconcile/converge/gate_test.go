package converge_test

import (
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// A task waits for what its service depends on, and says so with another id where waiting alone does not help: what that stalled is told with its reason.
func TestGate(t *testing.T) {
	why := state.Reason{ID: "task.exited", Message: "exited with code 1"}
	for _, tt := range []struct {
		name string
		gone bool          // the service that web depends on is not there
		db   state.Service // that service
		task state.Report  // of its only task
		ops  state.Stack   // the stack that shop depends on; without a source there is none
		want state.Reason
	}{
		{name: "healthy", task: state.Report{Phase: state.PhaseRunning, Health: state.HealthHealthy}},
		{name: "starting", db: state.Service{Step: state.StepUpdating}, task: state.Report{Phase: state.PhaseRunning, Health: state.HealthStarting},
			want: state.Reason{ID: converge.ReasonDependency, Message: "waits for db (service_healthy)"}},
		{name: "failed, and may be replaced yet", db: state.Service{Step: state.StepUpdating}, task: state.Report{Phase: state.PhaseFailed, Reason: why},
			want: state.Reason{ID: converge.ReasonDependency, Message: "waits for db (service_healthy)"}},
		{name: "failed for good", task: state.Report{Phase: state.PhaseFailed, Reason: why},
			want: state.Reason{ID: converge.ReasonDependedOn, Message: "db, which it depends on, failed: exited with code 1"}},
		{name: "stalled", db: state.Service{Step: state.StepPaused, Reason: why}, task: state.Report{Phase: state.PhaseWaiting},
			want: state.Reason{ID: converge.ReasonDependedOn, Message: "db, which it depends on, stalled: exited with code 1"}},
		{name: "stalled, but one task of it is healthy", db: state.Service{Step: state.StepPaused, Reason: why}, task: state.Report{Phase: state.PhaseRunning, Health: state.HealthHealthy}},
		{name: "not there", gone: true, want: state.Reason{ID: converge.ReasonDependedOn, Message: "db, which it depends on, is not there"}},
		{name: "without replicas", db: state.Service{Target: "none"}, task: state.Report{Phase: state.PhaseGone}},
		{name: "stack in progress", task: state.Report{Phase: state.PhaseComplete}, ops: state.Stack{Source: "fleet", Applied: &state.Applied{}},
			want: state.Reason{ID: converge.ReasonStackOrder, Message: "waits for stack ops to be deployed"}},
		{name: "stack stalled", task: state.Report{Phase: state.PhaseComplete},
			ops:  state.Stack{Source: "fleet", Applied: &state.Applied{}, Outcome: state.Outcome{Kind: state.Stalled, Reason: why}},
			want: state.Reason{ID: converge.ReasonDependedOn, Message: "stack ops, which it depends on, stalled: exited with code 1"}},
		{name: "stack blocked", task: state.Report{Phase: state.PhaseComplete},
			ops:  state.Stack{Source: "fleet", Wanted: state.Wanted{Decision: state.DecisionBlocked, Reasons: []state.Reason{{ID: "policy.denied", Message: "privileged is denied"}}}},
			want: state.Reason{ID: converge.ReasonDependedOn, Message: "stack ops, which it depends on, is blocked: privileged is denied"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			release := state.Release{Stack: manifest.Stack{Name: "shop"}}
			items := state.Item{
				state.Set("none", state.Spec{Service: manifest.Service{Mode: manifest.Replicated}}), state.Put("shop/db.1.1", 0, state.Task{ID: "shop/db.1.1", Stack: "shop", Service: "db", Desired: state.DesiredRun}),
				state.Set("shop/db.1.1", tt.task), state.Put("shop", 0, state.Stack{Name: "shop", Source: "fleet", Applied: &state.Applied{Release: "r1"}}),
			}
			if !tt.gone {
				items = append(items, state.Put("shop/db", 0, tt.db))
			}
			if tt.ops.Source != "" {
				release.Stack.DependsOn = []string{"ops"}
				items = append(items, state.Put("ops", 0, tt.ops))
			}
			s := state.New()
			data, err := state.Encode(state.Command{At: time.Unix(0, 0).UTC(), Items: []state.Item{append(items, state.Set("r1", release))}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Apply(1, 1, data); err != nil {
				t.Fatal(err)
			}
			v := s.View()
			spec := manifest.Service{Name: "web", DependsOn: []manifest.Dependency{{Service: "db", Condition: manifest.Healthy}}}
			got := converge.Gate(v, state.Task{ID: "shop/web.1.1", Stack: "shop", Service: "web"}, &spec, func(t state.Task) state.Report {
				r, _ := v.Reports.Get(t.ID)
				return r.Value
			})
			if got != tt.want {
				t.Errorf("it says %q, want %q", got, tt.want)
			}
		})
	}
}
