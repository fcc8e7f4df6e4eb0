package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file holds all that asks policy, and which policy that is. Two gates are asked before a stack is told to be something else: whether what it would be may
// run, and whether what would be done to it may be done. What follows from that (batches, heals, stops) is never asked about.

// Reasons that have to do with the policy source.
const (
	ReasonNewPolicy = "policy.changed"
	ReasonNoPolicy  = "policy.missing"
)

// errNoPolicy says that nothing can be judged.
var errNoPolicy = errors.New("its policy is not known yet")

// policySource is the source that holds the policy, if there is one.
func policySource(v *state.View) (state.Source, bool) {
	for _, e := range v.Sources.All() {
		if e.Value.Policy && !e.Value.Removing {
			return e.Value, true
		}
	}
	return state.Source{}, false
}

// inForce is the policy that judges now.
func (n *Node) inForce() (*policy.Engine, error) {
	if e := n.engine.Load(); e != nil {
		return e, nil
	}
	src, _ := policySource(n.View())
	return nil, fmt.Errorf("source %s, which holds the policy, was not read since this agent started, and nothing new runs before that: `gitopsctl source test %s` says what is wrong with it: %w",
		src.Name, src.Name, errNoPolicy)
}

func (n *Node) policyHash() string {
	if e := n.engine.Load(); e != nil {
		return e.Hash()
	}
	return ""
}

// recall puts the policy that was accepted last in force again, before any other source is looked at. From here Git may be lost; where the files of that policy are
// lost too, or none was accepted yet, the source is asked.
func (l *leader) recall(ctx context.Context) error {
	s, ok := policySource(l.View())
	if !ok { // another leader may have removed it
		return l.ask(ctx, func(l *leader) error { return l.judgeBy(ctx, l.cfg.Policy) })
	}
	tip := Tip{Source: s.Name}
	src, err := l.source(s)
	if err == nil && s.Accepted.Commit != "" {
		var in *intake
		if in, err = l.ready(ctx, s, s.Accepted); err == nil && in.engine != nil {
			return l.ask(ctx, func(l *leader) error { return l.enforce(ctx, s.Name, in) })
		}
		l.log.Warn("the policy that was in force can't be read again; asking its source", "source", s.Name, "revision", s.Accepted.String(), "err", err)
	}
	if err == nil || s.Accepted.Commit != "" {
		tip.Revision, err = l.cfg.Sources.Newest(ctx, src)
	}
	tip.Err = err
	_ = l.tip(ctx, tip) // what is wrong is told there, and tried again with all other sources
	return ctx.Err()
}

// compile makes a policy of what a policy source says. What is wrong with it is among the problems of the revision, so that it is not accepted.
func (n *Node) compile(ctx context.Context, loaded *Loaded) (*intake, error) {
	in := &intake{loaded: loaded}
	if loaded.Unsigned != nil || manifest.HasErrors(loaded.Bundle.Problems) {
		return in, nil
	}
	engine, err := n.cfg.Policy.With(ctx, loaded.Policy)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		loaded.Bundle.Problems = append(loaded.Bundle.Problems, policy.Problems(reconcile.ReasonBadPolicy, err)...)
		return in, nil
	}
	in.engine = engine
	return in, nil
}

// enforce puts the policy of an accepted revision of the policy source in force. Only the loop calls it.
func (l *leader) enforce(ctx context.Context, source string, in *intake) error {
	e, ok := l.View().Sources.Get(source)
	rev := in.loaded.Bundle.Revision
	if in.engine == nil || !ok || e.Value.Accepted != rev {
		return nil
	}
	if hash := in.engine.Hash(); e.Value.PolicyHash != hash {
		next := e.Value
		next.PolicyHash = hash
		plan := reconcile.Plan{
			Steps: []reconcile.Step{{Action: reconcile.ActAccept, Cause: reconcile.CauseRevision, Source: source, Revision: rev,
				Reason: state.Reason{ID: ReasonNewPolicy, Message: fmt.Sprintf("policy %.12s of %s is in force", hash, rev)}}},
			Items: []state.Item{{state.Put(source, e.Version, next)}},
		}
		if err := l.proposePlan(ctx, &plan, l.View()); err != nil {
			return err
		}
	}
	return l.judgeBy(ctx, in.engine)
}

// judgeBy puts a policy in force and has everything judged by it.
func (l *leader) judgeBy(ctx context.Context, engine *policy.Engine) error {
	was := l.engine.Swap(engine)
	if was != nil && was.Hash() == engine.Hash() && !l.judged.IsZero() {
		return nil
	}
	if was == nil {
		l.cfg.Sources.Trigger("") // what waited for it
	}
	return l.judgeAll(ctx)
}

