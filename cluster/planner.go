package cluster

import (
	"context"
	"fmt"
	"slices"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// PlanBundle plans a directory that the caller rendered. See [api.Planner].
func (n *Node) PlanBundle(ctx context.Context, b *manifest.Bundle) (api.Preview, error) {
	if b.Source == "" { // the one source that there is
		if names := stackSources(n.View()); len(names) == 1 {
			b.Source = names[0]
		}
	}
	if !slices.Contains(stackSources(n.View()), b.Source) {
		return api.Preview{}, api.NotFoundf("source", b.Source, stackSources(n.View()))
	}
	in, err := n.review(ctx, &Loaded{Bundle: b}, nil)
	if err != nil {
		return api.Preview{}, err
	}
	return n.preview(ctx, in, reconcile.RelationForward)
}

// PlanRevision fetches, renders and plans a ref of a source. Nothing of it is run. See [api.Planner].
func (n *Node) PlanRevision(ctx context.Context, source, ref string) (api.Preview, error) {
	e, ok := n.View().Sources.Get(source)
	if !ok {
		return api.Preview{}, api.NotFoundf("source", source, stackSources(n.View()))
	}
	if e.Value.Policy {
		return api.Preview{}, api.Invalidf("source %s holds policy, not stacks: `gitopsctl policy check PATH --policy DIR` tries one", source)
	}
	src, err := n.source(e.Value)
	if err != nil {
		return api.Preview{}, err
	}
	loaded, err := n.cfg.Sources.Load(ctx, src, manifest.Revision{Ref: ref})
	if err != nil {
		return api.Preview{}, api.Invalidf("%v", err)
	}
	in, err := n.review(ctx, loaded, nil)
	if err != nil {
		return api.Preview{}, err
	}
	return n.preview(ctx, in, reconcile.RelationForward)
}

// TestSource tries a source step by step. See [api.Planner].
func (n *Node) TestSource(ctx context.Context, s api.SourceSpec) (api.SourceReport, error) {
	src := SourceOf(s)
	if s.URL == "" { // one that is followed already
		e, ok := n.View().Sources.Get(s.Name)
		if !ok {
			return api.SourceReport{}, api.NotFoundf("source", s.Name, keys(n.View().Sources))
		}
		var err error
		if src, err = n.source(e.Value); err != nil {
			return api.SourceReport{}, err
		}
	}
	return n.cfg.Sources.Test(ctx, src)
}

func (n *Node) preview(ctx context.Context, in *intake, relation reconcile.Relation) (api.Preview, error) {
	v := n.View()
	b, err := n.named(ctx, v, in.loaded.Bundle)
	if err != nil {
		return api.Preview{}, err
	}
	asked := reconcile.Intake{Source: b.Source, Bundle: b, Reviews: in.reviews, Relation: relation, Unsigned: in.loaded.Unsigned, Now: n.now().Log}
	if asked.Reviews, err = n.judgePlan(ctx, v, asked, in.said); err != nil {
		return api.Preview{}, err
	}
	plan, err := reconcile.Preview(v, asked, n.now())
	if err != nil {
		return api.Preview{}, fmt.Errorf("plan %s: %w", b.Revision, err)
	}
	out := api.Preview{Source: b.Source, Revision: b.Revision, Steps: plan.Steps, Problems: slices.Clone(b.Problems), Summary: api.Summarize(plan.Steps)}
	for i := range b.Stacks {
		st := &b.Stacks[i]
		out.Problems = append(out.Problems, unset(v, st)...)
		out.Findings = append(out.Findings, asked.Reviews[st.Name].Findings...)
		if _, known := v.Stacks.Get(st.Name); known && !changes(plan, st.Name) {
			continue
		}
		for _, a := range in.applied[st.Name] {
			out.Hardening = append(out.Hardening, api.Hardening{Stack: st.Name, Applied: a})
		}
	}
	for _, d := range reconcile.Data(v, b) {
		out.Data = append(out.Data, api.DataNote{Stack: d.Stack, Name: d.Name, Kind: string(d.Kind), Node: d.Node, Message: d.Message})
	}
	return out, nil
}

// stackSources are the names of the sources that hold stacks.
func stackSources(v *state.View) []string {
	return slices.DeleteFunc(keys(v.Sources), func(name string) bool {
		e, _ := v.Sources.Get(name)
		return e.Value.Policy
	})
}

// unset tells of secrets that a stack waits for, since nobody set them.
func unset(v *state.View, st *manifest.Stack) []manifest.Problem {
	var out []manifest.Problem
	for _, sec := range st.Secrets {
		if _, ok := v.Secrets.Get(sec.Name); sec.External && !ok {
			out = append(out, manifest.Problem{Severity: manifest.Warn, Rule: "secret-unset", Stack: st.Name,
				Message: fmt.Sprintf("the external secret %s has no value yet: tasks that need it wait until `gitopsctl secret set %s`", sec.Name, sec.Name)})
		}
	}
	return out
}

func changes(p reconcile.Plan, stack string) bool {
	for _, s := range p.Steps {
		if s.Stack == stack {
			return true
		}
	}
	return false
}

// named is the bundle with each secret named by the keyed hash of its value, where that is known; nothing is logged. A secret without a value here is taken to be
// what the log has.
func (n *Node) named(ctx context.Context, v *state.View, b *manifest.Bundle) (*manifest.Bundle, error) {
	return withRefs(b, func(st *manifest.Stack, sec manifest.Secret) (string, error) {
		value, comes := st.SecretValues[sec.Name]
		if sec.External || !comes {
			have, _ := v.Secrets.Get(sec.Name)
			return have.Value.Ref, nil
		}
		return n.refOf(ctx, sec.Name, value)
	})
}
