package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/cluster"
	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/compose"
	"github.com/gitopsd/gitopsd/sync/git"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// sources joins Git and Compose to what package cluster asks of its sources.
type sources struct {
	store   *git.Store
	watcher *git.Watcher
	cluster string
	log     *slog.Logger

	loading sync.RWMutex // held for writing while checkouts are removed

	mu     sync.Mutex
	trees  map[string]string // by source: the tree that was loaded last
	tip    func(context.Context, cluster.Tip) error
	caches map[string]*compose.Cache // by source
	wrong  map[string]error          // why sources are not followed
	news   chan struct{}             // holds one when wrong is new
}

func newSources(dir, clusterName string, log *slog.Logger) (*sources, error) {
	store, err := git.Open(dir, git.Limits{})
	if err != nil {
		return nil, err
	}
	s := &sources{store: store, cluster: clusterName, log: log, caches: map[string]*compose.Cache{}, trees: map[string]string{}, news: make(chan struct{}, 1)}
	s.watcher = git.NewWatcher(git.WatchConfig{Deliver: s.delivered, Logger: log})
	return s, nil
}

func spec(src cluster.Source) git.Spec {
	return git.Spec{
		Name: src.Name, URL: src.URL, Branch: src.Branch, Tag: src.Tag, Path: src.Path, Interval: time.Duration(src.Interval),
		Auth: git.Auth{
			Username: src.Credentials.Username, Token: src.Credentials.Token, CA: src.Credentials.CA,
			PrivateKey: src.Credentials.PrivateKey, Passphrase: src.Credentials.Passphrase, KnownHosts: src.Known,
		},
		Verify: git.Verify{Mode: git.Mode(src.Verify), AllowedSigners: src.Signers, Keyring: src.Signers},
	}
}

// Run implements cluster.Sources.
func (s *sources) Run(ctx context.Context, tip func(context.Context, cluster.Tip) error) error {
	s.mu.Lock()
	s.tip = tip
	s.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.watcher.Run(ctx) })
	g.Go(func() error { return s.tellWrong(ctx) })
	return g.Wait()
}

func (s *sources) delivered(ctx context.Context, e git.Event) error {
	s.mu.Lock()
	tip := s.tip
	s.mu.Unlock()
	return tip(ctx, cluster.Tip{Source: e.Spec.Name, Revision: revision(e.Tip), Err: e.Err})
}

func revision(t git.Tip) manifest.Revision { return manifest.Revision{Ref: t.Ref, Commit: t.Commit} }

// Follow implements cluster.Sources. One that can't be followed is told as failing, and keeps the others from nothing.
func (s *sources) Follow(list []cluster.Source) error {
	var specs []git.Spec
	wrong := map[string]error{}
	for _, src := range list {
		sp := spec(src)
		if err := sp.Check(); err != nil {
			wrong[src.Name] = err
			continue
		}
		specs = append(specs, sp)
	}
	s.mu.Lock()
	s.wrong = wrong
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default:
	}
	return s.watcher.Set(specs)
}

// tellWrong tells of the sources that can't be followed, until ctx ends. What can't be told, as the node does not lead any more, is told again by the next that leads:
// it is the first to call Follow then.
func (s *sources) tellWrong(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.news:
		}
		s.mu.Lock()
		wrong, tip := s.wrong, s.tip
		s.mu.Unlock()
		for _, name := range slices.Sorted(maps.Keys(wrong)) {
			_ = tip(ctx, cluster.Tip{Source: name, Err: wrong[name]}) // it logs what it is told
		}
	}
}

// Trigger implements cluster.Sources.
func (s *sources) Trigger(source string) {
	s.watcher.Trigger(func(sp git.Spec) bool { return source == "" || sp.Name == source })
}

// Newest implements cluster.Sources.
func (s *sources) Newest(ctx context.Context, src cluster.Source) (manifest.Revision, error) {
	tip, err := s.store.Resolve(ctx, spec(src))
	return revision(tip), err
}

