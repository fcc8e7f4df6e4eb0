package network

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// contents is what an nftables table holds, by what tells each thing apart. Rules are told apart by the text in their comment, which says what
// they do, so a rule that others made or changed differs from ours.
type contents struct {
	chains map[string][]string        // texts of the rules, in order
	sets   map[string]map[string]bool // keys of the elements; of the end of an interval with "/" behind
}

// tableSpec is what our table should hold.
type tableSpec struct {
	chains []chainSpec
	sets   []setSpec
}

type chainSpec struct {
	name  string
	base  *nftables.Chain // hook, type and priority of a base chain; nil = reached by a jump
	rules []ruleSpec
}

type ruleSpec struct {
	text  string
	exprs []expr.Any
	// spread is an anonymous map that exprs look up by number: the backends of a service.
	spread []netip.Addr
}

type setSpec struct {
	name     string
	set      nftables.Set // types and flags
	elements []nftables.SetElement
}

// Names of chains and sets in our table. Services have a chain for each protocol, portChain-tcp-shop/web, and networks one each.
const (
	portChain    = "port"
	networkChain = "network"
	publishChain = "published"

	portSet       = "ports"       // protocol . port -> chain of the service
	hostPortSet   = "hostports"   // address . protocol . port -> chain of the service
	targetSet     = "targets"     // protocol . port -> port of the tasks
	hostTargetSet = "hosttargets" // address . protocol . port -> port of the tasks
	gatewaySet    = "gateways"
	subnetSet     = "outward" // subnets that may reach the outside
	pairSet       = "within"  // bridge . bridge, for traffic inside one network
	networkSet    = "networks"
)

// isPort tells that a chain or set belongs to published ports, which are left alone until SetPublished told of them.
func isPortChain(name string) bool {
	return len(name) > len(portChain) && name[:len(portChain)+1] == portChain+"-"
}
func isPortSet(name string) bool {
	return slices.Contains([]string{portSet, hostPortSet, targetSet, hostTargetSet}, name)
}

// spec describes our table.
//
// Priorities are 10 before those of iptables' nat chains, so that our ports win over a neighbour's and a port rule never sees a
// packet twice.
func (m *Manager) spec() tableSpec {
	ours, internal := m.bridgePrefix(), m.internalPrefix()
	hook := func(t nftables.ChainType, h *nftables.ChainHook, prio nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Type: t, Hooknum: h, Priority: &prio}
	}
	toPublished := ruleSpec{text: "to the host: see published", exprs: join(toLocalAddress(), []expr.Any{verdict(expr.VerdictJump, publishChain)})}
	port := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	hostPort := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	spec := tableSpec{
		chains: []chainSpec{
			{name: "loopback-guard", base: hook(nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -300), rules: []ruleSpec{
				// Bridges have route_localnet; nobody on them may use it to reach what listens on 127.0.0.1.
				{text: "from a bridge to 127.0.0.0/8: drop", exprs: join(iif(ours), toPrefix("127.0.0.0/8"), drop())},
			}},
			{name: "incoming", base: hook(nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -110), rules: []ruleSpec{toPublished}},
			{name: "local", base: hook(nftables.ChainTypeNAT, nftables.ChainHookOutput, -110), rules: []ruleSpec{toPublished}},
			{name: publishChain, rules: []ruleSpec{
				// A gateway's port 53 is the keeper's DNS, whatever a stack publishes.
				{text: "dns of a gateway: not published", exprs: join(payload(netDst), inSet(gatewaySet), dport(53),
					[]expr.Any{verdict(expr.VerdictReturn, "")})},
				{text: "address . protocol . port: chain of the service", exprs: toChain(hostPortSet, true)},
				// The host's own services on other loopback addresses (127.0.0.53 is systemd's resolver) stay its own.
				{text: "127.0.0.0/8 but 127.0.0.1: not published", exprs: join(toPrefix("127.0.0.0/8"),
					payload(netDst), []expr.Any{compare(expr.CmpOpNeq, []byte{127, 0, 0, 1}), verdict(expr.VerdictReturn, "")})},
				{text: "protocol . port: chain of the service", exprs: toChain(portSet, false)},
			}},
			{name: "forward", base: hook(nftables.ChainTypeFilter, nftables.ChainHookForward, 0), rules: []ruleSpec{
				{text: "established or related: accept", exprs: join(ctBits(expr.CtKeySTATE, ctEstablished|ctRelated), accept())},
				{text: "within one network: accept", exprs: join([]expr.Any{
					&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 2},
					&expr.Lookup{SourceRegister: 1, SetName: pairSet}}, accept())},
				{text: "from an internal network: drop", exprs: join(iif(internal), drop())},
				{text: "to an internal network: drop", exprs: join(oif(internal), drop())},
				// A task reaches another network's tasks, and the outside reaches any, only through what is published.
				{text: "to a network, published: accept", exprs: join(oif(ours), ctBits(expr.CtKeySTATUS, ctDNAT), accept())},
				{text: "to a network: drop", exprs: join(oif(ours), drop())},
			}},
			{name: "outgoing", base: hook(nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 90), rules: []ruleSpec{
				{text: "from 127.0.0.0/8 to a network: masquerade", exprs: join(oif(ours), fromPrefix(netip.MustParsePrefix("127.0.0.0/8")), masquerade())},
				{text: "to a network: its chain", exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
					&expr.Lookup{SourceRegister: 1, SetName: networkSet, IsDestRegSet: true}}},
				// What the host sends to its own gateway address leaves by lo, and keeps its source.
				{text: "from a network to the outside: masquerade", exprs: join(notOif(ours), []expr.Any{compare(expr.CmpOpNeq, ifname("lo"))},
					payload(netSrc), inSet(subnetSet), masquerade())},
			}},
		},
		sets: []setSpec{
			{name: gatewaySet, set: nftables.Set{KeyType: nftables.TypeIPAddr}},
			{name: subnetSet, set: nftables.Set{KeyType: nftables.TypeIPAddr, Interval: true}},
			{name: pairSet, set: nftables.Set{KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIFName)}},
			{name: networkSet, set: nftables.Set{KeyType: nftables.TypeIFName, IsMap: true, DataType: nftables.TypeVerdict}},
			{name: portSet, set: nftables.Set{KeyType: port, IsMap: true, DataType: nftables.TypeVerdict}},
			{name: hostPortSet, set: nftables.Set{KeyType: hostPort, IsMap: true, DataType: nftables.TypeVerdict}},
			{name: targetSet, set: nftables.Set{KeyType: port, IsMap: true, DataType: nftables.TypeInetService}},
			{name: hostTargetSet, set: nftables.Set{KeyType: hostPort, IsMap: true, DataType: nftables.TypeInetService}},
		},
	}
	m.specNetworks(&spec)
	m.specPorts(&spec)
	return spec
}

