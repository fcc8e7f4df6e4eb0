package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/rollout"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Relation is how a new tip of a source stands to the commit that was accepted before.
type Relation string

// The relations.
const (
	RelationFirst    Relation = ""         // nothing was accepted before
	RelationSame     Relation = "same"     // the same commit
	RelationForward  Relation = "forward"  // the usual case
	RelationRewind   Relation = "rewind"   // the tip is an ancestor of what was accepted
	RelationDiverged Relation = "diverged" // history was rewritten
)

// Review is what policy said of one stack of a revision: of what it would be, and of what would be done to get there. A stack that the revision no longer names has
// one when its removal was judged.
type Review struct {
	Deny     bool
	Findings []manifest.Problem
	Policy   string    // hash of the policy
	Until    time.Time // when the answer may change by itself
}

// Intake is a revision of a source with all that was found out about it.
type Intake struct {
	Source   string
	Bundle   *manifest.Bundle
	Reviews  map[string]Review // by stack
	Relation Relation
	Now      time.Time     // log time
	Unsigned *state.Reason // the signature is missing or unknown: the revision is Blocked as a whole

	approved bool // as if a person had said so
}

// Reasons that acceptance gives.
const (
	ReasonFirst     = "source.first"
	ReasonRewind    = "source.rewind"
	ReasonUnsigned  = "source.unsigned"
	ReasonBudget    = "prune.budget"
	ReasonRenamed   = "stack.renamed"
	ReasonPolicy    = rollout.ReasonPolicy
	ReasonBadPolicy = "policy.broken"
	ReasonRender    = "render.failed"
	ReasonOwned     = "stack.owned"
	ReasonSuspended = "stack.suspended"
	ReasonPinned    = "stack.pinned"
	ReasonRevision  = "revision"
	ReasonPruned    = "prune"
)

// maxProblems bounds what a stack remembers of its problems, so that an entry stays small.
const maxProblems = 50

// Accept says what a revision changes: which stacks follow it, which are blocked, which fail, which are to be removed. A stack that the revision does not change
// costs nothing. One broken or denied stack never holds another one back.
func Accept(v *state.View, in Intake) Plan {
	src, ok := v.Sources.Get(in.Source)
	if !ok {
		return Plan{}
	}
	a := accepting{v: v, in: in, src: src.Value, version: src.Version}
	a.run()
	return a.plan
}

type accepting struct {
	v       *state.View
	in      Intake
	src     state.Source
	version uint64
	plan    Plan
}

func (a *accepting) run() {
	rev := a.in.Bundle.Revision
	next := a.src
	next.Seen, next.Waiting, next.Trouble = rev, nil, nil
	next.Problems = nil
	for _, p := range a.in.Bundle.Problems {
		if p.Stack == "" && len(next.Problems) < maxProblems {
			next.Problems = append(next.Problems, p)
		}
	}
	for _, f := range a.in.Bundle.Found {
		if why := a.owned(f.Name); why.ID != "" {
			next.Problems = append(next.Problems, manifest.Problem{Severity: manifest.Error, Rule: why.ID, Stack: f.Name, Message: why.Message})
		}
	}
	gone := a.removed()
	next.Waiting = a.holds(gone)
	switch broken := a.broken(); {
	case broken != nil && len(next.Waiting) == 0:
		next.Trouble = broken
		if a.src.Trouble == nil || *a.src.Trouble != *broken {
			a.plan.Steps = append(a.plan.Steps, Step{Action: ActFail, Cause: CauseRevision, Source: a.in.Source, Revision: rev, Reason: *broken})
		}
	case len(next.Waiting) == 0:
		next.Accepted, next.PruneVolumes = rev, a.in.Bundle.Settings.PruneVolumes
		a.stacks()
		a.prune(gone)
	case !slices.Equal(next.Waiting, a.src.Waiting):
		for _, why := range next.Waiting {
			a.plan.Steps = append(a.plan.Steps, Step{Action: ActWait, Cause: CauseRevision, Source: a.in.Source, Revision: rev, Reason: why})
		}
	}
	if manifest.Hash(next) != manifest.Hash(a.src) {
		a.plan.Items = append(a.plan.Items, state.Item{state.Put(a.in.Source, a.version, next)})
	}
}

