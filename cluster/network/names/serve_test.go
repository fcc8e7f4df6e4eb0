package names

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// keeper is a Serve that runs on loopback addresses of its own.
type keeper struct {
	t    *testing.T
	path string
	port uint16
	log  safeBuffer
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func startKeeper(t *testing.T) *keeper {
	k := &keeper{t: t, path: filepath.Join(t.TempDir(), "run", "names.json"), port: freePort(t)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, Config{Path: k.path, ResolvConf: filepath.Join(t.TempDir(), "none"), Port: k.port,
			Log: slog.New(slog.NewTextHandler(&k.log, nil))})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the directory is there", func() bool { return WriteFile(k.path, []byte("not yet")) == nil })
	return k
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func (k *keeper) set(table Table) {
	k.t.Helper()
	data, err := Encode(table)
	if err == nil {
		err = WriteFile(k.path, data)
	}
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *keeper) ask(network, gateway, name string, typ uint16) (*dns.Msg, error) {
	q := new(dns.Msg)
	q.SetQuestion(name, typ)
	c := &dns.Client{Net: network, Timeout: 5 * time.Second}
	m, _, err := c.Exchange(q, fmt.Sprintf("%s:%d", gateway, k.port))
	return m, err
}

func (k *keeper) mustAsk(network, gateway, name string, typ uint16) *dns.Msg {
	k.t.Helper()
	m, err := k.ask(network, gateway, name, typ)
	if err != nil {
		k.t.Fatalf("%s over %s: %v", name, network, err)
	}
	return m
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// loopNet is a network whose gateway is a loopback address; each test has its own.
func loopNet(gateway string, records ...Record) Network {
	return Network{ID: "net" + gateway, Gateway: netip.MustParseAddr(gateway), Subnet: netip.MustParsePrefix("127.0.0.0/8"), Records: records}
}

func TestServeAnswersAndFollowsTheFile(t *testing.T) {
	k := startKeeper(t)
	const gw = "127.0.77.1"
	web := Record{Stack: "shop", Names: ServiceNames("shop", "web"), Addrs: parseAddrs([]string{"10.0.0.2"})}
	k.set(Table{Domain: "svc.internal", Networks: []Network{loopNet(gw, web)}})
	eventually(t, "the gateway answers", func() bool { m, err := k.ask("udp", gw, "web.", dns.TypeA); return err == nil && len(m.Answer) == 1 })
	for _, network := range []string{"udp", "tcp"} {
		m := k.mustAsk(network, gw, "web.svc.internal.", dns.TypeA)
		if len(m.Answer) != 1 || m.Answer[0].Header().Ttl > 5 || !m.RecursionAvailable {
			t.Errorf("over %s: %v", network, m)
		}
	}

	if err := WriteFile(k.path, []byte(`{"format":99}`)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the bad file is told", func() bool { return strings.Contains(k.log.String(), "format 99") })
	if m := k.mustAsk("udp", gw, "web.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("a bad file changed the names: %v", m)
	}

	web.Addrs = parseAddrs([]string{"10.0.0.3"})
	k.set(Table{Domain: "svc.internal", Networks: []Network{loopNet(gw, web)}})
	eventually(t, "the new address", func() bool {
		m := k.mustAsk("udp", gw, "web.", dns.TypeA)
		return m.Answer[0].(*dns.A).A.String() == "10.0.0.3"
	})
	k.set(Table{Domain: "svc.internal"})
	eventually(t, "the gateway is gone", func() bool { _, err := k.ask("tcp", gw, "web.", dns.TypeA); return err != nil })
}

func TestServeCutsLongAnswers(t *testing.T) {
	k := startKeeper(t)
	const gw = "127.0.77.2"
	r := Record{Names: []string{"many"}}
	for i := range 100 {
		r.Addrs = append(r.Addrs, netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}))
	}
	k.set(Table{Networks: []Network{loopNet(gw, r)}})
	eventually(t, "up", func() bool { _, err := k.ask("udp", gw, "many.", dns.TypeA); return err == nil })
	if m := k.mustAsk("udp", gw, "many.", dns.TypeA); !m.Truncated || len(m.Answer) == 0 || len(m.Answer) == 100 {
		t.Errorf("truncated %t, %d answers", m.Truncated, len(m.Answer))
	}
	if m := k.mustAsk("tcp", gw, "many.", dns.TypeA); m.Truncated || len(m.Answer) != 100 {
		t.Errorf("truncated %t, %d answers", m.Truncated, len(m.Answer))
	}
}

// upstream is a resolver that answers by f.
func upstream(t *testing.T, f func(network string, req *dns.Msg) *dns.Msg) string {
	t.Helper()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	for network, s := range map[string]*dns.Server{"udp": {PacketConn: pc}, "tcp": {Listener: l}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		s.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			if m := f(network, req); m != nil {
				w.WriteMsg(m)
			}
		})
		running.Go(func() { s.ActivateAndServe() })
		<-up
		t.Cleanup(func() { s.Shutdown() })
	}
	return pc.LocalAddr().String()
}

func record(name string, last byte) dns.RR {
	return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: net.IPv4(192, 0, 2, last)}
}

