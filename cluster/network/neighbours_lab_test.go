package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/gitopsd/gitopsd/cluster/network/names"
)

func TestLabBesideFirewalls(t *testing.T) {
	if !inLab(t) {
		return
	}
	iptables, nft := needTool(t, "iptables-nft"), needTool(t, "nft")
	// Docker's chains, ufw's policies, firewalld's table and one that a person wrote, in turn: each drops what it does not know.
	cases := []struct {
		name         string
		set          func(t *testing.T)
		opened       []string
		dropsQueries bool
	}{
		{"docker", func(t *testing.T) {
			for _, args := range []string{"-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A DOCKER-USER -j RETURN"} {
				run(t, "", iptables, strings.Fields(args)...)
			}
		}, []string{"ip filter DOCKER-USER"}, false},
		{"ufw", func(t *testing.T) {
			for _, args := range []string{"-P FORWARD DROP", "-P INPUT DROP", "-N ufw-before-forward", "-A FORWARD -j ufw-before-forward",
				"-A INPUT -i lo -j ACCEPT", "-A INPUT -i uplink -j ACCEPT", "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT"} {
				run(t, "", iptables, strings.Fields(args)...)
			}
		}, []string{"ip filter FORWARD", "ip filter INPUT"}, true},
		{"firewalld", func(t *testing.T) {
			run(t, `table inet firewalld {
				chain filter_FORWARD { type filter hook forward priority 10; policy accept; ct state established accept; reject with icmpx type admin-prohibited; }
				chain filter_INPUT { type filter hook input priority 10; policy accept; ct state established accept; iifname { "lo", "uplink" } accept; reject; }
			}`, nft, "-f", "-")
		}, []string{"inet firewalld filter_FORWARD", "inet firewalld filter_INPUT"}, true},
		{"nftables.conf", func(t *testing.T) {
			run(t, "table inet mine {\n chain forward { type filter hook forward priority 0; policy drop; }\n }", nft, "-f", "-")
		}, []string{"inet mine forward"}, false},
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	ensure(t, m, "blog_default", "10.210.2.0/24", false)
	attach(t, m, "web.1", "shop_default 10.210.1.2")
	attach(t, m, "web.2", "shop_default 10.210.1.3")
	attach(t, m, "blog.1", "blog_default 10.210.2.2")
	for _, task := range []string{"web.1", "web.2", "blog.1"} {
		serve(t, m, task, 80)
	}
	serveAt(t, client, "client", 9000)
	serveAt(t, host, "dns", 53)
	serveAt(t, host, "secret", 7001)
	publish(t, m, Service{Key: "shop/web", Ports: []Port{tcp(8080, 80)}, Backends: addrs("10.210.1.2")})
	const bridged = "net.bridge.bridge-nf-call-iptables"
	nf, _ := readSysctl(bridged)
	t.Logf("%s is %q", bridged, nf)
	works := func(t *testing.T) {
		t.Helper()
		mustAsk(t, client, "192.0.2.1:8080", "web.1")
		mustAsk(t, m.pin("web.1"), "192.0.2.1:8080", "web.1")
		mustAsk(t, m.pin("web.2"), "192.0.2.1:8080", "web.1")
		mustAsk(t, m.pin("web.2"), "10.210.1.2:80", "web.1")
		mustAsk(t, m.pin("web.2"), "192.0.2.2:9000", "client")
		mustAsk(t, m.pin("web.2"), "10.210.1.1:53", "dns")
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c.set(t)
			before := run(t, "", nft, "-s", "list", "ruleset")
			mustFail(t, client, "192.0.2.1:8080")
			if c.dropsQueries {
				mustFail(t, m.pin("web.2"), "10.210.1.1:53")
			}
			got, err := m.Prepare(t.Context())
			if err != nil || !slices.Equal(got.Opened, c.opened) || len(got.Problems) != 0 {
				t.Errorf("opened %v, problems %v, %v; want %v", got.Opened, got.Problems, err, c.opened)
			}
			works(t)
			mustFail(t, m.pin("blog.1"), "10.210.1.2:80") // our own rules still hold
			mustFail(t, client, "10.210.1.2:80")
			if c.dropsQueries {
				mustFail(t, m.pin("web.2"), "10.210.1.1:7001") // only names are let in
			}
			if got, err = m.Prepare(t.Context()); err != nil || len(got.Opened) != 0 {
				t.Errorf("the second time: %v, %v", got, err)
			}
			if list := run(t, "", iptables, "-S"); strings.Contains(list, "incompatible") || (c.name == "ufw" &&
				!strings.Contains(list, "-A INPUT -i gl3x-b+ -p udp -m udp --dport 53 ")) {
				t.Errorf("iptables lists:\n%s", list)
			}
			if err := m.closeForwarding(); err != nil {
				t.Error(err)
			}
			if after := run(t, "", nft, "-s", "list", "ruleset"); after != before {
				t.Errorf("rules are not as before:\n%s\nbut\n%s", before, after)
			}
			for _, args := range []string{"-P FORWARD ACCEPT", "-P INPUT ACCEPT", "-F", "-X"} {
				run(t, "", iptables, strings.Fields(args)...)
			}
			run(t, "add table inet firewalld\ndelete table inet firewalld\nadd table inet mine\ndelete table inet mine\n", nft, "-f", "-")
			works(t)
		})
	}
}

