package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/miekg/dns"
)

// Config of a server.
type Config struct {
	Path       string       // the names file, see WriteFile
	ResolvConf string       // the host's; empty = /etc/resolv.conf
	Port       uint16       // of DNS on the gateways; 0 = 53
	Log        *slog.Logger // nil = discard
}

// server holds what runs. Only Serve's goroutine changes it; handlers read current.
type server struct {
	cfg     Config
	log     *slog.Logger
	current atomic.Pointer[directory]
	forward *forwarder
	turn    atomic.Uint32

	running   sync.WaitGroup
	listeners map[netip.Addr]*gatewayServer
	proxies   map[proxyKey]*proxy
	proxied   chan struct{}       // a slot for each connection of the proxy
	failed    map[string]struct{} // what could not be bound, by its log text, so that it is told once
}

// Serve answers names and proxies ports until ctx ends, as the names file says at each moment. It returns when all it started ended, with
// an error only when it cannot watch the file. What cannot be bound, because another program has the address, is logged and tried again.
func Serve(ctx context.Context, cfg Config) error {
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = "/etc/resolv.conf"
	}
	if cfg.Port == 0 {
		cfg.Port = 53
	}
	s := &server{cfg: cfg, log: cfg.Log, forward: newForwarder(cfg.ResolvConf), listeners: map[netip.Addr]*gatewayServer{},
		proxies: map[proxyKey]*proxy{}, proxied: make(chan struct{}, maxProxied), failed: map[string]struct{}{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.current.Store(newDirectory(Table{}))
	dir := filepath.Dir(cfg.Path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the names file's directory: %w", err)
	}
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the names file: %w", err)
	}
	defer watch.Close()
	// The directory, not the file: the file is replaced.
	if err := watch.Add(dir); err != nil {
		return fmt.Errorf("watch the names file: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer s.stop()
	defer cancel()
	retry := time.NewTicker(time.Second)
	defer retry.Stop()
	s.load()
	s.reconcile(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-watch.Events:
			if filepath.Base(ev.Name) != filepath.Base(cfg.Path) || !ev.Has(fsnotify.Create|fsnotify.Write) {
				continue
			}
			s.load()
			s.reconcile(ctx)
		case err := <-watch.Errors: // events were lost
			s.log.Warn("watch the names file", "error", err)
			s.load()
			s.reconcile(ctx)
		case <-retry.C:
			if len(s.failed) > 0 {
				s.reconcile(ctx)
			}
		}
	}
}

// load takes over the names file. What cannot be read changes nothing.
func (s *server) load() {
	data, err := os.ReadFile(s.cfg.Path)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err == nil {
		var t Table
		if t, err = Decode(data); err == nil {
			s.current.Store(newDirectory(t))
			return
		}
	}
	s.log.Error("names stay as they were", "error", err)
}

// reconcile makes the listeners fit the table.
func (s *server) reconcile(ctx context.Context) {
	d := s.current.Load()
	tried := map[string]struct{}{}
	for addr, g := range s.listeners {
		if d.gateways[addr] == nil {
			g.close()
			delete(s.listeners, addr)
		}
	}
	for addr := range d.gateways {
		if s.listeners[addr] != nil {
			continue
		}
		g, err := s.listen(ctx, addr)
		if err != nil {
			s.bindFailed(tried, "names are not answered on a gateway", addr.String(), err)
			continue
		}
		s.listeners[addr] = g
	}
	s.reconcileProxies(ctx, d, tried)
	s.failed = tried
}

func (s *server) bindFailed(tried map[string]struct{}, what, at string, err error) {
	key := what + " " + at + " " + err.Error()
	tried[key] = struct{}{}
	if _, told := s.failed[key]; !told {
		s.log.Error("names: can't listen", "what", what, "address", at, "error", err)
	}
}

func (s *server) stop() {
	for _, g := range s.listeners {
		g.close()
	}
	for _, p := range s.proxies {
		p.close()
	}
	s.running.Wait()
}

// gatewayServer is DNS on one gateway, over UDP and TCP.
type gatewayServer struct {
	packets net.PacketConn
	stream  net.Listener
	servers []*dns.Server
}

// close ends listening at once and what is under way soon; the server's running tells when.
func (g *gatewayServer) close() {
	done, cancel := context.WithCancel(context.Background())
	cancel()
	for _, srv := range g.servers {
		_ = srv.ShutdownContext(done) // wakes idle TCP connections; fails when it is not up yet
	}
	g.packets.Close()
	g.stream.Close()
}

// maxStreams bounds the TCP connections of one network, so that its tasks cannot use up the keeper's files.
const maxStreams = 128

func (s *server) listen(ctx context.Context, gateway netip.Addr) (*gatewayServer, error) {
	at := net.JoinHostPort(gateway.String(), strconv.Itoa(int(s.cfg.Port)))
	lc := net.ListenConfig{Control: freebind}
	packets, err := lc.ListenPacket(ctx, "udp4", at)
	if err != nil {
		return nil, err
	}
	stream, err := lc.Listen(ctx, "tcp4", at)
	if err != nil {
		packets.Close()
		return nil, err
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) { s.handle(ctx, gateway, w, req) })
	servers := []*dns.Server{
		{PacketConn: packets, Handler: handler, UDPSize: ednsSize},
		{Listener: &limited{Listener: stream, slots: make(chan struct{}, maxStreams)}, Handler: handler},
	}
	for _, srv := range servers {
		s.running.Go(func() {
			if err := srv.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
				s.log.Error("names are not answered any more", "address", at, "error", err)
			}
		})
	}
	return &gatewayServer{packets, stream, servers}, nil
}

