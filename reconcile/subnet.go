package reconcile

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file chooses where networks and tasks live in a node's block of addresses.
//
// A network gets a subnet of a node when its first task is placed there: the first free part of the block that has room for its services, unless the file names one
// (ipam). It stays as it is while a task is on it, as a bridge has one subnet. What no task is on is given up by Collect, or when a larger one is needed.

// The least part of a node's block that a network gets: 61 tasks, and 253 where it has a name of its own, which it has to be shared with stacks that come later.
const (
	subnetBits = 26
	sharedBits = 24
)

// place is a network on a node.
type place struct{ node, network string }

// part is a subnet of a node with the network that has it.
type part struct {
	netip.Prefix
	network string
}

// addresses gives a task an address on each of its networks.
func (s *stackRun) addresses(node string, target *manifest.Service) (map[string]string, state.Reason) {
	if len(target.Networks) == 0 || target.NetworkMode != "" {
		return nil, state.Reason{}
	}
	out := make(map[string]string, len(target.Networks))
	nets := make([]state.Network, len(target.Networks))
	var chosen []part
	for i, at := range target.Networks {
		where := place{node, at.Network}
		n := s.network(at.Network)
		prefix, why := s.subnet(where, &n, chosen)
		nets[i], chosen = n, append(chosen, part{prefix, at.Network})
		addr := at.IPv4
		switch {
		case why != "":
		case addr == "":
			if addr = free(prefix, n.Gateway, s.inUse()[where]); addr == "" {
				why = fmt.Sprintf("network %s (%s) has no free address left on %s", at.Network, prefix, node)
				if n.Subnet != "" {
					why += ": give it a larger subnet under ipam.config"
				}
				why += "; it gets a larger one when no task is on it there: set the replicas of its services to 0 and back, or move some of them to another network"
			}
		case !contains(prefix, addr):
			why = fmt.Sprintf("the fixed address %s is not in the subnet %s of network %s on %s; a network gets another subnet when no task is on it: "+
				"set the replicas of its services to 0 and back", addr, prefix, at.Network, node)
		}
		if why != "" {
			return nil, state.Reason{ID: ReasonNoAddress, Message: why}
		}
		out[at.Network] = addr
	}
	for i, at := range target.Networks {
		s.attach(place{node, at.Network}, nets[i], out[at.Network])
	}
	return out, state.Reason{}
}

// attach records that a task has an address of a network, and what the network has become for it.
func (s *stackRun) attach(where place, n state.Network, addr string) {
	used := s.inUse()
	if used[where] == nil {
		used[where] = map[string]bool{}
	}
	used[where][addr] = true
	if old, known := s.recorded(where.network); known && reflect.DeepEqual(old, n) {
		return
	}
	s.nets[where.network] = &n
	parts := slices.DeleteFunc(s.parts()[where.node], func(p part) bool { return p.network == where.network })
	p := part{netip.MustParsePrefix(n.Subnets[where.node]), where.network}
	at, _ := slices.BinarySearchFunc(parts, p, byAddress)
	s.taken[where.node] = slices.Insert(parts, at, p)
}

// recorded is a network as it is when this plan is in.
func (d *decision) recorded(name string) (state.Network, bool) {
	if n, made := d.nets[name]; made {
		if n == nil {
			return state.Network{}, false
		}
		return *n, true
	}
	e, known := d.v.Networks.Get(name)
	return e.Value, known
}

// network is a network as it is for the next task. One that no task is on is as the stack that has it declares it.
func (s *stackRun) network(name string) state.Network {
	n, known := s.recorded(name)
	at := slices.IndexFunc(s.release.Stack.Networks, func(n manifest.Network) bool { return n.Name == name })
	switch {
	case !known && (at < 0 || s.release.Stack.Networks[at].External):
		return s.wants().declared[name]
	case at < 0 || s.release.Stack.Networks[at].External:
		return n
	}
	says := asDeclared(s.name, s.release.Stack.Networks[at])
	if known && (n.Subnet == says.Subnet && n.Gateway == says.Gateway && n.Internal == says.Internal || s.busy(name)) {
		return n
	}
	return says
}

