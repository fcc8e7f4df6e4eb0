package converge

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// The kinds of drift that a task can show.
const (
	DriftMissing = "missing"
	DriftStopped = "stopped"
	DriftExtra   = "extra"
	DriftPaused  = "paused"
	DriftLimits  = "limits"
	DriftImage   = "image"
)

// Reasons that drift gives, by its first kind.
const (
	ReasonDriftMissing = "drift.missing"
	ReasonDriftPaused  = "drift.paused"
	ReasonDriftLimits  = "drift.limits"
	ReasonDriftImage   = "drift.image"
)

// drift compares what runs with what should, field by field. Paused comes first: nothing else can be set on a frozen container.
func (n *node) drift() []state.Drift {
	var out []state.Drift
	add := func(kind, path, want, have string) {
		if !slices.ContainsFunc(n.a.Ignore, func(i string) bool { return path == i || strings.HasSuffix(path, "."+i) }) {
			out = append(out, state.Drift{Kind: kind, Path: path, Want: want, Have: have})
		}
	}
	for _, c := range n.cur {
		if c.Phase == Paused {
			add(DriftPaused, c.Name, "running", "paused")
		}
	}
	for _, c := range n.cur {
		at := slices.IndexFunc(n.a.Spec.Containers, func(s manifest.Container) bool { return s.Name == c.Name })
		if at < 0 {
			continue
		}
		want, have := n.a.Spec.Containers[at].Resources, c.Limits
		if differs(int64(want.Memory), int64(have.Memory), 0) {
			add(DriftLimits, c.Name+".resources.memory", limit(want.Memory), limit(have.Memory))
		}
		if differs(int64(want.CPU), int64(have.CPU), cpuGrain) {
			add(DriftLimits, c.Name+".resources.cpu", limit(want.CPU), limit(have.CPU))
		}
		if differs(want.Pids, have.Pids, 0) {
			add(DriftLimits, c.Name+".resources.pids", limit(count(want.Pids)), limit(count(have.Pids)))
		}
	}
	for _, c := range n.cur {
		if want := n.images()[c.Name]; want != "" && c.Digest != "" && want != c.Digest {
			add(DriftImage, c.Name+".image", want, c.Digest)
		}
	}
	return out
}

// cpuGrain is the kernel's: quotas are set in microseconds of a tenth of a second.
const cpuGrain = 1e9 / 1e5

// differs compares a limit of the spec (0 or less = none) with the kernel's (0 = unknown, less = none).
func differs(want, have, grain int64) bool {
	switch {
	case have == 0, want <= 0 && have < 0:
		return false
	case want <= 0 || have < 0:
		return true
	}
	return want-have > grain || have-want > grain
}

// count is a number of things.
type count int64

func (c count) String() string { return strconv.FormatInt(int64(c), 10) }

func limit[T interface {
	~int64
	fmt.Stringer
}](v T) string {
	if v <= 0 {
		return "none"
	}
	return v.String()
}

// Drifts compares everything that is assigned and should run with what is there now: for people who ask. What the node would set right within moments is
// told all the same.
func Drifts(in Input) map[string][]state.Drift {
	out := map[string][]state.Drift{}
	byTask := map[string][]Container{}
	for _, c := range in.Containers {
		byTask[c.Task] = append(byTask[c.Task], c)
	}
	assigned := map[string]bool{}
	for i := range in.Assigned {
		a := &in.Assigned[i]
		assigned[a.ID] = true
		if a.Desired != state.DesiredRun || a.Last.Phase != state.PhaseRunning {
			continue
		}
		n := node{in: &in, a: a, mem: in.Memory[a.ID], all: byTask[a.ID]}
		n.cur, _ = newest(n.all)
		if d := n.compare(); len(d) > 0 {
			out[a.ID] = d
		}
	}
	for _, c := range in.Containers {
		if !assigned[c.Task] {
			out[c.Task] = append(out[c.Task], state.Drift{Kind: DriftExtra, Path: c.Name, Have: c.ID})
		}
	}
	return out
}

func (n *node) compare() []state.Drift {
	var out []state.Drift
	for _, c := range n.a.Spec.Containers {
		at := slices.IndexFunc(n.cur, func(o Container) bool { return o.Name == c.Name })
		switch {
		case at < 0:
			out = append(out, state.Drift{Kind: DriftMissing, Path: c.Name, Want: "running", Have: "none"})
		case n.cur[at].Phase != Running && n.cur[at].Phase != Paused:
			out = append(out, state.Drift{Kind: DriftStopped, Path: c.Name, Want: "running", Have: string(n.cur[at].Phase)})
		}
	}
	return append(out, n.drift()...)
}
