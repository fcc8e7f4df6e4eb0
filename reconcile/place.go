package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/schedule"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Host ports for ports that name none are chosen from this range, as Swarm does.
const (
	firstPort = 30000
	lastPort  = 32767
)

// places lists the nodes with what is free on them.
func (d *decision) places() []schedule.Node {
	if d.nodes != nil {
		return d.nodes
	}
	d.nodes = []schedule.Node{}
	at := map[string]int{}
	for id, n := range d.v.Nodes.All() {
		at[id] = len(d.nodes)
		d.nodes = append(d.nodes, schedule.Node{ID: id, Platform: n.Value.Platform, FreeCPU: n.Value.CPU, FreeMemory: n.Value.Memory, Ports: map[string]string{}, Same: map[string]int{}})
	}
	for _, t := range d.v.Tasks.All() {
		i, ok := at[t.Value.Node]
		spec, known := d.spec(t.Value.Spec)
		if !ok || !known {
			continue
		}
		d.nodes[i].Take(t.Value.Key(), spec)
	}
	return d.nodes
}

// took counts a task that this plan places.
func (d *decision) took(node, key string, spec *manifest.Service) {
	at := slices.IndexFunc(d.nodes, func(n schedule.Node) bool { return n.ID == node })
	d.nodes[at].Take(key, spec)
}

// without lists the nodes as they are when the slot's tasks have stopped: what is only made ready runs after those are gone, so it may have what they reserve.
func (d *decision) without(nodes []schedule.Node, key string, slot int) []schedule.Node {
	out := slices.Clone(nodes)
	for _, t := range d.v.Tasks.Below(key + ".") {
		at := slices.IndexFunc(out, func(n schedule.Node) bool { return n.ID == t.Value.Node })
		if spec, ok := d.spec(t.Value.Spec); ok && at >= 0 && t.Value.Slot == slot {
			out[at].Release(spec)
		}
	}
	return out
}

// home is the node that holds the slot's local data.
func (s *stackRun) home(target *manifest.Service, slot int) string {
	for i := range target.Containers {
		c := &target.Containers[i]
		for id := range s.v.Nodes.All() { // those of the image, too, which its node knows of
			for range s.v.Volumes.Below(state.VolumeKey(id, manifest.MountAnonymous, SlotVolumes(s.name, c.Name, slot))) {
				return id
			}
		}
		for _, m := range c.Mounts {
			if !m.Local() || m.Kind == manifest.MountVolume && s.remote(m.Source) {
				continue
			}
			name := VolumeName(s.name, c.Name, slot, m)
			for id := range s.v.Nodes.All() {
				if has(s.v.Volumes, state.VolumeKey(id, m.Kind, name)) {
					return id
				}
			}
		}
	}
	return ""
}

// volumes records the local data of a new task with its node, before the task first starts: from then on the slot belongs there.
func (s *stackRun) volumes(node string, target *manifest.Service, slot int) state.Item {
	var item state.Item
	for i := range target.Containers {
		c := &target.Containers[i]
		for _, m := range c.Mounts {
			if !m.Local() || m.Kind == manifest.MountVolume && s.remote(m.Source) {
				continue
			}
			name := VolumeName(s.name, c.Name, slot, m)
			id := state.VolumeKey(node, m.Kind, name)
			v := state.Volume{Name: name, Kind: m.Kind, Stack: s.name, Node: node, Own: owns(&s.release.Stack, m)}
			e, known := s.v.Volumes.Get(id)
			if known && !e.Value.Orphan && (e.Value.Own || !v.Own) || s.volumed[id] {
				continue // of stacks that share it, it is the first one's that says that it is its own
			}
			s.volumed[id] = true
			if m.Kind == manifest.MountAnonymous {
				v.Service, v.Slot = target.Name, slot
			}
			item = append(item, state.Set(id, v))
		}
	}
	return item
}

func (s *stackRun) remote(volume string) bool {
	return slices.ContainsFunc(s.release.Stack.Volumes, func(v manifest.Volume) bool { return v.Name == volume && !v.Local() })
}

// VolumeName names the data of a mount within its kind: a named volume by its real name, an anonymous one by its container's slot and target, a data path by
// stack and path, a bind by its path.
func VolumeName(stack, container string, slot int, m manifest.Mount) string {
	switch m.Kind {
	case manifest.MountAnonymous:
		return strings.TrimSuffix(SlotVolumes(stack, container, slot), "/") + m.Target
	case manifest.MountData, manifest.MountContent:
		return stack + "/" + m.Source
	}
	return m.Source
}

// SlotVolumes is what the names of all anonymous volumes of a container in a slot begin with.
func SlotVolumes(stack, container string, slot int) string {
	return fmt.Sprintf("%s/%s.%d/", stack, container, slot)
}

// hostPorts chooses a host port for each published port that names none, and keeps it for good.
func (s *stackRun) hostPorts(have map[string]uint16, target *manifest.Service) map[string]uint16 {
	var out map[string]uint16
	for _, p := range target.Ports {
		if p.Published != 0 {
			continue
		}
		name := converge.PortName(p)
		if out == nil {
			out = map[string]uint16{}
		}
		if out[name] = have[name]; out[name] == 0 {
			out[name] = s.freePort()
			s.ports[out[name]] = true
		}
	}
	return out
}

// freePort is the lowest port of the range that nobody has, 0 when all are taken.
func (d *decision) freePort() uint16 {
	used := maps.Clone(d.ports)
	for _, e := range d.v.Services.All() {
		for _, name := range sortedKeys(e.Value.Ports) {
			used[e.Value.Ports[name]] = true
		}
		if spec, ok := d.spec(e.Value.Target); ok {
			for _, p := range spec.Ports {
				used[p.Published] = true
			}
		}
	}
	for p := uint16(firstPort); p <= lastPort; p++ {
		if !used[p] {
			return p
		}
	}
	return 0
}
