package manifest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
)

// Ports are what a service publishes, sorted as [ComparePorts] says. Written out, a long range is one element, with the number of its ports as
// "count": a media server publishes ten thousand, and an entry of the log holds 256 KiB.
type Ports []Port

// longRange is the least number of ports that are written as one. Shorter ranges have an element for each port.
const longRange = 32

type portRange struct {
	Port
	Count int `json:"count,omitzero"` // ports one after another, on both sides; 0 = one
}

// ComparePorts orders ports by number, target, protocol and address.
func ComparePorts(a, b Port) int {
	return cmp.Or(cmp.Compare(a.Published, b.Published), cmp.Compare(a.Target, b.Target), cmp.Compare(a.Proto(), b.Proto()), cmp.Compare(a.HostIP, b.HostIP))
}

// MarshalJSON writes long ranges as one element. Ports in another order are written one by one, because the order would be lost.
func (p Ports) MarshalJSON() ([]byte, error) {
	if len(p) < longRange || !slices.IsSortedFunc(p, ComparePorts) {
		return json.Marshal([]Port(p))
	}
	left := make(map[Port]int, len(p)) // how many of each are not written yet
	for _, port := range p {
		left[port]++
	}
	var out []portRange
	for _, first := range p {
		if left[first] == 0 {
			continue
		}
		n := 1
		for first.Published > 0 && int(first.Published)+n <= 65535 && int(first.Target)+n <= 65535 && left[first.after(n)] > 0 {
			n++
		}
		r := portRange{Port: first, Count: n}
		if n < longRange {
			r.Count, n = 0, 1
		}
		for i := range n {
			left[first.after(i)]--
		}
		out = append(out, r)
	}
	return json.Marshal(out)
}

// after is the nth port of a range that begins with this one.
func (p Port) after(n int) Port {
	p.Published += uint16(n)
	p.Target += uint16(n)
	return p
}

// UnmarshalJSON reads both forms.
func (p *Ports) UnmarshalJSON(data []byte) error {
	var list []portRange
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	if *p = nil; list != nil {
		*p = make(Ports, 0, len(list))
	}
	long := false
	for _, r := range list {
		if r.Count < 0 || int(r.Published)+r.Count > 1<<16 || int(r.Target)+r.Count > 1<<16 {
			return fmt.Errorf("ports: a range of %d ports from %d to %d does not end within 65535", r.Count, r.Published, r.Target)
		}
		for i := range max(r.Count, 1) {
			*p = append(*p, r.after(i))
		}
		long = long || r.Count > 0
	}
	if long {
		slices.SortStableFunc(*p, ComparePorts)
	}
	return nil
}
