package api

import (
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// statusOf tells of one stack and its source, or with an empty name of all.
func statusOf(v *state.View, stack string) (Status, error) {
	st := Status{Index: v.Index, At: v.At, Sources: []SourceStatus{}, Stacks: []reconcile.StackStatus{}}
	if stack == "" {
		st.Sources = sourcesOf(v)
		for _, one := range reconcile.Statuses(v) {
			st.Stacks = append(st.Stacks, whole(one))
		}
		return st, nil
	}
	one, ok := reconcile.StatusOf(v, stack)
	if !ok {
		return st, noStack(v, stack)
	}
	st.Stacks = append(st.Stacks, whole(one))
	for _, s := range sourcesOf(v) {
		if s.Name == one.Source {
			st.Sources = append(st.Sources, s)
		}
	}
	return st, nil
}

// whole gives a stack without services an empty list of them: a program should not have to think of null.
func whole(s reconcile.StackStatus) reconcile.StackStatus {
	if s.Services == nil {
		s.Services = []reconcile.ServiceStatus{}
	}
	return s
}

func noStack(v *state.View, name string) *Error { return NotFoundf("stack", name, names(v.Stacks)) }

func noSource(v *state.View, name string) *Error { return NotFoundf("source", name, names(v.Sources)) }

func noTask(v *state.View, id string) *Error { return NotFoundf("task", id, names(v.Tasks)) }

// names are the keys of a table, in order.
func names[T state.Object](t state.Table[T]) []string {
	out := make([]string, 0, t.Len())
	for k := range t.All() {
		out = append(out, k)
	}
	return out
}

func sourcesOf(v *state.View) []SourceStatus {
	stacks := map[string]int{}
	for _, s := range v.Stacks.All() {
		stacks[s.Value.Source]++
	}
	out := []SourceStatus{}
	for name, e := range v.Sources.All() {
		s := e.Value
		st := SourceStatus{Name: name, URL: s.URL, Branch: s.Branch, Tag: s.Tag, Path: s.Path, Interval: s.Interval, Verify: s.Verify, Auth: s.Auth != "",
			Seen: s.Seen, Accepted: s.Accepted, Waiting: s.Waiting, Trouble: s.Trouble, Problems: s.Problems, Stacks: stacks[name], Policy: s.Policy, PolicyHash: s.PolicyHash}
		switch {
		case s.Removing:
			st.State = SourceRemoving
		case s.Trouble != nil:
			st.State = SourceFailing
		case len(s.Waiting) > 0:
			st.State = SourceWaiting
		case s.Seen.Commit == "":
			st.State = SourceNew
		default:
			st.State = SourceFollowing
		}
		out = append(out, st)
	}
	return out
}

func historyOf(v *state.View, stack string) (StackHistory, error) {
	e, ok := v.Stacks.Get(stack)
	if !ok {
		return StackHistory{}, noStack(v, stack)
	}
	s := e.Value
	h := StackHistory{Stack: stack, Pinned: s.Pinned, Outcomes: []state.Outcome{}}
	if s.Stable != nil {
		h.Stable = s.Stable.Revision
	}
	if s.Applied != nil {
		h.Outcomes = append(h.Outcomes, s.Outcome)
	}
	h.Outcomes = append(h.Outcomes, s.History...)
	return h, nil
}

func volumesOf(v *state.View) []VolumeInfo {
	out := []VolumeInfo{}
	for k, e := range v.Volumes.All() {
		out = append(out, VolumeInfo{Key: k, Volume: e.Value, Path: volumePath(v, e.Value), NodeName: nodeName(v, e.Value.Node), Since: e.At})
	}
	slices.SortStableFunc(out, func(a, b VolumeInfo) int { return strings.Compare(a.Stack+"\x00"+a.Name, b.Stack+"\x00"+b.Name) })
	return out
}

// nodeName is what people call a node.
func nodeName(v *state.View, id string) string {
	n, _ := v.Nodes.Get(id)
	return n.Value.Name
}

// secretsOf lists the secrets that people or revisions brought. What the cluster keeps for itself, as its own key and the credentials of sources, has a / in its
// name and no stack.
func secretsOf(v *state.View) []SecretInfo {
	out := []SecretInfo{}
	for k, e := range v.Secrets.All() {
		if ownSecret(k) {
			continue
		}
		out = append(out, SecretInfo{Name: k, Stack: e.Value.Stack, Since: e.At, Nodes: len(e.Value.Keys)})
	}
	return out
}

// ownSecret says that a secret is the cluster's own, and none of a person's.
func ownSecret(name string) bool { return strings.HasPrefix(name, ".") }

// EventQuery says which events.
type EventQuery struct {
	Stack string // empty = all
	Tail  int    // the last so many of those that there are; -1 = all
	Watch bool   // and those that come
	After string // of those of a watch: only events of a greater Key; empty = all
}

// eventsAfter lists the events whose key is greater than after.
func eventsAfter(v *state.View, after string, q EventQuery) []EventInfo {
	out := []EventInfo{}
	for k, e := range v.Events.All() {
		if k > after && (q.Stack == "" || e.Value.Stack == q.Stack) {
			out = append(out, EventInfo{Key: k, Event: e.Value})
		}
	}
	return out
}

// Ending is what a stack's way to a revision came to.
type Ending string

// The endings. The first five are those of state.OutcomeKind. An empty one means that it goes on.
const (
	EndDeployed   Ending = Ending(state.Deployed)
	EndRolledBack Ending = Ending(state.RolledBack)
	EndSuperseded Ending = Ending(state.Superseded)
	EndAborted    Ending = Ending(state.Aborted)
	EndStalled    Ending = Ending(state.Stalled)
	EndBlocked    Ending = "Blocked"   // the revision, or the stack in it, may not run: policy, signature, budget, approval
	EndFailed     Ending = "Failed"    // it does not render
	EndSuspended  Ending = "Suspended" // the stack does not follow Git: a person's word, or that of its settings
	EndPinned     Ending = "Pinned"    // the stack was rolled back by a person
	EndRemoved    Ending = "Removed"   // the revision no longer names it, and nothing of it is left
)

// Progress is how far a stack is on its way to a revision.
type Progress struct {
	Stack    string            `json:"stack"`
	Revision manifest.Revision `json:"revision"`
	End      Ending            `json:"end,omitempty"`
	To       manifest.Revision `json:"to,omitzero"` // RolledBack: to which
	Reason   state.Reason      `json:"reason,omitzero"`
	Services int               `json:"services"`
	// Tasks: how many there should be, how many are of what the stack is told to be, and how many do their work. While it goes on, they are told of the revision.
	Desired int `json:"desired"`
	Updated int `json:"updated"`
	Ready   int `json:"ready"`
}

// journey follows the stacks of a source to one revision. What a stack was told to be when the journey began is what it waits for: a newer
// revision that comes meanwhile supersedes it.
type journey struct {
	source   string
	stack    string // empty = all of the source
	revision manifest.Revision
	targets  map[string]string // stack -> release that it was told to be, "" = none
}

// look tells where each stack is; done says that all came to an end.
func (j *journey) look(v *state.View) (all []Progress, done bool) {
	if j.targets == nil {
		j.targets = map[string]string{}
		for name, e := range v.Stacks.All() {
			if e.Value.Source != j.source || j.stack != "" && name != j.stack {
				continue
			}
			j.targets[name] = ""
			if e.Value.Applied != nil {
				j.targets[name] = e.Value.Applied.Release
			}
		}
	}
	src, _ := v.Sources.Get(j.source)
	done = true
	all = []Progress{}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for k := range j.targets {
			if !yield(k) {
				return
			}
		}
	}) {
		p := j.progress(v, src.Value, name)
		done = done && p.End != ""
		all = append(all, p)
	}
	return all, done
}

