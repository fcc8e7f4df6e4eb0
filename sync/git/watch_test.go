package git

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// watch runs a Watcher whose events arrive on a channel.
func watch(t *testing.T, conf WatchConfig, specs ...Spec) (*Watcher, <-chan Event) {
	t.Helper()
	events := make(chan Event, 1000)
	if conf.Deliver == nil {
		conf.Deliver = func(_ context.Context, e Event) error { events <- e; return nil }
	}
	w := NewWatcher(conf)
	if err := w.Set(specs); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w, events
}

func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(time.Minute):
		t.Fatal("no event")
		return Event{}
	}
}

func TestLocalPushIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	first := b.push(map[string]string{"a": "1"})
	_, events := watch(t, WatchConfig{Interval: 24 * time.Hour}, b.spec())
	if e := next(t, events); e.Err != nil || e.Tip.Commit != first || !e.Changed {
		t.Fatalf("first: %+v", e)
	}
	for i := range 3 {
		id := b.push(map[string]string{"a": fmt.Sprint("push ", i)})
		if i == 1 {
			b.run("", "pack-refs", "--all") // the ref's file goes, its directory may too
		}
		for {
			if e := next(t, events); e.Err == nil && e.Tip.Commit == id {
				break
			}
		}
		if i == 1 {
			b.ref("refs/heads/main", id)
		}
	}
}

func TestOneLookForSourcesThatShareARepository(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"x/a": "1", "y/a": "1"})
	b.ref("refs/heads/dev", b.commit(map[string]string{"a": "dev"}))
	var requests []string
	url, ca := tlsServer(t, gitHTTP(b, &requests))
	spec := Spec{URL: url + "/repo.git", Auth: Auth{Token: canary, CA: ca}}
	one, two, three := spec, spec, spec
	one.Name, two.Name, three.Name = "one", "two", "three"
	one.Path, two.Path, three.Branch = "x", "y", "dev"
	w, events := watch(t, WatchConfig{Interval: 24 * time.Hour}, one, two, three)
	got := map[string]string{}
	for range 3 {
		e := next(t, events)
		got[e.Spec.Name] = e.Tip.Ref
	}
	if got["one"] != "main" || got["two"] != "main" || got["three"] != "dev" {
		t.Errorf("got %v", got)
	}
	if n := w.Trigger(func(s Spec) bool { return s.Name == "two" }); n != 1 {
		t.Errorf("%d sources matched", n)
	}
	for range 3 {
		if e := next(t, events); e.Changed || e.Err != nil {
			t.Errorf("after a trigger without news: %+v", e)
		}
	}
	if len(requests) != 2 {
		t.Errorf("requests: %q", requests)
	}
}

func TestFailedLooksAreToldAndRecovered(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	_, events := watch(t, WatchConfig{Interval: time.Millisecond, MaxWait: 5 * time.Millisecond}, b.spec())
	if e := next(t, events); !errors.Is(e.Err, EmptyRepository) || !strings.HasPrefix(e.Err.Error(), "look at shop@HEAD: ") {
		t.Fatalf("got %+v", e)
	}
	id := b.push(map[string]string{"a": "1"})
	for {
		if e := next(t, events); e.Err == nil {
			if e.Tip.Commit != id || !e.Changed {
				t.Fatalf("got %+v", e)
			}
			return
		}
	}
}

func TestRefusedDeliveryIsRepeated(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	id := b.push(map[string]string{"a": "1"})
	calls := make(chan Event, 100)
	n := 0
	w, _ := watch(t, WatchConfig{Interval: time.Millisecond, MaxWait: 5 * time.Millisecond, Deliver: func(_ context.Context, e Event) error {
		n++
		calls <- e
		if n < 3 {
			return errors.New("not now")
		}
		return nil
	}}, b.spec())
	for range 3 {
		if e := next(t, calls); e.Tip.Commit != id || !e.Changed {
			t.Fatalf("got %+v", e)
		}
	}
	// Taken at last: only a trigger brings it again, and as one that is not new.
	w.Trigger(nil)
	if e := next(t, calls); e.Changed {
		t.Errorf("told again as new: %+v", e)
	}
}

