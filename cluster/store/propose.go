package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// Propose puts a command into the log and returns what became of it once it is applied here. Only the leader can: see the errors of this package for what
// else may happen. It answers within Options.ProposeTimeout. A command without a time gets the log time of now.
func (s *Store) Propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	res, err := s.propose(ctx, cmd)
	if err != nil {
		return res, fmt.Errorf("propose: %w", err)
	}
	return res, nil
}

func (s *Store) propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, s.opts.ProposeTimeout)
	defer cancel()
	for {
		lead, err := s.awaitLead(ctx)
		if err != nil {
			return state.Result{}, err
		}
		stamped := cmd
		if stamped.At.IsZero() {
			stamped.At = s.Now()
		}
		data, err := state.Encode(stamped)
		if err != nil {
			return state.Result{}, err
		}
		res, err := s.apply(ctx, data)
		if !errors.Is(err, raft.ErrNotLeader) {
			return res, err
		}
		// Raft knew first that the term is over.
		select {
		case <-lead.over:
		case <-ctx.Done():
			return state.Result{}, s.explain(ctx)
		}
	}
}

func (s *Store) apply(ctx context.Context, data []byte) (state.Result, error) {
	r := s.raft.Load()
	done := make(chan error, 1)
	var future raft.ApplyFuture
	go func() {
		future = r.Apply(data, s.opts.ProposeTimeout)
		done <- future.Error() // raft answers all it has taken at the latest when this server steps down or stops
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnknown, s.explain(ctx))
	}
	switch {
	case err == nil:
		a := future.Response().(answer)
		return a.res, a.err
	case errors.Is(err, raft.ErrNotLeader):
		return state.Result{}, err
	case errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return state.Result{}, fmt.Errorf("%w: it is handing over", ErrNotLeader)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return state.Result{}, s.explain(ctx)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown), errors.Is(err, raft.ErrAbortedByRestore):
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	return state.Result{}, s.storageError(err)
}

// awaitLead waits until this server leads. It gives up at once when another one does.
func (s *Store) awaitLead(ctx context.Context) (*reign, error) {
	for {
		if err := s.fsm.halted(); err != nil {
			return nil, err
		}
		lead, changed := s.lead()
		if lead != nil {
			return lead, nil
		}
		if id, _, ok := s.Leader(); ok && id != s.opts.ID {
			return nil, fmt.Errorf("%w: %s does", ErrNotLeader, id)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, s.explain(ctx)
		}
	}
}

// Fault is why the last write to the log failed, as an [ErrStorage]; nil where it did not. While there is one, this server leads only for moments.
func (s *Store) Fault() error {
	if fault := s.logs.fault.Load(); fault != nil {
		return s.storageError(*fault)
	}
	return nil
}

// explain says why there was no answer in time.
func (s *Store) explain(ctx context.Context) error {
	if err := s.Fault(); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w within %s", ErrNoQuorum, s.opts.ProposeTimeout)
}

func (s *Store) storageError(err error) error {
	return fmt.Errorf("%w: %w: make room on the disk of %s; it goes on by itself", ErrStorage, err, s.opts.Dir)
}
