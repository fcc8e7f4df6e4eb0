// Package store keeps the facts of package state in a replicated log, and is the only user of hashicorp/raft.
//
// The flow: [Open] reads the newest snapshot and the committed entries after it, so that [Store.View] is right before anything runs. [Store.Run] takes
// part in the cluster until its context ends. Whoever leads proposes commands with [Store.Propose]; each member applies each committed entry to its own
// state.State and publishes the View; [Store.Changed] wakes those who wait for it. [Store.Lead] runs the leader's work for as long as a term lasts.
//
// On disk, below Options.Dir: log.db holds the entries, vote.db the term and the vote, snapshots/ the last two snapshots as JSON lines. A snapshot is
// taken every few thousand entries; entries older than the older snapshot are removed, so one damaged snapshot loses nothing.
//
// Words: a server is a member by its id, which never changes; its address may. A term is one leader's reign. Log time is the last stamp in the log plus
// the time that has passed on the leader's monotonic clock since its election: time without a leader does not count.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// Errors that callers branch on. All but ErrUnknown mean that the command is not in the log.
var (
	// ErrNotLeader says that another server leads: ask [Store.Leader] which, and propose there.
	ErrNotLeader = errors.New("this node does not lead the cluster")
	// ErrNoQuorum says that no leader was found in time: too few servers answer each other. Containers run on.
	ErrNoQuorum = errors.New("no quorum: too few servers of the cluster answer")
	// ErrHalted says that an entry of the log was not understood. This node applies nothing more until it is upgraded.
	ErrHalted = errors.New("this node stopped applying the log")
	// ErrUnknown says that the command may or may not be in the log. Propose it again with the same request id: it is applied once at most.
	ErrUnknown = errors.New("the outcome is unknown: repeat it with the same request id")
	// ErrStorage says that the log could not be written, as on a full disk. The error's text has the cause.
	ErrStorage = errors.New("the log can't be written")
	// ErrDamaged says that what is on disk is not what was written there. The error's text has the way out.
	ErrDamaged = errors.New("the data is damaged")
)

// Timing is how fast servers notice that the leader is gone. Raft waits for between one and two times Heartbeat before it calls an election.
type Timing struct {
	Heartbeat time.Duration // a follower without word for this long calls an election
	Election  time.Duration // a candidate without a majority for this long tries again
	Lease     time.Duration // a leader without word from a majority for this long steps down
}

// LAN suits servers whose round trips take some milliseconds: a new leader within 3 s of the loss of the old one.
var LAN = Timing{Heartbeat: 500 * time.Millisecond, Election: 500 * time.Millisecond, Lease: 400 * time.Millisecond}

// WAN suits servers whose round trips take up to some 200 ms, or small disks that stall.
var WAN = Timing{Heartbeat: 2 * time.Second, Election: 2 * time.Second, Lease: 1500 * time.Millisecond}

// Network carries raft's messages between servers. Accept and Close are those of a listener; Close ends Accept.
type Network interface {
	net.Listener
	Dial(address string, timeout time.Duration) (net.Conn, error)
}

// Options say how a store is opened. Dir and ID must be given.
type Options struct {
	Dir     string  // made when missing
	ID      string  // of this server: for ever
	Address string  // where other servers reach it; empty = the Network's, or the id when there is no network
	Network Network // nil = this server is alone
	Join    bool    // a new directory waits to be added to a cluster instead of beginning one

	Timing          Timing           // zero = LAN
	ProposeTimeout  time.Duration    // 0 = 2 s
	SnapshotEntries uint64           // entries between snapshots; 0 = 8192
	SnapshotBytes   int64            // or bytes of commands, whichever comes first; 0 = 16 MiB
	Now             func() time.Time // nil = time.Now; differences are taken of its monotonic reading
	Logger          *slog.Logger     // nil = none
}

