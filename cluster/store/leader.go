package store

import (
	"context"
	"time"

	"github.com/hashicorp/raft"
)

// reign is this server's leadership for one term.
type reign struct {
	term  uint64
	base  time.Time // log time at its beginning
	begun time.Time // by this server's clock
	over  chan struct{}
}

// lead is the current reign, nil when this server does not lead, and a channel that is closed when that, or what Leader says, changes.
func (s *Store) lead() (*reign, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reign, s.changed
}

func (s *Store) setReign(r *reign) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reign != nil {
		close(s.reign.over)
	}
	s.reign = r
	close(s.changed)
	s.changed = make(chan struct{})
}

// Leading says whether this server leads, and in which term. It leads only once its View has all that earlier terms committed.
func (s *Store) Leading() (term uint64, ok bool) {
	if lead, _ := s.lead(); lead != nil {
		return lead.term, true
	}
	return 0, false
}

// Leader is the id and the address of the server that leads, as far as this one knows.
func (s *Store) Leader() (id, address string, ok bool) {
	r := s.raft.Load()
	if r == nil {
		return "", "", false
	}
	a, i := r.LeaderWithID()
	return string(i), string(a), i != ""
}

// Now is log time: for the leader the present, for others the last stamp they have seen. It never goes back.
func (s *Store) Now() time.Time {
	lead, _ := s.lead()
	seen := s.View().At
	if lead == nil {
		return seen
	}
	now := lead.base.Add(s.opts.Now().Sub(lead.begun)).UTC()
	if now.Before(seen) {
		return seen
	}
	return now
}

// Lead calls work each time this server begins to lead, with the term and a context that ends with it, and returns the error of work, or nil when ctx
// has ended. There is never more than one call at a time: it waits for the work of one term to return before that of the next begins.
func (s *Store) Lead(ctx context.Context, work func(ctx context.Context, term uint64) error) error {
	var done *reign
	for {
		lead, changed := s.lead()
		if lead != nil && lead != done {
			done = lead
			if err := s.during(ctx, lead, work); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

func (s *Store) during(ctx context.Context, mine *reign, work func(context.Context, uint64) error) error {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-mine.over:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := work(ctx, mine.term)
	cancel()
	<-ended
	return err
}

// watchLeadership begins and ends reigns as raft wins and loses elections.
func (s *Store) watchLeadership(ctx context.Context, r *raft.Raft) {
	others := make(chan raft.Observation, 1) // one that is dropped is like the one that waits: look again
	observer := raft.NewObserver(others, false, func(o *raft.Observation) bool { _, ok := o.Data.(raft.LeaderObservation); return ok })
	r.RegisterObserver(observer)
	defer r.DeregisterObserver(observer)
	defer s.setReign(nil)
	for {
		select {
		case <-ctx.Done():
			return
		case <-others:
			s.mu.Lock()
			close(s.changed)
			s.changed = make(chan struct{})
			s.mu.Unlock()
		case leads := <-r.LeaderCh():
			// The channel holds the newest word only: a leader that lost and won again in between gets a new reign all the same.
			s.setReign(nil)
			if leads {
				s.begin(ctx, r)
			}
		}
	}
}

// begin waits until all entries of earlier terms are applied here. Only then is the View what the reign's decisions may start from.
func (s *Store) begin(ctx context.Context, r *raft.Raft) {
	for ctx.Err() == nil && r.State() == raft.Leader {
		term := r.CurrentTerm()
		if err := r.Barrier(s.opts.Timing.Election).Error(); err != nil {
			continue
		}
		if s.fsm.halted() != nil {
			// Another server may understand the entry. Where there is none, this one goes on leading for raft, and nobody's commands are taken.
			_ = r.LeadershipTransfer().Error()
			return
		}
		if r.State() != raft.Leader || r.CurrentTerm() != term {
			continue
		}
		now := s.opts.Now()
		base := s.View().At
		if base.IsZero() {
			base = now // a new log: log time begins with the clock of whoever leads first
		}
		s.setReign(&reign{term: term, base: base.Round(0), begun: now, over: make(chan struct{})})
		return
	}
}