// renewal is when verdicts are to be made again although policy did not change, or registries to be asked again; zero = never.
func (l *leader) renewal() time.Time {
	e := l.engine.Load()
	if e == nil || l.judged.IsZero() {
		return time.Time{}
	}
	at := e.Renew(l.judged)
	for _, in := range l.intakes {
		if again := in.asked.Add(askEvery); in.open && (at.IsZero() || again.Before(at)) {
			at = again
		}
	}
	return at
}

// renew does what the time of renewal has come for: an exemption ended, time passed that rules look at, or registries are to be asked again. Those are asked
// beside the loop, when their source is looked at.
func (l *leader) renew(ctx context.Context) error {
	now := l.cfg.Now()
	for source, in := range l.intakes {
		if in.open && !now.Before(in.asked.Add(askEvery)) {
			next := *in
			next.asked = now
			l.intakes[source] = &next
			l.cfg.Sources.Trigger(source)
		}
	}
	if at := l.engine.Load().Renew(l.judged); at.IsZero() || now.Before(at) {
		return nil
	}
	return l.judgeAll(ctx)
}

// judgeAll makes all verdicts again, by what is known of images.
func (l *leader) judgeAll(ctx context.Context) error {
	l.judged = l.cfg.Now()
	if err := l.judgeKept(ctx); err != nil {
		return err
	}
	for _, source := range slices.Sorted(maps.Keys(l.intakes)) {
		if e, ok := l.View().Sources.Get(source); !ok || e.Value.Policy {
			continue
		}
		anew := *l.intakes[source]
		if err := l.verdicts(ctx, &anew, nil); err != nil {
			return err
		}
		if anew.policy != l.intakes[source].policy { // it may want to know more, and at once
			anew.asked = time.Time{}
		}
		l.intakes[source] = &anew
		if err := l.again(ctx, source); err != nil {
			return err
		}
	}
	return l.judgeEarlier(ctx, keys(l.View().Stacks))
}

// judgeKept asks current policy about the stacks of sources that were not fetched in this term, as the log has them: Git may be out of reach for long. One that policy
// denies now is Blocked; the rest waits for the source, as does the place in the file where the denial has its cause.
func (l *leader) judgeKept(ctx context.Context) error {
	engine, err := l.inForce()
	if err != nil {
		return err
	}
	for name, e := range l.View().Stacks.All() {
		w := e.Value.Wanted
		if _, fetched := l.intakes[e.Value.Source]; fetched || e.Value.Removing || w.Decision != state.DecisionAccepted || w.Verdict.Policy == engine.Hash() {
			continue
		}
		spec, ok := reconcile.Rendered(l.View(), w.Release)
		if !ok {
			continue
		}
		r, err := l.judge(ctx, engine, policy.Input{Gate: policy.RevisionGate, Stack: spec}, nil)
		if err != nil {
			return err
		}
		if !r.Deny {
			continue
		}
		next := e.Value
		next.Wanted.Decision, next.Wanted.Problems = state.DecisionBlocked, r.Findings
		next.Wanted.Verdict = state.Verdict{Policy: r.Policy, Deny: true, Until: r.Until}
		next.Wanted.Reasons = []state.Reason{{ID: reconcile.ReasonPolicy, Message: firstError(r)}}
		plan := reconcile.Plan{
			Steps: []reconcile.Step{{Action: reconcile.ActBlock, Cause: reconcile.CauseRevision, Source: next.Source, Stack: name, Revision: w.Revision, Reason: next.Wanted.Reasons[0]}},
			Items: []state.Item{{state.Put(name, e.Version, next)}},
		}
		if err := l.proposePlan(ctx, &plan, l.View()); err != nil {
			return err
		}
	}
	return nil
}

// review hardens each stack of a revision, writes the defaults into it, asks registries about images where policy wants to know, and asks policy about it. A stack that
// the revision before had as well, and that policy had nothing to say of, is not asked about again: a commit costs what it changes.
func (n *Node) review(ctx context.Context, loaded *Loaded, before *intake) (*intake, error) {
	in := &intake{loaded: loaded, applied: map[string][]policy.Applied{}, hashes: map[string]string{}}
	for i := range loaded.Bundle.Stacks {
		st := &loaded.Bundle.Stacks[i]
		*st, in.applied[st.Name] = policy.Harden(*st, n.cfg.Harden)
		st.Services = slices.Clone(st.Services)
		for k := range st.Services {
			manifest.Resolve(&st.Services[k])
		}
		in.hashes[st.Name] = manifest.Hash(st)
	}
	return in, n.reviewWith(ctx, in, before)
}

