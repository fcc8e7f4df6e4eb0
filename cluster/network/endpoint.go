package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Endpoint is a task's network namespace as it should be.
type Endpoint struct {
	Task       string // as shop/web.3.7: letters, digits and ._-/
	Interfaces []Interface
	// Sysctls below net. are set in the namespace. Without a word about it, any user may bind any port there, as images expect.
	Sysctls map[string]string
}

// Interface is one link of an endpoint.
type Interface struct {
	Name    string // in the namespace, as eth0
	Network string // ID of a network that was ensured
	Address netip.Addr
	MAC     string // empty = derived from the address
}

var taskRE = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]*(/[a-zA-Z0-9_][a-zA-Z0-9_.-]*)*$`)

func (e Endpoint) check() error {
	if len(e.Task) > 120 || !taskRE.MatchString(e.Task) {
		return fmt.Errorf("attach task %q: its name must have at most 120 letters, digits and ._-/", e.Task)
	}
	seen := map[string]bool{}
	for _, i := range e.Interfaces {
		if i.Name == "" || i.Name == "lo" || len(i.Name) > 15 || strings.ContainsAny(i.Name, "/: \t\n") || seen[i.Name] {
			return fmt.Errorf("attach task %s: interface name %q is not possible or used twice", e.Task, i.Name)
		}
		seen[i.Name] = true
		if i.MAC != "" {
			if mac, err := net.ParseMAC(i.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
				return fmt.Errorf("attach task %s: MAC address %q of %s is not that of one Ethernet card", e.Task, i.MAC, i.Name)
			}
		}
	}
	for key := range e.Sysctls {
		if !strings.HasPrefix(sysctlPath(key), "/proc/sys/net/") {
			return fmt.Errorf("attach task %s: sysctl %s does not belong to the network", e.Task, key)
		}
	}
	return nil
}

// Attach makes the task's network namespace, pinned at the path it returns, with the interfaces, their addresses, a default route through
// the first network that is not internal, and lo up. Without interfaces there is only lo. What exists and matches is left alone, what
// is missing or differs is set right in place, so a running task keeps its namespace.
func (m *Manager) Attach(ctx context.Context, e Endpoint) (path string, err error) {
	if err := e.check(); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", fmt.Errorf("attach task %s: %w", e.Task, err)
	}
	plans, err := m.plan(e)
	if err != nil {
		return "", err
	}
	fresh := !m.pinned(e.Task)
	if err := m.fixHostEnds(e.Task, plans); err != nil {
		return "", err
	}
	if err := inNamespace(m.pin(e.Task), fresh, func(host, ns *os.File) error { return m.wire(e, plans, host, ns, fresh) }); err != nil {
		if fresh {
			err = errors.Join(err, m.Detach(context.WithoutCancel(ctx), e.Task))
		}
		return "", fmt.Errorf("attach task %s: %w", e.Task, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.veths[e.Task] = nil
	for _, p := range plans {
		m.veths[e.Task] = append(m.veths[e.Task], p.host)
	}
	return m.pin(e.Task), nil
}

// wiring is an interface with all that is known of its network.
type wiring struct {
	Interface
	host, alias string
	bridge      bridge
	prefix      netip.Prefix
	mac         net.HardwareAddr
	gateway     bool // the default route goes here
}

func (m *Manager) plan(e Endpoint) ([]wiring, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []wiring
	routed := false
	for _, i := range e.Interfaces {
		b, ok := m.networks[i.Network]
		if !ok {
			return nil, fmt.Errorf("attach task %s: network %s is not on this node", e.Task, i.Network)
		}
		if !b.Subnet.Contains(i.Address) || i.Address == b.Gateway {
			return nil, fmt.Errorf("attach task %s: address %s is no task's address of network %s (%s)", e.Task, i.Address, i.Network, b.Subnet)
		}
		w := wiring{Interface: i, bridge: b, prefix: netip.PrefixFrom(i.Address, b.Subnet.Bits()), mac: hardwareAddr(i.Address)}
		w.host = m.cfg.Name + "-v" + shortHash(e.Task+" "+i.Name, 7)
		w.alias = strings.TrimRight(fmt.Sprintf("%s endpoint %s %s %s %s %s", m.cfg.Name, e.Task, i.Name, i.Network, w.prefix, i.MAC), " ")
		if len(w.alias) > 255 {
			return nil, fmt.Errorf("attach task %s: the names of the task and of network %s are too long together", e.Task, i.Network)
		}
		if i.MAC != "" {
			w.mac, _ = net.ParseMAC(i.MAC) // checked
		}
		if !b.Internal && !routed {
			w.gateway, routed = true, true
		}
		out = append(out, w)
	}
	return out, nil
}

// fixHostEnds deletes host links of the task that the plan does not have, of an interface it lost or one that changed, and puts the others
// back on their bridges.
func (m *Manager) fixHostEnds(task string, plans []wiring) error {
	m.mu.Lock()
	mine := slices.Clone(m.veths[task])
	m.mu.Unlock()
	for _, p := range plans {
		if !slices.Contains(mine, p.host) {
			mine = append(mine, p.host) // of an earlier run that we did not list
		}
	}
	for _, name := range mine {
		l, err := netlink.LinkByName(name)
		if gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("attach task %s: find link %s: %w", task, name, err)
		}
		i := slices.IndexFunc(plans, func(p wiring) bool { return p.host == name })
		if i >= 0 && plans[i].alias == l.Attrs().Alias && m.pinned(task) {
			if err := joinBridge(l, plans[i].bridge.index); err != nil {
				return fmt.Errorf("attach task %s: %w", task, err)
			}
			continue
		}
		if err := netlink.LinkDel(l); err != nil && !gone(err) {
			return fmt.Errorf("attach task %s: delete link %s: %w", task, name, err)
		}
	}
	return nil
}

// joinBridge puts the host's end of a pair on a bridge and brings it up, unless it is so.
func joinBridge(l netlink.Link, index int) error {
	if l.Attrs().MasterIndex != index {
		if err := netlink.LinkSetMasterByIndex(l, index); err != nil {
			return fmt.Errorf("put %s on its bridge: %w", l.Attrs().Name, err)
		}
		if err := netlink.LinkSetHairpin(l, true); err != nil {
			return fmt.Errorf("set hairpin mode of %s: %w", l.Attrs().Name, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("bring up %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// wire runs in the namespace ns.
func (m *Manager) wire(e Endpoint, plans []wiring, host, ns *os.File, fresh bool) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}
	}
	if fresh {
		if err := setSysctls(taskSysctls); err != nil {
			return err
		}
	}
	for _, p := range plans {
		if err := m.wireOne(p, host, ns); err != nil {
			return fmt.Errorf("interface %s on network %s: %w", p.Name, p.Network, err)
		}
	}
	if fresh {
		return setSysctls(e.Sysctls)
	}
	return nil
}

// taskSysctls are set in each new namespace before its interfaces come: images expect to bind port 80 and to ping as any user, and
// interfaces get no IPv6 address. A kernel that lacks one is used without it.
var taskSysctls = map[string]string{
	"net.ipv4.ip_unprivileged_port_start": "0",
	"net.ipv4.ping_group_range":           "0 2147483647",
	"net.ipv6.conf.default.disable_ipv6":  "1",
}

func setSysctls(values map[string]string) error {
	for _, k := range sortedKeys(values) {
		err := writeSysctl(k, values[k])
		if _, own := taskSysctls[k]; own && errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) wireOne(p wiring, host, ns *os.File) error {
	l, err := netlink.LinkByName(p.Name)
	if gone(err) {
		if l, err = m.addVeth(p, host, ns); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("find it: %w", err)
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return prefixOf(a.IPNet) == p.prefix }) {
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(p.prefix)}); err != nil {
			return fmt.Errorf("add address %s: %w", p.prefix, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("bring up: %w", err)
		}
	}
	if !p.gateway {
		return nil
	}
	all := ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	err = netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: p.bridge.Gateway.AsSlice(), Dst: all})
	if err != nil {
		return fmt.Errorf("add default route through %s: %w", p.bridge.Gateway, err)
	}
	return nil
}

// addVeth makes the pair, one end in this namespace, the other on the bridge in the host's.
func (m *Manager) addVeth(p wiring, host, ns *os.File) (netlink.Link, error) {
	h, err := netlink.NewHandleAt(nsHandle(host), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink in the host's namespace: %w", err)
	}
	defer h.Close()
	mtu := m.mtuOf(h, p.bridge.index)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = p.host, mtu
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerMTU = p.Name, p.mac, uint32(mtu)
	veth.PeerNamespace = netlink.NsFd(ns.Fd())
	if err := h.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth pair %s: %w", p.host, err)
	}
	if err := h.LinkSetAlias(veth, p.alias); err != nil {
		return nil, fmt.Errorf("set the alias of %s: %w", p.host, err)
	}
	if err := h.LinkSetMasterByIndex(veth, p.bridge.index); err != nil {
		return nil, fmt.Errorf("put %s on bridge %s: %w", p.host, p.bridge.link, err)
	}
	// With bridge-nf-call-iptables (Docker turns it on) a packet to the task's own published port turns round on its bridge port.
	if err := h.LinkSetHairpin(veth, true); err != nil {
		return nil, fmt.Errorf("set hairpin mode of %s: %w", p.host, err)
	}
	if err := h.LinkSetUp(veth); err != nil {
		return nil, fmt.Errorf("bring up %s: %w", p.host, err)
	}
	l, err := netlink.LinkByName(p.Name)
	if err != nil {
		return nil, fmt.Errorf("find the new link: %w", err)
	}
	return l, nil
}

func (m *Manager) mtuOf(h *netlink.Handle, bridge int) int {
	if l, err := h.LinkByIndex(bridge); err == nil && l.Attrs().MTU > 0 {
		return l.Attrs().MTU
	}
	return 1500
}

// Detach lets go of the task's namespace and deletes its links. The namespace is gone when the task's last process is. A task that is
// not attached is no error. Deleting a link takes the kernel tens of milliseconds: it goes on behind the call, and [Manager.Sync] waits.
func (m *Manager) Detach(ctx context.Context, task string) error {
	m.mu.Lock()
	links := m.veths[task]
	delete(m.veths, task)
	m.mu.Unlock()
	if err := m.unpin(task); err != nil {
		return fmt.Errorf("detach task %s: %w", task, err)
	}
	m.deleteLinks(links)
	return nil
}

// linkGrace is how long the kernel gets to delete a namespace's links itself, many namespaces at once, before we do it one by one: they
// stay only when a process still holds the namespace.
const linkGrace = 500 * time.Millisecond

func (m *Manager) deleteLinks(links []string) {
	if len(links) == 0 {
		return
	}
	m.deleting.Go(func() {
		if err := awaitOrDelete(links, linkGrace); err != nil {
			m.log.Warn("delete links of a detached task", "error", err)
			m.failMu.Lock()
			m.failed = errors.Join(m.failed, err)
			m.failMu.Unlock()
		}
	})
}

func awaitOrDelete(links []string, grace time.Duration) error {
	// One small question a link: package net would list all links of the machine for it, again and again.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("look for links: %w", err)
	}
	defer unix.Close(fd)
	deadline := time.NewTimer(grace)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		links = slices.DeleteFunc(links, func(name string) bool {
			ifr, err := unix.NewIfreq(name)
			return err != nil || unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr) != nil
		})
		if len(links) == 0 {
			return nil
		}
		select {
		case <-tick.C:
			continue
		case <-deadline.C:
		}
		var errs []error
		for _, name := range links {
			l, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkDel(l)
			}
			if err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("delete link %s: %w", name, err))
			}
		}
		return errors.Join(errs...)
	}
}

type vethOf struct {
	task string
	Interface
}

// parseVeth tells whether a link is the host's end of one of our endpoints, from its alias.
func (m *Manager) parseVeth(l netlink.Link) (vethOf, bool) {
	rest, ok := strings.CutPrefix(l.Attrs().Alias, m.cfg.Name+" endpoint ")
	f := strings.Fields(rest)
	if !ok || len(f) < 4 || len(f) > 5 {
		return vethOf{}, false
	}
	p, err := netip.ParsePrefix(f[3])
	if err != nil {
		return vethOf{}, false
	}
	v := vethOf{task: f[0], Interface: Interface{Name: f[1], Network: f[2], Address: p.Addr()}}
	if len(f) == 5 {
		v.MAC = f[4]
	}
	return v, true
}

// Pins are files below RunDir/netns that a namespace is mounted on. Slashes of the task's name become ~, which names can't have.

func (m *Manager) pins() string { return filepath.Join(m.cfg.RunDir, "netns") }

func (m *Manager) pin(task string) string {
	return filepath.Join(m.pins(), strings.ReplaceAll(task, "/", "~"))
}

// pinned tells that a namespace is mounted at the task's pin.
func (m *Manager) pinned(task string) bool {
	var st unix.Statfs_t
	return unix.Statfs(m.pin(task), &st) == nil && st.Type == unix.NSFS_MAGIC
}

func (m *Manager) listPins() ([]string, error) {
	files, err := os.ReadDir(m.pins())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list pinned network namespaces: %w", err)
	}
	var out []string
	for _, f := range files {
		if task := strings.ReplaceAll(f.Name(), "~", "/"); m.pinned(task) {
			out = append(out, task)
		}
	}
	return out, nil
}

func (m *Manager) unpin(task string) error {
	path := m.pin(task)
	for m.pinned(task) { // may be mounted on twice after a crash
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the pin: %w", err)
	}
	return nil
}

// inNamespace runs f on a thread that is in the network namespace pinned at path, or in a new one that it pins there. f gets
// the host's namespace and that one.
func inNamespace(path string, fresh bool, f func(host, ns *os.File) error) (err error) {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		host, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open the host's network namespace: %w", err)
			return
		}
		defer host.Close()
		err = enter(path, fresh, host, f)
		// A thread that cannot come back is not unlocked: it ends with this goroutine.
		if back := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

func enter(path string, fresh bool, host *os.File, f func(host, ns *os.File) error) error {
	if fresh {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		file, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
		if err != nil {
			return fmt.Errorf("pin the network namespace: %w", err)
		}
		file.Close()
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin the network namespace at %s: %w", path, err)
		}
	}
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the network namespace: %w", err)
	}
	defer ns.Close()
	if !fresh {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace %s: %w", path, err)
		}
	}
	return f(host, ns)
}

func nsHandle(f *os.File) netns.NsHandle { return netns.NsHandle(f.Fd()) }
