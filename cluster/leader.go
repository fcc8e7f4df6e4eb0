package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// collectEvery is how often the log is freed of what nothing names any more.
const collectEvery = 10 * time.Minute

// leader is the work of one term. Its loop owns its fields.
type leader struct {
	*Node
	term    uint64
	intakes map[string]*intake // by source: the newest revision, rendered and reviewed
	follows []Source
	looked  uint64    // index up to which changes of sources were seen
	judged  time.Time // when all verdicts were made, or made again; zero = not in this term yet

	decided uint64               // index up to which all stacks were decided
	wakes   map[string]time.Time // log time at which a stack is to be decided again
}

func newLeader(n *Node, term uint64) *leader {
	return &leader{Node: n, term: term, intakes: map[string]*intake{}, wakes: map[string]time.Time{}}
}

// run registers the node, follows the sources and decides, until the term ends.
func (l *leader) run(ctx context.Context) error {
	if err := l.register(ctx); err != nil {
		return fmt.Errorf("register the node: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := l.recall(ctx); err != nil {
			return err
		}
		return l.cfg.Sources.Run(ctx, l.tip)
	})
	g.Go(func() error { return l.loop(ctx) })
	return g.Wait()
}

// loop is the one place where decisions are made and proposed.
func (l *leader) loop(ctx context.Context) error {
	wake := time.NewTimer(0)
	defer wake.Stop()
	collect := time.NewTicker(collectEvery)
	defer collect.Stop()
	for {
		if err := l.follow(); err != nil {
			return err
		}
		if at := l.renewal(); !at.IsZero() && !l.cfg.Now().Before(at) {
			if err := l.renew(ctx); err != nil {
				return err
			}
		}
		view := l.View()
		moved, err := l.decide(ctx, view)
		if err != nil {
			return err
		}
		if moved {
			continue
		}
		if next := l.nextWake(); next > 0 {
			wake.Reset(next)
		} else {
			wake.Stop()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.Changed(view.Index):
		case <-wake.C:
		case f := <-l.requests:
			f(l)
		case <-collect.C:
			if err := l.tidy(ctx); err != nil {
				return err
			}
		}
	}
}

// tidy does what has time: it frees what nothing names any more, in the log and on disk.
func (l *leader) tidy(ctx context.Context) error {
	view := l.View()
	plan := reconcile.Collect(view)
	if err := l.proposePlan(ctx, &plan, view); err != nil {
		return err
	}
	if err := l.cfg.Sources.Tidy(); err != nil {
		l.log.Warn("remove old checkouts", "err", err)
	}
	if n, err := l.cfg.Blobs.GC(l.wantedBlobs(), blobGrace); err != nil {
		l.log.Warn("remove unused repository files", "err", err)
	} else if n > 0 {
		l.log.Debug("removed unused repository files", "count", n)
	}
	return nil
}

// blobGrace protects the files of a revision that is about to be proposed.
const blobGrace = time.Hour

// wantedBlobs are the digests of all files that kept releases mount, those inside of directories too.
func (n *Node) wantedBlobs() map[string]bool {
	keep := map[string]bool{}
	for _, digest := range reconcile.Blobs(n.View()) {
		keep[digest] = true
		entries, err := n.cfg.Blobs.ReadListing(digest)
		if err != nil {
			continue // a file, not a directory
		}
		for _, e := range entries {
			keep[e.Digest] = true
		}
	}
	return keep
}

// nextWake is the wait until the first stack is to be decided again, or verdicts are to be made again; 0 = neither.
func (l *leader) nextWake() time.Duration {
	var waits []time.Duration
	if at := l.renewal(); !at.IsZero() {
		waits = append(waits, at.Sub(l.cfg.Now()))
	}
	if len(l.wakes) > 0 {
		waits = append(waits, slices.MinFunc(slices.Collect(maps.Values(l.wakes)), time.Time.Compare).Sub(l.cfg.Store.Now()))
	}
	if len(waits) == 0 {
		return 0
	}
	return max(slices.Min(waits), time.Millisecond)
}

