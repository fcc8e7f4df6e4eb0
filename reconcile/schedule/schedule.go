// Package schedule decides which node runs a task, and explains each refusal.
//
// The flow: Decide collects what has to be placed ([Ask]) and where it could go ([Node]); [Place] runs each ask through one pipeline of filters, the same
// for everybody who asks whether a task fits, and answers with a node or with a sentence that says how many nodes failed which filter.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Node is a place for tasks.
type Node struct {
	ID       string
	Platform string // os/arch
	// Free is what is not reserved by tasks that are there.
	FreeCPU    manifest.CPU
	FreeMemory manifest.Bytes
	// Ports maps each taken host port, as "tcp/8080", to the service that holds it.
	Ports map[string]string
	Tasks int // tasks on it, for spreading
	// Same counts the tasks of the asking service on it.
	Same map[string]int
}

// Ask is one task to place.
type Ask struct {
	Service string // stack/service
	Slot    int
	Home    string // node that holds the slot's local data; empty = none
	Spec    *manifest.Service
}

// Placement is the answer to an Ask: a node, or a refusal.
type Placement struct {
	Node    string
	Refusal string // a sentence; empty when Node is set
}

// filter says why a node can't run an ask; an empty answer means that it can.
type filter struct {
	name  string
	check func(a Ask, n *Node) string
}

// filters, cheapest first. The first that refuses a node is the one that is counted.
var filters = []filter{
	{"local data elsewhere", func(a Ask, n *Node) string {
		if a.Home != "" && a.Home != n.ID {
			return "the slot's data are on " + a.Home
		}
		return ""
	}},
	{"platform", func(a Ask, n *Node) string {
		for i := range a.Spec.Containers {
			if p := a.Spec.Containers[i].Platform; p != "" && !samePlatform(p, n.Platform) {
				return fmt.Sprintf("the service wants %s, the node is %s", p, n.Platform)
			}
		}
		return ""
	}},
	{"host port taken", func(a Ask, n *Node) string {
		key, holder := n.holder(a.Service, a.Spec)
		if holder == "" {
			return ""
		}
		return fmt.Sprintf("port %s is published by %s", key, holder)
	}},
	{"cpu reserved", func(a Ask, n *Node) string {
		if want := reserved(a.Spec, func(r manifest.Resources) int64 { return int64(r.ReserveCPU) }); want > int64(n.FreeCPU) {
			return fmt.Sprintf("it reserves %s cores, %s are free", manifest.CPU(want), n.FreeCPU)
		}
		return ""
	}},
	{"memory reserved", func(a Ask, n *Node) string {
		if want := reserved(a.Spec, func(r manifest.Resources) int64 { return int64(r.ReserveMemory) }); want > int64(n.FreeMemory) {
			return fmt.Sprintf("it reserves %s, %s are free", manifest.Bytes(want), n.FreeMemory)
		}
		return ""
	}},
}

// PortKey names a host port: protocol, address where one is given, number.
func PortKey(p manifest.Port) string {
	if p.HostIP != "" && p.HostIP != "0.0.0.0" {
		return fmt.Sprintf("%s/%s:%d", p.Proto(), p.HostIP, p.Published)
	}
	return fmt.Sprintf("%s/%d", p.Proto(), p.Published)
}

func samePlatform(want, have string) bool {
	w, h := strings.Split(want, "/"), strings.Split(have, "/")
	return len(w) < 2 || len(h) < 2 || w[0] == h[0] && w[1] == h[1]
}

func reserved(s *manifest.Service, of func(manifest.Resources) int64) (sum int64) {
	for i := range s.Containers {
		sum += of(s.Containers[i].Resources)
	}
	return sum
}

// Place finds the best node for a task: one that passes all filters, with the fewest tasks of the same service, then the fewest of all. The caller counts what
// it places with [Node.Take], so that the next ask finds the ports and the memory taken.
func Place(a Ask, nodes []Node) Placement {
	refused := make([]int, len(filters))
	example := make([]string, len(filters))
	var fit []*Node
next:
	for i := range nodes {
		n := &nodes[i]
		for f, flt := range filters {
			if why := flt.check(a, n); why != "" {
				refused[f]++
				if example[f] == "" {
					example[f] = why
				}
				continue next
			}
		}
		fit = append(fit, n)
	}
	if len(fit) == 0 {
		return Placement{Refusal: explain(len(nodes), refused, example)}
	}
	best := slices.MinFunc(fit, func(x, y *Node) int {
		return cmp.Or(cmp.Compare(x.Same[a.Service], y.Same[a.Service]), cmp.Compare(x.Tasks, y.Tasks), cmp.Compare(x.ID, y.ID))
	})
	return Placement{Node: best.ID}
}

// explain makes the sentence of a refusal: names and counts.
func explain(total int, refused []int, example []string) string {
	if total == 0 {
		return "there is no node"
	}
	var parts []string
	for f, n := range refused {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%s on %d (%s)", filters[f].name, n, example[f]))
		}
	}
	return fmt.Sprintf("no node of %d fits: %s", total, strings.Join(parts, ", "))
}

// holder finds another service that has a host port which the spec names, and the key of that port.
func (n *Node) holder(service string, spec *manifest.Service) (key, holder string) {
	for _, p := range spec.Ports {
		key := PortKey(p)
		if h := n.Ports[key]; p.Published != 0 && h != "" && h != service {
			return key, h
		}
	}
	return "", ""
}

// Publish takes the host ports of a spec for a service that has tasks on the node already. It says whether all of them were free; if not, none is taken.
func (n *Node) Publish(service string, spec *manifest.Service) bool {
	if _, holder := n.holder(service, spec); holder != "" {
		return false
	}
	for _, p := range spec.Ports {
		if p.Published != 0 {
			n.Ports[PortKey(p)] = service
		}
	}
	return true
}

// Release gives back what a task on the node reserves; its ports stay taken.
func (n *Node) Release(spec *manifest.Service) {
	n.FreeCPU += manifest.CPU(reserved(spec, func(r manifest.Resources) int64 { return int64(r.ReserveCPU) }))
	n.FreeMemory += manifest.Bytes(reserved(spec, func(r manifest.Resources) int64 { return int64(r.ReserveMemory) }))
}

// Take counts a task of the service as running on the node.
func (n *Node) Take(service string, spec *manifest.Service) {
	n.Tasks++
	n.FreeCPU -= manifest.CPU(reserved(spec, func(r manifest.Resources) int64 { return int64(r.ReserveCPU) }))
	n.FreeMemory -= manifest.Bytes(reserved(spec, func(r manifest.Resources) int64 { return int64(r.ReserveMemory) }))
	n.Publish(service, spec)
	n.Same[service]++
}
