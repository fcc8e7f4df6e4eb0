package network

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/network/names"
)

// A lab test runs in a child of the test binary that has its own network and mount namespace: nothing of it touches the machine.

const labEnv = "GITOPS_NETWORK_LAB"

// inLab is true in the child. The parent runs the same test there and takes over its verdict.
func inLab(t *testing.T) bool {
	t.Helper()
	if os.Getenv(labEnv) == t.Name() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal("make mounts private:", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			t.Fatal("bring up lo:", err)
		}
		return true
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: it makes network namespaces, links and nftables rules")
	}
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), labEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("in the lab: %v", err)
	}
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Skip("skipped in the lab, see above")
	}
	if !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatal("the test did not run in the lab")
	}
	return false
}

func newLab(t *testing.T) *Manager {
	t.Helper()
	m, err := New(Config{Name: "gl3x", RunDir: filepath.Join(t.TempDir(), "run"), StateDir: filepath.Join(t.TempDir(), "state")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Teardown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return m
}

func ensure(t *testing.T, m *Manager, id, subnet string, internal bool) Network {
	t.Helper()
	p := netip.MustParsePrefix(subnet)
	n := Network{ID: id, Subnet: p, Gateway: p.Addr().Next(), Internal: internal}
	if err := m.EnsureNetwork(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	return n
}

// attach gives a task one interface for each "network address".
func attach(t *testing.T, m *Manager, task string, on ...string) {
	t.Helper()
	if _, err := m.Attach(t.Context(), endpoint(task, on...)); err != nil {
		t.Fatal(err)
	}
}

func endpoint(task string, on ...string) Endpoint {
	e := Endpoint{Task: task}
	for i, s := range on {
		id, addr, _ := strings.Cut(s, " ")
		e.Interfaces = append(e.Interfaces, Interface{Name: fmt.Sprintf("eth%d", i), Network: id, Address: netip.MustParseAddr(addr)})
	}
	return e
}

// within runs f on a thread in the namespace at path; sockets that f makes stay there.
func within[T any](t *testing.T, path string, f func() (T, error)) (T, error) {
	t.Helper()
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- result{err: err}
			return
		}
		defer home.Close()
		there, err := netns.GetFromPath(path)
		if err == nil {
			defer there.Close()
			err = netns.Set(there)
		}
		var r result
		if r.err = err; err == nil {
			r.v, r.err = f()
		}
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- r
	}()
	r := <-done
	return r.v, r.err
}

const host = "/proc/self/ns/net"

// serve answers each connection to port in the task's namespace with the task's name, a line, then echoes.
func serve(t *testing.T, m *Manager, task string, port int) {
	t.Helper()
	serveAt(t, m.pin(task), task, port)
}

func serveAt(t *testing.T, path, name string, port int) {
	t.Helper()
	l, err := within(t, path, func() (net.Listener, error) { return net.Listen("tcp4", fmt.Sprintf(":%d", port)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				fmt.Fprintf(c, "%s %s\n", name, from)
				io.Copy(c, c)
			}()
		}
	}()
}

func serveUDP(t *testing.T, path, name string, port int) {
	t.Helper()
	c, err := within(t, path, func() (net.PacketConn, error) { return net.ListenPacket("udp4", fmt.Sprintf(":%d", port)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo([]byte(name), from)
		}
	}()
}

// patient is how long an answer may take that has to come, on a busy machine too; noWay is how long one is waited for that must not come.
const (
	patient = 10 * time.Second
	noWay   = 700 * time.Millisecond
)

func dial(t *testing.T, path, to string, wait time.Duration) (net.Conn, error) {
	t.Helper()
	return within(t, path, func() (net.Conn, error) { return net.DialTimeout("tcp4", to, wait) })
}

// ask connects from the namespace at path and gives who answers and the client's address that it saw.
func ask(t *testing.T, path, to string) (who, from string, err error) {
	t.Helper()
	return askFor(t, path, to, patient)
}

func askFor(t *testing.T, path, to string, wait time.Duration) (who, from string, err error) {
	t.Helper()
	c, err := dial(t, path, to, wait)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return hello(c)
}

func hello(c net.Conn) (who, from string, err error) {
	c.SetDeadline(time.Now().Add(patient))
	b := make([]byte, 200)
	n, err := c.Read(b)
	if err != nil {
		return "", "", err
	}
	who, from, _ = strings.Cut(strings.TrimSpace(string(b[:n])), " ")
	return who, from, nil
}

func mustAsk(t *testing.T, path, to, want string) {
	t.Helper()
	who, _, err := ask(t, path, to)
	if err != nil || who != want {
		t.Errorf("ask %s from %s: answered by %q, %v; want %s", to, filepath.Base(path), who, err, want)
	}
}

func mustFail(t *testing.T, path, to string) {
	t.Helper()
	if who, _, err := askFor(t, path, to, noWay); err == nil {
		t.Errorf("ask %s from %s: answered by %q, want no way", to, filepath.Base(path), who)
	}
}

// outside makes a namespace that is linked to the host: the host is 192.0.2.1 there, and the client 192.0.2.2.
func outside(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client")
	err := inNamespace(path, true, func(host, ns *os.File) error {
		h, err := netlink.NewHandleAt(nsHandle(host), unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "uplink"
		v := netlink.NewVeth(attrs)
		v.PeerName, v.PeerNamespace = "eth0", netlink.NsFd(ns.Fd())
		if err := h.LinkAdd(v); err != nil {
			return err
		}
		if err := h.AddrAdd(v, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("192.0.2.1/24"))}); err != nil {
			return err
		}
		if err := h.LinkSetUp(v); err != nil {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("192.0.2.2/24"))}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(eth); err != nil {
			return err
		}
		// So that only rules, not missing routes, keep the client out of the tasks' networks.
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.IPv4(192, 0, 2, 1), Dst: all})
	})
	if err != nil {
		t.Fatal("make the client's namespace:", err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

func addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func tcp(hostPort, target uint16) Port {
	return Port{HostPort: hostPort, Protocol: TCP, Target: target}
}

func publish(t *testing.T, m *Manager, s ...Service) {
	t.Helper()
	if err := m.SetPublished(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !f(); {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip("needs the tool " + name)
	}
	return path
}

func run(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func addDefaultRoute(dev, gw string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	_, all, _ := net.ParseCIDR("0.0.0.0/0")
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw), Dst: all})
}

// routeLoopback makes a namespace send 127.0.0.2 out of a link, as an attacker in the same segment would.
func routeLoopback(dev, gw string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(lo); err != nil { // takes the local route of 127/8 along
		return err
	}
	if err := writeSysctl("net.ipv4.conf."+dev+".route_localnet", "1"); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw), Dst: ipNet(netip.MustParsePrefix("127.0.0.2/32"))})
}

// serveNames answers names and the ports of programs, as the keeper does, until the test ends.
func serveNames(t *testing.T, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- names.Serve(ctx, names.Config{Path: m.NamesFile()}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
