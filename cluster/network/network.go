package network

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/gitopsd/gitopsd/cluster/network/names"
)

// Config says where the network of a node lives. Two agents on one kernel need different Names and directories.
type Config struct {
	// Name begins the names of links and is the name of the nftables table: 1 to 6 lower-case letters and digits, a letter first.
	Name string
	// RunDir holds the pinned network namespaces and the names file. It should not outlive a boot (/run/gitopsd).
	RunDir string
	// StateDir keeps the sysctl values that were there before us, for Teardown.
	StateDir string
	// MTU of the links, in bytes. 0 = that of the host's default route, at most 1500.
	MTU int
}

var nameRE = regexp.MustCompile(`^[a-z][a-z0-9]{0,5}$`)

func (c Config) check() error {
	if !nameRE.MatchString(c.Name) {
		return fmt.Errorf("network name %q: it must be 1 to 6 lower-case letters and digits, a letter first", c.Name)
	}
	if !filepath.IsAbs(c.RunDir) || !filepath.IsAbs(c.StateDir) {
		return fmt.Errorf("network directories %q and %q must be absolute", c.RunDir, c.StateDir)
	}
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535) {
		return fmt.Errorf("network MTU %d: it must be between 576 and 65535", c.MTU)
	}
	return nil
}

// Network is a bridge that tasks are attached to.
type Network struct {
	ID       string // without spaces, as shop_default
	Subnet   netip.Prefix
	Gateway  netip.Addr // in Subnet; on the bridge. The keeper's DNS answers there
	Internal bool       // no way out, and no published ports
}

// Manager makes and unmakes what the node's network consists of. Its methods may be called at once from several goroutines, but
// Attach and Detach not twice at a time for one task. It starts goroutines only to finish deletions, see [Manager.Sync].
type Manager struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex
	networks map[string]bridge   // by network ID
	services []Service           // last accepted by SetPublished
	known    bool                // services were told at least once since New
	have     *contents           // what the nft table holds, nil = not known
	names    Names               // last told by SetNames
	named    bool                // names were told at least once since New
	written  []byte              // what the names file holds
	veths    map[string][]string // by task: names of host links, for a Detach without a dump

	deleting sync.WaitGroup
	failMu   sync.Mutex
	failed   error // of deletions in the background
}

// bridge is a network with its link.
type bridge struct {
	Network
	link  string
	index int
}

// New makes a Manager; nothing is touched yet. log tells of deletions in the background that failed; nil = discard.
func New(cfg Config, log *slog.Logger) (*Manager, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Manager{cfg: cfg, log: log, networks: map[string]bridge{}, veths: map[string][]string{}}, nil
}

