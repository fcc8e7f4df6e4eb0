package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is a store and what ends its Run.
type running struct {
	*Store
	t    testing.TB
	stop func()
}

func start(t testing.TB, opts Options) *running {
	t.Helper()
	if opts.ID == "" {
		opts.ID = "n1"
	}
	s, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r := &running{Store: s, t: t}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// until waits for a condition, and fails the test when it does not come true in time.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for tick := time.NewTicker(2 * time.Millisecond); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func event(n int) state.Command {
	what := state.Event{Kind: "test", Actor: fmt.Sprint(n), Reason: state.Reason{ID: "x", Message: strings.Repeat("m", 300)}}
	return state.Command{Request: fmt.Sprint("r", n), Items: []state.Item{{state.Set(fmt.Sprintf("%08d", n%300), what)}}}
}

func (r *running) put(n int) state.Result {
	r.t.Helper()
	res, err := r.Propose(context.Background(), event(n))
	if err != nil {
		r.t.Fatal(err)
	}
	return res
}

func TestALoneServerLeadsAndKeepsItsFacts(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Options{Dir: dir})
	begun := time.Now()
	until(t, "it leads", func() bool { _, ok := s.Leading(); return ok })
	t.Logf("elected after %s", time.Since(begun))
	changed := s.Changed(s.View().Index)
	for n := range 100 {
		if res := s.put(n); len(res.Refused) != 0 || res.Stale || res.Again {
			t.Fatalf("result %+v", res)
		}
	}
	<-changed
	want, index := s.View().Hash(), s.View().Index
	if _, err := Open(Options{Dir: dir, ID: "n1"}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second process on the directory: %v", err)
	}
	s.stop()
	if _, err := s.Propose(context.Background(), event(1)); !errors.Is(err, ErrNoQuorum) {
		t.Errorf("a store that has ended answers %v", err)
	}

	s = start(t, Options{Dir: dir})
	// All but the last batch are there before raft runs.
	if v := s.View(); v.Index < index-1 {
		t.Errorf("opened at %d, was at %d", v.Index, index)
	}
	until(t, "all entries are applied", func() bool { return s.View().Index >= index })
	if got := s.View().Hash(); got != want {
		t.Errorf("hash %s after a restart, was %s", got, want)
	}
	if servers, err := s.Servers(); err != nil || len(servers) != 1 || servers[0] != (Server{ID: "n1", Address: "n1", Voter: true}) {
		t.Errorf("servers: %v, %v", servers, err)
	}
}

func TestARepeatedRequestIsAppliedOnce(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Options{Dir: dir})
	first := s.put(7)
	before := s.View().Hash()
	again := s.put(7)
	if !again.Again || again.Index != first.Index || s.View().Hash() != before {
		t.Errorf("first %+v, again %+v", first, again)
	}
	s.stop()
	s = start(t, Options{Dir: dir})
	if again := s.put(7); !again.Again || again.Index != first.Index {
		t.Errorf("after a restart %+v", again)
	}
}

func TestACommandOfAnotherTermChangesNothing(t *testing.T) {
	s := start(t, Options{Dir: t.TempDir()})
	until(t, "it leads", func() bool { _, ok := s.Leading(); return ok })
	term, _ := s.Leading()
	cmd := event(1)
	cmd.Term = term + 1
	if res, err := s.Propose(context.Background(), cmd); err != nil || !res.Stale || s.View().Events.Len() != 0 {
		t.Errorf("%+v, %v, %d events", res, err, s.View().Events.Len())
	}
	cmd.Term = term
	if res, err := s.Propose(context.Background(), cmd); err != nil || res.Stale || s.View().Events.Len() != 1 {
		t.Errorf("%+v, %v, %d events", res, err, s.View().Events.Len())
	}
}