// reviewWith asks registries and policy about a revision that is hardened.
func (n *Node) reviewWith(ctx context.Context, in, before *intake) error {
	engine, err := n.inForce()
	if err != nil {
		return err
	}
	n.describe(ctx, engine, in, before)
	return n.verdicts(ctx, in, before)
}

// verdicts asks policy about each stack of a revision.
func (n *Node) verdicts(ctx context.Context, in, before *intake) error {
	engine, err := n.inForce()
	if err != nil {
		return err
	}
	in.reviews, in.policy, in.open = map[string]reconcile.Review{}, engine.Hash(), false
	for i := range in.loaded.Bundle.Stacks {
		st := &in.loaded.Bundle.Stacks[i]
		if before != nil && before.policy == in.policy && before.hashes[st.Name] == in.hashes[st.Name] && maps.Equal(before.said[st.Name], in.said[st.Name]) {
			if r, known := before.reviews[st.Name]; known && !r.Deny && len(r.Findings) == 0 && r.Until.IsZero() {
				in.reviews[st.Name] = r
				continue
			}
		}
		said := in.said[st.Name]
		if in.reviews[st.Name], err = n.judge(ctx, engine, policy.Input{Gate: policy.RevisionGate, Stack: *st}, said); err != nil {
			return err
		}
		_, _, open := n.imageUsers(ctx, engine, st, said)
		in.open = in.open || len(open) > 0
	}
	return nil
}

// judge asks policy once, by what registries said of the stack's images. That a rule fails is a denial; the error is the context's.
func (n *Node) judge(ctx context.Context, engine *policy.Engine, in policy.Input, said map[string]described) (reconcile.Review, error) {
	in.Now = n.cfg.Now()
	in.ImageUsers, in.ImageTroubles, _ = n.imageUsers(ctx, engine, &in.Stack, said)
	verdict, err := engine.Review(ctx, in)
	if ctx.Err() != nil {
		return reconcile.Review{}, ctx.Err()
	}
	r := reconcile.Review{Deny: !verdict.Allowed(), Policy: verdict.PolicyHash, Until: verdict.Until}
	for _, f := range verdict.Findings {
		r.Findings = append(r.Findings, f.Problem())
	}
	if err != nil {
		r.Findings = append(r.Findings, manifest.Problem{Severity: manifest.Error, Rule: "policy/error", Stack: in.Stack.Name, Message: err.Error()})
	}
	return r, nil
}

// judgePlan asks policy at the plan gate about all that the revision would begin to change or remove in each stack, and returns the reviews with what it denied.
// It asks nothing where no rule looks at plans.
func (n *Node) judgePlan(ctx context.Context, v *state.View, in reconcile.Intake, said map[string]map[string]described) (map[string]reconcile.Review, error) {
	engine := n.engine.Load()
	if _, ok := v.Sources.Get(in.Source); !ok || engine == nil || !engine.JudgesPlans() {
		return in.Reviews, nil
	}
	plan, err := reconcile.Preview(v, in, n.now())
	if err != nil {
		return nil, fmt.Errorf("judge what %s changes: %w", in.Bundle.Revision, err)
	}
	reviews := maps.Clone(in.Reviews)
	add := func(name string, found []manifest.Problem) {
		r := reviews[name]
		r.Findings = slices.Clone(r.Findings)
		for _, f := range found {
			same := func(have manifest.Problem) bool { // wherever it is written
				return have.Rule == f.Rule && have.Service == f.Service && have.Message == f.Message
			}
			if !slices.ContainsFunc(r.Findings, same) {
				r.Findings = append(r.Findings, f)
			}
		}
		reviews[name] = r
	}
	for _, name := range plan.Stacks() {
		items := itemsOf(plan.Steps, name)
		if len(items) == 0 {
			continue
		}
		e, _ := v.Stacks.Get(name)
		spec := applied(v, e.Value)
		if at := slices.IndexFunc(in.Bundle.Stacks, func(s manifest.Stack) bool { return s.Name == name }); at >= 0 {
			spec = in.Bundle.Stacks[at]
		}
		r, err := n.judge(ctx, engine, policy.Input{Gate: policy.PlanGate, Stack: spec, Items: items}, said[name])
		if err != nil {
			return nil, err
		}
		both := reviews[name]
		both.Deny, both.Policy = both.Deny || r.Deny, r.Policy
		if both.Until.IsZero() || !r.Until.IsZero() && r.Until.Before(both.Until) {
			both.Until = r.Until
		}
		reviews[name] = both
		add(name, r.Findings)
	}
	for i := range in.Bundle.Stacks {
		add(in.Bundle.Stacks[i].Name, warned(v, engine, &in.Bundle.Stacks[i]))
	}
	return reviews, nil
}