// freebind lets us listen on an address before its bridge has it, and go on when the bridge is made anew.
func freebind(_, _ string, c syscall.RawConn) error {
	var serr error
	if err := c.Control(func(fd uintptr) { serr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_FREEBIND, 1) }); err != nil {
		return err
	}
	return serr
}

func (s *server) handle(ctx context.Context, gateway netip.Addr, w dns.ResponseWriter, req *dns.Msg) {
	d := s.current.Load()
	if req.Response {
		return // two servers that answer each other's answers never end
	}
	if req.Opcode != dns.OpcodeQuery || len(req.Question) != 1 {
		m := new(dns.Msg)
		m.SetRcode(req, dns.RcodeNotImplemented)
		s.write(w, req, m)
		return
	}
	r := d.answer(gateway, addrOf(w.RemoteAddr()), req.Question[0], int(s.turn.Add(1)>>1)) // A and AAAA come in pairs
	if !r.forward {
		s.write(w, req, d.reply(req, r))
		return
	}
	servers := r.resolvers
	if len(servers) == 0 {
		servers = d.table.Resolvers
	}
	m, err := s.forward.forward(ctx, req, servers, func(a netip.Addr) bool { return d.gateways[a] != nil })
	if err != nil {
		s.log.Debug("forward a query", "name", req.Question[0].Name, "error", err)
		m = new(dns.Msg)
		m.SetRcode(req, dns.RcodeServerFailure)
		m.RecursionAvailable = true
	}
	s.write(w, req, m)
}

// write sends the answer, cut to what the client takes.
func (s *server) write(w dns.ResponseWriter, req, m *dns.Msg) {
	size := dns.MaxMsgSize
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size = dns.MinMsgSize
		if opt := req.IsEdns0(); opt != nil {
			size = max(size, min(int(opt.UDPSize()), ednsSize))
		}
	}
	m.Compress = true
	m.Truncate(size)
	if err := w.WriteMsg(m); err != nil {
		s.log.Debug("send an answer", "client", w.RemoteAddr().String(), "error", err)
	}
}

// limited accepts no more connections than it has slots.
type limited struct {
	net.Listener
	slots chan struct{}
}

// Accept takes a connection; one too many is closed at once.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &slotted{Conn: c, slots: l.slots}, nil
		default:
			c.Close()
		}
	}
}

type slotted struct {
	net.Conn
	slots chan struct{}
	once  sync.Once
}

// Close gives the slot back.
func (c *slotted) Close() error {
	c.once.Do(func() { <-c.slots })
	return c.Conn.Close()
}