func (t *tableSpec) add(set string, e nftables.SetElement) {
	i := slices.IndexFunc(t.sets, func(s setSpec) bool { return s.name == set })
	t.sets[i].elements = append(t.sets[i].elements, e)
}

func (m *Manager) specNetworks(spec *tableSpec) {
	for _, id := range sortedKeys(m.networks) {
		b := m.networks[id]
		name := ifname(b.link)
		chain := networkChain + "-" + b.link
		// Who comes back to its own network through a published port is masqueraded: the backend would answer it directly, and it would
		// not know the answer.
		spec.chains = append(spec.chains, chainSpec{name: chain, rules: []ruleSpec{{
			text:  fmt.Sprintf("from %s, published: masquerade", b.Subnet),
			exprs: join(fromPrefix(b.Subnet), ctBits(expr.CtKeySTATUS, ctDNAT), masquerade()),
		}}})
		spec.add(networkSet, nftables.SetElement{Key: name, VerdictData: verdict(expr.VerdictGoto, chain)})
		spec.add(pairSet, nftables.SetElement{Key: slices.Concat(name, name)})
		spec.add(gatewaySet, nftables.SetElement{Key: b.Gateway.AsSlice()})
		if !b.Internal {
			spec.add(subnetSet, nftables.SetElement{Key: b.Subnet.Addr().AsSlice()})
			spec.add(subnetSet, nftables.SetElement{Key: address(number(lastAddr(b.Subnet)) + 1).AsSlice(), IntervalEnd: true})
		}
	}
}

func (m *Manager) specPorts(spec *tableSpec) {
	made := map[string]bool{}
	for _, e := range entries(m.services) {
		name := e.chain()
		if !made[name] {
			made[name] = true
			spec.chains = append(spec.chains, chainSpec{name: name, rules: []ruleSpec{e.rule()}})
		}
		key := slices.Concat([]byte{e.Protocol.number(), 0, 0, 0}, binary.BigEndian.AppendUint16(nil, e.HostPort), []byte{0, 0})
		ports, targets := portSet, targetSet
		if e.HostIP.IsValid() {
			key, ports, targets = slices.Concat(e.HostIP.AsSlice(), key), hostPortSet, hostTargetSet
		}
		spec.add(ports, nftables.SetElement{Key: key, VerdictData: verdict(expr.VerdictGoto, name)})
		spec.add(targets, nftables.SetElement{Key: key, Val: binary.BigEndian.AppendUint16(nil, e.Target)})
	}
}

// rule says what becomes of a new connection to a port of the service.
func (e entry) rule() ruleSpec {
	if len(e.backends) == 0 {
		reject := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: icmpPortUnreachable}
		if e.Protocol == TCP {
			reject = &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}
		}
		return ruleSpec{text: "no backends: refuse", exprs: []expr.Any{reject}}
	}
	sum := sha256.New()
	for _, b := range e.backends {
		fmt.Fprintln(sum, b)
	}
	targets := targetSet
	if e.HostIP.IsValid() {
		targets = hostTargetSet
	}
	return ruleSpec{
		text: fmt.Sprintf("to %d backends from %s in turn (%s), target of the port", len(e.backends), e.backends[0], hex.EncodeToString(sum.Sum(nil)[:12])),
		exprs: join([]expr.Any{
			&expr.Numgen{Register: 1, Modulus: uint32(len(e.backends)), Type: unix.NFT_NG_INCREMENTAL},
			&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true}, // the map of spread; table.go names it
		}, lookupPort(targets, e.HostIP.IsValid(), secondWord), []expr.Any{
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: secondWord},
		}),
		spread: e.backends,
	}
}

