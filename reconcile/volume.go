package reconcile

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file holds what follows for data on nodes when what used them is pruned.
//
// Volumes are kept, and their records are marked as orphans, unless the stack, or else its source, says pruneVolumes. Then those that were made for the stack, that
// nobody else uses, go last: after the last task of the service or stack. Only named and anonymous volumes do; data directories, paths of the host, external volumes and
// what driver options name never do. Deciding marks the record; the node that holds the data removes them, and then the record. Until then no task that would mount
// the volume is made.

// VolumeUsers names who uses the volume of that key: the services, as stack/service, of what stacks are told to be now, and the tasks on its node that are not gone yet.
// Both are sorted.
func VolumeUsers(v *state.View, key string) (services, tasks []string) {
	e, ok := v.Volumes.Get(key)
	if !ok {
		return nil, nil
	}
	for id, t := range v.Tasks.All() {
		if t.Value.Node != e.Value.Node || e.Value.Kind == manifest.MountAnonymous && e.Value.Slot != t.Value.Slot {
			continue
		}
		r, _ := v.Reports.Get(id)
		gone := t.Value.Desired == state.DesiredStop && r.Value.Phase == state.PhaseGone
		if spec, known := v.Specs.Get(t.Value.Spec); known && !gone && uses(t.Value.Stack, &spec.Value.Service, e.Value) {
			tasks = append(tasks, id)
		}
	}
	return named(v, e.Value), tasks
}

// named lists the services that use a volume by what their stacks are told to be, and by what they were rolled back to.
func named(v *state.View, vol state.Volume) []string {
	var out []string
	for stack, st := range v.Stacks.All() {
		if st.Value.Removing || st.Value.Applied == nil {
			continue
		}
		rel, _ := v.Releases.Get(st.Value.Applied.Release)
		for _, name := range rel.Value.Names() {
			key := state.ServiceKey(stack, name)
			svc, _ := v.Services.Get(key)
			asked, _ := v.Specs.Get(rel.Value.Services[name])
			has, _ := v.Specs.Get(svc.Value.Target)
			if uses(stack, &asked.Value.Service, vol) || uses(stack, &has.Value.Service, vol) {
				out = append(out, key)
			}
		}
	}
	return out
}

// uses says whether a service of a stack has a volume: on a slot of its own, or by a mount.
func uses(stack string, spec *manifest.Service, vol state.Volume) bool {
	if vol.Kind == manifest.MountAnonymous {
		return vol.Stack == stack && vol.Service == spec.Name
	}
	for i := range spec.Containers {
		for _, m := range spec.Containers[i].Mounts {
			name := VolumeName(stack, "", 0, m)
			switch vol.Kind {
			case manifest.MountData, manifest.MountContent: // one may hold the other
				if (m.Kind == manifest.MountData || m.Kind == manifest.MountContent && m.Seed) && (below(name, vol.Name) || below(vol.Name, name)) {
					return true
				}
			default:
				if m.Kind == vol.Kind && name == vol.Name {
					return true
				}
			}
		}
	}
	return false
}

// below says whether a path is a directory or lies in it.
func below(name, dir string) bool {
	name, dir = path.Clean(name), path.Clean(dir)
	return name == dir || strings.HasPrefix(name, dir+"/")
}

// owns says whether the data of a mount are made for the stack, so that they can be removed: not those that are external, that driver options or the host's paths
// name, or that are below a data root of the stack's own.
func owns(st *manifest.Stack, m manifest.Mount) bool {
	switch m.Kind {
	case manifest.MountAnonymous:
		return true
	case manifest.MountVolume:
		return slices.ContainsFunc(st.Volumes, func(v manifest.Volume) bool { return v.Name == m.Source && v.Own() })
	case manifest.MountData, manifest.MountContent:
		return st.DataRoot == ""
	}
	return false
}

// withVolumes says whether volumes go with what is pruned of a stack: by the stack's own word, or else by its source's.
func withVolumes(rel state.Release, source bool) bool {
	if own := rel.Stack.PruneVolumes; own != nil {
		return *own
	}
	return source
}

// prunable says whether a volume of a stack may go with it, if nobody uses it. What an orphan is was decided when it became one.
func prunable(rel state.Release, vol state.Volume) bool {
	external := slices.ContainsFunc(rel.Stack.Volumes, func(v manifest.Volume) bool { return v.Name == vol.Name && !v.Own() })
	return vol.Own && !vol.Orphan && vol.Removing == nil && (vol.Kind == manifest.MountAnonymous || vol.Kind == manifest.MountVolume && !external)
}

// left lists the volumes of a stack that a pruned service leaves, or with an empty name the stack as a whole.
func left(v *state.View, stack, service string) []string {
	var out []string
	svc, _ := v.Services.Get(state.ServiceKey(stack, service))
	spec, _ := v.Specs.Get(svc.Value.Target)
	for key, vol := range v.Volumes.All() {
		if vol.Value.Stack == stack && !vol.Value.Orphan && vol.Value.Removing == nil && (service == "" || uses(stack, &spec.Value.Service, vol.Value)) {
			out = append(out, key)
		}
	}
	return out
}

