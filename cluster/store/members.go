package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Server is a member of the cluster as the log has it.
type Server struct {
	ID      string
	Address string
	Voter   bool // it counts for a majority
}

// Servers lists the members, in the order in which they were added.
func (s *Store) Servers() ([]Server, error) {
	r := s.raft.Load()
	if r == nil {
		return nil, fmt.Errorf("list the servers: %w", ErrNoQuorum)
	}
	f := r.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, fmt.Errorf("list the servers: %w", err)
	}
	var list []Server
	for _, m := range f.Configuration().Servers {
		list = append(list, Server{ID: string(m.ID), Address: string(m.Address), Voter: m.Suffrage == raft.Voter})
	}
	return list, nil
}

// PutServer adds a member, or changes the address or the vote of one. Only the leader can.
func (s *Store) PutServer(ctx context.Context, m Server) error {
	err := s.change(ctx, func(r *raft.Raft, timeout time.Duration) raft.IndexFuture {
		if m.Voter {
			return r.AddVoter(raft.ServerID(m.ID), raft.ServerAddress(m.Address), 0, timeout)
		}
		// AddNonvoter leaves the vote of a member that has one.
		list, err := s.Servers()
		for _, old := range list {
			if err == nil && old.ID == m.ID && old.Voter {
				return r.DemoteVoter(raft.ServerID(m.ID), 0, timeout)
			}
		}
		return r.AddNonvoter(raft.ServerID(m.ID), raft.ServerAddress(m.Address), 0, timeout)
	})
	if err != nil {
		return fmt.Errorf("add server %s: %w", m.ID, err)
	}
	return nil
}

// RemoveServer takes a member out of the cluster. Only the leader can.
func (s *Store) RemoveServer(ctx context.Context, id string) error {
	err := s.change(ctx, func(r *raft.Raft, timeout time.Duration) raft.IndexFuture {
		return r.RemoveServer(raft.ServerID(id), 0, timeout)
	})
	if err != nil {
		return fmt.Errorf("remove server %s: %w", id, err)
	}
	return nil
}

func (s *Store) change(ctx context.Context, do func(*raft.Raft, time.Duration) raft.IndexFuture) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.ProposeTimeout)
	defer cancel()
	if _, err := s.awaitLead(ctx); err != nil {
		return err
	}
	r := s.raft.Load()
	done := make(chan error, 1)
	go func() { done <- do(r, s.opts.ProposeTimeout).Error() }()
	select {
	case err := <-done:
		switch {
		case errors.Is(err, raft.ErrNotLeader):
			return ErrNotLeader
		case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown):
			return fmt.Errorf("%w: %w", ErrUnknown, err)
		}
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnknown, s.explain(ctx))
	}
}

// transport is how raft reaches other servers, and what closes it. A server without a network is alone: its transport reaches nobody.
func (s *Store) transport() (raft.Transport, func() error) {
	if s.opts.Network == nil {
		_, solo := raft.NewInmemTransport(raft.ServerAddress(s.opts.Address))
		return solo, solo.Close
	}
	layer := &stream{Network: s.opts.Network, addr: address(s.opts.Address), open: map[*conn]bool{}}
	t := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Logger:                  s.conf.Logger,
		Stream:                  layer,
		MaxPool:                 3,
		Timeout:                 2 * s.opts.Timing.Heartbeat,
		MsgpackUseNewTimeFormat: true,
	})
	return t, func() error { return errors.Join(t.Close(), layer.closeAll()) }
}

// stream makes a Network raft's, with the address under which the cluster knows this server. It closes the connections at the end: raft leaves those that
// others opened to it, and their goroutines, as they are.
type stream struct {
	Network
	addr address

	mu     sync.Mutex
	open   map[*conn]bool
	closed bool
}

func (s *stream) Addr() net.Addr { return s.addr }

func (s *stream) Accept() (net.Conn, error) {
	c, err := s.Network.Accept()
	if err != nil {
		return nil, err
	}
	return s.keep(c)
}

func (s *stream) Dial(a raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	c, err := s.Network.Dial(string(a), timeout)
	if err != nil {
		return nil, err
	}
	return s.keep(c)
}

func (s *stream) keep(c net.Conn) (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	k := &conn{Conn: c, of: s}
	s.open[k] = true
	return k, nil
}

func (s *stream) closeAll() error {
	s.mu.Lock()
	s.closed = true
	open := slices.Collect(maps.Keys(s.open))
	s.mu.Unlock()
	var err error
	for _, c := range open {
		err = errors.Join(err, c.Close())
	}
	return err
}

type conn struct {
	net.Conn
	of *stream
}

func (c *conn) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	if err := c.Conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

type address string

func (address) Network() string  { return "raft" }
func (a address) String() string { return string(a) }
