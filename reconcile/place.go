package reconcile

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/schedule"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// subnetBits is the size of each network's part of a node's block: 253 tasks.
const subnetBits = 24

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
func (s *stackRun) home(key string, target *manifest.Service, slot int) string {
	for i := range target.Containers {
		for _, m := range target.Containers[i].Mounts {
			if !m.Local() || m.Kind == manifest.MountVolume && s.remote(m.Source) {
				continue
			}
			name := VolumeName(s.name, key, slot, m)
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
func (s *stackRun) volumes(node, key string, target *manifest.Service, slot int) state.Item {
	var item state.Item
	for i := range target.Containers {
		for _, m := range target.Containers[i].Mounts {
			if !m.Local() || m.Kind == manifest.MountVolume && s.remote(m.Source) {
				continue
			}
			name := VolumeName(s.name, key, slot, m)
			id := state.VolumeKey(node, m.Kind, name)
			e, known := s.v.Volumes.Get(id)
			if known && !e.Value.Orphan || s.volumed[id] {
				continue
			}
			s.volumed[id] = true
			v := state.Volume{Name: name, Kind: m.Kind, Stack: s.name, Node: node}
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

// VolumeName names the data of a mount within its kind: a named volume by its real name, an anonymous one by slot and target, a data path by
// stack and path, a bind by its path.
func VolumeName(stack, service string, slot int, m manifest.Mount) string {
	switch m.Kind {
	case manifest.MountAnonymous:
		return fmt.Sprintf("%s.%d%s", service, slot, m.Target)
	case manifest.MountData, manifest.MountContent:
		return stack + "/" + m.Source
	}
	return m.Source
}

// networks makes sure that each network of the release has its place in every node's block.
func (s *stackRun) networks() {
	for _, n := range s.release.Stack.Networks {
		e, known := s.v.Networks.Get(n.Name)
		next := e.Value
		if _, made := s.nets[n.Name]; made {
			continue
		}
		if !known {
			next = state.Network{Internal: n.Internal, Fixed: n.Subnet != "", Gateway: n.Gateway, Number: s.freeNumber(), Subnets: map[string]string{}}
			if !n.External {
				next.Stack = s.name
			}
		}
		missing := false
		for id, node := range s.v.Nodes.All() {
			if next.Subnets[id] != "" {
				continue
			}
			cidr := n.Subnet
			if cidr == "" {
				cidr = subnet(node.Value.Block, next.Number)
			}
			if cidr == "" { // the block is used up: its tasks are refused by name
				continue
			}
			if !missing {
				missing, next.Subnets = true, clone(next.Subnets)
			}
			next.Subnets[id] = cidr
		}
		if known && !missing {
			continue
		}
		s.nets[n.Name] = next
		s.plan.Items = append(s.plan.Items, state.Item{state.Put(n.Name, e.Version, next)})
	}
}

func clone(m map[string]string) map[string]string {
	out := make(map[string]string, len(m)+1)
	for _, k := range sortedKeys(m) {
		out[k] = m[k]
	}
	return out
}

// freeNumber is the lowest network number that is not in use.
func (d *decision) freeNumber() int {
	used := map[int]bool{}
	for _, n := range d.v.Networks.All() {
		used[n.Value.Number] = true
	}
	for _, name := range sortedKeys(d.nets) {
		used[d.nets[name].Number] = true
	}
	for i := 0; ; i++ {
		if !used[i] {
			return i
		}
	}
}

// subnet cuts the n-th subnet out of a node's block; "" when the block has no such one.
func subnet(block string, n int) string {
	p, err := netip.ParsePrefix(block)
	if err != nil || p.Bits() > subnetBits || n >= 1<<(subnetBits-p.Bits()) {
		return ""
	}
	a := p.Masked().Addr().As4()
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])+uint32(n)<<(32-subnetBits))
	return netip.PrefixFrom(netip.AddrFrom4(a), subnetBits).String()
}

// addresses gives a task an address on each of its networks.
func (s *stackRun) addresses(node string, target *manifest.Service) (map[string]string, state.Reason) {
	if len(target.Networks) == 0 || target.NetworkMode != "" {
		return nil, state.Reason{}
	}
	out := make(map[string]string, len(target.Networks))
	for _, at := range target.Networks {
		n, ok := s.nets[at.Network]
		if !ok {
			e, _ := s.v.Networks.Get(at.Network)
			n = e.Value
		}
		prefix, err := netip.ParsePrefix(n.Subnets[node])
		if err != nil {
			return nil, state.Reason{ID: ReasonNoAddress, Message: fmt.Sprintf("network %s has no subnet on %s: the node's block is used up; give gitopsd a larger one with --block-bits, or remove networks", at.Network, node)}
		}
		used := s.inUse(node, at.Network)
		addr := at.IPv4
		if addr == "" {
			if addr = free(prefix, n.Gateway, used); addr == "" {
				return nil, state.Reason{ID: ReasonNoAddress, Message: fmt.Sprintf("network %s (%s) has no free address left", at.Network, prefix)}
			}
		}
		used[addr] = true
		out[at.Network] = addr
	}
	return out, state.Reason{}
}

// inUse are the addresses that tasks on the node hold in the network.
func (d *decision) inUse(node, network string) map[string]bool {
	key := node + "/" + network
	if u, ok := d.addrs[key]; ok {
		return u
	}
	u := map[string]bool{}
	for _, t := range d.v.Tasks.All() {
		if a := t.Value.Addrs[network]; a != "" && t.Value.Node == node {
			u[a] = true
		}
	}
	d.addrs[key] = u
	return u
}

// free is the lowest usable address of the prefix that is not in use: not the network's own, the gateway's or the broadcast one.
func free(p netip.Prefix, gateway string, used map[string]bool) string {
	if gateway == "" {
		gateway = p.Masked().Addr().Next().String()
	}
	for a := p.Masked().Addr().Next(); p.Contains(a) && p.Contains(a.Next()); a = a.Next() {
		if s := a.String(); s != gateway && !used[s] {
			return s
		}
	}
	return ""
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