func TestForward(t *testing.T) {
	k := startKeeper(t)
	const gw = "127.0.77.3"
	good := upstream(t, func(network string, req *dns.Msg) *dns.Msg {
		m := new(dns.Msg)
		m.SetReply(req)
		switch req.Question[0].Name {
		case "example.com.":
			m.Answer = []dns.RR{record("example.com.", 80)}
		case "long.example.com.":
			if network == "udp" {
				m.Truncated = true
				break
			}
			for i := range 20 {
				m.Answer = append(m.Answer, record("long.example.com.", byte(i)))
			}
		default:
			m.Rcode = dns.RcodeNameError
		}
		if req.IsEdns0() != nil {
			m.SetEdns0(4096, false)
		}
		return m
	})
	bad := upstream(t, func(_ string, req *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure) })
	noEDNS := upstream(t, func(_ string, req *dns.Msg) *dns.Msg {
		if req.IsEdns0() != nil {
			return new(dns.Msg).SetRcode(req, dns.RcodeFormatError)
		}
		m := new(dns.Msg)
		m.SetReply(req)
		m.Answer = []dns.RR{record(req.Question[0].Name, 81)}
		return m
	})
	use := func(servers ...string) {
		name := strings.NewReplacer(".", "-", ":", "-").Replace(servers[0])
		k.set(Table{Domain: "svc.internal", Resolvers: servers, Networks: []Network{loopNet(gw, Record{Names: []string{name}})}})
		eventually(t, "the table is used", func() bool {
			m, err := k.ask("udp", gw, name+".", dns.TypeAAAA)
			return err == nil && m.Rcode == dns.RcodeSuccess && m.Authoritative
		})
	}
	use(bad, good)
	if m := k.mustAsk("udp", gw, "example.com.", dns.TypeA); len(m.Answer) != 1 || m.Answer[0].Header().Ttl != 300 || m.IsEdns0() != nil {
		t.Errorf("example.com: %v", m)
	}
	if m := k.mustAsk("udp", gw, "nope.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("nope: %v", m)
	}
	if m := k.mustAsk("udp", gw, "long.example.com.", dns.TypeA); len(m.Answer) != 20 {
		t.Errorf("an answer that did not fit upstream's UDP: %v", m)
	}
	if m := k.mustAsk("udp", gw, "below.svc.internal.", dns.TypeA); m.Rcode != dns.RcodeNameError || !m.Authoritative {
		t.Errorf("a name of ours went out: %v", m)
	}
	use(noEDNS)
	if m := k.mustAsk("udp", gw, "example.com.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("a server without EDNS: %v", m)
	}
	dead := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	use(dead)
	if m := k.mustAsk("udp", gw, "example.com.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("no server answers: %v", m)
	}
	use(gw) // our own gateway is never asked
	if m := k.mustAsk("udp", gw, "example.com.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("a loop: %v", m)
	}
}

func echo(t *testing.T, name string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(func() { l.Close(); pc.Close(); running.Wait() })
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				io.WriteString(c, name)
				io.Copy(c, c)
			})
		}
	})
	running.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(append([]byte(name), b[:n]...), from)
		}
	})
	return netip.MustParseAddrPort(l.Addr().String())
}

func TestProxy(t *testing.T) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skip("needs IPv6 on the loopback: ", err)
	} else {
		l.Close()
	}
	k := startKeeper(t)
	one, two, port := echo(t, "1"), echo(t, "2"), freePort(t)
	at := fmt.Sprintf("[::1]:%d", port)
	set := func(backends ...netip.AddrPort) {
		var table Table
		for _, p := range []string{"tcp", "udp"} {
			table.Ports = append(table.Ports, Port{Address: netip.IPv6Unspecified(), Port: port, Protocol: p, Backends: backends})
		}
		k.set(table)
	}
	dial := func() (net.Conn, string) {
		c, err := net.Dial("tcp6", at)
		if err != nil {
			return nil, ""
		}
		t.Cleanup(func() { c.Close() })
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err != nil {
			return nil, ""
		}
		return c, string(b)
	}
	set(one)
	var old net.Conn
	eventually(t, "the port answers", func() bool { c, who := dial(); old = c; return who == "1" })
	if c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		c.Close()
		t.Error("the proxy takes IPv4, which is nftables' business")
	}
	udp, err := net.Dial("udp6", at)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	say := func() string {
		b := make([]byte, 10)
		udp.SetDeadline(time.Now().Add(200 * time.Millisecond))
		udp.Write([]byte("x"))
		n, _ := udp.Read(b)
		return string(b[:n])
	}
	eventually(t, "UDP answers", func() bool { return say() == "1x" })

	set(two)
	eventually(t, "new connections go to the new backend", func() bool { _, who := dial(); return who == "2" })
	eventually(t, "and a UDP client too", func() bool { return say() == "2x" })
	if _, err := io.WriteString(old, "still"); err != nil {
		t.Fatal(err)
	}
	if err := old.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(old); err != nil || string(rest) != "still" {
		t.Errorf("the old connection got %q, %v", rest, err)
	}

	set(netip.MustParseAddrPort("127.0.0.1:1"), two) // one that refuses is passed over
	for range 4 {
		if _, who := dial(); who != "2" {
			t.Errorf("answered by %q", who)
		}
	}
	set()
	eventually(t, "refused without backends", func() bool { _, who := dial(); return who == "" })

	holder, err := net.Listen("tcp6", at)
	if err != nil {
		t.Fatal(err)
	}
	set(one)
	eventually(t, "a port that is held is told", func() bool { return strings.Contains(k.log.String(), "in use") })
	holder.Close()
	eventually(t, "and taken when it is free", func() bool { _, who := dial(); return who == "1" })
}