// A stack may publish port 53. Queries to a gateway are for our DNS all the same, and those to the host for the stack.
func TestLabPort53(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "dns_default", "10.210.1.0/24", false)
	attach(t, m, "dns/pihole.1", "dns_default 10.210.1.2")
	attach(t, m, "dns/web.1", "dns_default 10.210.1.3")
	serve(t, m, "dns/pihole.1", 53)
	serveUDP(t, m.pin("dns/pihole.1"), "pihole", 53)
	publish(t, m, Service{Key: "dns/pihole", Ports: []Port{tcp(53, 53), {HostPort: 53, Protocol: UDP, Target: 53}}, Backends: addrs("10.210.1.2")})
	if err := m.SetNames(t.Context(), Names{Domain: "svc.internal", Records: map[string][]names.Record{
		"dns_default": {{Stack: "dns", Names: names.ServiceNames("dns", "web"), Addrs: addrs("10.210.1.3")}},
	}}); err != nil {
		t.Fatal(err)
	}
	serveNames(t, m)
	lookup := func(ns, network, at string) (*dns.Msg, error) {
		conn, err := within(t, ns, func() (net.Conn, error) { return net.Dial(network, at) })
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Second))
		c := &dns.Conn{Conn: conn}
		if err := c.WriteMsg(new(dns.Msg).SetQuestion("web.dns.", dns.TypeA)); err != nil {
			return nil, err
		}
		return c.ReadMsg()
	}
	web := m.pin("dns/web.1")
	eventually(t, "the keeper answers", func() bool { _, err := lookup(web, "udp4", "10.210.1.1:53"); return err == nil })
	for _, ns := range []string{web, host, m.pin("dns/pihole.1")} {
		for _, network := range []string{"udp4", "tcp4"} {
			msg, err := lookup(ns, network, "10.210.1.1:53")
			if err != nil || len(msg.Answer) != 1 || msg.Answer[0].(*dns.A).A.String() != "10.210.1.3" {
				t.Errorf("%s from %s: %v, %v", network, ns, msg, err)
			}
		}
	}
	ports := []Port{tcp(53, 53), {HostPort: 53, Protocol: UDP, Target: 53}, {HostIP: addrs("0.0.0.0")[0], HostPort: 53, Protocol: UDP, Target: 53}}
	gateways := addrs("10.210.1.1")
	if taken := PortsTaken(t.Context(), ports, gateways); len(taken) > 0 {
		t.Errorf("the keeper's own DNS takes port 53 from a stack: %v", taken)
	}
	for _, at := range []string{"127.0.0.1", "192.0.2.1", "0.0.0.0"} {
		l, err := net.ListenPacket("udp4", at+":53")
		if at == "0.0.0.0" { // not beside the keeper's: another port
			ports[1].HostPort, ports[2].HostPort = 54, 54
			l, err = net.ListenPacket("udp4", at+":54")
		}
		if err != nil {
			t.Fatal(err)
		}
		if taken := PortsTaken(t.Context(), ports, gateways); len(taken) != 2 {
			t.Errorf("beside a program at %s: taken are %v, want both of UDP", at, taken)
		}
		l.Close()
	}
	mustAsk(t, client, "192.0.2.1:53", "dns/pihole.1")
	mustAsk(t, web, "192.0.2.1:53", "dns/pihole.1")
	if got := askUDP(t, client, "192.0.2.1:53"); got != "pihole" {
		t.Errorf("over UDP answers %q", got)
	}
}

