package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestLabEndpoint(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	ensure(t, m, "shop_inner", "10.210.2.0/24", true)
	e := endpoint("shop/web.1", "shop_inner 10.210.2.2", "shop_default 10.210.1.2")
	e.Interfaces[0].MAC = "02:00:00:00:00:07"
	e.Sysctls = map[string]string{"net.core.somaxconn": "77", "net.ipv4.conf.eth1.rp_filter": "2"}
	path, err := m.Attach(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	ns := inode(t, path)
	state := func() State {
		t.Helper()
		st, err := m.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	whole := State{
		Networks: []Network{
			{ID: "shop_default", Subnet: netip.MustParsePrefix("10.210.1.0/24"), Gateway: netip.MustParseAddr("10.210.1.1")},
			{ID: "shop_inner", Subnet: netip.MustParsePrefix("10.210.2.0/24"), Gateway: netip.MustParseAddr("10.210.2.1"), Internal: true},
		},
		Endpoints: []Attached{{Task: "shop/web.1", Namespace: path, Interfaces: e.Interfaces}},
	}
	exact := gocmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	exactP := gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := gocmp.Diff(whole, state(), exact, exactP); diff != "" {
		t.Errorf("list: %s", diff)
	}

	t.Run("what is inside", func(t *testing.T) {
		_, err := within(t, path, func() (int, error) {
			for key, want := range map[string]string{"net.core.somaxconn": "77", "net.ipv4.conf.eth1.rp_filter": "2",
				"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv6.conf.eth0.disable_ipv6": "1"} {
				if got, err := readSysctl(key); err != nil || got != want {
					t.Errorf("%s is %s, %v; want %s", key, got, err, want)
				}
			}
			routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
			if err != nil {
				return 0, err
			}
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return 0, err
			}
			if eth0.Attrs().HardwareAddr.String() != "02:00:00:00:00:07" {
				t.Errorf("MAC address %s", eth0.Attrs().HardwareAddr)
			}
			gw := ""
			for _, r := range routes {
				if len(r.Gw) > 0 {
					gw += r.Gw.String()
				}
			}
			if gw != "10.210.1.1" {
				t.Errorf("default route through %s; that of the network that is not internal is 10.210.1.1", gw)
			}
			return 0, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Run("attaching again changes nothing", func(t *testing.T) {
		before := run(t, "", "ip", "-o", "link")
		if again, err := m.Attach(t.Context(), e); err != nil || again != path || inode(t, again) != ns {
			t.Errorf("%s, %v", again, err)
		}
		if after := run(t, "", "ip", "-o", "link"); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
	t.Run("what others broke is set right in place", func(t *testing.T) {
		serve(t, m, "shop/web.1", 80)
		for name, harm := range map[string]func() error{
			"a link deleted": func() error {
				l, err := netlink.LinkByName(m.veths["shop/web.1"][1])
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			},
			"a link off its bridge": func() error {
				l, err := netlink.LinkByName(m.veths["shop/web.1"][1])
				if err != nil {
					return err
				}
				return netlink.LinkSetNoMaster(l)
			},
			"a bridge deleted": func() error {
				l, err := netlink.LinkByName(m.networks["shop_default"].link)
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			},
			"the address taken": func() error {
				_, err := within(t, path, func() (int, error) {
					l, err := netlink.LinkByName("eth1")
					if err != nil {
						return 0, err
					}
					return 0, netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("10.210.1.2/24"))})
				})
				return err
			},
		} {
			if err := harm(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			mustFail(t, host, "10.210.1.2:80")
			if _, err := m.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			ensure(t, m, "shop_default", "10.210.1.0/24", false)
			if _, err := m.Attach(t.Context(), e); err != nil || inode(t, path) != ns {
				t.Fatalf("%s: %v", name, err)
			}
			// The host asks for the task's MAC address once a second.
			eventually(t, name, func() bool { who, _, _ := ask(t, host, "10.210.1.2:80"); return who == "shop/web.1" })
		}
	})
	t.Run("a stranger is told", func(t *testing.T) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = "stranger", m.networks["shop_inner"].index
		veth := netlink.NewVeth(attrs)
		veth.PeerName = "strangers-peer"
		if err := netlink.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
		if got := state().Strangers; len(got) != 1 || got[0] != (Stranger{"shop_inner", "stranger"}) {
			t.Errorf("strangers: %v", got)
		}
	})
	t.Run("refusals", func(t *testing.T) {
		for _, c := range []struct{ id, subnet, gateway, want string }{
			{"x", "10.210.1.128/25", "10.210.1.129", "overlaps 10.210.1.0/24 of network shop_default"},
			{"x", "127.0.0.0/24", "127.0.0.1", "of the host's lo"},
			{"shop_inner", "10.210.2.0/24", "10.210.2.1", "remove it before"},
			{"x", "10.210.9.0/24", "10.210.8.1", "is no host address"},
		} {
			n := Network{ID: c.id, Subnet: netip.MustParsePrefix(c.subnet), Gateway: netip.MustParseAddr(c.gateway)}
			if err := m.EnsureNetwork(t.Context(), n); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v: %v; want %s", c, err, c.want)
			}
		}
		if err := m.RemoveNetwork(t.Context(), "shop_default"); err == nil || !strings.Contains(err.Error(), "shop/web.1 is still on it") {
			t.Errorf("a network in use: %v", err)
		}
	})
	t.Run("detach and remove", func(t *testing.T) {
		for range 2 {
			if err := m.Detach(t.Context(), "shop/web.1"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("the pin is still there")
		}
		if err := m.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			for _, id := range []string{"shop_default", "shop_inner"} {
				if err := m.RemoveNetwork(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
		}
		if st := state(); len(st.Networks)+len(st.Endpoints) != 0 {
			t.Errorf("left: %+v", st)
		}
	})
}

func TestLabHostPrefixes(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	uplink, err := netlink.LinkByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	// As a VPN does: in a table of its own.
	vpn := &netlink.Route{LinkIndex: uplink.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("10.211.0.0/16")), Table: 52, Gw: net.IPv4(192, 0, 2, 2)}
	if err := netlink.RouteAdd(vpn); err != nil {
		t.Fatal(err)
	}
	got, err := m.HostPrefixes()
	if err != nil {
		t.Fatal(err)
	}
	block, err := PickBlock(prefixes("10.210.0.0/15", "192.0.2.0/24"), got, 24)
	if err != nil || block.String() != "10.210.0.0/24" || !slices.Contains(got, netip.MustParsePrefix("10.211.0.0/16")) {
		t.Errorf("picked %s, %v beside %v", block, err, got)
	}
	if block, err = PickBlock(prefixes("192.0.2.0/24"), got, 24); err == nil {
		t.Errorf("picked the uplink's %s", block)
	}
	if slices.ContainsFunc(got, netip.MustParsePrefix("10.210.1.0/24").Overlaps) {
		t.Errorf("our own network is among %v", got)
	}
}

// A process that holds the namespace does not hold the links: they are deleted when the kernel does not do it by itself.
func TestLabDetachWhileHeld(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	attach(t, m, "web.1", "shop_default 10.210.1.2")
	held, err := os.Open(m.pin("web.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	link := m.veths["web.1"][0]
	if err := m.Detach(t.Context(), "web.1"); err != nil {
		t.Fatal(err)
	}
	if err := m.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := net.InterfaceByName(link); err == nil {
		t.Error("the link is still there")
	}
	runtime.KeepAlive(held)
}

// Not a check but figures: 50 endpoints and many ports.
func TestLabFigures(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	ensure(t, m, "shop_default", "10.210.0.0/16", false)
	const n = 50
	took := func(what string, f func()) {
		start := time.Now()
		f()
		t.Logf("%-48s %s", what, time.Since(start).Round(10*time.Microsecond))
	}
	all := func(f func(i int) error) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := f(i); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	one := func(i int) Endpoint {
		return endpoint(fmt.Sprintf("shop/web.%d", i), fmt.Sprintf("shop_default 10.210.1.%d", i+2))
	}
	took("attach one", func() { attach(t, m, "shop/first", "shop_default 10.210.2.1") })
	took("attach 50 at once", func() { all(func(i int) error { _, err := m.Attach(t.Context(), one(i)); return err }) })
	took("attach the same 50 again", func() { all(func(i int) error { _, err := m.Attach(t.Context(), one(i)); return err }) })
	svc := Service{Key: "shop/web", Ports: []Port{tcp(8080, 80)}}
	for i := range n {
		svc.Backends = append(svc.Backends, netip.AddrFrom4([4]byte{10, 210, 1, byte(i + 2)}))
	}
	took("publish a port with 50 backends", func() { publish(t, m, svc) })
	svc.Backends = svc.Backends[1:]
	took("take one backend out", func() { publish(t, m, svc) })
	took("the same table again", func() { publish(t, m, svc) })
	many := Service{Key: "shop/many", Backends: svc.Backends[:3]}
	for i := range 1000 {
		many.Ports = append(many.Ports, tcp(uint16(20000+i), 80))
	}
	took("publish 1000 ports more", func() { publish(t, m, svc, many) })
	took("prepare with 1001 ports", func() {
		if _, err := m.Prepare(t.Context()); err != nil {
			t.Error(err)
		}
	})
	took("list", func() {
		if st, err := m.List(t.Context()); err != nil || len(st.Endpoints) != n+1 {
			t.Errorf("%d endpoints, %v", len(st.Endpoints), err)
		}
	})
	took("detach 50 at once", func() { all(func(i int) error { return m.Detach(t.Context(), one(i).Task) }) })
	took("until their links are gone", func() {
		if err := m.Sync(t.Context()); err != nil {
			t.Error(err)
		}
	})
	took("teardown", func() {
		if err := m.Teardown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
