package names

import (
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// ttl of our answers, in seconds. A task that is taken from the names must be forgotten soon, and asking again costs a fraction of
// a millisecond.
const ttl = 1

// directory is a table made ready for queries. It never changes.
type directory struct {
	table    Table
	networks map[string]*zone
	gateways map[netip.Addr]*zone
	clients  map[netip.Addr]*Client
}

type zone struct {
	*Network
	records map[string][]*Record
	byAddr  map[netip.Addr]*Record
}

func newDirectory(t Table) *directory {
	t.Domain = normal(t.Domain)
	d := &directory{table: t, networks: map[string]*zone{}, gateways: map[netip.Addr]*zone{}, clients: map[netip.Addr]*Client{}}
	for i := range t.Networks {
		n := &t.Networks[i]
		z := &zone{Network: n, records: map[string][]*Record{}, byAddr: map[netip.Addr]*Record{}}
		for j := range n.Records {
			r := &n.Records[j]
			for _, name := range r.Names {
				if name = normal(name); name != "" && !slices.Contains(z.records[name], r) {
					z.records[name] = append(z.records[name], r)
				}
			}
			for _, a := range r.Addrs {
				// A record of one address is a task's own: its name says more.
				if old := z.byAddr[a]; old == nil || len(r.Addrs) < len(old.Addrs) {
					z.byAddr[a] = r
				}
			}
		}
		d.networks[n.ID], d.gateways[n.Gateway] = z, z
	}
	for i := range t.Clients {
		for _, a := range t.Clients[i].Addrs {
			d.clients[a] = &t.Clients[i]
		}
	}
	return d
}

func normal(name string) string { return strings.ToLower(strings.Trim(name, ".")) }

// result is what becomes of a query: an answer of ours, or forward.
type result struct {
	rcode   int
	answers []dns.RR
	// forward: the query goes to resolvers; none = those of the table, or else of the host.
	forward   bool
	resolvers []string
}

// answer decides on a question that came in on a gateway's address. turn rotates the addresses of an answer. It is a pure function.
func (d *directory) answer(gateway, source netip.Addr, q dns.Question, turn int) result {
	z := d.gateways[gateway]
	// The gateway itself is who asks from the host. All others have no business here: an open resolver serves attackers.
	if z == nil || (source != gateway && !z.Subnet.Contains(source)) {
		return result{rcode: dns.RcodeRefused}
	}
	zones, stack, resolvers := []*zone{z}, "", []string(nil)
	if c := d.clients[source]; c != nil {
		stack, resolvers = c.Stack, c.Resolvers
		for _, id := range c.Networks {
			if other := d.networks[id]; other != nil && other != z {
				zones = append(zones, other)
			}
		}
		slices.SortStableFunc(zones, func(a, b *zone) int { return slices.Index(c.Networks, a.ID) - slices.Index(c.Networks, b.ID) })
	}
	up := result{forward: true, resolvers: resolvers}
	if !slices.ContainsFunc(zones, func(z *zone) bool { return !z.Internal }) {
		up = result{rcode: dns.RcodeNameError}
	}
	if q.Qclass != dns.ClassINET {
		return up
	}
	name := normal(q.Name)
	if addr, ok := reverse(name); ok {
		return d.pointer(zones, addr, q, up)
	}
	rest, below := strings.CutSuffix(name, "."+d.table.Domain)
	if d.table.Domain == "" {
		rest, below = name, false
	}
	if addrs, known := lookup(zones, stack, rest); known {
		return result{answers: addressRecords(q, addrs, turn)}
	}
	switch {
	case name == d.table.Domain && name != "":
		return result{}
	case below:
		return result{rcode: dns.RcodeNameError}
	}
	return up
}

// lookup finds the addresses of a name. Networks count in the order in which the task has them; in a network that stacks share, the
// asker's own stack has the first word, else a foreign "db" would mix with one's own.
func lookup(zones []*zone, stack, name string) (addrs []netip.Addr, known bool) {
	for _, own := range []bool{true, false} {
		found := false
		for _, z := range zones {
			for _, r := range z.records[name] {
				if own && (stack == "" || r.Stack != stack) {
					continue
				}
				found = true
				addrs = append(addrs, r.Addrs...)
			}
			if len(addrs) > 0 {
				return addrs, true
			}
		}
		if found {
			return nil, true
		}
	}
	return nil, false
}

func addressRecords(q dns.Question, addrs []netip.Addr, turn int) []dns.RR {
	if len(addrs) == 0 || (q.Qtype != dns.TypeA && q.Qtype != dns.TypeANY) {
		return nil // the name exists: no NXDOMAIN, or clients that ask for AAAA first would give up
	}
	out := make([]dns.RR, 0, len(addrs))
	seen := map[netip.Addr]bool{}
	for i := range addrs {
		a := addrs[(i+turn)%len(addrs)]
		if !seen[a] {
			seen[a] = true
			out = append(out, &dns.A{Hdr: header(q.Name, dns.TypeA), A: a.AsSlice()})
		}
	}
	return out
}

func (d *directory) pointer(zones []*zone, addr netip.Addr, q dns.Question, up result) result {
	for _, z := range zones {
		r := z.byAddr[addr]
		if r == nil || len(r.Names) == 0 {
			continue
		}
		if q.Qtype != dns.TypePTR && q.Qtype != dns.TypeANY {
			return result{}
		}
		return result{answers: []dns.RR{&dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: dns.Fqdn(join(normal(r.Names[0]), d.table.Domain))}}}
	}
	for _, n := range d.table.Networks {
		if n.Subnet.Contains(addr) {
			return result{rcode: dns.RcodeNameError} // ours: no business of a server outside
		}
	}
	return up
}

func join(name, domain string) string {
	if domain == "" {
		return name
	}
	return name + "." + domain
}

// reverse reads the address of 4.3.2.1.in-addr.arpa.
func reverse(name string) (netip.Addr, bool) {
	rest, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	parts := strings.Split(rest, ".")
	slices.Reverse(parts)
	a, err := netip.ParseAddr(strings.Join(parts, "."))
	return a, err == nil && a.Is4()
}

func header(name string, typ uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: typ, Class: dns.ClassINET, Ttl: ttl}
}

// reply makes the message for a result that is not forwarded.
func (d *directory) reply(req *dns.Msg, r result) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(req, r.rcode)
	m.RecursionAvailable = true
	m.Answer = r.answers
	if r.rcode != dns.RcodeRefused {
		m.Authoritative = true
		if len(r.answers) == 0 {
			zone := dns.Fqdn(d.table.Domain)
			below := strings.TrimPrefix(zone, ".") // empty for the root
			m.Ns = []dns.RR{&dns.SOA{Hdr: header(zone, dns.TypeSOA), Ns: "ns." + below, Mbox: "hostmaster." + below,
				Serial: 1, Refresh: ttl, Retry: ttl, Expire: ttl, Minttl: ttl}}
		}
	}
	if opt := req.IsEdns0(); opt != nil {
		m.SetEdns0(ednsSize, opt.Do())
	}
	return m
}

func addrOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
