package network

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestLabPaths(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	ensure(t, m, "blog_default", "10.210.2.0/24", false)
	ensure(t, m, "shop_inner", "10.210.3.0/24", true)
	attach(t, m, "shop/web.1", "shop_default 10.210.1.2", "shop_inner 10.210.3.2")
	attach(t, m, "shop/web.2", "shop_default 10.210.1.3")
	attach(t, m, "shop/db.1", "shop_inner 10.210.3.3")
	attach(t, m, "blog/web.1", "blog_default 10.210.2.2")
	attach(t, m, "shop/alone.1")
	for _, task := range []string{"shop/web.1", "shop/web.2", "shop/db.1", "blog/web.1", "shop/alone.1"} {
		serve(t, m, task, 80)
	}
	serveAt(t, client, "client", 9000)
	serveAt(t, host, "host", 7000)
	web1, web2, db, blog, alone := m.pin("shop/web.1"), m.pin("shop/web.2"), m.pin("shop/db.1"), m.pin("blog/web.1"), m.pin("shop/alone.1")
	publish(t, m,
		Service{Key: "shop/web", Ports: []Port{tcp(8080, 80)}, Backends: addrs("10.210.1.2")},
		Service{Key: "blog/web", Ports: []Port{
			{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8081, Protocol: TCP, Target: 80},
			{HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 8082, Protocol: TCP, Target: 80},
			{HostIP: netip.MustParseAddr("0.0.0.0"), HostPort: 8083, Protocol: TCP, Target: 80},
		}, Backends: addrs("10.210.2.2")},
		Service{Key: "blog/none", Ports: []Port{tcp(8084, 80)}})
	t.Run("tasks of one network reach each other", func(t *testing.T) {
		mustAsk(t, web1, "10.210.1.3:80", "shop/web.2")
		mustAsk(t, web1, "10.210.3.3:80", "shop/db.1")
		mustAsk(t, host, "10.210.1.3:80", "shop/web.2")
		mustAsk(t, alone, "127.0.0.1:80", "shop/alone.1")
	})
	t.Run("networks are apart", func(t *testing.T) {
		mustFail(t, web1, "10.210.2.2:80")
		mustFail(t, blog, "10.210.1.2:80")
		mustFail(t, blog, "10.210.3.2:80")
		mustFail(t, client, "10.210.1.2:80")
	})
	t.Run("an internal network has no way out", func(t *testing.T) {
		mustAsk(t, web1, "192.0.2.2:9000", "client")
		mustFail(t, db, "192.0.2.2:9000")
		mustFail(t, alone, "192.0.2.2:9000")
		// Not even with a route of its own making.
		if _, err := within(t, db, func() (int, error) { return 0, addDefaultRoute("eth0", "10.210.3.1") }); err != nil {
			t.Fatal(err)
		}
		mustFail(t, db, "192.0.2.2:9000")
		mustFail(t, db, "192.0.2.1:8080")
	})
	t.Run("going out is masqueraded", func(t *testing.T) {
		if _, from, err := ask(t, web1, "192.0.2.2:9000"); from != "192.0.2.1" {
			t.Errorf("the client saw %q, %v", from, err)
		}
	})
	t.Run("published", func(t *testing.T) {
		mustAsk(t, client, "192.0.2.1:8080", "shop/web.1")
		mustAsk(t, host, "127.0.0.1:8080", "shop/web.1")
		mustAsk(t, host, "192.0.2.1:8080", "shop/web.1")
		mustAsk(t, web1, "192.0.2.1:8080", "shop/web.1") // itself
		mustAsk(t, web2, "192.0.2.1:8080", "shop/web.1") // its sibling
		mustAsk(t, blog, "192.0.2.1:8080", "shop/web.1") // another network
		mustAsk(t, web1, "10.210.1.1:8080", "shop/web.1")
		mustFail(t, alone, "192.0.2.1:8080")
		if _, from, _ := ask(t, client, "192.0.2.1:8080"); from != "192.0.2.2" {
			t.Errorf("the task saw %q in place of the client", from)
		}
		if _, from, _ := ask(t, blog, "192.0.2.1:8080"); from != "10.210.2.2" {
			t.Errorf("the task saw %q in place of the other stack's task", from)
		}
	})
	t.Run("on one host address", func(t *testing.T) {
		mustAsk(t, host, "127.0.0.1:8081", "blog/web.1")
		mustFail(t, client, "192.0.2.1:8081")
		mustFail(t, client, "127.0.0.1:8081")
		mustAsk(t, client, "192.0.2.1:8082", "blog/web.1")
		mustFail(t, host, "127.0.0.1:8082")
		mustAsk(t, host, "127.0.0.1:8083", "blog/web.1")
		mustAsk(t, client, "192.0.2.1:8083", "blog/web.1")
	})
	t.Run("without a backend it is refused at once", func(t *testing.T) {
		for _, ns := range []string{client, host, web1} {
			if _, _, err := ask(t, ns, "192.0.2.1:8084"); err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("from %s: %v", ns, err)
			}
		}
	})
	t.Run("the host's own loopback services stay its own", func(t *testing.T) {
		publish(t, m, Service{Key: "shop/all", Ports: []Port{tcp(7000, 80)}, Backends: addrs("10.210.1.2")})
		mustAsk(t, host, "127.0.0.53:7000", "host")
		mustAsk(t, host, "127.0.0.1:7000", "shop/web.1")
	})
}