// spreadMap is the anonymous map from a number to a backend.
func spreadMap(table *nftables.Table, to []netip.Addr) (*nftables.Set, []nftables.SetElement) {
	set := &nftables.Set{
		Table: table, Anonymous: true, Constant: true, IsMap: true,
		KeyType: nftables.TypeInteger, DataType: nftables.TypeIPAddr,
	}
	var elems []nftables.SetElement
	for i, b := range to {
		elems = append(elems, nftables.SetElement{Key: binary.NativeEndian.AppendUint32(nil, uint32(i)), Val: b.AsSlice()})
	}
	return set, elems
}

// Bits of ct state and ct status, ICMP codes and registers, as in the kernel's headers nf_conntrack_common.h, icmp.h and nf_tables.h.
const (
	ctEstablished = 1 << 1
	ctRelated     = 1 << 2
	ctDNAT        = 1 << 5

	icmpPortUnreachable = 3

	// The 32-bit words of register 1 are 8, 9, 10, 11, those of register 2 the next four: a concatenation lies in them one by one.
	secondWord = unix.NFT_REG32_00 + 1
	keyWord    = unix.NFT_REG32_00 + 4
)

type field struct{ base, offset, length uint32 }

var (
	netSrc       = field{uint32(expr.PayloadBaseNetworkHeader), 12, 4}
	netDst       = field{uint32(expr.PayloadBaseNetworkHeader), 16, 4}
	transportDst = field{uint32(expr.PayloadBaseTransportHeader), 2, 2}
)

func join(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func payloadTo(f field, register uint32) *expr.Payload {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBase(f.base), Offset: f.offset, Len: f.length}
}

func payload(f field) []expr.Any { return []expr.Any{payloadTo(f, 1)} }

func compare(op expr.CmpOp, data []byte) *expr.Cmp { return &expr.Cmp{Op: op, Register: 1, Data: data} }

// iif matches interfaces by the beginning of their name.
func iif(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, compare(expr.CmpOpEq, []byte(prefix))}
}

func oif(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, compare(expr.CmpOpEq, []byte(prefix))}
}

func notOif(prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, compare(expr.CmpOpNeq, []byte(prefix))}
}

func prefixMatch(f field, p netip.Prefix) []expr.Any {
	return []expr.Any{payloadTo(f, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: ipNet(p).Mask, Xor: make([]byte, 4)},
		compare(expr.CmpOpEq, p.Masked().Addr().AsSlice())}
}

func toPrefix(p string) []expr.Any         { return prefixMatch(netDst, netip.MustParsePrefix(p)) }
func fromPrefix(p netip.Prefix) []expr.Any { return prefixMatch(netSrc, p) }

func inSet(name string) []expr.Any { return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: name}} }

func toLocalAddress() []expr.Any {
	return []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		compare(expr.CmpOpEq, binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL))}
}

// dport matches a port of TCP and UDP: the number in the protocol's header, which others have elsewhere.
func dport(port uint16) []expr.Any {
	return []expr.Any{payloadTo(transportDst, 1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port))}
}

// lookupPort looks a packet's protocol and port up in a map, with its address before them or without. The key is built in register 2, to leave what
// register 1 holds.
func lookupPort(set string, withAddress bool, into uint32) []expr.Any {
	var key []expr.Any
	at := uint32(keyWord)
	if withAddress {
		key = append(key, payloadTo(netDst, at))
		at++
	}
	return append(key, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: at}, payloadTo(transportDst, at+1),
		&expr.Lookup{SourceRegister: keyWord, DestRegister: into, SetName: set, IsDestRegSet: true})
}

// toChain goes to the chain that a map has for the packet's port.
func toChain(set string, withAddress bool) []expr.Any {
	return lookupPort(set, withAddress, unix.NFT_REG_VERDICT)
}

// ctBits matches when any of the bits is set.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bits), Xor: make([]byte, 4)},
		compare(expr.CmpOpNeq, make([]byte, 4))}
}

func verdict(kind expr.VerdictKind, chain string) *expr.Verdict {
	return &expr.Verdict{Kind: kind, Chain: chain}
}

func accept() []expr.Any     { return []expr.Any{verdict(expr.VerdictAccept, "")} }
func drop() []expr.Any       { return []expr.Any{&expr.Counter{}, verdict(expr.VerdictDrop, "")} }
func masquerade() []expr.Any { return []expr.Any{&expr.Counter{}, &expr.Masq{}} }

// ifname is an interface name as the kernel compares it.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