// asDeclared is a network of a stack that no task is on yet.
func asDeclared(stack string, n manifest.Network) state.Network {
	return state.Network{Stack: stack, Internal: n.Internal, Subnet: n.Subnet, Gateway: n.Gateway}
}

// busy says whether a task is on a network, on any node.
func (d *decision) busy(network string) bool {
	for id := range d.v.Nodes.All() {
		if len(d.inUse()[place{id, network}]) > 0 {
			return true
		}
	}
	return false
}

// subnet is the part of a node's block that a network has, or from now on has: n is changed then. chosen are those of the task's other networks. why says what is in
// the way.
func (d *decision) subnet(where place, n *state.Network, chosen []part) (p netip.Prefix, why string) {
	have, err := netip.ParsePrefix(n.Subnets[where.node])
	if err == nil && (n.Subnet != "" || len(d.inUse()[where]) > 0) {
		return have, ""
	}
	others := slices.DeleteFunc(slices.Concat(d.parts()[where.node], chosen), func(o part) bool { return o.network == where.network })
	slices.SortFunc(others, byAddress)
	if n.Subnet != "" {
		if p, err = netip.ParsePrefix(n.Subnet); err != nil {
			return p, fmt.Sprintf("network %s: read its subnet: %v", where.network, err)
		}
		if at := slices.IndexFunc(others, func(o part) bool { return o.Overlaps(p) }); at >= 0 {
			return p, fmt.Sprintf("the subnet %s of network %s overlaps %s, which network %s has on %s: give it another one under ipam.config",
				p, where.network, others[at].Prefix, others[at].network, where.node)
		}
	} else {
		e, _ := d.v.Nodes.Get(where.node)
		block, _ := netip.ParsePrefix(e.Value.Block)
		for bits := d.wanted(where.network, n.Stack); bits <= subnetBits && !p.IsValid(); bits++ {
			p = firstFit(block, others, bits)
		}
		switch {
		case err == nil && (!p.IsValid() || p.Bits() >= have.Bits()):
			return have, ""
		case !p.IsValid():
			return p, fmt.Sprintf("network %s has no subnet on %s: the node's block %s is used up by %s; remove some, or give a new node a larger block with --block-bits",
				where.network, where.node, block, count(len(others), "network"))
		}
	}
	subnets := map[string]string{where.node: p.Masked().String()}
	for _, id := range sortedKeys(n.Subnets) {
		if id != where.node {
			subnets[id] = n.Subnets[id]
		}
	}
	n.Subnets = subnets
	return p.Masked(), ""
}

// wants is what all stacks ask of networks.
type wants struct {
	declared map[string]state.Network // by the stack whose own it is
	tasks    map[string]int           // of all services on it
}

func (d *decision) wants() *wants {
	if d.asked != nil {
		return d.asked
	}
	d.asked = &wants{map[string]state.Network{}, map[string]int{}}
	for stack, st := range d.v.Stacks.All() {
		if st.Value.Applied == nil || st.Value.Removing {
			continue
		}
		rel, _ := d.v.Releases.Get(st.Value.Applied.Release)
		for _, n := range rel.Value.Stack.Networks {
			if !n.External {
				d.asked.declared[n.Name] = asDeclared(stack, n)
			}
		}
		for _, name := range rel.Value.Names() {
			spec, _ := d.spec(rel.Value.Services[name])
			tasks := 1 // on a node
			if spec.Mode != manifest.Global && spec.Mode != manifest.GlobalJob {
				tasks = spec.Replicas
			}
			for _, at := range spec.Networks {
				d.asked.tasks[at.Network] += tasks
			}
		}
	}
	return d.asked
}

