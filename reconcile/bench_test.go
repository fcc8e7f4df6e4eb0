package reconcile_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// converged is a converged cluster of one node: stacks of five services each, one task a service, all ready.
func converged(tb testing.TB, stacks int) (*state.View, reconcile.Now) {
	tb.Helper()
	s := state.New()
	now := reconcile.Now{Log: time.Unix(1_700_000_000, 0).UTC(), Wall: time.Unix(1_700_000_000, 0).UTC()}
	apply := func(items ...state.Item) {
		tb.Helper()
		now.Log = now.Log.Add(time.Second)
		if _, err := s.Try(now.Log, items); err != nil {
			tb.Fatal(err)
		}
	}
	apply(state.Item{state.Put("n1", 0, state.Node{Name: "n1", Block: "10.0.0.0/9", Platform: "linux/amd64", CPU: 64e9, Memory: 1 << 40})},
		state.Item{state.Put("src", 0, state.Source{Name: "src", Yes: true})})
	b := &manifest.Bundle{Source: "src", Revision: manifest.Revision{Ref: "main", Commit: "c1"}}
	for i := range stacks {
		st := manifest.Stack{Name: fmt.Sprintf("s%04d", i), Networks: []manifest.Network{{Name: fmt.Sprintf("s%04d_default", i), Key: "default"}}}
		for k := range 5 {
			svc := manifest.Service{Name: fmt.Sprintf("web%d", k), Replicas: 1, Networks: []manifest.Attachment{{Network: fmt.Sprintf("s%04d_default", i)}},
				Containers: []manifest.Container{{Name: fmt.Sprintf("web%d", k), Image: "demo/web:1", Env: map[string]string{"A": "b", "STACK": st.Name}}}}
			manifest.Resolve(&svc)
			st.Services = append(st.Services, svc)
		}
		b.Stacks = append(b.Stacks, st)
		b.Found = append(b.Found, manifest.FoundStack{Name: st.Name, Dir: st.Name})
	}
	plan := reconcile.Accept(s.View(), reconcile.Intake{Source: "src", Bundle: b})
	apply(plan.Items...)
	for range 20 {
		now.Log = now.Log.Add(10 * time.Second)
		plan := reconcile.Decide(s.View(), now)
		if plan.Empty() {
			break
		}
		apply(plan.Items...)
		var reports []state.Item
		for id := range s.View().Tasks.All() {
			reports = append(reports, state.Item{state.Set(id, state.Report{Node: "n1", Phase: state.PhaseRunning, Health: state.HealthHealthy, Attempt: 1})})
		}
		apply(reports...)
	}
	return s.View(), now
}

// BenchmarkDecideUnchanged is a full pass over 1,000 stacks of 5 services that are all as they should be. The target is 50 ms.
func BenchmarkDecideUnchanged(b *testing.B) {
	v, now := converged(b, 1000)
	b.ReportAllocs()
	for b.Loop() {
		if p := reconcile.Decide(v, now); !p.Empty() {
			b.Fatalf("the plan is not empty: %+v", p.Steps[:min(3, len(p.Steps))])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N)/50, "of-target")
}