// Prepare makes the directories, turns on IPv4 forwarding (the earlier value is kept for Teardown), takes over the networks that an
// earlier run left, sets our nftables table right where it differs, and lets our traffic through the neighbours' firewalls. What it
// returns is what it changed or could not change at the neighbours. It is idempotent; call it at start and at each full pass.
func (m *Manager) Prepare(ctx context.Context) (Neighbours, error) {
	for _, dir := range []string{m.cfg.RunDir, m.pins()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return Neighbours{}, fmt.Errorf("make the network's run directory: %w", err)
		}
	}
	if err := m.enableForwarding(); err != nil {
		return Neighbours{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	links, err := whole(netlink.LinkList)
	if err != nil {
		return Neighbours{}, fmt.Errorf("list the host's links: %w", err)
	}
	if err := m.adopt(links); err != nil {
		return Neighbours{}, err
	}
	m.have = nil // others may have changed it
	if err := m.apply(); err != nil {
		return Neighbours{}, err
	}
	return m.EnsureForwarding(ctx)
}

// dumps bounds how often a list is asked for anew.
const dumps = 20

// whole asks the kernel for a list until nothing changed while it answered: a list that is not complete would have us take what is there for gone.
func whole[T any](list func() ([]T, error)) ([]T, error) {
	for n := 1; ; n++ {
		all, err := list()
		if n == dumps || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
}

// adopt learns the networks and endpoints that exist; those we were told of since New keep what was told.
func (m *Manager) adopt(links []netlink.Link) error {
	seen := map[string]bool{}
	for _, l := range links {
		a := l.Attrs()
		if id, ok := m.bridgeOf(l); ok {
			seen[id] = true
			if _, ok := m.networks[id]; ok {
				continue
			}
			gw, err := addrOf(l)
			if err != nil {
				return err
			}
			if !gw.IsValid() {
				continue // half made; EnsureNetwork completes it
			}
			m.networks[id] = bridge{
				Network: Network{ID: id, Subnet: gw.Masked(), Gateway: gw.Addr(), Internal: m.internal(a.Name)},
				link:    a.Name, index: a.Index,
			}
		} else if ep, ok := m.parseVeth(l); ok && !slices.Contains(m.veths[ep.task], a.Name) {
			m.veths[ep.task] = append(m.veths[ep.task], a.Name)
		}
	}
	for id := range m.networks {
		if !seen[id] {
			delete(m.networks, id)
		}
	}
	return nil
}

// EnsureNetwork makes the bridge of a network, or sets an existing one right. It refuses a subnet that overlaps an address of another
// link of the host. A network that changes its subnet or Internal must be removed first.
func (m *Manager) EnsureNetwork(ctx context.Context, n Network) error {
	if err := n.check(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if b, ok := m.networks[n.ID]; ok {
		if b.Network != n {
			return fmt.Errorf("network %s exists with subnet %s, gateway %s, internal %t: "+
				"remove it before it is made with subnet %s, gateway %s, internal %t",
				n.ID, b.Subnet, b.Gateway, b.Internal, n.Subnet, n.Gateway, n.Internal)
		}
		if l, err := netlink.LinkByIndex(b.index); err == nil && l.Attrs().Name == b.link {
			return m.setBridge(l, n)
		}
		delete(m.networks, n.ID) // someone deleted the link
	}
	links, err := whole(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("make network %s: list the host's links: %w", n.ID, err)
	}
	if err := m.clash(n, links); err != nil {
		return err
	}
	name, exists := m.bridgeName(n, links)
	if !exists {
		br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
		br.Name, br.MTU = name, m.mtu()
		// Without an own address a bridge takes that of a port and changes it as ports come and go, and neighbours lose the gateway.
		br.HardwareAddr = hardwareAddr(n.Gateway)
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("make network %s: add bridge %s: %w", n.ID, name, err)
		}
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("make network %s: find bridge %s: %w", n.ID, name, err)
	}
	if err := m.setBridge(l, n); err != nil {
		return err
	}
	for _, port := range links { // after someone deleted the bridge
		if v, ok := m.parseVeth(port); ok && v.Network == n.ID {
			if err := joinBridge(port, l.Attrs().Index); err != nil {
				return fmt.Errorf("make network %s: %w", n.ID, err)
			}
		}
	}
	m.networks[n.ID] = bridge{Network: n, link: name, index: l.Attrs().Index}
	if err := m.apply(); err != nil {
		delete(m.networks, n.ID)
		return err
	}
	return m.writeNames()
}

// setBridge gives a bridge its alias, address and sysctls and brings it up.
func (m *Manager) setBridge(l netlink.Link, n Network) error {
	name := l.Attrs().Name
	if alias := m.cfg.Name + " network " + n.ID; l.Attrs().Alias != alias { // the kernel takes none with a new link
		if err := netlink.LinkSetAlias(l, alias); err != nil {
			return fmt.Errorf("make network %s: set the alias of %s: %w", n.ID, name, err)
		}
	}
	// Containers have no IPv6 address; a link-local one on the bridge would let them reach the host's own services.
	if err := writeSysctl("net.ipv6.conf."+name+".disable_ipv6", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make network %s: %w", n.ID, err)
	}
	// 127.0.0.1:port is rewritten to a container's address; without this the kernel takes such packets for martians. The rules drop
	// 127/8 that comes in from a bridge. It goes with the bridge.
	if err := writeSysctl("net.ipv4.conf."+name+".route_localnet", "1"); err != nil {
		return fmt.Errorf("make network %s: %w", n.ID, err)
	}
	want := netip.PrefixFrom(n.Gateway, n.Subnet.Bits())
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("make network %s: list addresses of %s: %w", n.ID, name, err)
	}
	found := false
	for _, a := range addrs {
		found = found || prefixOf(a.IPNet) == want
	}
	if !found {
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(want)}); err != nil {
			return fmt.Errorf("make network %s: add address %s to %s: %w", n.ID, want, name, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("make network %s: bring up %s: %w", n.ID, name, err)
		}
	}
	return nil
}

func (n Network) check() error {
	if n.ID == "" || len(n.ID) > 160 || strings.ContainsAny(n.ID, " \t\n") {
		return fmt.Errorf("network %q: its name must have 1 to 160 characters and no spaces", n.ID)
	}
	if !n.Subnet.IsValid() || !n.Subnet.Addr().Is4() || n.Subnet.Bits() > 30 || n.Subnet.Masked() != n.Subnet {
		return fmt.Errorf("network %s: subnet %s must be an IPv4 network of at most 30 bits", n.ID, n.Subnet)
	}
	if !n.Subnet.Contains(n.Gateway) || n.Gateway == n.Subnet.Addr() || n.Gateway == lastAddr(n.Subnet) {
		return fmt.Errorf("network %s: gateway %s is no host address of %s", n.ID, n.Gateway, n.Subnet)
	}
	return nil
}

