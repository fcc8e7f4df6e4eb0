// Package cluster is one node: it joins the log, the worker, the sources, policy and the API into a running agent.
//
// The flow: [Node.Run] starts the store, the worker and, while this node leads, the leader's work. The leader follows the sources; a new commit
// is fetched and rendered (intake.go), policy judges it and what it would change (judge.go), its files are stored and its secrets sealed, and reconcile.Accept says what
// it changes; then reconcile.Decide is
// asked whenever the log moved or its wake time came (leader.go), and what it plans is proposed. The worker performs on each node what is
// assigned to it. People's operations (operate.go) are commands in the log like everything else; reads are answered from the node's own replica.
//
// All that touches the world comes in as values of [Config]: this package knows no Git, no Compose and no container runtime.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/blob"
	"github.com/gitopsd/gitopsd/cluster/seal"
	"github.com/gitopsd/gitopsd/cluster/store"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Source is a source to follow, with its credentials in clear. They live in memory only.
type Source struct {
	state.Source
	Credentials Credentials
}

// Credentials of a source.
type Credentials struct {
	Username   string `json:"username,omitempty"`
	Token      string `json:"token,omitempty"`
	PrivateKey string `json:"privateKey,omitempty"`
	Passphrase string `json:"passphrase,omitempty"`
	CA         string `json:"ca,omitempty"`
}

// Tip is the newest commit of a source, or why it could not be seen.
type Tip struct {
	Source   string
	Revision manifest.Revision
	Err      error
}

// Loaded is a revision that was fetched, verified and rendered.
type Loaded struct {
	Bundle   *manifest.Bundle
	Policy   policy.Source // of a policy source, whose Bundle has no stacks
	Unsigned *state.Reason // its signature is missing or not of an allowed signer
	// Read returns the bytes of a blob of the bundle.
	Read func(ref manifest.BlobRef) ([]byte, error)
}

// Sources brings revisions of Git repositories and renders them. All methods are safe for concurrent use.
type Sources interface {
	// Run looks at the sources that Follow named until ctx ends, and calls tip for each new commit, after a Trigger for the same one too, and for each failure to
	// look. An error of tip brings the same tip again, later.
	Run(ctx context.Context, tip func(context.Context, Tip) error) error
	// Follow replaces the set of sources.
	Follow(sources []Source) error
	// Trigger asks for an early look at a source; "" means all.
	Trigger(source string)
	// Load fetches, verifies and renders a revision; an empty Revision is the newest, one without Ref any commit or ref. Of a policy source, it reads the policy; what is
	// wrong with that is among the problems of the Bundle.
	Load(ctx context.Context, src Source, rev manifest.Revision) (*Loaded, error)
	// Newest asks what a source points to now, without fetching it.
	Newest(ctx context.Context, src Source) (manifest.Revision, error)
	// Relation says how a commit stands to an earlier one.
	Relation(ctx context.Context, src Source, earlier, commit string) (reconcile.Relation, error)
	// Tidy removes what older revisions left on disk.
	Tidy() error
	// Test tries a source step by step.
	Test(ctx context.Context, src Source) (api.SourceReport, error)
}

// Config is what a node is made of.
type Config struct {
	ID      string     // of the node: for ever
	Record  state.Node // as it is to be registered
	Cluster state.Cluster
	Version string

	Store   *store.Store
	Sources Sources
	Blobs   *blob.Store
	Key     *seal.Key
	// Policy judges where the log names no policy source. OwnPolicy says that it is more than the built-in rules, and so in the way of one.
	Policy    *policy.Engine
	OwnPolicy bool
	Harden    policy.Defaults
	// Initial are sources to be added when the log has no such source yet.
	Initial []Source

	Now    func() time.Time // wall clock
	Logger *slog.Logger
}

// Node is one running agent.
type Node struct {
	cfg      Config
	log      *slog.Logger
	worker   *worker.Worker
	images   worker.Images
	engine   atomic.Pointer[policy.Engine] // the policy in force; nil as long as the policy source that the log names was not read
	settled  atomic.Bool
	requests chan func(*leader) // taken by the leader's loop of the current term
}

// New makes a node with its worker, whose Log and OpenSecret it fills in. Nothing runs until Run.
func New(cfg Config, w worker.Config) *Node {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	n := &Node{cfg: cfg, log: cfg.Logger.With("node", cfg.ID), images: w.Images, requests: make(chan func(*leader))}
	if _, ok := policySource(n.View()); !ok && !slices.ContainsFunc(cfg.Initial, func(s Source) bool { return s.Policy }) {
		n.engine.Store(cfg.Policy)
	}
	w.Log, w.OpenSecret = workerLog{n}, n.openSecret
	n.worker = worker.New(w)
	return n
}

// Run runs the node until ctx ends or a part of it fails for good. It returns when all of it has ended; containers run on.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	part := func(name string, run func(context.Context) error) {
		g.Go(func() error {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	part("store", n.cfg.Store.Run)
	part("worker", n.worker.Run)
	part("leader", func(ctx context.Context) error { return n.cfg.Store.Lead(ctx, n.leadTerm) })
	return g.Wait()
}

// leadTerm leads for one term. What fails for a while, as a full disk does, is tried again for as long as the term lasts.
func (n *Node) leadTerm(ctx context.Context, term uint64) error {
	for {
		err := newLeader(n, term).run(ctx)
		if ctx.Err() != nil || errors.Is(err, store.ErrNotLeader) {
			return nil
		}
		if errors.Is(err, store.ErrHalted) {
			return err
		}
		n.log.Error("the leader's work stopped; it begins again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(leadAgain):
		}
	}
}

// leadAgain is the pause before the leader's work begins again after an error.
const leadAgain = time.Second

// now is the time that the leader decides at.
func (n *Node) now() reconcile.Now {
	return reconcile.Now{Log: n.cfg.Store.Now(), Wall: n.cfg.Now()}
}

// ask runs f in the leader's loop and waits for it.
func (n *Node) ask(ctx context.Context, f func(*leader) error) error {
	done := make(chan error, 1)
	select {
	case n.requests <- func(l *leader) { done <- f(l) }:
	case <-ctx.Done():
		return api.NoQuorumf("no node leads the cluster: %v", context.Cause(ctx))
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// View is the newest snapshot that this node has.
func (n *Node) View() *state.View { return n.cfg.Store.View() }

// Changed gives a channel that is closed when the view's index is greater than after.
func (n *Node) Changed(after uint64) <-chan struct{} { return n.cfg.Store.Changed(after) }

// propose puts one command into the log and turns refusals into an error that says to look again.
func (n *Node) propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	res, err := n.cfg.Store.Propose(ctx, cmd)
	if err != nil {
		return res, err
	}
	if len(res.Refused) > 0 {
		return res, errRefused
	}
	return res, nil
}

var errRefused = errors.New("what it was based on changed meanwhile")