// broken says that the revision as a whole does not render, as when gitops.yaml can't be read: then nothing is known of its stacks, and nothing changes. Of a policy
// source it says that its rules can't be used: those of the revision before stay in force.
func (a *accepting) broken() *state.Reason {
	for _, p := range a.in.Bundle.Problems {
		if p.Stack == "" && p.Severity == manifest.Error {
			why := &state.Reason{ID: ReasonRender, Message: p.String()}
			if a.src.Policy {
				why.ID = ReasonBadPolicy
			}
			return why
		}
	}
	return nil
}

// holds lists why the revision as a whole waits for a person. An approval is of one commit.
func (a *accepting) holds(gone []string) []state.Reason {
	if a.in.Unsigned != nil {
		return []state.Reason{*a.in.Unsigned}
	}
	rev := a.in.Bundle.Revision
	if a.in.approved || rev.Commit != "" && a.src.Approved == rev.Commit {
		return nil
	}
	approve := "gitopsctl approve " + a.in.Source
	if rev.Commit != "" { // files that are planned before they are committed have none
		approve += " --revision " + short(rev)
	}
	var why []state.Reason
	if a.src.Accepted.Commit == "" && !a.src.Yes {
		why = append(why, state.Reason{ID: ReasonFirst, Message: "the first revision of a new source waits for a person: look at `gitopsctl plan`, then `" + approve + "`"})
	}
	if a.in.Relation == RelationRewind {
		why = append(why, state.Reason{ID: ReasonRewind, Message: fmt.Sprintf("%s is older than %s, which runs: somebody moved %s back; if that was meant, `%s`, else push the newer commit again",
			rev, short(a.src.Accepted), rev.Ref, approve)})
	}
	if r, yes := a.renamed(gone); yes {
		r.Message += "; if that was meant, `" + approve + "`"
		why = append(why, r)
	}
	if r, over := a.overBudget(gone); over {
		r.Message += "; if that was meant, `" + approve + "`"
		why = append(why, r)
	}
	return why
}

// now is log time, at the least that of the last entry.
func (a *accepting) now() time.Time {
	if a.in.Now.Before(a.v.At) {
		return a.v.At
	}
	return a.in.Now
}

// renamed says whether a stack that is gone left volumes and another one now lives in its directory: the data would not follow.
func (a *accepting) renamed(gone []string) (state.Reason, bool) {
	for _, name := range gone {
		old, _ := a.v.Stacks.Get(name)
		for _, f := range a.in.Bundle.Found {
			if f.Dir != old.Value.Dir || has(a.v.Stacks, f.Name) {
				continue
			}
			for _, vol := range a.v.Volumes.All() {
				if vol.Value.Stack == name && vol.Value.Kind != manifest.MountBind {
					stay := "stay under the old name"
					if a.withVolumes(old.Value) {
						stay = "would be removed with the old name"
					}
					return state.Reason{ID: ReasonRenamed, Message: fmt.Sprintf("stack %s is called %s now; its data (%s and what else it has) %s, and %s would start empty: give it the old name, with `name: %s`",
						name, f.Name, vol.Value.Name, stay, f.Name, name)}, true
				}
			}
		}
	}
	return state.Reason{}, false
}

func short(r manifest.Revision) string { return r.Commit[:min(8, len(r.Commit))] }

// removed lists the source's stacks that the revision no longer names, sorted. Of a revision that can't be read as a whole, nothing is known.
func (a *accepting) removed() []string {
	if a.in.Bundle.Settings.PruneOff || a.in.Unsigned != nil || a.broken() != nil {
		return nil
	}
	found := map[string]bool{}
	for _, f := range a.in.Bundle.Found {
		found[f.Name] = true
	}
	var gone []string
	for name, s := range a.v.Stacks.All() {
		if s.Value.Source == a.in.Source && !found[name] && !s.Value.Removing && !a.pruneOff(s.Value) {
			gone = append(gone, name)
		}
	}
	return gone
}

// withVolumes says whether the volumes of a stack that the revision no longer names go with it: by its own last word, or else by the revision's.
func (a *accepting) withVolumes(s state.Stack) bool {
	if s.Applied == nil {
		return false
	}
	rel, _ := a.v.Releases.Get(s.Applied.Release)
	return withVolumes(rel.Value, a.in.Bundle.Settings.PruneVolumes)
}

