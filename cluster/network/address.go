package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// dockerRanges are what a Docker engine cuts its networks from unless told otherwise (its default address pools). Docker may come to this
// machine later, so a block must not lie in them even when no route shows them.
var dockerRanges = []netip.Prefix{
	netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("172.18.0.0/15"), netip.MustParsePrefix("172.20.0.0/14"),
	netip.MustParsePrefix("172.24.0.0/13"), netip.MustParsePrefix("192.168.0.0/16"),
}

// PickBlock chooses the first block of the given size (prefix bits) in the pool, in the pool's order, that overlaps neither taken nor
// Docker's default ranges. taken should hold [HostPrefixes] and the blocks of other nodes. The same input gives the same block.
func PickBlock(pool, taken []netip.Prefix, bits int) (netip.Prefix, error) {
	taken = slices.Concat(dockerRanges, taken)
	if bits < 1 || bits > 30 {
		return netip.Prefix{}, fmt.Errorf("pick a block of /%d: the size must be between /1 and /30", bits)
	}
	for _, p := range pool {
		if !p.IsValid() || !p.Addr().Is4() {
			return netip.Prefix{}, fmt.Errorf("pick a block of /%d: %s in the pool is not an IPv4 network", bits, p)
		}
		if p.Bits() > bits {
			continue
		}
		first, last := number(p.Masked().Addr()), uint64(number(lastAddr(p)))
		for at := uint64(first); at <= last; {
			cand := netip.PrefixFrom(address(uint32(at)), bits)
			i := slices.IndexFunc(taken, cand.Overlaps)
			if i < 0 {
				return cand, nil
			}
			// Go on behind the obstacle, on the next boundary of this size: a large one costs one step.
			size := uint64(1) << (32 - bits)
			end := max(uint64(number(lastAddr(taken[i]))), uint64(number(lastAddr(cand))))
			at = (end/size + 1) * size
		}
	}
	return netip.Prefix{}, fmt.Errorf("no free /%d in the pool %v: all of it overlaps %v or networks of this machine; set another address pool",
		bits, pool, taken)
}

// HostPrefixes lists the networks this machine already reaches, by its addresses and routes: blocks must not overlap them. Networks
// of ours (links named after Config.Name) and default routes are left out.
func (m *Manager) HostPrefixes() ([]netip.Prefix, error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list the host's links: %w", err)
	}
	ours := map[int]bool{}
	for _, l := range links {
		if _, ok := m.bridgeOf(l); ok {
			ours[l.Attrs().Index] = true
		}
	}
	var out []netip.Prefix
	add := func(index int, n *net.IPNet) {
		if p := prefixOf(n); p.IsValid() && p.Bits() > 0 && !ours[index] && !p.Addr().IsLoopback() {
			out = append(out, p.Masked())
		}
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	for _, a := range addrs {
		add(a.LinkIndex, a.IPNet)
	}
	routes, err := whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list the host's routes: %w", err)
	}
	for _, r := range routes {
		add(r.LinkIndex, r.Dst)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out), nil
}

// hardwareAddr derives a link's address from its IP address, so that an address used again by another task fits what neighbours remember.
func hardwareAddr(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func address(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

func lastAddr(p netip.Prefix) netip.Addr {
	return address(number(p.Masked().Addr()) | uint32(uint64(1)<<(32-p.Bits())-1))
}

// prefixOf converts; an invalid Prefix for nil and for IPv6.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP.To4())
	ones, size := n.Mask.Size()
	if !ok || size != 32 {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// addrOf reads a bridge's address; invalid when it has none.
func addrOf(l netlink.Link) (netip.Prefix, error) {
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	if len(addrs) == 0 {
		return netip.Prefix{}, nil
	}
	return prefixOf(addrs[0].IPNet), nil
}