// clash refuses a subnet that the host already uses on another link: routes would go astray.
func (m *Manager) clash(n Network, links []netlink.Link) error {
	for _, b := range m.networks {
		if b.ID != n.ID && b.Subnet.Overlaps(n.Subnet) {
			return fmt.Errorf("network %s: subnet %s overlaps %s of network %s; give one of them another subnet", n.ID, n.Subnet, b.Subnet, b.ID)
		}
	}
	byIndex := map[int]string{}
	for _, l := range links {
		if id, ok := m.bridgeOf(l); !ok || id != n.ID {
			byIndex[l.Attrs().Index] = l.Attrs().Name
		}
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("make network %s: list the host's addresses: %w", n.ID, err)
	}
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		if name, ok := byIndex[a.LinkIndex]; ok && p.Masked().Overlaps(n.Subnet) {
			return fmt.Errorf("network %s: subnet %s overlaps %s of the host's %s; give it another subnet", n.ID, n.Subnet, p, name)
		}
	}
	return nil
}

// RemoveNetwork takes a network's bridge and rules away. A network that is not there is no error; one with endpoints is.
func (m *Manager) RemoveNetwork(ctx context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	links, err := whole(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("remove network %s: list the host's links: %w", id, err)
	}
	for _, l := range links {
		got, ok := m.bridgeOf(l)
		if !ok || got != id {
			continue
		}
		for _, port := range links {
			if ep, ok := m.parseVeth(port); ok && port.Attrs().MasterIndex == l.Attrs().Index && m.pinned(ep.task) {
				return fmt.Errorf("remove network %s: task %s is still on it", id, ep.task)
			}
		}
		if err := netlink.LinkDel(l); err != nil && !gone(err) {
			return fmt.Errorf("remove network %s: delete bridge %s: %w", id, l.Attrs().Name, err)
		}
	}
	delete(m.networks, id)
	if err := m.apply(); err != nil {
		return err
	}
	return m.writeNames()
}

// State is what is there of ours, read from the kernel.
type State struct {
	Networks  []Network  // sorted by ID
	Endpoints []Attached // sorted by task
	Strangers []Stranger // ports on our bridges that we did not make
}

// Attached is an endpoint that exists.
type Attached struct {
	Task       string
	Namespace  string // path of the pinned network namespace; empty: there are links but no namespace
	Interfaces []Interface
}

// Stranger is a link on one of our bridges that is not ours: drift.
type Stranger struct {
	Network string
	Link    string
}

// List reads what is there: for adoption after a restart of the agent, and for drift.
func (m *Manager) List(ctx context.Context) (State, error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return State{}, fmt.Errorf("list the host's links: %w", err)
	}
	var st State
	bridges := map[int]string{}
	for _, l := range links {
		id, ok := m.bridgeOf(l)
		if !ok {
			continue
		}
		bridges[l.Attrs().Index] = id
		gw, err := addrOf(l)
		if err != nil {
			return State{}, err
		}
		n := Network{ID: id, Internal: m.internal(l.Attrs().Name)}
		if gw.IsValid() {
			n.Subnet, n.Gateway = gw.Masked(), gw.Addr()
		}
		st.Networks = append(st.Networks, n)
	}
	tasks := map[string]*Attached{}
	pinned, err := m.listPins()
	if err != nil {
		return State{}, err
	}
	for _, task := range pinned {
		tasks[task] = &Attached{Task: task, Namespace: m.pin(task)}
	}
	for _, l := range links {
		if ep, ok := m.parseVeth(l); ok {
			if tasks[ep.task] == nil {
				tasks[ep.task] = &Attached{Task: ep.task}
			}
			tasks[ep.task].Interfaces = append(tasks[ep.task].Interfaces, ep.Interface)
		} else if id, ok := bridges[l.Attrs().MasterIndex]; ok {
			st.Strangers = append(st.Strangers, Stranger{Network: id, Link: l.Attrs().Name})
		}
	}
	for _, a := range tasks {
		slices.SortFunc(a.Interfaces, func(x, y Interface) int { return strings.Compare(x.Name, y.Name) })
		st.Endpoints = append(st.Endpoints, *a)
	}
	slices.SortFunc(st.Networks, func(x, y Network) int { return strings.Compare(x.ID, y.ID) })
	slices.SortFunc(st.Endpoints, func(x, y Attached) int { return strings.Compare(x.Task, y.Task) })
	slices.SortFunc(st.Strangers, func(x, y Stranger) int { return strings.Compare(x.Link, y.Link) })
	return st, nil
}

