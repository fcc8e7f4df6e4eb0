package reconcile_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// newWorld has nodes with blocks of that size, and a source.
func newWorld(t *testing.T, nodes, bits int) *world {
	w := &world{t: t, state: state.New(), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), last: map[string]reconcile.Intake{}}
	for i := range nodes {
		id := fmt.Sprintf("n%d", i+1)
		w.put(state.Put(id, 0, state.Node{Name: id, Block: fmt.Sprintf("10.%d.0.0/%d", i+1, bits), Platform: "linux/amd64", CPU: 64e9, Memory: 1 << 40}))
	}
	w.put(state.Put("fleet", 0, state.Source{Name: "fleet", Yes: true}))
	return w
}

// rest lets plans go in and nodes work until nothing changes, and looks at each state on the way.
func (w *world) rest(look func(*state.View)) {
	for range 1000 {
		p := w.decide()
		w.propose(p)
		look(w.view())
		news := w.nodes()
		var wake time.Time
		for _, at := range p.Wakes {
			if wake.IsZero() || at.Before(wake) {
				wake = at
			}
		}
		switch {
		case news || !p.Empty():
		case wake.After(w.now):
			w.now = wake
		default:
			return
		}
	}
	w.t.Fatal("it never settles")
}

// A stack of one service with a network of its own takes a 128th of a block of /19, and one too many is told so.
func TestNetworksOfABlock(t *testing.T) {
	w := newWorld(t, 1, 19)
	b := &manifest.Bundle{Source: "fleet", Revision: manifest.Revision{Ref: "main", Commit: "c1"}}
	for i := range 129 {
		b.Stacks = append(b.Stacks, oneService(fmt.Sprintf("s%03d", i), 1))
		b.Found = append(b.Found, manifest.FoundStack{Name: b.Stacks[i].Name, Dir: b.Stacks[i].Name})
	}
	w.propose(reconcile.Accept(w.view(), reconcile.Intake{Source: "fleet", Bundle: b}))
	w.rest(func(*state.View) {})
	for i, st := range reconcile.Statuses(w.view()) {
		if i < 128 && !st.Ready || i == 128 && (st.Outcome.Kind != state.Stalled || !strings.Contains(st.Outcome.Reason.Message, "used up by 128 networks")) {
			t.Errorf("%s: %s %s %v", st.Name, st.Sync, st.Health, st.Reasons)
		}
	}
}

// oneService is a stack with one service on its own network.
func oneService(name string, replicas int) manifest.Stack {
	net := name + "_default"
	svc := manifest.Service{Name: "web", Replicas: replicas, Networks: []manifest.Attachment{{Network: net}}, Containers: []manifest.Container{{Name: "web", Image: "web:1"}}}
	svc.Update.Deadline = manifest.Duration(time.Minute)
	manifest.Resolve(&svc)
	return manifest.Stack{Name: name, Networks: []manifest.Network{{Name: net, Key: "default"}}, Services: []manifest.Service{svc}}
}

// Whatever comes and goes: subnets on a node never overlap, none changes while a task is on it, each task has an address of its own in the subnets of its networks,
// and when all is gone nothing is kept.
func TestSubnetsNeverOverlap(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(t, rapid.IntRange(1, 2).Draw(rt, "nodes"), rapid.SampledFrom([]int{23, 24}).Draw(rt, "block"))
		last := map[string]string{} // network on a node -> its subnet, while a task is on it
		look := func(v *state.View) { checkSubnets(rt, v, last) }
		for i := range rapid.IntRange(1, 4).Draw(rt, "commits") {
			commit(rt, w, fmt.Sprintf("c%d", i))
			w.rest(look)
			if rapid.Bool().Draw(rt, "collect") {
				w.propose(reconcile.Collect(w.view()))
			}
		}
		e, _ := w.view().Sources.Get("fleet")
		e.Value.Approved = "end"
		w.put(state.Put("fleet", e.Version, e.Value))
		w.propose(reconcile.Accept(w.view(), reconcile.Intake{Source: "fleet", Bundle: &manifest.Bundle{Source: "fleet", Revision: manifest.Revision{Ref: "main", Commit: "end"}}}))
		w.rest(look)
		w.propose(reconcile.Collect(w.view()))
		if w.view().Tasks.Len()+w.view().Networks.Len() > 0 {
			rt.Fatalf("%d tasks and %d networks are left", w.view().Tasks.Len(), w.view().Networks.Len())
		}
		if strings.Contains(w.out.String(), "BUG") {
			rt.Fatal(w.out.String())
		}
	})
}

