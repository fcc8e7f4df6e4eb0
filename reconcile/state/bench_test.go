package state

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// fleet is a state of n stacks of five services with one task each.
func fleet(tb testing.TB, n int) *State {
	tb.Helper()
	s := New()
	index := uint64(0)
	rev := manifest.Revision{}
	for i := range n {
		stack := fmt.Sprintf("stack-%04d", i)
		rel := Release{Services: map[string]string{}}
		item := Item{Put(stack, 0, Stack{Name: stack, Source: "fleet", Dir: stack, Wanted: Wanted{Revision: rev, Release: stack, Decision: DecisionAccepted}})}
		for j := range 5 {
			service := fmt.Sprintf("service-%d", j)
			spec := manifest.Hash([]string{stack, service})
			rel.Services[service] = spec
			id := TaskID(stack, service, 1, 1)
			var full manifest.Service
			full.Name = service
			item = append(item,
				Put(spec, 0, Spec{Service: full}),
				Put(ServiceKey(stack, service), 0, Service{Target: spec, Stable: spec, Started: epoch}),
				Put(id, 0, Task{
					ID: id, Stack: stack, Service: service, Slot: 1, Gen: 1, Node: "n1", Spec: spec, Desired: DesiredRun,
					Addrs: map[string]string{"default": "10.0.0.1"},
				}),
				Put(id, 0, Report{Node: "n1", Phase: PhaseRunning, Health: HealthHealthy, Attempt: 1}),
			)
		}
		item = append(item, Put(stack, 0, rel))
		index++
		apply(tb, s, index, 1, encode(tb, Command{At: epoch.Add(time.Duration(i)), Items: []Item{item}}))
	}
	return s
}

// The cost of an entry is that of its change: the same in a small and in a large state.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n, "stacks"), func(b *testing.B) {
			s := fleet(b, n)
			index := s.View().Index
			id := TaskID("stack-0007", "service-2", 1, 1)
			var log [][]byte
			for i := range keepRequests * 2 {
				log = append(log, encode(b, Command{At: epoch, Request: fmt.Sprint(i), Items: []Item{{Set(id, Report{Node: "n1", Phase: PhaseRunning, Attempt: i})}}}))
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				index++
				if _, err := s.Apply(index, 1, log[i%len(log)]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSnapshot(b *testing.B) {
	s := fleet(b, 1000)
	lines := snapshot(s)
	size := 0
	for _, l := range lines {
		size += len(l) + 1
	}
	b.Run("write", func(b *testing.B) {
		b.SetBytes(int64(size))
		for b.Loop() {
			for range s.Freeze().Lines() {
			}
		}
	})
	b.Run("restore", func(b *testing.B) {
		b.SetBytes(int64(size))
		for b.Loop() {
			if _, err := Restore(slices.Values(lines)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkMemory reports what the facts of 1,000 stacks of five services occupy.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := fleet(b, 1000)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		runtime.KeepAlive(s)
	}
}
