package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/gitopsd/gitopsd/cluster/seal"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// ReasonFetch is given while a source can't be fetched.
const ReasonFetch = "source.fetch"

// intake is a revision that was rendered and reviewed, as the leader keeps it: approvals, resumes and new secrets judge it again without rendering.
type intake struct {
	loaded  *Loaded
	reviews map[string]reconcile.Review
	policy  string                      // hash of the policy that reviewed it
	applied map[string][]policy.Applied // by stack: restrictions that nobody wrote
	hashes  map[string]string           // by stack: what was reviewed
	engine  *policy.Engine              // of a policy source: what it puts in force; nil when it can't be used

	said  map[string]map[string]described // by stack, by image reference: what registries said
	asked time.Time                       // when they were asked
	open  bool                            // policy wants to know more than was said
}

// unsure says whether what registries say at the next look could change a verdict.
func (in *intake) unsure() bool {
	for stack, said := range in.said {
		if len(said) > 0 && in.reviews[stack].Deny {
			return true
		}
	}
	return in.open
}

// tip takes in what a source points to now. It runs beside the loop: only the acceptance itself is the loop's.
func (l *leader) tip(ctx context.Context, t Tip) error {
	e, ok := l.View().Sources.Get(t.Source)
	if !ok {
		return nil
	}
	if t.Err == nil {
		t.Err = l.take(ctx, e.Value, t.Revision)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if t.Err != nil {
		l.log.Warn("source", "source", t.Source, "err", t.Err)
		return errors.Join(t.Err, l.ask(ctx, func(l *leader) error { return l.trouble(ctx, t.Source, t.Err) }))
	}
	return nil
}

// take fetches, renders and reviews a revision, unless that was done already, and has it accepted. Policy that changes meanwhile reviews it again.
func (l *leader) take(ctx context.Context, s state.Source, rev manifest.Revision) error {
	for {
		have, err := l.ready(ctx, s, rev)
		if err != nil {
			return err
		}
		relation, err := l.relation(ctx, s, rev.Commit)
		if err != nil {
			return err
		}
		stale := false
		err = l.ask(ctx, func(l *leader) error {
			if stale = !s.Policy && have.policy != l.policyHash(); stale {
				return nil
			}
			l.intakes[s.Name] = have
			return l.accept(ctx, s.Name, relation)
		})
		if err != nil || !stale {
			return err
		}
	}
}

// ready is a revision, fetched, rendered and reviewed by the policy in force, with its files stored.
func (l *leader) ready(ctx context.Context, s state.Source, rev manifest.Revision) (*intake, error) {
	var have *intake
	if err := l.ask(ctx, func(l *leader) error { have = l.intakes[s.Name]; return nil }); err != nil {
		return nil, err
	}
	if have != nil && have.loaded.Bundle.Revision == rev && (s.Policy || have.policy == l.policyHash()) {
		if !have.unsure() {
			return have, nil
		}
		anew := *have
		return &anew, l.reviewWith(ctx, &anew, have)
	}
	src, err := l.source(s)
	if err != nil {
		return nil, err
	}
	loaded, err := l.cfg.Sources.Load(ctx, src, rev)
	if err != nil {
		return nil, err
	}
	if s.Policy {
		return l.compile(ctx, loaded)
	}
	if have, err = l.review(ctx, loaded, have); err != nil {
		return nil, err
	}
	return have, l.storeBlobs(loaded)
}

func (n *Node) relation(ctx context.Context, s state.Source, commit string) (reconcile.Relation, error) {
	switch s.Accepted.Commit {
	case "":
		return reconcile.RelationFirst, nil
	case commit:
		return reconcile.RelationSame, nil
	}
	src, err := n.source(s)
	if err != nil {
		return "", err
	}
	return n.cfg.Sources.Relation(ctx, src, s.Accepted.Commit, commit)
}

// blobBatch is how many bytes of files are read before they are written, with one sync for all.
const blobBatch = 8 << 20

// storeBlobs keeps the files that the revision mounts, before anything that names them is proposed.
func (n *Node) storeBlobs(loaded *Loaded) error {
	blobs := loaded.Bundle.Blobs
	var batch [][]byte
	size := 0
	flush := func() error {
		if _, err := n.cfg.Blobs.PutBatch(batch); err != nil {
			return fmt.Errorf("store the files of %s: %w", loaded.Bundle.Revision, err)
		}
		batch, size = nil, 0
		return nil
	}
	for _, digest := range n.cfg.Blobs.Missing(slices.Sorted(maps.Keys(blobs))) {
		b, err := loaded.Read(blobs[digest])
		if err != nil {
			return fmt.Errorf("read a file of %s: %w", loaded.Bundle.Revision, err)
		}
		batch, size = append(batch, b), size+len(b)
		if size > blobBatch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// accept judges a source's intake against the view as it is now and proposes what follows. Only the loop calls it.
func (l *leader) accept(ctx context.Context, source string, relation reconcile.Relation) error {
	in := l.intakes[source]
	if in == nil {
		return nil
	}
	bundle, err := l.sealed(ctx, in.loaded.Bundle)
	if err != nil {
		return err
	}
	asked := reconcile.Intake{Source: source, Bundle: bundle, Reviews: in.reviews, Relation: relation, Unsigned: in.loaded.Unsigned, Now: l.now().Log}
	if asked.Reviews, err = l.judgePlan(ctx, l.View(), asked, in.said); err != nil {
		return err
	}
	for {
		view := l.View()
		plan := reconcile.Accept(view, asked)
		if plan.Empty() {
			return l.enforce(ctx, source, in)
		}
		plan.Items = append(judgedImages(view, asked, in.said), plan.Items...)
		if err := l.proposePlan(ctx, &plan, view); err != nil {
			return err
		}
		if err := l.judgeEarlier(ctx, plan.Stacks()); err != nil {
			return err
		}
	}
}

// again accepts anew what a source's newest revision asks: after a person's word or a new secret.
func (l *leader) again(ctx context.Context, source string) error {
	e, ok := l.View().Sources.Get(source)
	in := l.intakes[source]
	if !ok || in == nil {
		return nil
	}
	relation, err := l.relation(ctx, e.Value, in.loaded.Bundle.Revision.Commit)
	if err != nil {
		return err
	}
	return l.accept(ctx, source, relation)
}

// trouble records that a source could not be followed; once, not at each try.
func (l *leader) trouble(ctx context.Context, source string, cause error) error {
	e, ok := l.View().Sources.Get(source)
	why := state.Reason{ID: ReasonFetch, Message: cause.Error()}
	if errors.Is(cause, errNoPolicy) {
		why.ID = ReasonNoPolicy
	}
	if !ok || e.Value.Trouble != nil && *e.Value.Trouble == why {
		return nil
	}
	next := e.Value
	next.Trouble = &why
	plan := reconcile.Plan{
		Steps: []reconcile.Step{{Action: reconcile.ActFail, Source: source, Reason: why}},
		Items: []state.Item{{state.Put(source, e.Version, next)}},
	}
	return l.proposePlan(ctx, &plan, l.View())
}

// sealed returns the bundle with each secret named by the keyed hash of its value, after putting the values, sealed, into the log.
func (l *leader) sealed(ctx context.Context, b *manifest.Bundle) (*manifest.Bundle, error) {
	return withRefs(b, func(st *manifest.Stack, sec manifest.Secret) (string, error) { return l.secretRef(ctx, st, sec) })
}

// withRefs is the bundle with the reference of each secret written into it and into all its uses. The bundle given is not changed.
func withRefs(b *manifest.Bundle, refOf func(*manifest.Stack, manifest.Secret) (string, error)) (*manifest.Bundle, error) {
	out := *b
	out.Stacks = slices.Clone(b.Stacks)
	for i := range out.Stacks {
		st := &out.Stacks[i]
		if len(st.Secrets) == 0 {
			continue
		}
		refs := map[string]string{}
		st.Secrets = slices.Clone(st.Secrets)
		for k := range st.Secrets {
			sec := &st.Secrets[k]
			ref, err := refOf(st, *sec)
			if err != nil {
				return nil, fmt.Errorf("seal secret %s: %w", sec.Name, err)
			}
			sec.Ref, refs[sec.Name] = ref, ref
		}
		st.Services = slices.Clone(st.Services)
		for s := range st.Services {
			svc := &st.Services[s]
			svc.Containers = slices.Clone(svc.Containers)
			for c := range svc.Containers {
				uses := slices.Clone(svc.Containers[c].Secrets)
				for u := range uses {
					uses[u].Ref = refs[uses[u].Secret]
				}
				svc.Containers[c].Secrets = uses
			}
		}
	}
	return &out, nil
}

// secretRef is the keyed hash of a secret's value. A value that came with the revision and is not in the log yet goes there, sealed.
func (l *leader) secretRef(ctx context.Context, st *manifest.Stack, sec manifest.Secret) (string, error) {
	have, known := l.View().Secrets.Get(sec.Name)
	value, comes := st.SecretValues[sec.Name]
	if sec.External || !comes {
		return have.Value.Ref, nil
	}
	ref, err := l.refOf(ctx, sec.Name, value)
	if err != nil {
		return "", err
	}
	if known && have.Value.Ref == ref {
		return ref, nil
	}
	return ref, l.putSecret(ctx, sec.Name, st.Name, value, ref, "leader", "")
}

// sealKeys are the public keys of all nodes.
func (n *Node) sealKeys() map[string]string {
	nodes := map[string]string{}
	for id, e := range n.View().Nodes.All() {
		nodes[id] = e.Value.SealKey
	}
	return nodes
}

// putSecret seals a value to all nodes and logs it.
func (n *Node) putSecret(ctx context.Context, name, stack string, value []byte, ref, actor, request string) error {
	sealed, err := seal.Seal(name, value, n.sealKeys())
	if err != nil {
		return err
	}
	sealed.Ref, sealed.Stack = ref, stack
	_, err = n.propose(ctx, state.Command{Request: request, Actor: actor, Items: []state.Item{{state.Set(name, sealed)}}})
	return err
}

// hashKey makes the cluster's key for references of secrets, once.
func (l *leader) hashKey(ctx context.Context) error {
	if _, ok := l.View().Secrets.Get(seal.HashKeyName); ok {
		return nil
	}
	sealed, err := seal.NewHasher().Secret(l.sealKeys())
	if err != nil {
		return err
	}
	_, err = l.propose(ctx, state.Command{Term: l.term, Actor: "leader", Items: []state.Item{{state.Put(seal.HashKeyName, 0, sealed)}}})
	return err
}

// keyTime is how long a first leader has to make the hash key.
const keyTime = 10 * time.Second

// refOf is the keyed hash of a secret's value. A cluster that began a moment ago makes the key first.
func (n *Node) refOf(ctx context.Context, name string, value []byte) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, keyTime)
	defer cancel()
	view := n.View()
	e, ok := view.Secrets.Get(seal.HashKeyName)
	for ; !ok; e, ok = view.Secrets.Get(seal.HashKeyName) {
		select {
		case <-ctx.Done():
			return "", errors.New("the cluster's hash key is not in the log yet: no node leads")
		case <-n.Changed(view.Index):
			view = n.View()
		}
	}
	h, err := seal.OpenHasher(e.Value, n.cfg.Key, n.cfg.ID)
	if err != nil {
		return "", err
	}
	return h.Ref(name, value), nil
}

func (n *Node) openCredentials(secret string, into *Credentials) error {
	e, ok := n.View().Secrets.Get(secret)
	if !ok {
		return fmt.Errorf("secret %s is not in the log", secret)
	}
	b, err := n.cfg.Key.Open(e.Value, n.cfg.ID)
	if err != nil {
		return err
	}
	defer clear(b)
	return json.Unmarshal(b, into)
}

// openSecret unseals a secret for a task of this node.
func (n *Node) openSecret(s state.Secret) ([]byte, error) { return n.cfg.Key.Open(s, n.cfg.ID) }