// decide asks for a plan for the stacks that something changed for, or whose time came, and proposes it. It says whether the log moved.
func (l *leader) decide(ctx context.Context, view *state.View) (bool, error) {
	now := l.now()
	names := reconcile.Due(view, l.decided, l.wakes, now.Log)
	l.decided = view.Index
	if len(names) == 0 {
		return false, nil
	}
	plan := reconcile.DecideStacks(view, names, now)
	for _, name := range names {
		delete(l.wakes, name)
	}
	maps.Copy(l.wakes, plan.Wakes)
	if plan.Empty() {
		return false, nil
	}
	return true, l.proposePlan(ctx, &plan, view)
}

// proposePlan puts a plan into the log. Items that were refused are decided again: the view has moved.
func (l *leader) proposePlan(ctx context.Context, plan *reconcile.Plan, view *state.View) error {
	for _, s := range plan.Steps {
		l.log.Info("plan", "action", string(s.Action), "source", s.Source, "stack", s.Stack, "service", s.Service, "task", s.Task, "revision", s.Revision.String(), "reason", s.Reason.ID, "message", s.Reason.Message)
	}
	for _, cmd := range plan.Commands(l.term, view.Index, l.now()) {
		if _, err := l.propose(ctx, cmd); err != nil && !errors.Is(err, errRefused) {
			return fmt.Errorf("propose a plan: %w", err)
		}
	}
	return nil
}

// follow hands the sources of the log to those who watch them, when they changed.
func (l *leader) follow() error {
	view := l.View()
	if l.looked > 0 {
		sources, whole := view.Since(l.looked, "sources")
		secrets, _ := view.Since(l.looked, "secrets")
		if whole && len(sources)+len(secrets) == 0 {
			l.looked = view.Index
			return nil
		}
	}
	l.looked = view.Index
	var want []Source
	for _, s := range view.Sources.All() {
		if s.Value.Removing {
			continue
		}
		src, err := l.source(s.Value)
		if err != nil {
			l.log.Error("open the credentials of a source", "source", s.Value.Name, "err", err)
			continue
		}
		want = append(want, src)
	}
	if reflect.DeepEqual(want, l.follows) {
		return nil
	}
	if err := l.cfg.Sources.Follow(want); err != nil {
		return fmt.Errorf("follow the sources: %w", err)
	}
	l.follows = want
	return nil
}

// source adds the credentials to a source and leaves out what only tells of its progress, so that two can be compared.
func (n *Node) source(s state.Source) (Source, error) {
	src := Source{Source: state.Source{Name: s.Name, URL: s.URL, Branch: s.Branch, Tag: s.Tag, Path: s.Path, Interval: s.Interval, Verify: s.Verify, Signers: s.Signers, Known: s.Known, Auth: s.Auth, Policy: s.Policy}}
	if s.Auth == "" {
		return src, nil
	}
	return src, n.openCredentials(s.Auth, &src.Credentials)
}

// register writes the cluster's and the node's objects where they are missing or differ, and the sources of the first start.
func (l *leader) register(ctx context.Context) error {
	v := l.View()
	var items []state.Item
	if _, ok := v.Clusters.Get("cluster"); !ok {
		items = append(items, state.Item{state.Put("cluster", 0, l.cfg.Cluster)})
	}
	e, ok := v.Nodes.Get(l.cfg.ID)
	record := l.cfg.Record
	if ok {
		record.Block = e.Value.Block // once chosen, for ever: addresses of tasks are in it
		record.Booted = e.Value.Booted
		if e.Value.Boot != "" && e.Value.Boot != record.Boot {
			record.Booted = l.now().Log
		}
	}
	if !ok || !reflect.DeepEqual(e.Value, record) {
		items = append(items, state.Item{state.Put(l.cfg.ID, e.Version, record)})
	}
	if len(items) > 0 {
		if _, err := l.propose(ctx, state.Command{Term: l.term, Actor: "node/" + l.cfg.ID, Items: items}); err != nil {
			return err
		}
	}
	if err := l.hashKey(ctx); err != nil {
		return err
	}
	for _, src := range l.cfg.Initial {
		if _, ok := l.View().Sources.Get(src.Name); ok {
			continue
		}
		if err := l.addSource(ctx, src, "first start"); err != nil {
			return err
		}
	}
	return nil
}
