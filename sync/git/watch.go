package git

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Event is what a Watcher tells about one source.
type Event struct {
	Spec    Spec
	Tip     Tip   // what the ref points to; zero with Err
	Changed bool  // the tip is not the one that was delivered last (true for the first one)
	Err     error // of type *Error: the look failed, and is tried again with backoff
}

// WatchConfig configures a Watcher.
type WatchConfig struct {
	Interval time.Duration // between two looks at one repository, give or take a tenth; 30 s if zero
	MaxWait  time.Duration // the longest wait after failures; 5 min if zero
	Limits   Limits        // Time and the sizes of what is read
	// Deliver is told of a new tip, of a failed look, and after a Trigger also of a tip that is not
	// new. It is called from one goroutine per repository, so what it does for one repository holds
	// up no other. An error means that the event could not be used: the same tip is delivered again,
	// with backoff.
	Deliver func(context.Context, Event) error
	Logger  *slog.Logger // nil: silent
}

// Watcher looks at the repositories of a set of sources once per interval, and early when it is
// triggered or when the refs of a local repository change. Sources with the same URL and credentials
// share one look.
type Watcher struct {
	conf WatchConfig
	set  chan struct{} // wakes Run after Set

	mu     sync.Mutex
	groups map[string]*group // by Spec.pollKey
	specs  map[string][]Spec
}

// NewWatcher returns a Watcher without sources; nothing runs before Run.
func NewWatcher(c WatchConfig) *Watcher {
	if c.Interval <= 0 {
		c.Interval = 30 * time.Second
	}
	if c.MaxWait <= 0 {
		c.MaxWait = 5 * time.Minute
	}
	c.Limits = c.Limits.withDefaults()
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Watcher{conf: c, set: make(chan struct{}, 1), groups: map[string]*group{}, specs: map[string][]Spec{}}
}

// Set replaces the sources that are watched. It may be called before Run and while it runs. It fails,
// and changes nothing, when a Spec is not usable or two have the same name.
func (w *Watcher) Set(specs []Spec) error {
	next := map[string][]Spec{}
	names := map[string]bool{}
	for _, s := range specs {
		if err := s.Check(); err != nil {
			return err
		}
		if names[s.Name] {
			return fail(InvalidSource, "two sources have the name "+printable(s.Name, 100), "rename one")
		}
		names[s.Name] = true
		key := s.pollKey()
		next[key] = append(next[key], s)
	}
	w.mu.Lock()
	w.specs = next
	for key, g := range w.groups {
		g.setSpecs(next[key])
	}
	w.mu.Unlock()
	select {
	case w.set <- struct{}{}:
	default:
	}
	return nil
}

// Trigger asks for an early look at the sources that match; nil matches all. It returns how many
// matched and does not wait. Many triggers during one look are one more look.
func (w *Watcher) Trigger(match func(Spec) bool) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for key, specs := range w.specs {
		hit := 0
		for _, s := range specs {
			if match == nil || match(s) {
				hit++
			}
		}
		if hit > 0 && w.groups[key] != nil {
			w.groups[key].wake()
		}
		n += hit
	}
	return n
}

// Run looks and delivers until ctx ends, and returns nil when all it started has ended.
func (w *Watcher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	stops := map[string]context.CancelFunc{}
	for {
		w.mu.Lock()
		for key := range stops {
			if _, ok := w.specs[key]; !ok {
				stops[key]()
				delete(stops, key)
				delete(w.groups, key)
			}
		}
		for key, specs := range w.specs {
			if _, ok := stops[key]; ok {
				continue
			}
			g := &group{conf: w.conf, specs: specs, early: make(chan struct{}, 1), changed: make(chan struct{}, 1), delivered: map[string]delivery{}}
			gctx, stop := context.WithCancel(ctx)
			w.groups[key], stops[key] = g, stop
			wg.Go(func() { g.run(gctx) })
		}
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			w.mu.Lock()
			for key, stop := range stops {
				stop()
				delete(w.groups, key)
			}
			w.mu.Unlock()
			wg.Wait()
			return nil
		case <-w.set:
		}
	}
}

// group is one repository and the sources that read it.
type group struct {
	conf    WatchConfig
	early   chan struct{} // a trigger
	changed chan struct{} // the set of sources changed

	mu    sync.Mutex
	specs []Spec

	// Only run's goroutine uses these.
	delivered map[string]delivery
	failures  int
}

// delivery is what was told last about a source, by name.
type delivery struct {
	ref string // what it followed: with another ref it is told afresh
	tip Tip
}

func (g *group) setSpecs(specs []Spec) {
	g.mu.Lock()
	g.specs = specs
	g.mu.Unlock()
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

func (g *group) current() []Spec {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.specs
}

func (g *group) wake() {
	select {
	case g.early <- struct{}{}:
	default:
	}
}

func (g *group) run(ctx context.Context) {
	refs := g.watchRefs()
	defer func() { refs.close() }()
	// The first look is at once; later ones spread, so that many sources do not ask in step.
	timer := time.NewTimer(0)
	defer timer.Stop()
	var looked time.Time
	for {
		triggered := false
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-g.changed:
		case <-g.early:
			triggered = true
		case e := <-refs.events():
			if strings.HasSuffix(e.Name, ".lock") {
				continue // a ref is about to change; the lock is renamed when it has
			}
			if time.Since(looked) < settleTime && !refs.settle(ctx) {
				return
			}
		case err := <-refs.errors():
			g.conf.Logger.Info("file notification failed, looking anyway", "error", err)
		}
		if g.look(ctx, triggered) {
			g.failures = 0
		} else {
			g.failures++
		}
		if ctx.Err() != nil {
			return
		}
		looked = time.Now()
		if refs == nil {
			refs = g.watchRefs() // the repository may have appeared
		}
		refs.refresh(g.current())
		timer.Reset(g.wait())
	}
}

