package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Established counts the TCP connections that still lead to a task through published ports or the keeper's proxy: those that were set up and
// that neither side has closed for good. Ports are the task's own; none = all. The caller that takes a task out of service asks until it is 0
// or the task's grace is over.
func (m *Manager) Established(ctx context.Context, backend netip.Addr, ports ...uint16) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("count connections to %s: %w", backend, err)
	}
	flows, err := flowsTo(backend)
	if err != nil {
		return 0, fmt.Errorf("count connections to %s: %w", backend, err)
	}
	n := 0
	for _, f := range flows {
		if f.proto == unix.IPPROTO_TCP && f.src == backend && liveState(f.state) && (len(ports) == 0 || slices.Contains(ports, f.port)) {
			n++
		}
	}
	return n, nil
}

// liveState tells that data may still come, from the kernel's enum tcp_conntrack: SYN_SENT 1, SYN_RECV 2, ESTABLISHED 3, FIN_WAIT 4,
// CLOSE_WAIT 5; behind them are LAST_ACK, TIME_WAIT and CLOSE.
func liveState(state uint8) bool { return state >= 1 && state <= 5 }

// flow is what we read of a connection: where its answers come from, which is the backend behind the port that the client saw.
type flow struct {
	src   netip.Addr
	port  uint16
	proto uint8
	state uint8 // of TCP
}

// Attributes of conntrack's netlink messages that the netlink library does not name, from nfnetlink_conntrack.h. A filter gives flags for
// each tuple: which of its fields the entries are compared by.
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	ctaFilterSrcAddress = 1
)

// flowsTo lists the connections answered from an address. Kernels from 5.8 filter; older ones send the whole table, so callers look at src.
func flowsTo(src netip.Addr) ([]flow, error) {
	req := nl.NewNetlinkRequest(int(netlink.ConntrackTable)<<8|nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	tuple := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_REPLY, nil)
	ip := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil)
	ip.AddChild(nl.NewRtAttr(nl.CTA_IP_V4_SRC, src.AsSlice()))
	tuple.AddChild(ip)
	req.AddData(tuple)
	filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
	filter.AddChild(nl.NewRtAttr(ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, 0)))
	filter.AddChild(nl.NewRtAttr(ctaFilterReplyFlags, binary.NativeEndian.AppendUint32(nil, ctaFilterSrcAddress)))
	req.AddData(filter)
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list conntrack entries: %w", err)
	}
	var out []flow
	for _, msg := range msgs {
		if f, ok := parseFlow(msg); ok {
			out = append(out, f)
		}
	}
	return out, nil
}

// parseFlow reads a conntrack message, from the four bytes of the netfilter header on.
func parseFlow(msg []byte) (flow, bool) {
	if len(msg) < 4 {
		return flow{}, false
	}
	var f flow
	top := attributes(msg[4:])
	reply := attributes(top[nl.CTA_TUPLE_REPLY])
	ip, proto := attributes(reply[nl.CTA_TUPLE_IP]), attributes(reply[nl.CTA_TUPLE_PROTO])
	src, ok := netip.AddrFromSlice(ip[nl.CTA_IP_V4_SRC])
	if !ok || len(proto[nl.CTA_PROTO_NUM]) != 1 {
		return flow{}, false
	}
	f.src, f.proto = src, proto[nl.CTA_PROTO_NUM][0]
	if p := proto[nl.CTA_PROTO_SRC_PORT]; len(p) == 2 {
		f.port = binary.BigEndian.Uint16(p)
	}
	tcp := attributes(attributes(top[nl.CTA_PROTOINFO])[nl.CTA_PROTOINFO_TCP])
	if s := tcp[nl.CTA_PROTOINFO_TCP_STATE]; len(s) == 1 {
		f.state = s[0]
	}
	return f, true
}

// attributes splits netlink attributes by type. What is malformed ends the list.
func attributes(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for len(b) >= 4 {
		size, typ := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)
		if size < 4 || size > len(b) {
			break
		}
		out[typ] = b[4:size]
		b = b[min(len(b), (size+3)&^3):]
	}
	return out
}

// forget deletes conntrack entries that would lead packets past a change of the published ports.
//
// UDP has no end of a connection: a peer that goes on sending keeps its entry, and with it a backend that was removed. And an entry
// made while a port was not published yet keeps its packets from being rewritten; of TCP only those that got nowhere are
// deleted, so that connections to a program of the host live on.
func (m *Manager) forget(before, after []Service) error {
	f := &staleFlows{gone: map[target]bool{}, published: map[Port]bool{}}
	for _, e := range entries(before) {
		for _, b := range e.backends {
			if e.Protocol == UDP {
				f.gone[target{e.Protocol.number(), netip.AddrPortFrom(b, e.Target)}] = true
			}
		}
	}
	had := map[Port]bool{}
	for _, e := range entries(before) {
		had[Port{HostIP: e.HostIP, HostPort: e.HostPort, Protocol: e.Protocol}] = true
	}
	for _, e := range entries(after) {
		for _, b := range e.backends {
			delete(f.gone, target{e.Protocol.number(), netip.AddrPortFrom(b, e.Target)})
		}
		if p := (Port{HostIP: e.HostIP, HostPort: e.HostPort, Protocol: e.Protocol}); !had[p] {
			f.published[p] = true
		}
	}
	if len(f.gone) == 0 && len(f.published) == 0 {
		return nil
	}
	if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, f); err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("delete conntrack entries of changed ports: %w", err)
	}
	return nil
}

type target struct {
	proto uint8
	at    netip.AddrPort
}

// staleFlows is a netlink.CustomConntrackFilter.
type staleFlows struct {
	gone      map[target]bool // backends that no port leads to any more
	published map[Port]bool   // new ports, without Target
}

// MatchConntrackFlow tells which entries to delete.
func (s *staleFlows) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, ok1 := netip.AddrFromSlice(f.Reverse.SrcIP.To4())
	dst, ok2 := netip.AddrFromSlice(f.Forward.DstIP.To4())
	if !ok1 || !ok2 {
		return false
	}
	proto := f.Forward.Protocol
	if s.gone[target{proto, netip.AddrPortFrom(src, f.Reverse.SrcPort)}] {
		return true
	}
	if src != dst || f.Reverse.SrcPort != f.Forward.DstPort {
		return false // rewritten by someone
	}
	var name Protocol
	switch proto {
	case unix.IPPROTO_UDP:
		name = UDP
	case unix.IPPROTO_SCTP:
		name = SCTP
	case unix.IPPROTO_TCP:
		name = TCP
		if tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP); ok && tcp.State == 3 { // ESTABLISHED
			return false
		}
	}
	p := Port{HostPort: f.Forward.DstPort, Protocol: name}
	if s.published[p] {
		return true
	}
	p.HostIP = dst
	return s.published[p]
}
