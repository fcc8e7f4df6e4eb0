package names

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxProxied bounds the TCP connections of all ports together.
	maxProxied = 4096
	// maxPeers bounds the UDP clients of one port; peerIdle is how long one is remembered.
	maxPeers = 1024
	peerIdle = 60 * time.Second

	dialTimeout = 3 * time.Second
)

type proxyKey struct {
	addr     netip.Addr
	port     uint16
	protocol string
}

// proxy is one published port on IPv6: tasks have IPv4 addresses only, so its connections end here and go on from here.
type proxy struct {
	listener io.Closer
	backends atomic.Pointer[[]netip.AddrPort]
	turn     atomic.Uint32
}

func (p *proxy) close() { p.listener.Close() }

// pick gives the backends in the order in which to try them.
func (p *proxy) pick() []netip.AddrPort {
	all := *p.backends.Load()
	if len(all) == 0 {
		return nil
	}
	i := int(p.turn.Add(1)) % len(all)
	return slices.Concat(all[i:], all[:i])
}

// reconcileProxies makes the proxies fit the table. A port without backends is not listened on: it is refused, as on IPv4. Connections of a
// port or backend that went away go on.
func (s *server) reconcileProxies(ctx context.Context, d *directory, tried map[string]struct{}) {
	want := map[proxyKey][]netip.AddrPort{}
	for _, p := range d.table.Ports {
		if len(p.Backends) > 0 {
			want[proxyKey{p.Address, p.Port, p.Protocol}] = p.Backends
		}
	}
	for key, p := range s.proxies {
		if want[key] == nil {
			p.close()
			delete(s.proxies, key)
		}
	}
	for key, backends := range want {
		p := s.proxies[key]
		if p != nil {
			p.backends.Store(&backends)
			continue
		}
		p = &proxy{}
		p.backends.Store(&backends)
		at := net.JoinHostPort(key.addr.String(), strconv.Itoa(int(key.port)))
		if err := s.open(ctx, p, key.protocol, at); err != nil {
			s.bindFailed(tried, "a published port is not served on IPv6", at+"/"+key.protocol, err)
			continue
		}
		s.proxies[key] = p
	}
}

func (s *server) open(ctx context.Context, p *proxy, protocol, at string) error {
	var lc net.ListenConfig
	if protocol == "udp" {
		conn, err := lc.ListenPacket(ctx, "udp6", at)
		if err != nil {
			return err
		}
		p.listener = conn
		s.running.Go(func() { p.relay(conn.(*net.UDPConn)) })
		return nil
	}
	l, err := lc.Listen(ctx, "tcp6", at)
	if err != nil {
		return err
	}
	p.listener = l
	s.running.Go(func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of files: those that end make room
				s.log.Warn("accept on a published port", "address", at, "error", err)
				select {
				case <-time.After(100 * time.Millisecond):
					continue
				case <-ctx.Done():
					return
				}
			}
			select {
			case s.proxied <- struct{}{}:
			default:
				c.Close()
				continue
			}
			s.running.Go(func() {
				defer func() { <-s.proxied }()
				p.connect(ctx, c.(*net.TCPConn))
			})
		}
	})
	return nil
}

// connect joins a client with the first backend that answers, until both sides are done or ctx ends.
func (p *proxy) connect(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	var backend *net.TCPConn
	for _, at := range p.pick() {
		c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp4", at.String())
		if err == nil {
			backend = c.(*net.TCPConn)
			break
		}
	}
	if backend == nil {
		_ = client.SetLinger(0) // reset: not an answer without content
		return
	}
	defer backend.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); backend.Close() })()
	var both sync.WaitGroup
	both.Go(func() { copyHalf(backend, client) })
	both.Go(func() { copyHalf(client, backend) })
	both.Wait()
}

// copyHalf copies one direction and passes its end on. A failure ends both: the other side would wait for ever.
func copyHalf(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	_ = to.CloseWrite()
}

// relay serves a UDP port: a client keeps its backend while it sends, unless the backend is gone.
func (p *proxy) relay(conn *net.UDPConn) {
	type peer struct {
		*net.UDPConn
		backend netip.AddrPort
	}
	var mu sync.Mutex
	peers := map[netip.AddrPort]*peer{}
	var readers sync.WaitGroup
	defer readers.Wait()
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range peers {
			c.Close()
		}
	}()
	find := func(from netip.AddrPort) *peer {
		mu.Lock()
		defer mu.Unlock()
		c := peers[from]
		if c != nil && slices.Contains(*p.backends.Load(), c.backend) {
			return c
		}
		order := p.pick()
		if len(order) == 0 || (c == nil && len(peers) >= maxPeers) {
			return nil
		}
		if c != nil {
			c.Close()
		}
		up, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(order[0]))
		if err != nil {
			return nil
		}
		c = &peer{up, order[0]}
		peers[from] = c
		readers.Go(func() {
			b := make([]byte, 64<<10)
			for {
				_ = c.SetReadDeadline(time.Now().Add(peerIdle))
				n, err := c.Read(b)
				if err == nil {
					_, err = conn.WriteToUDPAddrPort(b[:n], from)
				}
				if err != nil {
					break
				}
			}
			c.Close()
			mu.Lock()
			defer mu.Unlock()
			if peers[from] == c {
				delete(peers, from)
			}
		})
		return c
	}
	b := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if c := find(from); c != nil {
			_ = c.SetReadDeadline(time.Now().Add(peerIdle))
			_, _ = c.Write(b[:n]) // a datagram may be lost
		}
	}
}
