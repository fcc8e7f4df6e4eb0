package store

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// fsm applies committed entries to the state and publishes views of it. Raft calls it from one goroutine at a time.
type fsm struct {
	state   *state.State
	applied uint64                     // index of the last entry taken
	view    atomic.Pointer[state.View] // what everyone else sees
	halt    atomic.Pointer[error]

	since atomic.Uint64 // index that the newest snapshot ends at
	bytes atomic.Int64  // of the commands applied after it

	mu   sync.Mutex
	wake chan struct{} // closed at the next change; nil = nobody waits
}

func newFSM() *fsm {
	f := &fsm{state: state.New()}
	f.view.Store(f.state.View())
	return f
}

// answer is what raft hands back to Propose for an entry.
type answer struct {
	res state.Result
	err error
}

// take applies one entry. After one that is not understood it applies nothing more.
func (f *fsm) take(entry *raft.Log) answer {
	if entry.Type != raft.LogCommand || entry.Index <= f.applied {
		return answer{}
	}
	if err := f.halted(); err != nil {
		return answer{err: err}
	}
	res, err := f.state.Apply(entry.Index, entry.Term, entry.Data)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrHalted, err)
		f.halt.Store(&err)
		return answer{err: err}
	}
	f.applied = entry.Index
	f.bytes.Add(int64(len(entry.Data)))
	return answer{res: res}
}

func (f *fsm) halted() error {
	if err := f.halt.Load(); err != nil {
		return *err
	}
	return nil
}

// publish makes what was applied visible, then wakes those who wait: whoever is woken sees it.
func (f *fsm) publish() {
	f.view.Store(f.state.View())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wake != nil {
		close(f.wake)
		f.wake = nil
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (f *fsm) changed(after uint64) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.view.Load().Index > after {
		return closed
	}
	if f.wake == nil {
		f.wake = make(chan struct{})
	}
	return f.wake
}

// Apply is called where raft applies entries one by one.
func (f *fsm) Apply(entry *raft.Log) any { return f.ApplyBatch([]*raft.Log{entry})[0] }

// ApplyBatch applies entries and publishes one view for all of them.
func (f *fsm) ApplyBatch(entries []*raft.Log) []any {
	answers := make([]any, len(entries))
	for i, e := range entries {
		answers[i] = f.take(e)
	}
	f.publish()
	return answers
}

// Snapshot freezes the state. It refuses after a halt: raft would note it as containing entries that were not applied.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.halted(); err != nil {
		return nil, err
	}
	f.bytes.Store(0)
	return frozen{f.state.Freeze()}, nil
}

// Restore replaces the state by a snapshot.
func (f *fsm) Restore(file io.ReadCloser) error {
	defer file.Close()
	var readErr error
	s, err := state.Restore(func(yield func([]byte) bool) {
		r := bufio.NewReaderSize(file, 64<<10)
		for {
			line, err := r.ReadBytes('\n')
			if len(line) > 0 && !yield(line) {
				return
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					readErr = err
				}
				return
			}
		}
	})
	if readErr != nil {
		return fmt.Errorf("read the snapshot: %w", readErr)
	}
	if err != nil {
		return err
	}
	f.state, f.applied = s, s.View().Index
	f.halt.Store(nil)
	f.bytes.Store(0)
	f.publish()
	return nil
}

// frozen writes a snapshot while entries go on being applied.
type frozen struct{ *state.Snapshot }

func (s frozen) Persist(sink raft.SnapshotSink) error {
	for line := range s.Lines() {
		if _, err := sink.Write(append(line, '\n')); err != nil {
			return errors.Join(err, sink.Cancel())
		}
	}
	return sink.Close()
}

func (frozen) Release() {}