// Snapshots keep the log short, and a start from a snapshot gives the same facts.
func TestTheLogStaysBounded(t *testing.T) {
	dir := t.TempDir()
	opts := Options{Dir: dir, SnapshotEntries: 50}
	s := start(t, opts)
	for n := range 500 {
		s.put(n)
	}
	until(t, "old entries are removed", func() bool { first, last := s.logs.bounds(); return last-first < 200 && first > 1 })
	list, err := s.snaps.List()
	if err != nil || len(list) != keepSnapshots {
		t.Fatalf("%d snapshots, %v", len(list), err)
	}
	want, index := s.View().Hash(), s.View().Index
	s.stop()
	for _, newest := range []bool{false, true} {
		if newest { // it is damaged: the one before and the log still have everything
			if list, err = s.snaps.List(); err != nil {
				t.Fatal(err)
			}
			damage(t, filepath.Join(dir, "snapshots", list[0].ID, "state.bin"))
		}
		s = start(t, opts)
		until(t, "all entries are applied", func() bool { return s.View().Index >= index })
		if got := s.View().Hash(); got != want {
			t.Errorf("hash %s after a restart, was %s", got, want)
		}
		s.stop()
	}
	aside, err := filepath.Glob(filepath.Join(dir, "damaged-*"))
	if err != nil || len(aside) != 1 {
		t.Errorf("put aside: %v, %v", aside, err)
	}
	snaps, err := filepath.Glob(filepath.Join(dir, "snapshots", "*", "state.bin"))
	if err != nil || len(snaps) == 0 {
		t.Fatal(err)
	}
	for _, p := range snaps {
		damage(t, p)
	}
	if _, err := Open(Options{Dir: dir, ID: "n1"}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "put back a copy") {
		t.Errorf("all snapshots damaged: %v", err)
	}
}

func damage(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// An entry that is not understood ends applying, on this start and on the next ones; the facts so far stay readable.
func TestAnEntryOfTheFutureHalts(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Options{Dir: dir, SnapshotEntries: 3})
	s.put(1)
	want := s.View()
	r := s.raft.Load()
	if err := r.Apply([]byte(`{"format":99,"at":"2030-01-01T00:00:00Z","items":[]}`), time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	// As if a leader of a newer build had written it: this one's own commands come after.
	if err := r.Apply([]byte(`{"format":1,"at":"2030-01-01T00:00:00Z","items":[]}`), time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		until(t, "it halts", func() bool { return s.Halted() != nil })
		_, err := s.Propose(context.Background(), event(2))
		if !errors.Is(err, ErrHalted) || !errors.Is(err, state.ErrHalt) || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("start %d: propose: %v", n, err)
		}
		if v := s.View(); v.Index != want.Index || v.Hash() != want.Hash() {
			t.Errorf("start %d: view at %d, want %d", n, v.Index, want.Index)
		}
		s.stop()
		if n == 0 {
			s = start(t, Options{Dir: dir, SnapshotEntries: 3})
		}
	}
}

// Log time goes on from the last stamp: neither time without a leader nor a wrong clock counts.
func TestLogTimeIgnoresTheWallClock(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	clock := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	now := func() time.Time { mu.Lock(); defer mu.Unlock(); return clock }
	set := func(at time.Time) { mu.Lock(); defer mu.Unlock(); clock = at }
	lead := func() *running {
		s := start(t, Options{Dir: dir, Now: now})
		until(t, "it leads", func() bool { _, ok := s.Leading(); return ok })
		return s
	}
	s := lead()
	if got := s.Now(); !got.Equal(clock) {
		t.Errorf("a new log begins at %s, want the clock's %s", got, clock)
	}
	set(clock.Add(time.Minute))
	s.put(1)
	at := s.View().At
	if !at.Equal(time.Date(2030, 1, 1, 0, 1, 0, 0, time.UTC)) {
		t.Errorf("stamp %s", at)
	}
	s.stop()
	if got := s.Now(); !got.Equal(at) {
		t.Errorf("without a leader log time is %s, want %s", got, at)
	}
	for _, jump := range []time.Duration{-time.Hour, 24 * time.Hour} {
		set(clock.Add(jump))
		s := lead()
		if got := s.Now(); !got.Equal(at) {
			t.Errorf("log time %s after a start with the clock %s off, want %s", got, jump, at)
		}
		set(clock.Add(5 * time.Second))
		s.put(2)
		at = at.Add(5 * time.Second)
		if got := s.Now(); !got.Equal(at) {
			t.Errorf("log time %s 5 s later, want %s", got, at)
		}
		s.put(int(3 + jump.Hours()))
		s.stop()
	}
}

