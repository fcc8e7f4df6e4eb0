package names

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// ednsSize is what we take over UDP without fear of fragments (the DNS flag day's figure), in bytes.
	ednsSize = 1232
	// maxForwards bounds the queries under way to upstream servers; more are answered SERVFAIL, and clients ask again.
	maxForwards = 256
	// upstreamTimeout is for one server, forwardTimeout for all: a client's own timeout is 5 s by default.
	upstreamTimeout = 2 * time.Second
	forwardTimeout  = 4500 * time.Millisecond
)

// forwarder asks upstream servers.
type forwarder struct {
	resolvConf string
	slots      chan struct{}

	mu      sync.Mutex
	servers []string
	read    fileStamp
}

type fileStamp struct {
	mod  time.Time
	size int64
}

func newForwarder(resolvConf string) *forwarder {
	return &forwarder{resolvConf: resolvConf, slots: make(chan struct{}, maxForwards)}
}

var errBusy = errors.New("too many queries are under way")

// forward asks the servers one after the other until one gives an answer. Answers that say no are answers. own are our gateways,
// which are never asked: that would be a loop.
func (f *forwarder) forward(ctx context.Context, req *dns.Msg, servers []string, own func(netip.Addr) bool) (*dns.Msg, error) {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, errBusy
	}
	if len(servers) == 0 {
		var err error
		if servers, err = f.hostServers(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	errs := []error{errors.New("no upstream server could be asked")}
	for _, s := range servers {
		at := withPort(s)
		if host, _, err := net.SplitHostPort(at); err == nil {
			if a, err := netip.ParseAddr(host); err == nil && own(a) {
				continue
			}
		}
		m, err := exchange(ctx, req, at)
		if err == nil && (m.Rcode == dns.RcodeServerFailure || m.Rcode == dns.RcodeRefused || m.Rcode == dns.RcodeNotImplemented) {
			err = fmt.Errorf("%s: %s", at, dns.RcodeToString[m.Rcode])
		}
		if err == nil {
			return m, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// exchange asks one server over UDP, and over TCP when the answer did not fit.
func exchange(ctx context.Context, req *dns.Msg, server string) (*dns.Msg, error) {
	ask := new(dns.Msg)
	ask.SetQuestion(req.Question[0].Name, req.Question[0].Qtype)
	ask.Question[0].Qclass = req.Question[0].Qclass
	ask.RecursionDesired, ask.CheckingDisabled = req.RecursionDesired, req.CheckingDisabled
	opt := req.IsEdns0()
	ask.SetEdns0(ednsSize, opt != nil && opt.Do())
	m, _, err := (&dns.Client{Net: "udp", Timeout: upstreamTimeout, UDPSize: ednsSize}).ExchangeContext(ctx, ask, server)
	if err == nil && m.Rcode == dns.RcodeFormatError { // a server that knows no EDNS
		ask.Extra = nil
		m, _, err = (&dns.Client{Net: "udp", Timeout: upstreamTimeout}).ExchangeContext(ctx, ask, server)
	}
	if err == nil && m.Truncated {
		m, _, err = (&dns.Client{Net: "tcp", Timeout: upstreamTimeout}).ExchangeContext(ctx, ask, server)
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", server, err)
	}
	m.Id, m.Question = req.Id, req.Question
	// OPT is between neighbours only.
	extra := m.Extra[:0]
	for _, rr := range m.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			extra = append(extra, rr)
		}
	}
	m.Extra = extra
	if opt != nil {
		m.SetEdns0(ednsSize, opt.Do())
	}
	return m, nil
}

// hostServers gives those of resolv.conf. It is read again when it changed: DHCP and VPN clients rewrite it.
func (f *forwarder) hostServers() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st, err := os.Stat(f.resolvConf)
	if err != nil {
		return nil, fmt.Errorf("read the host's resolvers: %w", err)
	}
	stamp := fileStamp{st.ModTime(), st.Size()}
	if f.servers != nil && stamp == f.read {
		return f.servers, nil
	}
	conf, err := dns.ClientConfigFromFile(f.resolvConf)
	if err != nil {
		return nil, fmt.Errorf("read the host's resolvers: %w", err)
	}
	f.servers, f.read = conf.Servers, stamp
	return f.servers, nil
}

func withPort(server string) string {
	if a, err := netip.ParseAddr(strings.Trim(server, "[]")); err == nil {
		return net.JoinHostPort(a.String(), "53")
	}
	if _, _, err := net.SplitHostPort(server); err == nil {
		return server
	}
	return net.JoinHostPort(server, "53")
}