func (o Options) withDefaults() (Options, error) {
	if o.Dir == "" || o.ID == "" {
		return o, errors.New("a directory and an id are needed")
	}
	if o.Address == "" {
		o.Address = o.ID
		if o.Network != nil {
			o.Address = o.Network.Addr().String()
		}
	}
	if o.Timing == (Timing{}) {
		o.Timing = LAN
	}
	if o.ProposeTimeout == 0 {
		o.ProposeTimeout = 2 * time.Second
	}
	if o.SnapshotEntries == 0 {
		o.SnapshotEntries = 8192
	}
	if o.SnapshotBytes == 0 {
		o.SnapshotBytes = 16 << 20
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Store is one server's replica of the log. Its methods may be called from any goroutine.
type Store struct {
	opts  Options
	conf  *raft.Config
	logs  *logStore
	votes *voteStore
	snaps *raft.FileSnapshotStore
	fsm   *fsm

	raft atomic.Pointer[raft.Raft] // nil until Run

	mu      sync.Mutex
	reign   *reign        // nil while this server does not lead
	changed chan struct{} // closed and replaced when reign changes
	ran     bool
}

const keepSnapshots = 2

// Open reads the facts from the directory, beginning a cluster of one where it is new and Options.Join is not set. It starts nothing; the files stay
// open until Run has ended, or Close where there is no Run. A damaged directory gives ErrDamaged, entries of a newer gitopsd do not: the View is then
// that of the last entry understood, and Propose says ErrHalted.
func Open(opts Options) (*Store, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	s, err := open(opts)
	if err != nil {
		return nil, fmt.Errorf("open the log in %s: %w", opts.Dir, err)
	}
	return s, nil
}

func open(opts Options) (_ *Store, err error) {
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, err
	}
	s := &Store{opts: opts, fsm: newFSM(), changed: make(chan struct{})}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if s.logs, err = openLog(filepath.Join(opts.Dir, "log.db")); err != nil {
		return nil, err
	}
	if s.votes, err = openVotes(filepath.Join(opts.Dir, "vote.db")); err != nil {
		return nil, err
	}
	logger := newRaftLogger(opts.Logger)
	if s.snaps, err = raft.NewFileSnapshotStoreWithLogger(opts.Dir, keepSnapshots, logger); err != nil {
		return nil, err
	}
	s.conf = raft.DefaultConfig()
	s.conf.LocalID = raft.ServerID(opts.ID)
	s.conf.Logger = logger
	s.conf.HeartbeatTimeout = opts.Timing.Heartbeat
	s.conf.ElectionTimeout = opts.Timing.Election
	s.conf.LeaderLeaseTimeout = opts.Timing.Lease
	s.conf.ShutdownOnRemove = false
	s.conf.NoLegacyTelemetry = true
	// The flag makes raft hand its commit index to the log store, which keeps it for replay.
	s.conf.RestoreCommittedLogs = true
	// Replay, the time of snapshots and what is removed after them are ours: see replay and compact.
	s.conf.NoSnapshotRestoreOnStart = true
	s.conf.SnapshotThreshold = math.MaxUint64
	s.conf.TrailingLogs = math.MaxUint64
	if err := raft.ValidateConfig(s.conf); err != nil {
		return nil, err
	}
	if err := s.bootstrap(); err != nil {
		return nil, err
	}
	if err := s.replay(); err != nil {
		return nil, err
	}
	return s, nil
}

// bootstrap writes the first configuration, this server alone, into a new directory.
func (s *Store) bootstrap() error {
	known, err := raft.HasExistingState(s.logs, s.votes, s.snaps)
	if err != nil || known || s.opts.Join {
		return err
	}
	_, solo := raft.NewInmemTransport(raft.ServerAddress(s.opts.Address))
	err = raft.BootstrapCluster(s.conf, s.logs, s.votes, s.snaps, solo, raft.Configuration{Servers: []raft.Server{
		{Suffrage: raft.Voter, ID: raft.ServerID(s.opts.ID), Address: raft.ServerAddress(s.opts.Address)},
	}})
	if err != nil {
		return fmt.Errorf("begin a cluster: %w", err)
	}
	return nil
}

// replay brings the state to the last entry that is known to be committed. Raft would do that only after it has started, and blocks for ever where more
// than 128 batches are to be applied before its own goroutine for that runs (1.8.0). What it applies once more later is skipped by its index.
func (s *Store) replay() error {
	base, err := s.restoreSnapshot()
	if err != nil {
		return err
	}
	first, last := s.logs.bounds()
	if last > base && first > base+1 {
		return damaged(fmt.Errorf("the log begins at entry %d, the newest readable snapshot ends at %d", first, base))
	}
	for i := base + 1; i <= s.logs.committed(); i++ {
		var entry raft.Log
		if err := s.logs.GetLog(i, &entry); err != nil {
			return damaged(err)
		}
		s.fsm.take(&entry)
	}
	s.fsm.publish()
	return nil
}

// restoreSnapshot loads the newest snapshot that can be read and returns the index it ends at. One that is damaged is put aside where the log reaches
// back to the one before.
func (s *Store) restoreSnapshot() (uint64, error) {
	list, err := s.snaps.List()
	if err != nil {
		return 0, err
	}
	var damage error
	for _, meta := range list {
		_, file, err := s.snaps.Open(meta.ID)
		if err == nil {
			err = s.fsm.Restore(file)
		}
		switch {
		case err == nil:
			s.fsm.since.Store(meta.Index)
			return meta.Index, nil
		case errors.Is(err, state.ErrHalt):
			return 0, fmt.Errorf("snapshot %s: %w", meta.ID, err)
		}
		damage = errors.Join(damage, fmt.Errorf("snapshot %s: %w", meta.ID, err))
		s.opts.Logger.Error("a snapshot is damaged and is put aside", "snapshot", meta.ID, "error", err)
		from := filepath.Join(s.opts.Dir, "snapshots", meta.ID)
		if err := os.Rename(from, filepath.Join(s.opts.Dir, "damaged-"+meta.ID)); err != nil {
			return 0, fmt.Errorf("put the damaged snapshot aside: %w", err)
		}
	}
	if first, _ := s.logs.bounds(); damage != nil && first > 1 {
		return 0, damaged(damage)
	}
	return 0, nil
}

// damageAdvice is the way out of damage, for the end of an error.
const damageAdvice = "stop gitopsd and put back a copy of the directory, or move it away and start anew: Git still says what should run"

func damaged(err error) error { return fmt.Errorf("%w: %w: %s", ErrDamaged, err, damageAdvice) }

func (s *Store) closeFiles() {
	if s.logs != nil {
		s.logs.close()
	}
	if s.votes != nil {
		s.votes.close()
	}
}

// Close lets go of the files of a store that was never run.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ran {
		s.ran = true
		s.closeFiles()
	}
}

