package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/gitopsd/gitopsd/cluster/network/names"
)

func TestAdmit(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	any4 := netip.MustParseAddr("0.0.0.0")
	got, err := admit([]Service{
		{Key: "shop/web", Ports: []Port{tcp(80, 8080), {HostIP: any4, HostPort: 81, Protocol: TCP, Target: 1}},
			Backends: addrs("10.0.0.3", "10.0.0.2", "10.0.0.3")},
		{Key: "blog/web", Ports: []Port{tcp(80, 80), {HostIP: local, HostPort: 80, Protocol: TCP, Target: 80},
			{HostPort: 80, Protocol: UDP, Target: 80}, tcp(81, 2)}},
		{Key: "odd/one", Ports: []Port{{HostPort: 1, Protocol: "icmp", Target: 1}, tcp(0, 1), tcp(9, 0)}, Backends: addrs("fd00::1")},
	})
	if err == nil {
		t.Fatal("no problem was told")
	}
	want := []string{
		"publish blog/web: port 80/tcp is already published by shop/web",
		"publish blog/web: port 81/tcp is already published by shop/web",
		"publish odd/one: backend fd00::1 is not an IPv4 address",
		"publish odd/one: port 1/icmp to 1 is not possible: ports go from 1 to 65535, protocols are tcp, udp and sctp",
		"publish odd/one: port 0/tcp to 1 is not possible: ports go from 1 to 65535, protocols are tcp, udp and sctp",
		"publish odd/one: port 9/tcp to 0 is not possible: ports go from 1 to 65535, protocols are tcp, udp and sctp",
	}
	if lines := strings.Split(err.Error(), "\n"); !slices.Equal(lines, want) {
		t.Errorf("problems:\n%s", err)
	}
	if !slices.Equal(got[0].Backends, addrs("10.0.0.2", "10.0.0.3")) || len(got[1].Ports) != 2 || len(got[2].Ports)+len(got[2].Backends) != 0 {
		t.Errorf("admitted %+v", got)
	}
}