// interval is the shortest that a source of the group asks for.
func (g *group) interval() time.Duration {
	var d time.Duration
	for _, s := range g.current() {
		if own := cmp.Or(s.Interval, g.conf.Interval); d == 0 || own < d {
			d = own
		}
	}
	return cmp.Or(d, g.conf.Interval)
}

// wait is the interval, doubled for each failure in a row up to MaxWait, with a tenth of jitter either way.
func (g *group) wait() time.Duration {
	interval := g.interval()
	d := interval
	for range min(g.failures, 30) {
		if d *= 2; d >= g.conf.MaxWait {
			d = max(g.conf.MaxWait, interval)
			break
		}
	}
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}

// look asks the repository once and tells every source that has news. It reports whether all went well.
func (g *group) look(ctx context.Context, triggered bool) bool {
	specs := g.current()
	if len(specs) == 0 {
		return true
	}
	look, cancel := context.WithTimeout(ctx, g.conf.Limits.Time)
	defer cancel()
	var a *advert
	loc, err := specs[0].location()
	if err == nil {
		a, err = lookup(look, specs[0], loc, g.conf.Limits)
	}
	if ctx.Err() != nil {
		return true
	}
	good := err == nil
	for _, spec := range specs {
		ev := Event{Spec: spec}
		if ev.Err = err; err == nil {
			ev.Tip, ev.Err = a.tip(spec)
		}
		last := g.delivered[spec.Name]
		if ev.Err != nil {
			ev.Err = explain(look, "look at "+spec.String(), Unreachable, ev.Err, spec.secrets())
			good = false
			g.conf.Logger.Warn("source can't be read", "source", spec.Name, "error", ev.Err.Error(), "failures", g.failures+1)
		} else {
			ev.Changed = last.tip != ev.Tip || last.ref != spec.refName()
			if !ev.Changed && !triggered {
				continue
			}
		}
		if err := g.conf.Deliver(ctx, ev); err != nil {
			delete(g.delivered, spec.Name)
			good = false
			continue
		}
		if ev.Err == nil {
			g.delivered[spec.Name] = delivery{ref: spec.refName(), tip: ev.Tip}
		} else {
			// After a failure the tip is told again, so that whoever showed the failure can take it back.
			delete(g.delivered, spec.Name)
		}
	}
	return good
}

// refWatch watches the directories of a local repository's refs. Directories and not files: Git
// replaces a ref by renaming a new file over it, which a watch on the old file does not see.
type refWatch struct {
	w      *fsnotify.Watcher
	gitdir string
	seen   map[string]bool
}

// watchRefs returns nil for a remote repository, or when watching is not possible; polling goes on anyway.
func (g *group) watchRefs() *refWatch {
	specs := g.current()
	if len(specs) == 0 {
		return nil
	}
	loc, err := specs[0].location()
	if err != nil || loc.scheme != schemeLocal {
		return nil
	}
	dir, err := gitDir(loc.path)
	if err != nil {
		return nil // may appear later; polling finds it
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		g.conf.Logger.Info("no file notification, only polling", "source", specs[0].Name, "error", err)
		return nil
	}
	r := &refWatch{w: w, gitdir: dir, seen: map[string]bool{}}
	r.refresh(specs)
	return r
}

// refresh adds the directories that the followed refs lie in, as far as they exist: a directory of
// refs comes and goes with its refs.
func (r *refWatch) refresh(specs []Spec) {
	if r == nil {
		return
	}
	var refs []string
	for _, s := range specs {
		if name := s.refName(); name != "" {
			refs = append(refs, name)
		}
	}
	if head, err := os.ReadFile(filepath.Join(r.gitdir, "HEAD")); err == nil {
		if name, ok := strings.CutPrefix(strings.TrimSpace(string(head)), "ref: "); ok && badRefName(name) == "" {
			refs = append(refs, name)
		}
	}
	now := map[string]bool{}
	for _, dir := range refDirs(r.gitdir, refs) {
		if st, err := os.Lstat(dir); err == nil && st.IsDir() {
			now[dir] = true
			if !r.seen[dir] && r.w.Add(dir) != nil {
				delete(now, dir) // out of watches; polling finds the change
			}
		}
	}
	r.seen = now
}

func (r *refWatch) events() <-chan fsnotify.Event {
	if r == nil {
		return nil
	}
	return r.w.Events
}

// settleTime is how long a repository that changed a moment ago must be quiet before it is looked at once more. The first change of a ref is
// looked at as it comes: it is whole, since Git renames a ref into its place after all that it names is there.
const settleTime = 50 * time.Millisecond

// settle swallows the events that follow each other closely: a push may move many refs. It reports whether ctx goes on.
func (r *refWatch) settle(ctx context.Context) bool {
	quiet := time.NewTimer(settleTime)
	defer quiet.Stop()
	for n := 0; n < 1000; n++ {
		select {
		case <-ctx.Done():
			return false
		case <-quiet.C:
			return true
		case _, ok := <-r.w.Events:
			if !ok {
				return true
			}
		case err := <-r.w.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				return true
			}
		}
	}
	return true
}

func (r *refWatch) errors() <-chan error {
	if r == nil {
		return nil
	}
	return r.w.Errors
}

func (r *refWatch) close() {
	if r != nil {
		_ = r.w.Close()
	}
}