func (a *accepting) pruneOff(s state.Stack) bool {
	if s.Applied == nil {
		return false
	}
	r, _ := a.v.Releases.Get(s.Applied.Release)
	return r.Value.Stack.PruneOff
}

// overBudget says whether the revision removes more than it may unasked: more than the budget of the source's stacks, services or volumes, or all of one of these.
func (a *accepting) overBudget(gone []string) (state.Reason, bool) {
	budget := a.in.Bundle.Settings.PruneBudget
	if budget == 0 {
		budget = manifest.DefaultPruneBudget
	}
	stacks, services, lost := 0, 0, 0
	for name, s := range a.v.Stacks.All() {
		if s.Value.Source != a.in.Source || s.Value.Removing || s.Value.Applied == nil {
			continue
		}
		stacks++
		rel, _ := a.v.Releases.Get(s.Value.Applied.Release)
		services += len(rel.Value.Services)
		if slices.Contains(gone, name) {
			lost += len(rel.Value.Services)
			continue
		}
		at := slices.IndexFunc(a.in.Bundle.Stacks, func(n manifest.Stack) bool { return n.Name == name })
		if at < 0 || a.in.Bundle.Stacks[at].PruneOff {
			continue
		}
		for _, svc := range rel.Value.Names() {
			if a.in.Bundle.Stacks[at].Service(svc) == nil {
				lost++
			}
		}
	}
	over := func(lost, of int) bool { return lost > 0 && (lost == of || lost*100 > of*budget) }
	switch {
	case over(len(gone), stacks):
		return state.Reason{ID: ReasonBudget, Message: fmt.Sprintf("it removes %d of %d stacks (%s), the budget is %d%%", len(gone), stacks, strings.Join(gone, ", "), budget)}, true
	case over(lost, services):
		return state.Reason{ID: ReasonBudget, Message: fmt.Sprintf("it removes %d of %d services, the budget is %d%%", lost, services, budget)}, true
	}
	if data, of := a.lostVolumes(gone); over(len(data), of) {
		return state.Reason{ID: ReasonBudget, Message: fmt.Sprintf("it removes %d of %d volumes with their data (%s), the budget is %d%%", len(data), of, strings.Join(data, ", "), budget)}, true
	}
	return state.Reason{}, false
}

// stacks takes the revision's stacks one by one.
func (a *accepting) stacks() {
	rendered := map[string]*manifest.Stack{}
	for i := range a.in.Bundle.Stacks {
		rendered[a.in.Bundle.Stacks[i].Name] = &a.in.Bundle.Stacks[i]
	}
	problems := map[string][]manifest.Problem{}
	for _, p := range a.in.Bundle.Problems {
		if p.Stack != "" {
			problems[p.Stack] = append(problems[p.Stack], p)
		}
	}
	for _, f := range a.in.Bundle.Found {
		a.stack(f, rendered[f.Name], problems[f.Name])
	}
}

// owned says that a stack of that name is another source's.
func (a *accepting) owned(name string) state.Reason {
	e, ok := a.v.Stacks.Get(name)
	if !ok || e.Value.Source == a.in.Source || e.Value.Removing {
		return state.Reason{}
	}
	return state.Reason{ID: ReasonOwned, Message: fmt.Sprintf("stack %s belongs to source %s: give one of them another name", name, e.Value.Source)}
}