// Run takes part in the cluster until ctx ends, and returns when all that it started has ended and the files are closed. It may be called once.
func (s *Store) Run(ctx context.Context) error {
	s.mu.Lock()
	again := s.ran
	s.ran = true
	s.mu.Unlock()
	if again {
		return errors.New("run the log: it has been run or closed before")
	}
	defer s.closeFiles()
	transport, closeTransport := s.transport()
	r, err := s.start(transport)
	if err != nil {
		return errors.Join(fmt.Errorf("run the log: %w", err), closeTransport())
	}
	s.raft.Store(r)
	var work sync.WaitGroup
	work.Go(func() { s.watchLeadership(ctx, r) })
	work.Go(func() { s.compact(ctx, r) })
	<-ctx.Done()
	err = errors.Join(r.Shutdown().Error(), closeTransport())
	work.Wait()
	if err != nil {
		return fmt.Errorf("run the log: %w", err)
	}
	return nil
}

// start starts raft. A lone voter has nobody to wait for and is elected at once: raft looks at its timer when the timeout becomes shorter.
func (s *Store) start(transport raft.Transport) (*raft.Raft, error) {
	peek := *s.conf
	members, err := raft.GetConfiguration(&peek, s.fsm, s.logs, s.votes, s.snaps, transport)
	if err != nil {
		return nil, err
	}
	conf := *s.conf
	alone := len(members.Servers) == 1 && members.Servers[0].ID == conf.LocalID
	if alone {
		conf.HeartbeatTimeout += time.Second
		conf.ElectionTimeout += time.Second
	}
	r, err := raft.NewRaft(&conf, s.fsm, s.logs, s.votes, s.snaps, transport)
	if err != nil || !alone {
		return r, err
	}
	timeouts := r.ReloadableConfig()
	timeouts.HeartbeatTimeout, timeouts.ElectionTimeout = s.conf.HeartbeatTimeout, s.conf.ElectionTimeout
	if err := r.ReloadConfig(timeouts); err != nil {
		return nil, errors.Join(err, r.Shutdown().Error())
	}
	return r, nil
}

// View is the facts as of the last entry applied here. It never blocks.
func (s *Store) View() *state.View { return s.fsm.view.Load() }

// Changed returns a channel that is closed as soon as the View's index is above after. Several changes close it once.
func (s *Store) Changed(after uint64) <-chan struct{} { return s.fsm.changed(after) }

// Halted is the reason why this node applies no further entries, or nil.
func (s *Store) Halted() error { return s.fsm.halted() }

// compact takes a snapshot when enough has been logged since the last one, and removes what no kept snapshot needs.
func (s *Store) compact(ctx context.Context, r *raft.Raft) {
	var retry <-chan time.Time
	for {
		if retry == nil && s.fsm.halted() == nil && s.due(r) {
			if err := s.snapshot(r); err != nil {
				s.opts.Logger.Warn("a snapshot of the log failed and is tried again in a minute", "error", err)
				s.fsm.bytes.Add(s.opts.SnapshotBytes) // still due
				retry = time.After(time.Minute)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-retry:
			retry = nil
		case <-s.fsm.changed(s.View().Index):
		}
	}
}

func (s *Store) due(r *raft.Raft) bool {
	applied := r.AppliedIndex()
	return applied-min(s.fsm.since.Load(), applied) >= s.opts.SnapshotEntries || s.fsm.bytes.Load() >= s.opts.SnapshotBytes
}

func (s *Store) snapshot(r *raft.Raft) error {
	if err := r.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) && !errors.Is(err, raft.ErrRaftShutdown) {
		return err
	}
	list, err := s.snaps.List()
	if err != nil || len(list) == 0 {
		return err
	}
	s.fsm.since.Store(list[0].Index)
	if len(list) < keepSnapshots {
		return nil
	}
	first, last := s.logs.bounds()
	if upTo := min(list[len(list)-1].Index, last); first != 0 && upTo >= first {
		return s.logs.DeleteRange(first, upTo)
	}
	return nil
}