func TestSetChangesWhatIsWatched(t *testing.T) {
	t.Parallel()
	b, other := newRepo(t), newRepo(t)
	b.push(map[string]string{"a": "1"})
	dev := b.ref("refs/heads/dev", b.commit(map[string]string{"a": "dev"}))
	id := other.push(map[string]string{"a": "other"})
	w, events := watch(t, WatchConfig{Interval: 24 * time.Hour}, b.spec())
	next(t, events)
	spec := b.spec()
	spec.Branch = "dev"
	if err := w.Set([]Spec{spec}); err != nil {
		t.Fatal(err)
	}
	if e := next(t, events); e.Tip.Commit != dev || !e.Changed {
		t.Errorf("another branch: %+v", e)
	}
	second := other.spec()
	second.Name = "other"
	if err := w.Set([]Spec{second}); err != nil {
		t.Fatal(err)
	}
	for {
		if e := next(t, events); e.Spec.Name == "other" {
			if e.Tip.Commit != id {
				t.Errorf("another source: %+v", e)
			}
			break
		}
	}
	if n := w.Trigger(nil); n != 1 {
		t.Errorf("%d sources are watched", n)
	}
	if err := w.Set([]Spec{spec, spec}); !errors.Is(err, InvalidSource) || !strings.Contains(err.Error(), "two sources have the name shop") {
		t.Errorf("same name twice: %v", err)
	}
	if err := w.Set([]Spec{{Name: "bad", URL: "-x"}}); !errors.Is(err, InvalidSource) {
		t.Errorf("bad spec: %v", err)
	}
}

func TestBackoffGrowsToItsBound(t *testing.T) {
	t.Parallel()
	g := &group{conf: WatchConfig{Interval: 30 * time.Second, MaxWait: 5 * time.Minute}}
	for failures, want := range []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 5 * time.Minute, 5 * time.Minute} {
		g.failures = failures
		for range 100 {
			if d := g.wait(); d < want*9/10 || d > want*11/10 {
				t.Errorf("after %d failures: %v, want about %v", failures, d, want)
			}
		}
	}
}

// Each source has its interval; of those that read one repository the shortest counts, and of those without one the watcher's.
func TestIntervalOfASource(t *testing.T) {
	t.Parallel()
	g := &group{conf: WatchConfig{Interval: 30 * time.Second, MaxWait: 5 * time.Minute}, changed: make(chan struct{}, 1)}
	for _, c := range []struct{ own, other, want time.Duration }{
		{0, 0, 30 * time.Second}, {time.Hour, time.Minute, time.Minute}, {time.Hour, 0, 30 * time.Second}, {time.Second, 0, time.Second},
	} {
		g.setSpecs([]Spec{{Interval: c.own}, {Interval: c.other}})
		if d := g.wait(); d < c.want*9/10 || d > c.want*11/10 {
			t.Errorf("intervals %v and %v: a wait of %v, want about %v", c.own, c.other, d, c.want)
		}
	}
}

// Who showed that a source can't be read is told when it can be read again, news or not.
func TestTipIsToldAgainAfterAFailure(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	id := b.push(map[string]string{"a": "1"})
	w, events := watch(t, WatchConfig{Interval: time.Millisecond, MaxWait: 5 * time.Millisecond}, b.spec())
	next(t, events)
	hidden := b.Dir + ".hidden"
	if err := os.Rename(b.Dir, hidden); err != nil {
		t.Fatal(err)
	}
	w.Trigger(nil)
	for {
		if e := next(t, events); errors.Is(e.Err, RepositoryNotFound) {
			break
		}
	}
	if err := os.Rename(hidden, b.Dir); err != nil {
		t.Fatal(err)
	}
	for {
		if e := next(t, events); e.Err == nil {
			if e.Tip.Commit != id || !e.Changed {
				t.Errorf("got %+v", e)
			}
			return
		}
	}
}