// stack says what the revision means for one stack.
func (a *accepting) stack(f manifest.FoundStack, spec *manifest.Stack, problems []manifest.Problem) {
	entry, known := a.v.Stacks.Get(f.Name)
	old := entry.Value
	rev := a.in.Bundle.Revision
	if why := a.owned(f.Name); why.ID != "" {
		a.plan.Steps = append(a.plan.Steps, Step{Action: ActBlock, Cause: CauseRevision, Source: a.in.Source, Stack: f.Name, Revision: rev, Reason: why})
		return
	}
	next := old
	next.Name, next.Source, next.Dir, next.Removing, next.WithVolumes = f.Name, a.in.Source, f.Dir, false, false
	next.Wanted = state.Wanted{Revision: rev, Problems: problems[:min(len(problems), maxProblems)], Decision: state.DecisionAccepted}
	review := a.in.Reviews[f.Name]
	var release state.Release
	switch {
	case spec == nil:
		next.Wanted.Decision = state.DecisionFailed
		next.Wanted.Reasons = []state.Reason{{ID: ReasonRender, Message: firstError(problems)}}
	default:
		release = releaseOf(spec)
		next.Wanted.Release = manifest.Hash(release)
		review.judge(&next.Wanted)
	}
	held := a.held(old, spec)
	if held != nil && held.ID == ReasonSuspended && old.Suspended == nil && next.Wanted.Decision == state.DecisionAccepted {
		next.Wanted.Reasons = []state.Reason{*held} // Git says so: status has it from here
	}
	if known && sameWanted(old.Wanted, next.Wanted) && old.Dir == next.Dir && !old.Removing && (held != nil || follows(old, next.Wanted)) {
		return
	}
	step := Step{Cause: CauseRevision, Source: a.in.Source, Stack: f.Name, Revision: rev}
	var item state.Item
	switch {
	case next.Wanted.Decision == state.DecisionFailed:
		step.Action, step.Reason = ActFail, next.Wanted.Reasons[0]
	case next.Wanted.Decision == state.DecisionBlocked:
		step.Action, step.Reason = ActBlock, next.Wanted.Reasons[0]
	case held != nil:
		step.Action, step.Reason = ActWait, *held
	default:
		if next.Applied == nil || next.Applied.Release != next.Wanted.Release {
			item = a.store(release, spec)
			Follow(&next, state.Applied{Revision: a.in.Bundle.Revision, Release: next.Wanted.Release}, a.now())
		}
		step.Action, step.Reason = ActAccept, state.Reason{ID: ReasonRevision, Message: fmt.Sprintf("%s asks for it", rev)}
	}
	item = append(item, state.Put(f.Name, entry.Version, next))
	a.plan.Items = append(a.plan.Items, item)
	a.plan.Steps = append(a.plan.Steps, step)
}

// judge writes the review into what is wanted of the stack.
func (r Review) judge(w *state.Wanted) {
	w.Verdict = state.Verdict{Policy: r.Policy, Deny: r.Deny, Until: r.Until}
	w.Problems = append(slices.Clone(w.Problems), r.Findings[:min(len(r.Findings), maxProblems)]...)
	if !r.Deny {
		return
	}
	w.Decision = state.DecisionBlocked
	for _, p := range r.Findings {
		if p.Severity == manifest.Error {
			w.Reasons = append(w.Reasons, state.Reason{ID: ReasonPolicy, Message: p.String()})
		}
	}
}

// held says why a stack does not follow Git although its revision is fine.
func (a *accepting) held(old state.Stack, spec *manifest.Stack) *state.Reason {
	switch {
	case old.Pinned != nil:
		return old.Pinned
	case old.Suspended != nil:
		return old.Suspended
	case spec != nil && spec.Suspended:
		return &state.Reason{ID: ReasonSuspended, Message: "its settings in Git say suspend: true"}
	}
	return nil
}

func sameWanted(a, b state.Wanted) bool {
	a.Revision, b.Revision = manifest.Revision{}, manifest.Revision{}
	return manifest.Hash(a) == manifest.Hash(b)
}

// follows says whether what is applied is what is wanted, or may not be.
func follows(s state.Stack, w state.Wanted) bool {
	return w.Decision != state.DecisionAccepted || s.Applied != nil && s.Applied.Release == w.Release
}

func firstError(ps []manifest.Problem) string {
	for _, p := range ps {
		if p.Severity == manifest.Error {
			return p.String()
		}
	}
	return "it does not render"
}

// Follow makes a release the one that a stack should be. The outcome of what was applied before goes into the history: superseded, if it had not ended.
func Follow(s *state.Stack, to state.Applied, now time.Time) {
	if s.Applied != nil && s.Applied.Revision != to.Revision { // the same one again, with a new secret, is no new line of history
		last := s.Outcome
		if last.Kind == "" {
			last.Kind, last.Ended = state.Superseded, now
			last.Reason = state.Reason{ID: ReasonRevision, Message: fmt.Sprintf("%s came before it was ready", to.Revision)}
		}
		s.History = append([]state.Outcome{last}, s.History...)
		s.History = s.History[:min(len(s.History), state.KeepHistory)]
	}
	s.Applied, s.Back, s.Banned = &to, nil, nil
	s.Outcome = state.Outcome{Revision: to.Revision, Release: to.Release, Started: now}
}