// commit draws a revision: some stacks, each on its own network, some on that of the first one too; networks may name their subnet, even one that others have.
func commit(rt *rapid.T, w *world, id string) {
	b := &manifest.Bundle{Source: "fleet", Revision: manifest.Revision{Ref: "main", Commit: id}}
	for i := range 5 {
		if i > 0 && !rapid.Bool().Draw(rt, "stack") {
			continue
		}
		st := oneService(fmt.Sprintf("s%d", i), rapid.SampledFrom([]int{0, 1, 2, 32}).Draw(rt, "replicas"))
		if rapid.IntRange(0, 4).Draw(rt, "ipam") == 0 {
			st.Networks[0].Subnet = rapid.SampledFrom([]string{"10.1.0.64/26", "10.1.0.0/25", "10.9.0.0/24", "10.9.0.0/28"}).Draw(rt, "subnet")
		}
		if i > 0 && rapid.Bool().Draw(rt, "shared") {
			st.Networks = append(st.Networks, manifest.Network{Name: "s0_default", Key: "front", External: true})
			st.Services[0].Networks = append(st.Services[0].Networks, manifest.Attachment{Network: "s0_default"})
		}
		b.Stacks = append(b.Stacks, st)
		b.Found = append(b.Found, manifest.FoundStack{Name: st.Name, Dir: st.Name})
	}
	e, _ := w.view().Sources.Get("fleet")
	e.Value.Approved = id
	w.put(state.Put("fleet", e.Version, e.Value))
	w.propose(reconcile.Accept(w.view(), reconcile.Intake{Source: "fleet", Bundle: b}))
}

func checkSubnets(rt *rapid.T, v *state.View, last map[string]string) {
	for id := range v.Nodes.All() {
		parts := map[string]netip.Prefix{}
		for name, n := range v.Networks.All() {
			if n.Value.Subnets[id] == "" {
				continue
			}
			p := netip.MustParsePrefix(n.Value.Subnets[id])
			for other, o := range parts {
				if o.Overlaps(p) {
					rt.Fatalf("on %s, %s of %s overlaps %s of %s", id, p, name, o, other)
				}
			}
			parts[name] = p
		}
	}
	have, busy := map[string]string{}, map[string]string{}
	for id, task := range v.Tasks.All() {
		for name, addr := range task.Value.Addrs {
			n, _ := v.Networks.Get(name)
			where := task.Value.Node + " " + name
			busy[where] = n.Value.Subnets[task.Value.Node]
			p, a := netip.MustParsePrefix(busy[where]), netip.MustParseAddr(addr)
			if !p.Contains(a) || a == p.Addr() || a == p.Addr().Next() || !p.Contains(a.Next()) {
				rt.Fatalf("%s has %s in %s", id, a, p)
			}
			if other := have[where+addr]; other != "" {
				rt.Fatalf("%s and %s have %s of %s", id, other, addr, where)
			}
			have[where+addr] = id
		}
	}
	for where, cidr := range busy {
		if was := last[where]; was != "" && was != cidr {
			rt.Fatalf("%s was %s and is %s while a task is on it", where, was, cidr)
		}
	}
	clear(last)
	for where, cidr := range busy {
		last[where] = cidr
	}
}
