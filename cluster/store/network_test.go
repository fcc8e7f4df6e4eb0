package store

import (
	"errors"
	"net"
	"sync"
	"time"
)

// wires joins stores of one process. A server that is cut off reaches nobody and is reached by nobody.
type wires struct {
	mu    sync.Mutex
	ends  map[string]*end
	cut   map[string]bool
	conns map[net.Conn][2]string
}

func newWires() *wires {
	return &wires{ends: map[string]*end{}, cut: map[string]bool{}, conns: map[net.Conn][2]string{}}
}

// end is one server's side: a Network.
type end struct {
	w        *wires
	addr     string
	incoming chan net.Conn
	closed   chan struct{}
	once     sync.Once
}

func (w *wires) end(addr string) *end {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := &end{w: w, addr: addr, incoming: make(chan net.Conn), closed: make(chan struct{})}
	w.ends[addr] = e
	return e
}

func (w *wires) set(addr string, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut[addr] = cut
	for c, ends := range w.conns {
		if cut && (ends[0] == addr || ends[1] == addr) {
			c.Close()
			delete(w.conns, c)
		}
	}
}

func (e *end) Addr() net.Addr { return address(e.addr) }

func (e *end) Accept() (net.Conn, error) {
	select {
	case c := <-e.incoming:
		return c, nil
	case <-e.closed:
		return nil, net.ErrClosed
	}
}

func (e *end) Close() error { e.once.Do(func() { close(e.closed) }); return nil }

func (e *end) Dial(to string, timeout time.Duration) (net.Conn, error) {
	e.w.mu.Lock()
	peer, cut := e.w.ends[to], e.w.cut[to] || e.w.cut[e.addr]
	e.w.mu.Unlock()
	if peer == nil || cut {
		return nil, errors.New("no route to " + to)
	}
	mine, theirs := net.Pipe()
	select {
	case peer.incoming <- theirs:
	case <-peer.closed:
		return nil, errors.New(to + " is closed")
	case <-time.After(timeout):
		return nil, errors.New(to + " does not answer")
	}
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	if e.w.cut[to] || e.w.cut[e.addr] {
		mine.Close()
		return nil, errors.New("no route to " + to)
	}
	e.w.conns[mine] = [2]string{e.addr, to}
	return mine, nil
}