// wanted is the size of a subnet that has room for all tasks of a network, and for as many that replace them. stack is the one whose own it is.
func (d *decision) wanted(network, stack string) int {
	bits := subnetBits
	if !strings.HasPrefix(network, stack+"_") {
		bits = sharedBits
	}
	for bits > 1 && 1<<(32-bits)-3 < 2*d.wants().tasks[network] {
		bits--
	}
	return bits
}

// parts are the subnets of each node, by address.
func (d *decision) parts() map[string][]part {
	if d.taken != nil {
		return d.taken
	}
	d.taken = map[string][]part{}
	for name, n := range d.v.Networks.All() {
		for _, id := range sortedKeys(n.Value.Subnets) {
			if p, err := netip.ParsePrefix(n.Value.Subnets[id]); err == nil {
				d.taken[id] = append(d.taken[id], part{p, name})
			}
		}
	}
	for _, id := range sortedKeys(d.taken) {
		slices.SortFunc(d.taken[id], byAddress)
	}
	return d.taken
}

func byAddress(a, b part) int { return a.Addr().Compare(b.Addr()) }

// inUse are the addresses that tasks hold.
func (d *decision) inUse() map[place]map[string]bool {
	if d.addrs != nil {
		return d.addrs
	}
	d.addrs = map[place]map[string]bool{}
	for _, t := range d.v.Tasks.All() {
		for _, network := range sortedKeys(t.Value.Addrs) {
			where := place{t.Value.Node, network}
			if d.addrs[where] == nil {
				d.addrs[where] = map[string]bool{}
			}
			d.addrs[where][t.Value.Addrs[network]] = true
		}
	}
	return d.addrs
}

// firstFit is the lowest part of a block with that many bits that overlaps none of the others, which are in order of their addresses. It is not valid where there is none.
func firstFit(block netip.Prefix, others []part, bits int) netip.Prefix {
	if !block.IsValid() || !block.Addr().Is4() || bits < block.Bits() {
		return netip.Prefix{}
	}
	first, end := span(block)
	size := uint64(1) << (32 - bits)
	at := first
	for _, o := range others {
		from, to := span(o.Prefix)
		if from >= at+size {
			break
		}
		if to > at {
			at = (to + size - 1) / size * size
		}
	}
	if at+size > end {
		return netip.Prefix{}
	}
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], uint32(at))
	return netip.PrefixFrom(netip.AddrFrom4(a), bits)
}

// span is the first address of an IPv4 prefix, and the one behind its last.
func span(p netip.Prefix) (from, to uint64) {
	a := p.Masked().Addr().As4()
	from = uint64(binary.BigEndian.Uint32(a[:]))
	return from, from + 1<<(32-p.Bits())
}

// contains says whether an address lies in a prefix.
func contains(p netip.Prefix, addr string) bool {
	a, err := netip.ParseAddr(addr)
	return err == nil && p.Contains(a)
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

// changedNetworks are the changes of the networks that this plan gives subnets, or leaves. They go first, so that no node is told of a task before its network.
func (d *decision) changedNetworks() []state.Item {
	var out []state.Item
	for _, name := range sortedKeys(d.nets) {
		e, _ := d.v.Networks.Get(name)
		change := state.Delete[state.Network](name, e.Version)
		if n := d.nets[name]; n != nil {
			change = state.Put(name, e.Version, *n)
		}
		out = append(out, state.Item{change})
	}
	return out
}

// leaveNetworks gives up the networks of a stack of which all is gone. One that tasks of other stacks are on is theirs from now on.
func (s *stackRun) leaveNetworks() {
	for _, t := range s.v.Tasks.Below(s.name + "/") { // forgotten with this plan
		for _, network := range sortedKeys(t.Value.Addrs) {
			delete(s.inUse()[place{t.Value.Node, network}], t.Value.Addrs[network])
		}
	}
	for name := range s.v.Networks.All() {
		n, _ := s.recorded(name)
		if n.Stack != s.name {
			continue
		}
		s.nets[name] = nil
		if s.busy(name) {
			n.Stack = ""
			s.nets[name] = &n
		}
	}
}
