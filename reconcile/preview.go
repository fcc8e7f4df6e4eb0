package reconcile

import (
	"fmt"
	"slices"

	"github.com/gitopsd/gitopsd/reconcile/rollout"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Preview says what a revision would change, service by service, by the same code that accepts and decides: Accept is carried out on a fork of the state, and Decide
// asked there. Nothing of the view changes. A revision that would wait for a person is shown as if it were approved, with what it waits for.
func Preview(v *state.View, in Intake, now Now) (Plan, error) {
	src, ok := v.Sources.Get(in.Source)
	if !ok {
		return Plan{}, fmt.Errorf("plan: there is no source %s", in.Source)
	}
	fork := state.Fork(v)
	var out Plan
	asking := accepting{v: v, in: in, src: src.Value}
	for _, why := range asking.holds(asking.removed()) {
		out.Steps = append(out.Steps, Step{Action: ActWait, Cause: CauseRevision, Source: in.Source, Revision: in.Bundle.Revision, Reason: why})
	}
	if in.Unsigned != nil { // nobody can approve it, and nothing of it was rendered
		return out, nil
	}
	in.approved = true
	first := Accept(fork.View(), in)
	if err := try(fork, now, first.Items...); err != nil {
		return out, err
	}
	after := fork.View()
	for _, s := range first.Steps {
		switch s.Action {
		case ActAccept:
			out.Steps = append(out.Steps, services(v, after, s)...)
		case ActRemove:
			out.Steps = append(out.Steps, s)
			out.Steps = append(out.Steps, removals(v, s)...)
			out.Steps = pruned(out.Steps, after, s)
		default:
			out.Steps = append(out.Steps, s)
		}
	}
	out.Steps = append(out.Steps, refused(after, in, first)...)
	for _, s := range Decide(after, now).Steps {
		if s.Action == ActRefuse {
			out.Steps = append(out.Steps, s)
		}
	}
	return out, nil
}

// Back says, service by service, what it would change if a stack were told to be a release that is kept, as a person's rollback does.
func Back(v *state.View, stack string, to state.Applied, now Now) ([]Step, error) {
	fork := state.Fork(v)
	e, _ := v.Stacks.Get(stack)
	Follow(&e.Value, to, now.Log)
	if err := try(fork, now, state.Item{state.Set(stack, e.Value)}); err != nil {
		return nil, err
	}
	return services(v, fork.View(), Step{Cause: CausePerson, Source: e.Value.Source, Stack: stack, Revision: to.Revision}), nil
}

// try applies items to a fork.
func try(s *state.State, now Now, items ...state.Item) error {
	if len(items) == 0 {
		return nil
	}
	// A fork is no log: its entries may be larger.
	res, err := s.Try(now.Log, items)
	if err == nil && len(res.Refused) > 0 {
		err = fmt.Errorf("try a revision: %d of %d items do not fit the state", len(res.Refused), len(items))
	}
	return err
}

// refused tells of the revision's stacks that are Blocked or Failed, and were before: Accept has no step for what is no news.
func refused(v *state.View, in Intake, told Plan) []Step {
	var out []Step
	news := told.Stacks()
	for _, f := range in.Bundle.Found {
		e, ok := v.Stacks.Get(f.Name)
		w := e.Value.Wanted
		if _, is := slices.BinarySearch(news, f.Name); is || !ok || e.Value.Source != in.Source || len(w.Reasons) == 0 {
			continue
		}
		s := Step{Action: ActBlock, Cause: CauseRevision, Source: in.Source, Stack: f.Name, Revision: in.Bundle.Revision, Reason: w.Reasons[0]}
		switch w.Decision {
		case state.DecisionFailed:
			s.Action = ActFail
		case state.DecisionBlocked:
		default:
			continue
		}
		out = append(out, s)
	}
	return out
}

// services says what an accepted stack means for each of its services.
func services(before, after *state.View, s Step) []Step {
	st, _ := after.Stacks.Get(s.Stack)
	if st.Value.Applied == nil {
		return nil
	}
	rel, _ := after.Releases.Get(st.Value.Applied.Release)
	old, had := before.Stacks.Get(s.Stack)
	var out []Step
	if !had || old.Value.Applied == nil {
		out = append(out, Step{Action: ActCreate, Cause: CauseRevision, Source: s.Source, Stack: s.Stack, Revision: s.Revision, Reason: state.Reason{ID: ReasonRevision, Message: "a new stack"}})
	}
	follows := followers(before, after, s.Stack, rel.Value)
	for _, name := range rel.Value.Names() {
		spec, _ := after.Specs.Get(rel.Value.Services[name])
		step := Step{Cause: s.Cause, Source: s.Source, Stack: s.Stack, Service: name, Revision: s.Revision}
		svc, known := before.Services.Get(state.ServiceKey(s.Stack, name))
		was, ok := before.Specs.Get(svc.Value.Target)
		if !known || !ok {
			step.Action = ActCreate
			step.Reason = state.Reason{ID: ReasonRevision, Message: fmt.Sprintf("%s of %s", count(spec.Value.Service.Replicas, "task"), spec.Value.Service.Main().Image)}
			out = append(out, step)
			continue
		}
		effect, fields := manifest.Compare(&was.Value.Service, &spec.Value.Service)
		step.Fields = fields
		switch dep := follows[name]; {
		case dep != "" && effect != manifest.Replace:
			step.Action, step.Reason = ActReplace, state.Reason{ID: rollout.ReasonRestart, Message: fmt.Sprintf("once %s, which it depends on with restart, is replaced", dep)}
		case effect == manifest.Same:
			continue
		case effect == manifest.InPlace:
			step.Action, step.Reason = ActUpdate, state.Reason{ID: ReasonRevision, Message: "in place: no task restarts"}
		default:
			step.Action, step.Reason = ActReplace, state.Reason{ID: ReasonRevision, Message: how(&spec.Value.Service)}
		}
		out = append(out, step)
	}
	for key := range before.Services.Below(s.Stack + "/") {
		name := key[len(s.Stack)+1:]
		if _, kept := rel.Value.Services[name]; !kept && !rel.Value.Stack.PruneOff {
			step := Step{Action: ActRemove, Cause: CausePrune, Source: s.Source, Stack: s.Stack, Service: name, Revision: s.Revision, Reason: state.Reason{ID: ReasonPruned, Message: "the revision no longer names it"}}
			out = pruned(append(out, step), after, step)
		}
	}
	if len(out) == 0 && had {
		out = append(out, stackFields(before, s, old.Value, rel.Value)...)
	}
	return out
}

// followers names the services whose tasks will be replaced as those of one that they depend on with restart are, each with that one.
func followers(before, after *state.View, stack string, rel state.Release) map[string]string {
	out := map[string]string{}
	replaced := func(name string) bool {
		svc, _ := before.Services.Get(state.ServiceKey(stack, name))
		was, known := before.Specs.Get(svc.Value.Target)
		spec, _ := after.Specs.Get(rel.Services[name])
		effect, _ := manifest.Compare(&was.Value.Service, &spec.Value.Service)
		return out[name] != "" || known && effect == manifest.Replace
	}
	for more := true; more; {
		more = false
		for _, name := range rel.Names() {
			spec, _ := after.Specs.Get(rel.Services[name])
			for _, dep := range spec.Value.Service.DependsOn {
				if dep.Restart && out[name] == "" && has(before.Services, state.ServiceKey(stack, name)) && replaced(dep.Service) {
					out[name], more = dep.Service, true
				}
			}
		}
	}
	return out
}

// stackFields tells of changes outside of any service: networks, volumes, settings.
func stackFields(before *state.View, s Step, old state.Stack, rel state.Release) []Step {
	was, ok := before.Releases.Get(old.Applied.Release)
	if !ok {
		return nil
	}
	fields := manifest.Fields(manifest.Canonical(was.Value.Stack), manifest.Canonical(rel.Stack))
	if len(fields) == 0 {
		return nil
	}
	return []Step{{Action: ActUpdate, Cause: CauseRevision, Source: s.Source, Stack: s.Stack, Revision: s.Revision, Fields: fields, Reason: state.Reason{ID: ReasonRevision, Message: "no task restarts"}}}
}

func removals(v *state.View, s Step) []Step {
	var out []Step
	for key := range v.Services.Below(s.Stack + "/") {
		out = append(out, Step{Action: ActRemove, Cause: CausePrune, Source: s.Source, Stack: s.Stack, Service: key[len(s.Stack)+1:], Revision: s.Revision, Reason: s.Reason})
	}
	return out
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// how describes the way in which the tasks of a service are replaced.
func how(s *manifest.Service) string {
	order := "stop-first"
	if s.Update.StartFirst {
		order = "start-first"
	}
	batch := "all at once"
	if p := s.Update.Parallelism; p > 0 && p < s.Replicas {
		batch = fmt.Sprintf("%d at a time", p)
	}
	return fmt.Sprintf("%s, %s, %s", count(s.Replicas, "task"), batch, order)
}

// DataNote says what a plan means for data on a node.
type DataNote struct {
	Stack   string
	Name    string
	Kind    manifest.MountKind
	Node    string
	Message string
}

// Data names each volume or directory that would start empty or be left behind when the stacks of a revision are applied. Those that would be removed are steps of its
// plan.
func Data(v *state.View, b *manifest.Bundle) []DataNote {
	var out []DataNote
	a := accepting{v: v, in: Intake{Source: b.Source, Bundle: b}}
	gone := a.removed()
	lost, _ := a.lostVolumes(gone)
	left := func(stack string, named map[string]bool) {
		for key, vol := range v.Volumes.All() {
			if vol.Value.Stack == stack && !vol.Value.Orphan && !named[vol.Value.Name] && (vol.Value.Kind == manifest.MountVolume || vol.Value.Kind == manifest.MountData) && !slices.Contains(lost, key) {
				out = append(out, DataNote{Stack: stack, Name: vol.Value.Name, Kind: vol.Value.Kind, Node: vol.Value.Node, Message: "is left behind: nothing names it any more"})
			}
		}
	}
	for i := range b.Stacks {
		st := &b.Stacks[i]
		named := map[string]bool{}
		for k := range st.Services {
			for c := range st.Services[k].Containers {
				for _, m := range st.Services[k].Containers[c].Mounts {
					if m.Kind != manifest.MountVolume && m.Kind != manifest.MountData {
						continue
					}
					name := VolumeName(st.Name, "", 0, m)
					if named[name] {
						continue
					}
					named[name] = true
					if !anywhere(v, m.Kind, name) {
						out = append(out, DataNote{Stack: st.Name, Name: name, Kind: m.Kind, Message: "starts empty"})
					}
				}
			}
		}
		left(st.Name, named)
	}
	for _, name := range gone {
		left(name, nil)
	}
	return out
}

func anywhere(v *state.View, kind manifest.MountKind, name string) bool {
	for id := range v.Nodes.All() {
		if has(v.Volumes, state.VolumeKey(id, kind, name)) {
			return true
		}
	}
	return false
}

// Stacks lists the stacks of a plan's steps, each once, sorted.
func (p *Plan) Stacks() []string {
	var out []string
	for _, s := range p.Steps {
		if s.Stack != "" {
			out = append(out, s.Stack)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
