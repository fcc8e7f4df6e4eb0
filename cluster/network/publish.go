package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/gitopsd/gitopsd/cluster/network/names"
)

// Protocol of a published port.
type Protocol string

// The protocols that can be published. SCTP has no proxy for IPv6.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

func (p Protocol) number() byte {
	switch p {
	case TCP:
		return 6
	case UDP:
		return 17
	case SCTP:
		return 132
	}
	return 0
}

// Port is a port of the host that leads to a service.
type Port struct {
	// HostIP restricts the port to one address of the host: 127.0.0.1 is reachable from the host only. The zero Addr and 0.0.0.0 mean
	// all addresses, IPv6 too; :: means all IPv6 addresses.
	HostIP   netip.Addr
	HostPort uint16
	Protocol Protocol
	Target   uint16 // the tasks' port
}

func (p Port) String() string {
	host := ""
	if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
		host = p.HostIP.String() + " "
	}
	return fmt.Sprintf("%s%d/%s", host, p.HostPort, p.Protocol)
}

// Service is what is reachable through published ports. New connections are spread over the backends in turn. Without a backend they are
// refused at once.
type Service struct {
	Key      string // as shop/web; for error messages
	Ports    []Port
	Backends []netip.Addr // tasks that may take new connections, on a network that is not internal
}

// SetPublished makes the whole table of published ports be as given: in one transaction, sending only what changed, nothing at all when nothing
// did. When it returns, no new connection reaches a backend that is not in it; established TCP connections go on,
// and [Manager.Established] counts them. What UDP peers of a removed backend sent on is spread anew.
//
// A port that two services claim goes to the one named first, and a port that makes no sense to nobody; the error says so, after the rest was
// applied. The same services give the same error, so the caller may compare.
func (m *Manager) SetPublished(ctx context.Context, services []Service) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	accepted, problems := admit(services)
	before, first := m.services, !m.known
	m.services, m.known = accepted, true
	if err := m.apply(); err != nil {
		m.services, m.known = before, !first
		return errors.Join(err, problems)
	}
	if err := m.forget(before, accepted); err != nil {
		return errors.Join(err, problems)
	}
	return errors.Join(m.writeNames(), problems)
}

// admit sorts out ports that cannot be had, and sorts and copies the rest.
func admit(services []Service) ([]Service, error) {
	var out []Service
	var problems []error
	owner := map[Port]string{}
	for _, s := range services {
		ok := Service{Key: s.Key, Backends: slices.Compact(slices.SortedFunc(slices.Values(s.Backends), netip.Addr.Compare))}
		for _, b := range ok.Backends {
			if !b.Is4() {
				problems = append(problems, fmt.Errorf("publish %s: backend %s is not an IPv4 address", s.Key, b))
			}
		}
		ok.Backends = slices.DeleteFunc(ok.Backends, func(a netip.Addr) bool { return !a.Is4() })
		for _, p := range s.Ports {
			if p.Protocol.number() == 0 || p.HostPort == 0 || p.Target == 0 {
				problems = append(problems, fmt.Errorf("publish %s: port %s to %d is not possible: ports go from 1 to 65535, protocols are tcp, udp and sctp",
					s.Key, p, p.Target))
				continue
			}
			slot := p
			slot.Target = 0
			if p.HostIP.IsValid() && p.HostIP.IsUnspecified() && p.HostIP.Is4() {
				slot.HostIP = netip.Addr{}
			}
			if other, taken := owner[slot]; taken {
				if other != s.Key || !slices.Contains(ok.Ports, p) {
					problems = append(problems, fmt.Errorf("publish %s: port %s is already published by %s", s.Key, p, other))
				}
				continue
			}
			owner[slot] = s.Key
			p.HostIP = slot.HostIP
			ok.Ports = append(ok.Ports, p)
		}
		out = append(out, ok)
	}
	return out, errors.Join(problems...)
}

// entry is one key of the port maps with where it leads.
type entry struct {
	Port
	service  string
	backends []netip.Addr
}

// entries lists what nftables serves: ports of IPv4 addresses.
func entries(services []Service) []entry {
	var out []entry
	for _, s := range services {
		for _, p := range s.Ports {
			if !p.HostIP.IsValid() || p.HostIP.Is4() {
				out = append(out, entry{p, s.Key, s.Backends})
			}
		}
	}
	return out
}

// chain names the nftables chain of a port. All ports of a service and protocol share one, so that a range of ten thousand costs the kernel
// elements of a map, and a change of the backends one rule.
func (e entry) chain() string {
	kind := string(e.Protocol)
	if e.HostIP.IsValid() {
		kind = "address-" + kind
	}
	return portChain + "-" + kind + "-" + e.service
}

// proxied lists what the keeper's proxy serves: ports of the host's IPv6 addresses.
func proxied(services []Service) []names.Port {
	var out []names.Port
	for _, s := range services {
		for _, p := range s.Ports {
			if p.Protocol == SCTP || (p.HostIP.IsValid() && p.HostIP.Is4()) {
				continue
			}
			np := names.Port{Address: netip.IPv6Unspecified(), Port: p.HostPort, Protocol: string(p.Protocol)}
			if p.HostIP.IsValid() {
				np.Address = p.HostIP
			}
			for _, b := range s.Backends {
				np.Backends = append(np.Backends, netip.AddrPortFrom(b, p.Target))
			}
			out = append(out, np)
		}
	}
	return out
}

// PortTaken is a port that a program of the host holds, so that publishing it would take its traffic.
type PortTaken struct {
	Port
	Reason string
}

// probing keeps two looks at the same port apart: each would take the other for a program that holds it.
var probing sync.Mutex

// PortsTaken tells which ports are held by programs of the host, by trying to bind each for a moment. Ports that are published already are not
// tried: only the caller's new ones should be given. gateways are those of our networks: the keeper's DNS has port 53 there, and what is published
// leaves it alone, as it leaves the host's loopback addresses other than 127.0.0.1.
func PortsTaken(ctx context.Context, ports []Port, gateways []netip.Addr) []PortTaken {
	probing.Lock()
	defer probing.Unlock()
	var out []PortTaken
	for _, p := range ports {
		at := []netip.Addr{p.HostIP}
		if !p.HostIP.IsValid() || p.HostIP == netip.IPv4Unspecified() {
			if tryBind(ctx, p, netip.IPv4Unspecified()) == nil {
				continue
			}
			var err error
			if at, err = publishedAt(gateways); err != nil {
				out = append(out, PortTaken{p, err.Error()})
			}
		}
		for _, addr := range at {
			if err := tryBind(ctx, p, addr); err != nil {
				out = append(out, PortTaken{p, err.Error()})
				break
			}
		}
	}
	return out
}

// publishedAt lists the host's IPv4 addresses at which a port that is published on all of them is answered.
func publishedAt(gateways []netip.Addr) ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	out := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		if addr, ok := netip.AddrFromSlice(n.IP.To4()); ok && !addr.IsLoopback() && !slices.Contains(gateways, addr) {
			out = append(out, addr)
		}
	}
	return out, nil
}

func tryBind(ctx context.Context, p Port, addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, p.HostPort).String()
	family := "4"
	if addr.Is6() {
		family = "6"
	}
	var lc net.ListenConfig
	var held io.Closer
	var err error
	switch p.Protocol {
	case TCP:
		held, err = lc.Listen(ctx, "tcp"+family, at)
	case UDP:
		held, err = lc.ListenPacket(ctx, "udp"+family, at)
	default:
		return nil
	}
	if err != nil {
		return err
	}
	return held.Close()
}