// warned lists what users' rules warned of when a stack was told to be what the revision asks for again. A warning of what is done to a stack is about a moment that is
// over once it was begun: it stays with the stack until it is told to be something else, or by another policy.
func warned(v *state.View, engine *policy.Engine, spec *manifest.Stack) []manifest.Problem {
	e, ok := v.Stacks.Get(spec.Name)
	w := e.Value.Wanted
	if !ok || w.Decision != state.DecisionAccepted || w.Verdict.Policy != engine.Hash() {
		return nil
	}
	told, kept := reconcile.Rendered(v, w.Release)
	if !kept || manifest.Hash(&told) != manifest.Hash(spec) {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(w.Problems), func(p manifest.Problem) bool {
		return p.Severity != manifest.Warn || !strings.HasPrefix(p.Rule, policy.Custom+"/")
	})
}

// actions are the steps that policy is asked about, in its words.
var actions = map[reconcile.Action]string{
	reconcile.ActCreate: policy.ActionStart, reconcile.ActReplace: policy.ActionReplace, reconcile.ActUpdate: policy.ActionUpdate, reconcile.ActRemove: policy.ActionRemove,
}

// itemsOf are the steps of a plan that change a stack: those of its services, and its own where it goes as a whole.
func itemsOf(steps []reconcile.Step, stack string) []policy.Item {
	var items []policy.Item
	for _, s := range steps {
		action, ok := actions[s.Action]
		if ok && s.Stack == stack && (s.Service != "" || s.Action == reconcile.ActRemove) {
			items = append(items, policy.Item{Action: action, Stack: stack, Service: s.Service, Cause: policy.Cause(s.Cause)})
		}
	}
	return items
}

// mayDo asks policy at the plan gate about what a person's word would do to a stack, as it would be then. A denial is an error of kind Denied.
func (n *Node) mayDo(ctx context.Context, spec manifest.Stack, items []policy.Item) error {
	engine, err := n.inForce()
	if err != nil {
		return api.Deniedf(ReasonNoPolicy, "%v", err)
	}
	if !engine.JudgesPlans() || len(items) == 0 {
		return nil
	}
	r, err := n.judge(ctx, engine, policy.Input{Gate: policy.PlanGate, Stack: spec, Items: items}, nil)
	if err != nil || !r.Deny {
		return err
	}
	return api.Deniedf(reconcile.ReasonPolicy, "policy does not allow it: %s", firstError(r))
}

func firstError(r reconcile.Review) string {
	for _, p := range r.Findings {
		if p.Severity == manifest.Error {
			return p.String()
		}
	}
	return "it gives no reason"
}

// judgeEarlier asks current policy about what the stacks would be rolled back to, and records which it denies.
func (l *leader) judgeEarlier(ctx context.Context, stacks []string) error {
	for _, name := range stacks {
		v := l.View()
		e, ok := v.Stacks.Get(name)
		if !ok {
			continue
		}
		var banned *state.Reason
		if spec, ok := reconcile.Earlier(v, name); ok {
			var err error
			if banned, err = l.denied(ctx, spec, "what it would go back to"); err != nil {
				return err
			}
		}
		if reflect.DeepEqual(banned, e.Value.Banned) {
			continue
		}
		next := e.Value
		next.Banned = banned
		if _, err := l.propose(ctx, state.Command{Term: l.term, Actor: "leader", Items: []state.Item{{state.Put(name, e.Version, next)}}}); err != nil && !errors.Is(err, errRefused) {
			return err
		}
	}
	return nil
}

// denied says why current policy denies something that was accepted once; nil = it may run. An error is the context's.
func (n *Node) denied(ctx context.Context, spec manifest.Stack, what string) (*state.Reason, error) {
	engine, err := n.inForce()
	if err != nil {
		return &state.Reason{ID: ReasonNoPolicy, Message: err.Error()}, nil
	}
	r, err := n.judge(ctx, engine, policy.Input{Gate: policy.RevisionGate, Stack: spec}, nil)
	if err != nil || !r.Deny {
		return nil, err
	}
	return &state.Reason{ID: reconcile.ReasonPolicy, Message: fmt.Sprintf("policy denies %s today: %s", what, firstError(r))}, nil
}