// Load implements cluster.Sources.
func (s *sources) Load(ctx context.Context, src cluster.Source, rev manifest.Revision) (*cluster.Loaded, error) {
	s.loading.RLock()
	defer s.loading.RUnlock()
	sp, tip := spec(src), git.Tip{Ref: rev.Ref, Commit: rev.Commit}
	preview := rev.Commit == ""
	if preview {
		var err error
		if tip, err = s.find(ctx, sp, rev.Ref); err != nil {
			return nil, err
		}
	}
	co, err := s.store.Fetch(ctx, sp, tip)
	if why, bad := unsigned(err); bad {
		return &cluster.Loaded{Bundle: &manifest.Bundle{Source: src.Name, Revision: revision(tip)}, Unsigned: why}, nil
	}
	if err != nil {
		return nil, err
	}
	if !preview {
		s.mu.Lock()
		s.trees[src.Name] = co.Tree
		s.mu.Unlock()
	}
	if src.Policy {
		return loadPolicy(src, co), nil
	}
	b, err := compose.Load(ctx, compose.Options{
		Root: co.Dir, Path: src.Path, Source: src.Name, Revision: manifest.Revision{Ref: co.Ref, Commit: co.Commit}, Cluster: s.cluster,
		Hash: co.Hash, Cache: s.cache(src.Name),
	})
	if err != nil {
		return nil, fmt.Errorf("render %s@%s: %w", src.Name, co.Ref, err)
	}
	for _, p := range co.Problems {
		b.Problems = append(b.Problems, manifest.Problem{Severity: manifest.Notice, Rule: "tree." + string(p.Kind), File: p.Path, Message: p.Text})
	}
	manifest.SortProblems(b.Problems)
	return &cluster.Loaded{Bundle: b, Read: func(ref manifest.BlobRef) ([]byte, error) {
		if ref.Data != nil {
			return ref.Data, nil
		}
		root, err := os.OpenRoot(co.Dir)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		return root.ReadFile(filepath.FromSlash(ref.Path))
	}}, nil
}

// loadPolicy reads a policy source. What is wrong with it is a problem of its revision.
func loadPolicy(src cluster.Source, co *git.Checkout) *cluster.Loaded {
	b := &manifest.Bundle{Source: src.Name, Revision: manifest.Revision{Ref: co.Ref, Commit: co.Commit}}
	root, err := os.OpenRoot(filepath.Join(co.Dir, filepath.FromSlash(src.Path)))
	if err == nil {
		defer root.Close()
		var rules policy.Source
		if rules, err = policy.LoadSource(root.FS()); err == nil {
			return &cluster.Loaded{Bundle: b, Policy: rules}
		}
	}
	b.Problems = policy.Problems(reconcile.ReasonBadPolicy, err)
	return &cluster.Loaded{Bundle: b}
}

var fullCommit = regexp.MustCompile(`^[0-9a-f]{40}$`)

// find resolves what a person wants to see: a branch, a tag, a full ref as refs/pull/7/head, or the full id of a commit; "" is what the source follows.
func (s *sources) find(ctx context.Context, sp git.Spec, ref string) (git.Tip, error) {
	switch {
	case ref == "":
		return s.store.Resolve(ctx, sp)
	case fullCommit.MatchString(ref):
		return git.Tip{Commit: ref}, nil
	}
	branch, tag := sp, sp
	branch.Branch, branch.Tag = ref, ""
	tag.Branch, tag.Tag = "", ref
	tip, err := s.store.Resolve(ctx, branch)
	if errors.Is(err, git.RefNotFound) && !strings.HasPrefix(ref, "refs/") {
		if t, terr := s.store.Resolve(ctx, tag); terr == nil {
			return t, nil
		}
	}
	return tip, err
}

// Tidy implements cluster.Sources: of each source, the checkout that was loaded last stays.
func (s *sources) Tidy() error {
	s.loading.Lock()
	defer s.loading.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store.Prune(slices.Sorted(maps.Values(s.trees)))
}

// unsigned says whether a commit was refused for its signature.
func unsigned(err error) (*state.Reason, bool) {
	for _, r := range []git.Reason{git.Unsigned, git.UnknownSigner, git.BadSignature} {
		if errors.Is(err, r) {
			return &state.Reason{ID: reconcile.ReasonUnsigned, Message: err.Error()}, true
		}
	}
	return nil, false
}

// rendered counts the stacks that were rendered so far.
func (s *sources) rendered() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.caches {
		n += c.Stats().Rendered
	}
	return n
}

func (s *sources) cache(source string) *compose.Cache {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.caches[source]
	if c == nil {
		c = &compose.Cache{}
		s.caches[source] = c
	}
	return c
}

// Relation implements cluster.Sources. What can't be told is treated like a rewind: a person looks.
func (s *sources) Relation(ctx context.Context, src cluster.Source, earlier, commit string) (reconcile.Relation, error) {
	r, err := s.store.Relation(ctx, spec(src), earlier, commit)
	if err != nil {
		return "", err
	}
	switch r {
	case git.Same:
		return reconcile.RelationSame, nil
	case git.Forward:
		return reconcile.RelationForward, nil
	case git.Diverged:
		return reconcile.RelationDiverged, nil
	}
	return reconcile.RelationRewind, nil
}

// Test implements cluster.Sources.
func (s *sources) Test(ctx context.Context, src cluster.Source) (api.SourceReport, error) {
	out := api.SourceReport{Source: src.Name}
	for _, st := range git.Test(ctx, spec(src)).Steps {
		out.Steps = append(out.Steps, api.SourceStep{Name: st.Name, OK: st.OK, Detail: st.Detail})
	}
	return out, nil
}