// leave says what becomes of the volumes of what is gone of the stack: a service, or with an empty name all of it. What another one uses stays; if it was the stack's,
// it is the other's from now on.
func (s *stackRun) leave(service string, rel state.Release, goes bool, why state.Reason) state.Item {
	var item state.Item
	for _, key := range left(s.v, s.name, service) {
		e, _ := s.v.Volumes.Get(key)
		next := e.Value
		users, tasks := VolumeUsers(s.v, key)
		switch {
		case s.volumed[key]:
			continue
		case len(users) > 0 && service == "":
			next.Stack, _, _ = strings.Cut(users[0], "/")
			next.Own = declaresVolume(s.v, next)
		case len(users)+len(tasks) > 0:
			continue
		case goes && prunable(rel, e.Value):
			next.Orphan, next.Removing = true, &why
			s.step(Step{Action: ActRemove, Cause: CausePrune, Service: service, Volume: next.Name, Node: next.Node, Reason: state.Reason{ID: why.ID, Message: "with its data: " + why.Message}})
		default:
			next.Orphan = true
		}
		s.volumed[key] = true
		item = append(item, state.Put(key, e.Version, next))
	}
	return item
}

// declaresVolume says whether the stack of a volume declares it as its own.
func declaresVolume(v *state.View, vol state.Volume) bool {
	st, _ := v.Stacks.Get(vol.Stack)
	if st.Value.Applied == nil {
		return false
	}
	rel, _ := v.Releases.Get(st.Value.Applied.Release)
	return owns(&rel.Value.Stack, manifest.Mount{Kind: vol.Kind, Source: vol.Name})
}

// leaveService is leave for a service that the release no longer names.
func (s *stackRun) leaveService(name string, why state.Reason) state.Item {
	src, _ := s.v.Sources.Get(s.entry.Value.Source)
	return s.leave(name, s.release, withVolumes(s.release, src.Value.PruneVolumes), why)
}

// leaving says which of the slot's volumes is being removed by its node, if one is: its data must be gone before the slot may start anew.
func (s *stackRun) leaving(target *manifest.Service, slot int) string {
	if s.going == nil {
		s.going = []state.Volume{}
		for _, e := range s.v.Volumes.All() {
			if e.Value.Removing != nil {
				s.going = append(s.going, e.Value)
			}
		}
	}
	for _, vol := range s.going {
		if uses(s.name, target, vol) && (vol.Kind != manifest.MountAnonymous || vol.Slot == slot) {
			return fmt.Sprintf("its volume %s on %s is being removed: the task starts when that is done; `gitopsctl volume forget %s` gives it up", vol.Name, vol.Node, vol.Name)
		}
	}
	return ""
}

// pruned adds the volumes that would go to a plan's steps, when a service or, with an empty name, the whole of a stack is pruned as the view says.
func pruned(out []Step, v *state.View, step Step) []Step {
	st, _ := v.Stacks.Get(step.Stack)
	if st.Value.Applied == nil {
		return out
	}
	rel, _ := v.Releases.Get(st.Value.Applied.Release)
	src, _ := v.Sources.Get(st.Value.Source)
	goes := st.Value.WithVolumes
	if !st.Value.Removing {
		goes = withVolumes(rel.Value, src.Value.PruneVolumes)
	}
	for _, key := range left(v, step.Stack, step.Service) {
		e, _ := v.Volumes.Get(key)
		told := slices.ContainsFunc(out, func(s Step) bool { return s.Volume == e.Value.Name && s.Node == e.Value.Node }) // by another service that has it
		if !goes || told || !prunable(rel.Value, e.Value) || len(named(v, e.Value)) > 0 {
			continue
		}
		one := step
		one.Volume, one.Node = e.Value.Name, e.Value.Node
		one.Reason.Message = "with its data: " + step.Reason.Message
		out = append(out, one)
	}
	return out
}

// lostVolumes lists the volumes that a revision would remove, and counts those of the source's stacks that it could.
func (a *accepting) lostVolumes(gone []string) (lost []string, of int) {
	for key, vol := range a.v.Volumes.All() {
		st, ok := a.v.Stacks.Get(vol.Value.Stack)
		if !ok || st.Value.Source != a.in.Source || st.Value.Removing || st.Value.Applied == nil {
			continue
		}
		rel, _ := a.v.Releases.Get(st.Value.Applied.Release)
		if !prunable(rel.Value, vol.Value) {
			continue
		}
		of++
		next := rel.Value
		at := slices.IndexFunc(a.in.Bundle.Stacks, func(n manifest.Stack) bool { return n.Name == vol.Value.Stack })
		switch {
		case slices.Contains(gone, vol.Value.Stack):
		case at < 0 || a.in.Bundle.Stacks[at].PruneOff || !a.dropped(vol.Value, &a.in.Bundle.Stacks[at], rel.Value):
			continue
		default:
			next.Stack = a.in.Bundle.Stacks[at]
		}
		if withVolumes(next, a.in.Bundle.Settings.PruneVolumes) && !slices.ContainsFunc(named(a.v, vol.Value), func(user string) bool {
			return !strings.HasPrefix(user, vol.Value.Stack+"/")
		}) {
			lost = append(lost, key)
		}
	}
	return lost, of
}

// dropped says whether a service that a revision drops from a stack has a volume that none of those has which stay.
func (a *accepting) dropped(vol state.Volume, next *manifest.Stack, rel state.Release) bool {
	drops := false
	for _, name := range rel.Names() {
		spec, _ := a.v.Specs.Get(rel.Services[name])
		drops = drops || next.Service(name) == nil && uses(next.Name, &spec.Value.Service, vol)
	}
	return drops && !slices.ContainsFunc(next.Services, func(svc manifest.Service) bool { return uses(next.Name, &svc, vol) })
}