func TestLabLoopbackGuard(t *testing.T) {
	if !inLab(t) {
		return
	}
	needTool(t, "nft")
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	attach(t, m, "shop/web.1", "shop_default 10.210.1.2")
	serveAt(t, host, "secret", 7001)
	web := m.pin("shop/web.1")
	for ns, gw := range map[string]string{client: "192.0.2.1", web: "10.210.1.1"} {
		if _, err := within(t, ns, func() (int, error) { return 0, routeLoopback("eth0", gw) }); err != nil {
			t.Fatal(err)
		}
		mustFail(t, ns, "127.0.0.2:7001")
	}
	// The same without the guard shows that the attack works, and Prepare puts the guard back.
	run(t, "", "nft", "flush chain ip gl3x loopback-guard")
	mustAsk(t, web, "127.0.0.2:7001", "secret")
	if _, err := m.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustFail(t, web, "127.0.0.2:7001")
	mustFail(t, client, "127.0.0.2:7001")
}

func TestLabBackends(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	svc := Service{Key: "shop/web", Ports: []Port{tcp(8080, 80)}, Backends: addrs("10.210.1.2", "10.210.1.3", "10.210.1.4")}
	for i, b := range svc.Backends {
		task := []string{"web.1", "web.2", "web.3"}[i]
		attach(t, m, task, "shop_default "+b.String())
		serve(t, m, task, 80)
	}
	publish(t, m, svc)
	count := func() map[string]int {
		got := map[string]int{}
		for range 30 {
			who, _, err := ask(t, client, "192.0.2.1:8080")
			if err != nil {
				t.Fatal(err)
			}
			got[who]++
		}
		return got
	}
	t.Run("new connections are spread evenly", func(t *testing.T) {
		if got := count(); got["web.1"] != 10 || got["web.2"] != 10 || got["web.3"] != 10 {
			t.Errorf("answers: %v", got)
		}
	})
	t.Run("a backend taken out gets no new connection and keeps its old ones", func(t *testing.T) {
		open := map[string]net.Conn{}
		for range 3 {
			c, err := dial(t, client, "192.0.2.1:8080", patient)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			who, _, err := hello(c)
			if err != nil {
				t.Fatal(err)
			}
			open[who] = c
		}
		established := func() int {
			n, err := m.Established(t.Context(), svc.Backends[1], 80)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		eventually(t, "only the open connection counts", func() bool { return established() == 1 })
		less := svc
		less.Backends = addrs("10.210.1.2", "10.210.1.4")
		publish(t, m, less)
		if got := count(); got["web.2"] != 0 || got["web.1"] != 15 {
			t.Errorf("answers: %v", got)
		}
		if _, err := io.WriteString(open["web.2"], "still"); err != nil {
			t.Error(err)
		}
		if b := make([]byte, 5); true {
			if _, err := io.ReadFull(open["web.2"], b); err != nil || string(b) != "still" {
				t.Errorf("the old connection got %q, %v", b, err)
			}
		}
		if n, _ := m.Established(t.Context(), svc.Backends[1], 81); n != 0 {
			t.Errorf("%d connections to a port that nobody uses", n)
		}
		if established() != 1 {
			t.Error("the open connection is not counted")
		}
		open["web.2"].Close()
		eventually(t, "drained", func() bool { return established() == 0 })
	})
	t.Run("the same table sends nothing", func(t *testing.T) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if d := m.differ(m.spec()); !d.empty() {
			t.Errorf("difference: %+v", d)
		}
		have, err := m.readTable()
		if err != nil {
			t.Fatal(err)
		}
		if diff := gocmp.Diff(m.have, have, gocmp.AllowUnexported(contents{})); diff != "" {
			t.Errorf("what is noted is not what is there: %s", diff)
		}
	})
	t.Run("an agent that starts cuts nothing and adopts", func(t *testing.T) {
		next, err := New(m.cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := next.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		ensure(t, next, "shop_default", "10.210.1.0/24", false)
		if who, _, err := ask(t, client, "192.0.2.1:8080"); err != nil {
			t.Errorf("%s %v", who, err)
		}
		attach(t, next, "web.1", "shop_default 10.210.1.2")
		less := svc
		less.Backends = addrs("10.210.1.4")
		publish(t, next, less)
		if got := count(); got["web.3"] != 30 {
			t.Errorf("answers: %v", got)
		}
		publish(t, next)
		mustFail(t, client, "192.0.2.1:8080")
		if err := next.Detach(t.Context(), "web.3"); err != nil {
			t.Fatal(err)
		}
		if err := next.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		st, err := next.List(t.Context())
		if err != nil || len(st.Endpoints) != 2 || len(st.Networks) != 1 || len(st.Strangers) != 0 {
			t.Errorf("list: %+v, %v", st, err)
		}
	})
}

// A range of many ports costs the kernel elements of maps, no chain each; each port leads to its own target, on one address of the host too; and a
// port that goes from one service to another leads to the new one.
func TestLabPortRange(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	attach(t, m, "web.1", "shop_default 10.210.1.2")
	attach(t, m, "api.1", "shop_default 10.210.1.3")
	serve(t, m, "web.1", 21000)
	serve(t, m, "web.1", 30000)
	serve(t, m, "api.1", 22000)
	first, last := 10000, 30000
	web := Service{Key: "shop/web", Backends: addrs("10.210.1.2")}
	api := Service{Key: "shop/api", Backends: addrs("10.210.1.3")}
	for p := first; p <= last; p++ {
		web.Ports = append(web.Ports, tcp(uint16(p), uint16(p)+10000))
	}
	web.Ports = append(web.Ports, Port{HostIP: addrs("192.0.2.1")[0], HostPort: 80, Protocol: TCP, Target: 30000})
	api.Ports = []Port{tcp(80, 21000)}
	publish(t, m, web, api)
	mustAsk(t, client, "192.0.2.1:11000", "web.1")
	mustAsk(t, client, "192.0.2.1:20000", "web.1")
	mustAsk(t, client, "192.0.2.1:80", "web.1")
	mustFail(t, client, "192.0.2.1:12000")
	have, err := m.readTable()
	if err != nil {
		t.Fatal(err)
	}
	chains := 0
	for name := range have.chains {
		if isPortChain(name) {
			chains++
		}
	}
	if n := last - first + 2; chains != 3 || len(have.sets[portSet]) != n || len(have.sets[targetSet]) != n {
		t.Errorf("%d chains, %d and %d elements, want 3 and twice %d", chains, len(have.sets[portSet]), len(have.sets[targetSet]), n)
	}
	if diff := gocmp.Diff(m.have, have, gocmp.AllowUnexported(contents{})); diff != "" {
		t.Errorf("what is noted is not what is there: %s", diff)
	}
	api.Ports = append(api.Ports, tcp(12000, 22000))
	web.Ports = []Port{tcp(20000, 30000)}
	publish(t, m, web, api)
	mustAsk(t, client, "192.0.2.1:12000", "api.1")
	mustAsk(t, client, "192.0.2.1:20000", "web.1")
	mustFail(t, client, "192.0.2.1:11000")
}
