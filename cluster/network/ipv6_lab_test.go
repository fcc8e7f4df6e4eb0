package network

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What is published is reachable on the host's IPv6 addresses, too: from outside, from the host and on its loopback.
func TestLabIPv6(t *testing.T) {
	if !inLab(t) {
		return
	}
	m := newLab(t)
	client := outside(t)
	addIPv6(t, host, "uplink", "2001:db8::1/64")
	addIPv6(t, client, "eth0", "2001:db8::2/64")
	ensure(t, m, "shop_default", "10.210.1.0/24", false)
	attach(t, m, "shop/web.1", "shop_default 10.210.1.2")
	serve(t, m, "shop/web.1", 80)
	serveUDP(t, m.pin("shop/web.1"), "web.1", 5140)
	on := func(address string, port uint16) Port {
		return Port{HostIP: netip.MustParseAddr(address), HostPort: port, Protocol: TCP, Target: 80}
	}
	publish(t, m, Service{Key: "shop/web", Backends: addrs("10.210.1.2"), Ports: []Port{
		tcp(8080, 80), {HostPort: 514, Protocol: UDP, Target: 5140},
		on("2001:db8::1", 8081), on("::1", 8082), on("127.0.0.1", 8083), on("::", 8084),
	}})
	if err := m.SetNames(t.Context(), Names{}); err != nil {
		t.Fatal(err)
	}
	serveNames(t, m)
	answer := func(ns, to string) (string, error) {
		c, err := within(t, ns, func() (net.Conn, error) { return net.DialTimeout("tcp6", to, patient) })
		if err != nil {
			return "", err
		}
		defer c.Close()
		who, _, err := hello(c)
		return who, err
	}
	eventually(t, "the keeper serves the last port", func() bool { _, err := answer(host, "[::1]:8084"); return err == nil })
	for _, open := range []struct{ ns, to string }{
		{client, "[2001:db8::1]:8080"}, {host, "[2001:db8::1]:8080"}, {host, "[::1]:8080"},
		{client, "[2001:db8::1]:8081"}, {host, "[::1]:8082"}, {client, "[2001:db8::1]:8084"},
	} {
		if who, err := answer(open.ns, open.to); err != nil || who != "shop/web.1" {
			t.Errorf("%s from %s: answered by %q, %v", open.to, open.ns, who, err)
		}
	}
	for _, shut := range []struct{ ns, to string }{{host, "[::1]:8081"}, {client, "[2001:db8::1]:8082"}, {host, "[::1]:8083"}} {
		if who, err := answer(shut.ns, shut.to); err == nil {
			t.Errorf("%s from %s: answered by %q, want no way", shut.to, shut.ns, who)
		}
	}
	mustFail(t, client, "192.0.2.1:8084") // published on IPv6 only
	c, err := within(t, client, func() (net.Conn, error) { return net.Dial("udp6", "[2001:db8::1]:514") })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "an answer over UDP", func() bool { return say(c) == "web.1" })
}

// addIPv6 gives a link an IPv6 address that can be used at once.
func addIPv6(t *testing.T, ns, link, address string) {
	t.Helper()
	_, err := within(t, ns, func() (struct{}, error) {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return struct{}{}, err
		}
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			return struct{}{}, err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, addr); err != nil {
			if strings.Contains(err.Error(), "permission denied") {
				err = fmt.Errorf("IPv6 is off here: %w", err)
			}
			return struct{}{}, err
		}
		return struct{}{}, nil
	})
	if err != nil && strings.Contains(err.Error(), "IPv6 is off") {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal("add", address, "to", link, err)
	}
}