func askUDP(t *testing.T, ns, at string) string {
	t.Helper()
	c, err := within(t, ns, func() (net.Conn, error) { return net.Dial("udp4", at) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return sayFor(c, patient)
}

func say(c net.Conn) string { return sayFor(c, 300*time.Millisecond) }

func sayFor(c net.Conn, wait time.Duration) string {
	b := make([]byte, 100)
	c.SetDeadline(time.Now().Add(wait))
	c.Write([]byte("x"))
	n, _ := c.Read(b)
	return string(b[:n])
}

// A UDP client that never stops sending follows the backends, and gets through to a port that is published later.
func TestLabUDP(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	svc := Service{Key: "shop/log", Ports: []Port{{HostPort: 514, Protocol: UDP, Target: 5140}}}
	for i, task := range []string{"log.1", "log.2"} {
		attach(t, m, task, fmt.Sprintf("shop_default 10.210.1.%d", i+2))
		serveUDP(t, m.pin(task), task, 5140)
	}
	c, err := within(t, client, func() (net.Conn, error) { return net.Dial("udp4", "192.0.2.1:514") })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := say(c); got != "" {
		t.Fatalf("answered by %q before it is published", got)
	}
	svc.Backends = addrs("10.210.1.2")
	publish(t, m, svc)
	say(c) // may be told what became of the first
	if got := sayFor(c, patient); got != "log.1" {
		t.Errorf("answered by %q, want log.1", got)
	}
	svc.Backends = addrs("10.210.1.3")
	publish(t, m, svc)
	if got := sayFor(c, patient); got != "log.2" {
		t.Errorf("answered by %q, want log.2", got)
	}
	svc.Backends = nil
	publish(t, m, svc)
	if got := say(c); got != "" {
		t.Errorf("answered by %q without backends", got)
	}
	// The port belongs to us now; a program of the host that holds another is found.
	l, err := net.Listen("tcp4", "127.0.0.1:7002")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := PortsTaken(t.Context(), []Port{tcp(7002, 80), tcp(7003, 80), {HostPort: 7002, Protocol: UDP, Target: 1},
		{HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 7002, Protocol: TCP, Target: 80}}, nil)
	if len(taken) != 1 || taken[0].HostPort != 7002 || taken[0].Protocol != TCP || taken[0].HostIP.IsValid() {
		t.Errorf("taken: %v", taken)
	}
}

// snapshot is what a machine has of links, rules, mounts and sysctls.
func snapshot(t *testing.T) string {
	t.Helper()
	var out []string
	out = append(out, run(t, "", "ip", "-o", "addr"), run(t, "", "nft", "-s", "list", "ruleset"), run(t, "", "ip", "route", "show", "table", "all"))
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	forward, err := readSysctl(forwardKey)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(append(out, string(mounts), forward), "\n")
}

func TestLabTeardownLeavesNothing(t *testing.T) {
	if !inLab(t) {
		return
	}
	needTool(t, "nft")
	iptables := needTool(t, "iptables-nft")
	needTool(t, "ip")
	outside(t)
	run(t, "", iptables, "-P", "FORWARD", "DROP")
	if err := writeSysctl(forwardKey, "0"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the uplink's addresses are settled", func() bool { return !strings.Contains(run(t, "", "ip", "-o", "addr"), "tentative") })
	before := snapshot(t)
	dir := t.TempDir()
	cfg := Config{Name: "gl3x", RunDir: dir + "/run", StateDir: dir + "/state"}
	build := func() *Manager {
		m, err := New(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		ensure(t, m, "shop_default", "10.210.1.0/24", false)
		ensure(t, m, "shop_inner", "10.210.2.0/24", true)
		attach(t, m, "shop/web.1", "shop_default 10.210.1.2", "shop_inner 10.210.2.2")
		attach(t, m, "shop/web.2", "shop_default 10.210.1.3")
		attach(t, m, "shop/none.1")
		publish(t, m, Service{Key: "shop/web", Ports: []Port{tcp(8080, 80)}, Backends: addrs("10.210.1.2")})
		return m
	}
	m := build()
	if during := snapshot(t); during == before {
		t.Fatal("nothing was made")
	}
	if err := m.Detach(t.Context(), "shop/web.2"); err != nil {
		t.Fatal(err)
	}
	if err := m.Teardown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	// By another process than the one that made it, and twice.
	build()
	for range 2 {
		m, err := New(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Teardown(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	left, err := os.ReadDir(cfg.StateDir)
	if err != nil || len(left) != 0 {
		t.Errorf("state left: %v, %v", left, err)
	}
}