func newUnit(t *testing.T) *Manager {
	t.Helper()
	m, err := New(Config{Name: "gl3x", RunDir: t.TempDir(), StateDir: t.TempDir()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m.have = &contents{}
	return m
}

// sent takes over a difference as if it had been sent, and tells what it touched.
func (m *Manager) sent() []string {
	d := m.differ(m.spec())
	m.have = d.result
	var out []string
	for _, c := range d.newChains {
		out = append(out, "+chain "+c.name)
	}
	for _, c := range d.fill {
		out = append(out, "fill "+c.name)
	}
	for _, e := range d.addElements {
		out = append(out, "+"+e.spec.name)
	}
	for _, e := range d.dropElements {
		out = append(out, "-"+e.spec.name)
	}
	for _, c := range d.dropChains {
		out = append(out, "-chain "+c)
	}
	return out
}

// Only what changed is sent.
func TestDifference(t *testing.T) {
	m := newUnit(t)
	expect := func(what string, want ...string) {
		t.Helper()
		if got := m.sent(); !slices.Equal(got, want) {
			t.Errorf("%s: sent %q, want %q", what, got, want)
		}
		if again := m.sent(); len(again) != 0 {
			t.Errorf("%s: sent again %q", what, again)
		}
	}
	m.sent()
	n := Network{ID: "shop_default", Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.1")}
	m.networks[n.ID] = bridge{Network: n, link: "gl3x-bx1"}
	expect("a network", "+chain network-gl3x-bx1", "fill network-gl3x-bx1", "+gateways", "+outward", "+within", "+networks")
	m.known = true
	m.services = []Service{{Key: "a/b", Ports: []Port{tcp(80, 80), tcp(81, 81)}, Backends: addrs("10.0.0.2")}}
	expect("two ports", "+chain port-tcp-a/b", "fill port-tcp-a/b", "+ports", "+targets")
	m.services = []Service{{Key: "a/b", Ports: []Port{tcp(80, 80), tcp(81, 81)}, Backends: addrs("10.0.0.2", "10.0.0.3")}}
	expect("a backend more", "fill port-tcp-a/b")
	m.services = []Service{{Key: "a/b", Ports: []Port{tcp(80, 80)}, Backends: addrs("10.0.0.2", "10.0.0.3")}}
	expect("a port less", "-ports", "-targets")
	m.services[0].Ports[0].Target = 8080
	expect("another target", "+targets", "-targets")
	m.services[0].Key = "c/d"
	expect("the port goes to another service", "+chain port-tcp-c/d", "fill port-tcp-c/d", "+ports", "-ports", "-chain port-tcp-a/b")
	m.services, m.known = nil, false
	expect("before ports are known")
	m.known = true
	expect("no ports", "-ports", "-targets", "-chain port-tcp-c/d")
	delete(m.networks, "shop_default")
	expect("no network", "-gateways", "-outward", "-within", "-networks", "-chain network-gl3x-bx1")
}

// An element that is deleted is told by its key alone; the key must come back from the text that is kept.
func TestElementKey(t *testing.T) {
	for _, e := range []nftables.SetElement{
		{Key: []byte{10, 0, 0, 1}}, {Key: []byte{10, 0, 1, 0}, IntervalEnd: true}, {Key: []byte{6, 0, 0, 0, 0, 80, 0, 0}, Val: []byte{0, 80}},
		{Key: []byte{6, 0, 0, 0, 0, 80, 0, 0}, VerdictData: verdict(expr.VerdictGoto, "port-tcp-a/b")},
	} {
		if got := elementOf(elementKey(e)); !slices.Equal(got.Key, e.Key) || got.IntervalEnd != e.IntervalEnd {
			t.Errorf("%v became %v", e, got)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []Config{
		{Name: "", RunDir: "/r", StateDir: "/s"}, {Name: "toolong", RunDir: "/r", StateDir: "/s"}, {Name: "Up", RunDir: "/r", StateDir: "/s"},
		{Name: "a b", RunDir: "/r", StateDir: "/s"}, {Name: "ok", RunDir: "r", StateDir: "/s"}, {Name: "ok", RunDir: "/r"},
		{Name: "ok", RunDir: "/r", StateDir: "/s", MTU: 10},
	} {
		if _, err := New(c, nil); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestNamesOfLinksFit(t *testing.T) {
	m, err := New(Config{Name: "gitops", RunDir: "/r", StateDir: "/s"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, internal := range []bool{false, true} {
		name, _ := m.bridgeName(Network{ID: "shop_default", Internal: internal}, nil)
		if len(name) > 15 || m.internal(name) != internal {
			t.Errorf("bridge name %s", name)
		}
	}
	m.networks["n"] = bridge{Network: Network{ID: "n", Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.1")}}
	plans, err := m.plan(endpoint("shop/web.1", "n 10.0.0.2"))
	if err != nil || len(plans[0].host) > 15 {
		t.Errorf("%+v %v", plans, err)
	}
}

func TestEndpointsAreChecked(t *testing.T) {
	m := newUnit(t)
	m.networks["n"] = bridge{Network: Network{ID: "n", Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.1")}}
	good := endpoint("shop/web.1", "n 10.0.0.2")
	for name, change := range map[string]func(*Endpoint){
		"a path in the name":           func(e *Endpoint) { e.Task = "../x" },
		"a slash too much":             func(e *Endpoint) { e.Task = "a//b" },
		"an unknown network":           func(e *Endpoint) { e.Interfaces[0].Network = "other" },
		"the gateway's address":        func(e *Endpoint) { e.Interfaces[0].Address = netip.MustParseAddr("10.0.0.1") },
		"an address elsewhere":         func(e *Endpoint) { e.Interfaces[0].Address = netip.MustParseAddr("10.0.1.2") },
		"lo":                           func(e *Endpoint) { e.Interfaces[0].Name = "lo" },
		"a name twice":                 func(e *Endpoint) { e.Interfaces = append(e.Interfaces, e.Interfaces[0]) },
		"a multicast MAC":              func(e *Endpoint) { e.Interfaces[0].MAC = "01:00:5e:00:00:01" },
		"a sysctl of the whole host":   func(e *Endpoint) { e.Sysctls = map[string]string{"kernel.panic": "1"} },
		"a sysctl that leaves the net": func(e *Endpoint) { e.Sysctls = map[string]string{"net./../../kernel/panic": "1"} },
	} {
		e := good
		e.Interfaces = slices.Clone(good.Interfaces)
		change(&e)
		err := e.check()
		if err == nil {
			_, err = m.plan(e)
		}
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// Until the agent said both what is published and what names there are, the file of the agent before stays.
func TestNamesFileWaitsForAll(t *testing.T) {
	m := newUnit(t)
	file := m.NamesFile()
	if err := os.WriteFile(file, []byte("earlier"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.SetNames(t.Context(), Names{Domain: "svc.internal"}); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(file); string(data) != "earlier" {
		t.Fatalf("the file was replaced: %s", data)
	}
	m.services, m.known = []Service{{Key: "a/b", Backends: addrs("10.0.0.2"), Ports: []Port{
		tcp(80, 8080), {HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 81, Protocol: TCP, Target: 1}, {HostPort: 82, Protocol: SCTP, Target: 1},
		{HostIP: netip.MustParseAddr("::1"), HostPort: 83, Protocol: UDP, Target: 1}}}}, true
	if err := m.SetNames(t.Context(), Names{Domain: "svc.internal"}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	table, err := names.Decode(data)
	if err != nil || len(table.Ports) != 2 || table.Ports[0].Backends[0].String() != "10.0.0.2:8080" || table.Ports[1].Address.String() != "::1" {
		t.Errorf("table %+v, %v", table, err)
	}
	if left, _ := filepath.Glob(filepath.Join(m.cfg.RunDir, ".names*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func FuzzParseFlow(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 8, 0, 2, 128, 4, 0, 1, 128})
	f.Add([]byte{2, 0, 0, 0, 3, 0, 2, 0})
	f.Fuzz(func(t *testing.T, data []byte) { parseFlow(data) })
}