// releaseOf splits a rendered stack into itself and the hashes of its services.
func releaseOf(spec *manifest.Stack) state.Release {
	r := state.Release{Stack: *spec, Services: make(map[string]string, len(spec.Services))}
	r.Stack.Services = nil
	for i := range spec.Services {
		r.Services[spec.Services[i].Name] = manifest.Hash(&spec.Services[i])
	}
	return r
}

// Rendered puts a release and its specs together again; ok is false when a part of it is not kept any more.
func Rendered(v *state.View, release string) (manifest.Stack, bool) {
	r, ok := v.Releases.Get(release)
	if !ok {
		return manifest.Stack{}, false
	}
	out := r.Value.Stack
	for _, name := range r.Value.Names() {
		s, ok := v.Specs.Get(r.Value.Services[name])
		if !ok {
			return manifest.Stack{}, false
		}
		out.Services = append(out.Services, s.Value.Service)
	}
	return out, true
}

// Earlier is all that a failed rollout of the stack could go back to, gathered in one stack for policy to judge: the services of the stable release, and those that
// were stable on their own. ok is false where there is nothing to go back to.
func Earlier(v *state.View, stack string) (manifest.Stack, bool) {
	e, ok := v.Stacks.Get(stack)
	if !ok || e.Value.Applied == nil {
		return manifest.Stack{}, false
	}
	applied, _ := v.Releases.Get(e.Value.Applied.Release)
	stable := applied
	if e.Value.Stable != nil {
		stable, _ = v.Releases.Get(e.Value.Stable.Release)
	}
	out := stable.Value.Stack
	seen := map[string]bool{}
	for _, name := range applied.Value.Names() { // judged with its revision
		seen[applied.Value.Services[name]] = true
	}
	add := func(hash string) {
		if s, ok := v.Specs.Get(hash); ok && !seen[hash] {
			seen[hash] = true
			out.Services = append(out.Services, s.Value.Service)
		}
	}
	for _, name := range stable.Value.Names() {
		add(stable.Value.Services[name])
	}
	for _, svc := range v.Services.Below(stack + "/") {
		add(svc.Value.Stable)
	}
	return out, len(out.Services) > 0
}

// store makes the changes that put a release and those of its specs that are new into the log.
func (a *accepting) store(r state.Release, spec *manifest.Stack) state.Item {
	var item state.Item
	if h := manifest.Hash(r); !has(a.v.Releases, h) {
		item = append(item, state.Set(h, r))
	}
	for i := range spec.Services {
		h := manifest.Hash(&spec.Services[i])
		if !has(a.v.Specs, h) {
			item = append(item, state.Set(h, state.Spec{Service: spec.Services[i]}))
		}
	}
	return item
}

func has[T state.Object](t state.Table[T], key string) bool {
	_, ok := t.Get(key)
	return ok
}

// prune marks the stacks that are gone from Git. Their tasks are stopped by Decide. A stack that policy keeps from being removed is Blocked.
func (a *accepting) prune(gone []string) {
	rev := a.in.Bundle.Revision
	for _, name := range gone {
		e, _ := a.v.Stacks.Get(name)
		next := e.Value
		step := Step{Action: ActRemove, Cause: CausePrune, Source: a.in.Source, Stack: name, Revision: rev, Reason: state.Reason{ID: ReasonPruned, Message: fmt.Sprintf("%s no longer names it", rev)}}
		if review := a.in.Reviews[name]; review.Deny {
			next.Wanted = state.Wanted{Revision: rev}
			review.judge(&next.Wanted)
			if sameWanted(e.Value.Wanted, next.Wanted) {
				continue
			}
			step.Action, step.Reason = ActBlock, next.Wanted.Reasons[0]
		} else {
			next.Removing, next.WithVolumes = true, a.withVolumes(next)
		}
		a.plan.Items = append(a.plan.Items, state.Item{state.Put(name, e.Version, next)})
		a.plan.Steps = append(a.plan.Steps, step)
	}
}

// sortedKeys are the keys of a map in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
