package reconcile

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// Due lists the stacks that have to be decided again, sorted: those that something changed for since all were decided at the index given, those whose wake time
// came, and, when something gave up a place, those that wait for one. Deciding only these gives what deciding all would give.
func Due(v *state.View, decided uint64, wakes map[string]time.Time, now time.Time) []string {
	set := map[string]bool{}
	all := decided == 0
	for _, table := range []string{"stacks", "services", "tasks", "reports"} {
		changed, complete := v.Since(decided, table)
		all = all || !complete
		for _, k := range changed {
			name, _, _ := strings.Cut(k, "/")
			set[name] = true
		}
	}
	nodes, _ := v.Since(decided, "nodes")
	all = all || len(nodes) > 0
	// A task that is gone leaves its place, one that changed in place may have left a port, and a network its subnet.
	tasks, _ := v.Since(decided, "tasks")
	volumes, _ := v.Since(decided, "volumes") // nor may a task start before the data that it would find are removed
	networks, _ := v.Since(decided, "networks")
	if len(tasks)+len(volumes)+len(networks) > 0 && !all {
		for key, s := range v.Services.All() {
			if s.Value.Reason.ID == ReasonNoPlace || s.Value.Reason.ID == ReasonNoAddress {
				name, _, _ := strings.Cut(key, "/")
				set[name] = true
			}
		}
	}
	if all {
		for name := range v.Stacks.All() {
			set[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(wakes)) {
		if !now.Before(wakes[name]) {
			set[name] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}