func (j *journey) progress(v *state.View, src state.Source, name string) Progress {
	p := Progress{Stack: name, Revision: j.revision}
	e, ok := v.Stacks.Get(name)
	if !ok {
		p.End, p.Reason = EndRemoved, state.Reason{ID: reconcile.ReasonPruned, Message: "nothing of it is left"}
		return p
	}
	s := e.Value
	st, _ := reconcile.StatusOf(v, name)
	p.Services = len(st.Services)
	for _, svc := range st.Services {
		p.Desired, p.Updated, p.Ready = p.Desired+svc.Desired, p.Updated+svc.Updated, p.Ready+svc.Ready
	}
	if len(st.Reasons) > 0 {
		p.Reason = st.Reasons[0]
	}
	atTarget := s.Applied != nil && s.Applied.Release == s.Wanted.Release
	switch {
	case s.Removing:
		return p
	case len(src.Waiting) > 0:
		p.End, p.Reason = EndBlocked, src.Waiting[0]
	case src.Trouble != nil && src.Trouble.ID == reconcile.ReasonRender:
		p.End, p.Reason = EndFailed, *src.Trouble
	case s.Wanted.Decision == state.DecisionFailed:
		p.End = EndFailed
	case s.Wanted.Decision == state.DecisionBlocked:
		p.End = EndBlocked
	case s.Applied != nil && s.Applied.Release != j.targets[name]:
		j.superseded(s, name, &p)
	case !atTarget && s.Pinned != nil:
		p.End, p.Reason = EndPinned, *s.Pinned
	case !atTarget && s.Suspended != nil:
		p.End, p.Reason = EndSuspended, *s.Suspended
	case !atTarget:
		// Acceptance applies in the same entry, so what was accepted and not applied is held by the stack's own settings.
		p.End, p.Reason = EndSuspended, state.Reason{ID: reconcile.ReasonSuspended, Message: "its settings in Git say suspend: true"}
	case s.Outcome.Kind == "":
		p.Desired, p.Updated = 0, 0
		for _, svc := range st.Services {
			desired, updated := asked(v, s, svc)
			p.Desired, p.Updated = p.Desired+desired, p.Updated+updated
		}
	default:
		p.End, p.To = Ending(s.Outcome.Kind), s.Outcome.To
		if s.Outcome.Reason.ID != "" {
			p.Reason = s.Outcome.Reason
		}
	}
	return p
}

// asked counts the tasks of a service that the applied release asks for, and those that are of it. A service's own counts are about its target, which is another one
// until the rollout begins, and after it failed.
func asked(v *state.View, s state.Stack, svc reconcile.ServiceStatus) (desired, updated int) {
	rel, _ := v.Releases.Get(s.Applied.Release)
	want := rel.Value.Services[svc.Name]
	if now, ok := v.Services.Get(state.ServiceKey(s.Name, svc.Name)); ok && now.Value.Target == want {
		return svc.Desired, svc.Updated
	}
	spec, _ := v.Specs.Get(want)
	if m := spec.Value.Service.Mode; m == manifest.Global || m == manifest.GlobalJob {
		return v.Nodes.Len(), 0
	}
	return spec.Value.Service.Replicas, 0
}

// superseded finds what became of the release that the journey goes to, now that the stack has another.
func (j *journey) superseded(s state.Stack, name string, p *Progress) {
	for _, o := range s.History {
		if o.Release == j.targets[name] {
			p.End, p.To, p.Reason = Ending(o.Kind), o.To, o.Reason
			return
		}
	}
	p.End = EndSuperseded
	p.Reason = state.Reason{ID: reconcile.ReasonRevision, Message: s.Applied.Revision.String() + " came before it was ready"}
}