// Names is what the keeper's DNS answers, beside what the networks and published ports say.
type Names struct {
	Domain    string                    // search domain, as svc.internal
	Resolvers []string                  // the upstream servers, host or host:port; empty = those of the host's resolv.conf
	Records   map[string][]names.Record // by network ID
	Clients   []names.Client            // tasks that are on several networks or have own resolvers
}

// NamesFile is where the names file is; the keeper watches it.
func (m *Manager) NamesFile() string { return filepath.Join(m.cfg.RunDir, "names.json") }

// SetNames says what DNS answers from now on. The names file is written only when it changes.
func (m *Manager) SetNames(ctx context.Context, n Names) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names, m.named = n, true
	return m.writeNames()
}

// writeNames puts networks, names and published ports into the names file. Until all of them were told since New, an existing file
// stays as it is: the keeper must not forget names because the agent starts.
func (m *Manager) writeNames() error {
	if !m.named || !m.known {
		return nil
	}
	t := names.Table{Domain: m.names.Domain, Resolvers: m.names.Resolvers, Clients: m.names.Clients}
	for _, id := range sortedKeys(m.networks) {
		b := m.networks[id]
		t.Networks = append(t.Networks, names.Network{
			ID: id, Gateway: b.Gateway, Subnet: b.Subnet, Internal: b.Internal, Records: m.names.Records[id],
		})
	}
	t.Ports = proxied(m.services)
	data, err := names.Encode(t)
	if err != nil {
		return fmt.Errorf("write the names file: %w", err)
	}
	if slices.Equal(data, m.written) {
		return nil
	}
	if err := names.WriteFile(m.NamesFile(), data); err != nil {
		return err
	}
	m.written = data
	return nil
}

// Bridges are named <Name>-b, x or i for internal, and 6 characters of the ID's hash; host ends of veths <Name>-v and 7.

func (m *Manager) bridgePrefix() string   { return m.cfg.Name + "-b" }
func (m *Manager) internalPrefix() string { return m.cfg.Name + "-bi" }
func (m *Manager) internal(link string) bool {
	return strings.HasPrefix(link, m.internalPrefix())
}

// bridgeName finds the link name for a network: that of the bridge which has it already, or a free one. Names are derived, and a second
// one is derived where two networks share the first. A bridge without alias is one that we were stopped at making.
func (m *Manager) bridgeName(n Network, links []netlink.Link) (name string, exists bool) {
	taken := map[string]netlink.Link{}
	for _, l := range links {
		if id, ok := m.bridgeOf(l); ok && id == n.ID && m.internal(l.Attrs().Name) == n.Internal {
			return l.Attrs().Name, true
		}
		taken[l.Attrs().Name] = l
	}
	kind := "x"
	if n.Internal {
		kind = "i"
	}
	for seed := n.ID; ; seed += "#" {
		name = m.bridgePrefix() + kind + shortHash(seed, 6)
		if l := taken[name]; l == nil || (l.Type() == "bridge" && l.Attrs().Alias == "") {
			return name, l != nil
		}
	}
}

// bridgeOf tells whether a link is one of our bridges, and of which network.
func (m *Manager) bridgeOf(l netlink.Link) (id string, ok bool) {
	if l.Type() != "bridge" || !strings.HasPrefix(l.Attrs().Name, m.bridgePrefix()) {
		return "", false
	}
	return strings.CutPrefix(l.Attrs().Alias, m.cfg.Name+" network ")
}

func (m *Manager) mtu() int {
	if m.cfg.MTU != 0 {
		return m.cfg.MTU
	}
	mtu := 1500
	routes, err := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return mtu
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil && l.Attrs().MTU >= 576 {
			mtu = min(mtu, l.Attrs().MTU)
		}
	}
	return mtu
}

// Sync waits until the deletions that Detach left to the background are done, and returns what failed of them since the last call.
func (m *Manager) Sync(ctx context.Context) error {
	done := make(chan struct{})
	go func() { m.deleting.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("wait for links to be deleted: %w", ctx.Err())
	}
	m.failMu.Lock()
	defer m.failMu.Unlock()
	err := m.failed
	m.failed = nil
	return err
}

func shortHash(s string, n int) string {
	sum := sha256.Sum256([]byte(s))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:n]
}

// gone tells that what was to be deleted is not there any more.
func gone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.Is(err, os.ErrNotExist) || errors.As(err, &notFound) || isNoDevice(err)
}
