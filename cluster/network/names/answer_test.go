package names

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/miekg/dns"
	"pgregory.net/rapid"
)

func TestAnswer(t *testing.T) {
	var d *directory
	datadriven.RunTest(t, "testdata/answer", func(t *testing.T, td *datadriven.TestData) string {
		switch td.Cmd {
		case "table":
			table := parseTable(t, td.Input)
			d = newDirectory(table)
			return fmt.Sprintf("%d networks, %d clients\n", len(table.Networks), len(table.Clients))
		case "query":
			turn := 0
			td.MaybeScanArgs(t, "turn", &turn)
			var out strings.Builder
			for line := range strings.Lines(td.Input) {
				f := strings.Fields(line)
				q := dns.Question{Name: f[3], Qtype: dns.StringToType[f[2]], Qclass: dns.ClassINET}
				fmt.Fprintf(&out, "%s: %s\n", q.Name, show(d, d.answer(netip.MustParseAddr(f[0]), netip.MustParseAddr(f[1]), q, turn), q))
			}
			return out.String()
		}
		t.Fatalf("unknown command %s", td.Cmd)
		return ""
	})
}

func show(d *directory, r result, q dns.Question) string {
	if r.forward {
		if len(r.resolvers) > 0 {
			return "forward to " + strings.Join(r.resolvers, " ")
		}
		return "forward"
	}
	m := d.reply(&dns.Msg{Question: []dns.Question{q}}, r)
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.PTR:
			out = append(out, rr.Ptr)
		}
	}
	for _, rr := range m.Ns {
		out = append(out, fmt.Sprintf("(%s %s)", dns.TypeToString[rr.Header().Rrtype], rr.Header().Name))
	}
	return strings.Join(out, " ")
}

func parseTable(t *testing.T, text string) Table {
	var table Table
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch f[0] {
		case "domain":
			table.Domain = f[1]
		case "network":
			p := netip.MustParsePrefix(f[2])
			table.Networks = append(table.Networks, Network{ID: f[1], Subnet: p, Gateway: p.Addr().Next(), Internal: slices.Contains(f, "internal")})
		case "record":
			eq := slices.Index(f, "=")
			n := &table.Networks[len(table.Networks)-1]
			n.Records = append(n.Records, Record{Stack: f[1], Names: f[2:eq], Addrs: parseAddrs(f[eq+1:])})
		case "client":
			c := Client{Addrs: parseAddrs(strings.Split(f[1], ",")), Stack: f[2], Networks: strings.Split(f[3], ",")}
			if len(f) == 6 {
				c.Resolvers = []string{f[5]}
			}
			table.Clients = append(table.Clients, c)
		default:
			t.Fatalf("unknown line %q", line)
		}
	}
	return table
}

func parseAddrs(ss []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// Whatever is asked, the answer can be sent, and an address in it is one that the table has for a network of the asker.
func TestAnswerNeverInvents(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		label := rapid.SampledFrom([]string{"web", "db", "tasks.web", "shop", "web.shop", "x"})
		addr := func(net int) *rapid.Generator[netip.Addr] {
			return rapid.Custom(func(t *rapid.T) netip.Addr {
				return netip.AddrFrom4([4]byte{10, 0, byte(net), byte(rapid.IntRange(2, 9).Draw(t, "host"))})
			})
		}
		table := Table{Domain: "svc.internal"}
		of := map[string]map[netip.Addr]bool{}
		for i := range 3 {
			n := Network{ID: fmt.Sprint("n", i), Gateway: netip.AddrFrom4([4]byte{10, 0, byte(i), 1}),
				Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24), Internal: rapid.Bool().Draw(t, "internal")}
			of[n.ID] = map[netip.Addr]bool{}
			for range rapid.IntRange(0, 3).Draw(t, "records") {
				r := Record{Stack: rapid.SampledFrom([]string{"shop", "blog"}).Draw(t, "stack"),
					Names: rapid.SliceOfN(label, 1, 3).Draw(t, "names"), Addrs: rapid.SliceOfN(addr(i), 0, 3).Draw(t, "addrs")}
				n.Records = append(n.Records, r)
				for _, a := range r.Addrs {
					of[n.ID][a] = true
				}
			}
			table.Networks = append(table.Networks, n)
		}
		source := addr(0).Draw(t, "source")
		visible := []string{"n0"}
		if rapid.Bool().Draw(t, "client") {
			visible = append(visible, "n2")
			table.Clients = []Client{{Addrs: []netip.Addr{source}, Stack: "shop", Networks: []string{"n2", "n0"}}}
		}
		data, err := Encode(table)
		if err != nil {
			t.Fatal(err)
		}
		if table, err = Decode(data); err != nil {
			t.Fatal(err)
		}
		d := newDirectory(table)
		name := label.Draw(t, "name") + rapid.SampledFrom([]string{".", ".svc.internal.", ".example.com."}).Draw(t, "suffix")
		q := dns.Question{Name: name, Qtype: rapid.SampledFrom([]uint16{dns.TypeA, dns.TypeAAAA, dns.TypePTR}).Draw(t, "type"), Qclass: dns.ClassINET}
		r := d.answer(table.Networks[0].Gateway, source, q, rapid.IntRange(0, 100).Draw(t, "turn"))
		req := new(dns.Msg)
		req.Question = []dns.Question{q}
		m := d.reply(req, r)
		if _, err := m.Pack(); err != nil {
			t.Fatal(err)
		}
		for _, rr := range m.Answer {
			a, ok := rr.(*dns.A)
			if !ok {
				continue
			}
			got, _ := netip.AddrFromSlice(a.A.To4())
			if !slices.ContainsFunc(visible, func(id string) bool { return of[id][got] }) {
				t.Fatalf("answer %s is of no network of the asker", got)
			}
		}
		if r.rcode == dns.RcodeNameError && strings.HasSuffix(name, ".svc.internal.") && slices.ContainsFunc(visible, func(id string) bool {
			return len(d.networks[id].records[strings.TrimSuffix(name, ".svc.internal.")]) > 0
		}) {
			t.Fatal("NXDOMAIN for a name that exists")
		}
	})
}

func FuzzDecode(f *testing.F) {
	n := Network{ID: "a", Gateway: netip.MustParseAddr("10.0.0.1"), Subnet: netip.MustParsePrefix("10.0.0.0/24")}
	good, err := Encode(Table{Domain: "svc.internal", Networks: []Network{n}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`{"format":1,"networks":[{"id":"x","records":[{"names":[""]}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		table, err := Decode(data)
		if err != nil {
			return
		}
		d := newDirectory(table)
		for gw := range d.gateways {
			d.answer(gw, gw, dns.Question{Name: "web.", Qtype: dns.TypeA, Qclass: dns.ClassINET}, 0)
		}
	})
}