func TestNoWakeupIsLost(t *testing.T) {
	s := start(t, Options{Dir: t.TempDir()})
	var wg sync.WaitGroup
	defer wg.Wait()
	for range 4 {
		wg.Go(func() {
			for v := s.View(); v.Events.Len() < 200; v = s.View() {
				<-s.Changed(v.Index)
			}
		})
	}
	for n := range 200 {
		s.put(n)
	}
}

// On a full disk proposing fails in words, what is there stays whole, and it goes on when there is room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("needs root for a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	s := start(t, Options{Dir: dir})
	for n := range 20 {
		s.put(n)
	}
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	f.Close()
	n := 20
	for ; n < 5000; n++ {
		if _, err = s.Propose(context.Background(), event(n)); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrStorage) || !strings.Contains(err.Error(), "no space left") {
		t.Fatalf("on a full disk: %v", err)
	}
	index := s.View().Index
	// Each failure costs the leader its term. The elections that follow are written down all the same.
	term := s.raft.Load().CurrentTerm()
	until(t, "two more elections", func() bool {
		if _, err = s.Propose(context.Background(), event(n)); !errors.Is(err, ErrStorage) || !strings.Contains(err.Error(), "make room") {
			t.Fatalf("later: %v", err)
		}
		return s.raft.Load().CurrentTerm() > term+1
	})
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	until(t, "it goes on", func() bool { _, err := s.Propose(context.Background(), event(n)); return err == nil })
	if s.View().Index <= index {
		t.Errorf("index %d, was %d", s.View().Index, index)
	}
	want := s.View().Hash()
	s.stop()
	s = start(t, Options{Dir: dir})
	until(t, "it leads", func() bool { _, ok := s.Leading(); return ok })
	if got := s.View().Hash(); got != want {
		t.Errorf("hash %s after a restart, was %s", got, want)
	}
	s.stop()
}

func TestOptionsAreChecked(t *testing.T) {
	if _, err := Open(Options{Dir: t.TempDir()}); err == nil {
		t.Error("opened without an id")
	}
	if _, err := Open(Options{Dir: t.TempDir(), ID: "n1", Timing: Timing{Heartbeat: 1, Election: 1, Lease: 1}}); err == nil {
		t.Error("opened with a timing of nanoseconds")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Dir: file, ID: "n1"}); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("opened on a file: %v", err)
	}
	s, err := Open(Options{Dir: t.TempDir(), ID: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := s.Run(context.Background()); err == nil {
		t.Error("ran after Close")
	}
}

func BenchmarkPropose(b *testing.B) {
	for _, parallel := range []int{1, 100} {
		b.Run(fmt.Sprint(parallel), func(b *testing.B) {
			s := start(b, Options{Dir: b.TempDir()})
			s.put(0)
			work := make(chan int)
			var wg sync.WaitGroup
			for range parallel {
				wg.Go(func() {
					for n := range work {
						if _, err := s.Propose(context.Background(), event(n)); err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ResetTimer()
			for n := range b.N {
				work <- n + 1
			}
			close(work)
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
			if info, err := os.Stat(filepath.Join(s.opts.Dir, "log.db")); err == nil {
				b.ReportMetric(float64(info.Size())/(1<<20), "MiB-log")
			}
		})
	}
}
