package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/store"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Reasons that operations give.
const (
	ReasonByPerson = "person"
)

// tries bounds how often an operation is made anew because what it was based on changed meanwhile.
const tries = 5

// Operate does one write of a person. See [api.Backend].
func (n *Node) Operate(ctx context.Context, op api.Operation) (api.Result, error) {
	if err := op.Check(); err != nil {
		return api.Result{}, err
	}
	if _, ok := n.cfg.Store.Leading(); !ok {
		if err := n.cfg.Store.Fault(); err != nil {
			return api.Result{}, err
		}
		return api.Result{}, api.NoQuorumf("this node does not lead the cluster now: try again in a moment")
	}
	var res api.Result
	var err error
	switch op.Kind {
	case api.OpSync:
		res, err = n.sync(ctx, op)
	case api.OpSourceAdd:
		res, err = n.sourceAdd(ctx, op)
	case api.OpSecretSet:
		res, err = n.secretSet(ctx, op)
	default:
		err = n.ask(ctx, func(l *leader) error {
			var err error
			for range tries {
				if res, err = l.operate(ctx, op); !errors.Is(err, errRefused) {
					return err
				}
				op.ID += "+" // a try that was refused has its answer; the same request sent again goes through the same ids
			}
			return api.Conflictf("%s: it changed again and again meanwhile; try again", op.Kind)
		})
	}
	if errors.Is(err, store.ErrNoQuorum) || errors.Is(err, store.ErrNotLeader) || errors.Is(err, store.ErrUnknown) {
		return res, api.NoQuorumf("%v; the request may be sent again with id %s", err, op.ID)
	}
	return res, err
}

// change proposes the items of an operation together with the event that tells of it, who did it and what they said.
func (l *leader) change(ctx context.Context, op api.Operation, message string, items ...state.Item) (api.Result, error) {
	now := l.now()
	e := state.Event{Time: now.Wall.UTC(), Kind: string(op.Kind), Source: op.Source, Stack: op.Stack, Service: op.Service, Actor: op.Actor, Reason: state.Reason{ID: ReasonByPerson, Message: message}}
	event := state.Set(state.EventKey(now.Log, 0), e)
	if len(items) == 0 {
		items = []state.Item{{}}
	}
	items[0] = append(items[0], event) // told only if it happens
	res, err := l.propose(ctx, state.Command{Request: "op/" + op.ID, Actor: op.Actor, Items: items})
	return api.Result{Index: res.Index, Again: res.Again, Message: message}, err
}

func (l *leader) operate(ctx context.Context, op api.Operation) (api.Result, error) {
	switch op.Kind {
	case api.OpApprove:
		return l.approve(ctx, op)
	case api.OpSuspend, api.OpResume, api.OpUnpin, api.OpRollback:
		return l.steer(ctx, op)
	case api.OpRestart:
		return l.restart(ctx, op)
	case api.OpSourceRemove:
		return l.sourceRemove(ctx, op)
	case api.OpSecretRemove:
		return l.secretRemove(ctx, op)
	case api.OpVolumeForget, api.OpVolumeRemove:
		return l.volume(ctx, op)
	}
	return api.Result{}, api.Invalidf("operation %q is not known to this version", op.Kind)
}

// sync has sources fetched now, and waits until what they point to was judged. A source that fails holds no other one up. A stack that nobody knows is looked for in
// all sources: only their newest commit may bring it.
func (n *Node) sync(ctx context.Context, op api.Operation) (api.Result, error) {
	v := n.View()
	names := keys(v.Sources)
	if st, ok := v.Stacks.Get(op.Stack); ok {
		names = []string{st.Value.Source}
	} else if op.Source != "" {
		if _, ok := v.Sources.Get(op.Source); !ok {
			return api.Result{}, api.NotFoundf("source", op.Source, keys(v.Sources))
		}
		names = []string{op.Source}
	}
	var res api.Result
	var failed []error
	for _, name := range names {
		rev, err := n.syncSource(ctx, name)
		if err != nil {
			failed = append(failed, err)
		} else if st, ok := n.View().Stacks.Get(op.Stack); op.Stack == "" || ok && st.Value.Source == name {
			res.Source, res.Revision, res.Message = name, rev, fmt.Sprintf("%s is at %s", name, rev)
		}
	}
	v = n.View()
	res.Index = v.Index
	st, known := v.Stacks.Get(op.Stack)
	switch {
	case op.Stack != "" && !known:
		return res, api.NotFoundf("stack", op.Stack, keys(v.Stacks))
	case known && st.Value.Source == res.Source: // what is wrong with others is not its
		return res, nil
	}
	return res, errors.Join(failed...)
}

// syncSource has one source fetched now, and waits until what it points to was judged.
func (n *Node) syncSource(ctx context.Context, name string) (manifest.Revision, error) {
	e, _ := n.View().Sources.Get(name)
	src, err := n.source(e.Value)
	if err != nil {
		return manifest.Revision{}, err
	}
	rev, err := n.cfg.Sources.Newest(ctx, src)
	if err == nil {
		var l *leader
		if err = n.ask(ctx, func(cur *leader) error { l = cur; return nil }); err == nil {
			err = l.take(ctx, e.Value, rev)
		}
	}
	if err != nil {
		cause := err
		return rev, errors.Join(api.Invalidf("sync %s: %v", name, cause), n.ask(ctx, func(l *leader) error { return l.trouble(ctx, name, cause) }))
	}
	if e, _ := n.View().Sources.Get(name); e.Value.Policy && e.Value.Trouble != nil { // no stack could tell of it
		return rev, api.Deniedf(e.Value.Trouble.ID, "sync %s: %s", name, e.Value.Trouble.Message)
	}
	return rev, nil
}

func keys[T state.Object](t state.Table[T]) []string {
	var out []string
	for k := range t.All() {
		out = append(out, k)
	}
	return out
}

// approve lets a revision of a source pass that waits for a person's word.
func (l *leader) approve(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	name := op.Source
	if name == "" && op.Stack != "" {
		if st, ok := v.Stacks.Get(op.Stack); ok {
			name = st.Value.Source
		}
	}
	e, ok := v.Sources.Get(name)
	switch {
	case !ok:
		return api.Result{}, api.NotFoundf("source", name, keys(v.Sources))
	case len(e.Value.Waiting) == 0:
		return api.Result{}, api.Conflictf("nothing of source %s waits for approval", name)
	case e.Value.Waiting[0].ID == reconcile.ReasonUnsigned:
		return api.Result{}, api.Deniedf(reconcile.ReasonUnsigned, "a missing or unknown signature can't be approved: sign the commit, or let its signer in with `gitopsctl source add --signers`")
	case op.Revision != "" && !strings.HasPrefix(e.Value.Seen.Commit, op.Revision):
		return api.Result{}, api.Conflictf("the revision that waits is %s, not %s: look at its plan, then approve that one", e.Value.Seen, op.Revision)
	}
	next := e.Value
	next.Approved = e.Value.Seen.Commit
	op.Source = name
	res, err := l.change(ctx, op, fmt.Sprintf("%s of source %s is approved", e.Value.Seen, name), state.Item{state.Put(name, e.Version, next)})
	if err != nil {
		return res, err
	}
	res.Source, res.Revision = name, e.Value.Seen
	return res, l.again(ctx, name)
}

// steer changes whether a stack follows Git.
func (l *leader) steer(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	e, ok := v.Stacks.Get(op.Stack)
	if !ok {
		return api.Result{}, api.NotFoundf("stack", op.Stack, keys(v.Stacks))
	}
	next := e.Value
	said := op.Reason
	if said == "" {
		said = "by " + op.Actor
	}
	var message string
	switch op.Kind {
	case api.OpSuspend:
		next.Suspended = &state.Reason{ID: reconcile.ReasonSuspended, Message: "suspended: " + said + "; `gitopsctl resume " + op.Stack + "` follows Git again"}
		message = op.Stack + " does not follow Git any more; what runs is still healed"
	case api.OpResume:
		if next.Suspended == nil {
			return api.Result{}, api.Conflictf("%s is not suspended by a person; if Git says suspend, change it there", op.Stack)
		}
		next.Suspended = nil
		message = op.Stack + " follows Git again"
	case api.OpUnpin:
		if next.Pinned == nil {
			return api.Result{}, api.Conflictf("%s is not pinned", op.Stack)
		}
		next.Pinned = nil
		message = op.Stack + " follows Git again"
	case api.OpRollback:
		to, err := l.rollbackTarget(ctx, e.Value, op.Revision)
		if err != nil {
			return api.Result{}, err
		}
		reconcile.Follow(&next, to, l.now().Log)
		next.Pinned = &state.Reason{ID: reconcile.ReasonPinned, Message: fmt.Sprintf("rolled back to %s: %s; `gitopsctl unpin %s` follows Git again", to.Revision, said, op.Stack)}
		message = fmt.Sprintf("%s goes back to %s and stays there until it is unpinned", op.Stack, to.Revision)
	}
	res, err := l.change(ctx, op, message, state.Item{state.Put(op.Stack, e.Version, next)})
	if err != nil {
		return res, err
	}
	if next.Applied != nil {
		res.Revision = next.Applied.Revision
	}
	res.Source = next.Source
	if op.Kind == api.OpResume || op.Kind == api.OpUnpin {
		return res, l.again(ctx, next.Source)
	}
	return res, nil
}

// rollbackTarget finds the revision to go back to, and asks current policy about it: no rollback starts what policy denies now.
func (n *Node) rollbackTarget(ctx context.Context, s state.Stack, revision string) (state.Applied, error) {
	v := n.View()
	var to *state.Applied
	for _, o := range s.History {
		known := func() bool { _, ok := v.Releases.Get(o.Release); return ok }
		if (revision == "" && o.Kind == state.Deployed || revision != "" && strings.HasPrefix(o.Revision.Commit, revision)) && known() {
			to = &state.Applied{Revision: o.Revision, Release: o.Release}
			break
		}
	}
	if to == nil {
		if revision == "" {
			return state.Applied{}, api.Conflictf("%s has no earlier revision that was Deployed", s.Name)
		}
		return state.Applied{}, api.Conflictf("%s is none of the last revisions of %s: `gitopsctl history %s` lists them", revision, s.Name, s.Name)
	}
	spec, ok := reconcile.Rendered(v, to.Release)
	if !ok {
		return *to, api.Conflictf("what %s rendered to is not kept any more", to.Revision)
	}
	why, err := n.denied(ctx, spec, to.Revision.String())
	if err != nil {
		return *to, err
	}
	if why != nil {
		return *to, api.Deniedf(why.ID, "%s", why.Message)
	}
	steps, err := reconcile.Back(v, s.Name, *to, n.now())
	if err != nil {
		return *to, err
	}
	return *to, n.mayDo(ctx, spec, itemsOf(steps, s.Name))
}

// restart replaces the tasks of a service, or of all services of a stack, by its update policy.
func (l *leader) restart(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	st, ok := v.Stacks.Get(op.Stack)
	if !ok {
		return api.Result{}, api.NotFoundf("stack", op.Stack, keys(v.Stacks))
	}
	var items []state.Item
	var asked []policy.Item
	var known []string
	for key, e := range v.Services.Below(op.Stack + "/") {
		name := key[len(op.Stack)+1:]
		known = append(known, name)
		if op.Service != "" && name != op.Service {
			continue
		}
		next := e.Value
		next.Restart++
		next.Step, next.Started, next.Failed = state.StepUpdating, l.now().Log, nil
		items = append(items, state.Item{state.Put(key, e.Version, next)})
		asked = append(asked, policy.Item{Action: policy.ActionReplace, Stack: op.Stack, Service: name, Cause: policy.CausePerson})
	}
	if len(items) == 0 {
		return api.Result{}, api.NotFoundf("service", op.Service, known)
	}
	if err := l.mayDo(ctx, applied(v, st.Value), asked); err != nil {
		return api.Result{}, err
	}
	what := op.Stack
	if op.Service != "" {
		what += "/" + op.Service
	}
	return l.change(ctx, op, "the tasks of "+what+" are replaced, as its update policy says", items...)
}

// sourceAdd adds a source, or replaces what is known of it, and has it fetched.
func (n *Node) sourceAdd(ctx context.Context, op api.Operation) (api.Result, error) {
	src := SourceOf(*op.SourceSpec)
	op.Source = src.Name
	err := n.ask(ctx, func(l *leader) error { return l.addSource(ctx, src, op.Actor) })
	if err != nil {
		return api.Result{}, err
	}
	n.cfg.Sources.Trigger(src.Name)
	return api.Result{Index: n.View().Index, Source: src.Name, Message: fmt.Sprintf("source %s is followed from now on", src.Name)}, nil
}

// SourceOf is a source as a person wrote it. A policy source starts nothing, so that its being added is all the approval that it needs.
func SourceOf(s api.SourceSpec) Source {
	verify := s.Verify
	if verify == "none" {
		verify = ""
	}
	return Source{
		Source: state.Source{Name: s.Name, URL: s.URL, Branch: s.Branch, Tag: s.Tag, Path: s.Path, Interval: s.Interval, Verify: verify, Signers: s.Signers, Known: s.KnownHosts, Yes: s.Yes || s.Policy, Policy: s.Policy},
		Credentials: Credentials{
			Username: s.Username, Token: s.Token, PrivateKey: s.Key, Passphrase: s.Passphrase, CA: s.CA,
		},
	}
}

func (l *leader) addSource(ctx context.Context, src Source, actor string) error {
	next := src.Source
	if src.Credentials != (Credentials{}) {
		next.Auth = ".source/" + src.Name // no stack is called so: secrets of stacks are STACK/KEY
		b, err := json.Marshal(src.Credentials)
		if err != nil {
			return err
		}
		defer clear(b)
		if err := l.putSecret(ctx, next.Auth, "", b, "", actor, ""); err != nil {
			return err
		}
	}
	for range tries {
		e, ok := l.View().Sources.Get(src.Name)
		if ok { // its progress is kept: the same name is the same source
			next.Seen, next.Accepted, next.Approved, next.Yes = e.Value.Seen, e.Value.Accepted, e.Value.Approved, next.Yes || e.Value.Yes
			next.PolicyHash, next.PruneVolumes = e.Value.PolicyHash, e.Value.PruneVolumes
		}
		if err := l.fits(next, e.Value, ok); err != nil {
			return err
		}
		op := api.Operation{Kind: api.OpSourceAdd, Source: src.Name, Actor: actor, ID: fmt.Sprintf("source/%s/%d", src.Name, l.View().Index)}
		_, err := l.change(ctx, op, "source "+src.Name+" follows "+src.URL, state.Item{state.Put(src.Name, e.Version, next)})
		if !errors.Is(err, errRefused) {
			return err
		}
	}
	return errRefused
}

// fits says whether a source may be added beside the others, or in the place of the one of its name. There is one policy, from one place.
func (n *Node) fits(next, old state.Source, known bool) error {
	if known && old.Policy != next.Policy {
		return api.Conflictf("source %s holds %s: remove it first, or give the new one another name", old.Name, map[bool]string{true: "policy", false: "stacks"}[old.Policy])
	}
	if !next.Policy {
		return nil
	}
	if have, ok := policySource(n.View()); ok && have.Name != next.Name {
		return api.Conflictf("source %s is the policy source already, and there is one: remove it first", have.Name)
	}
	if n.cfg.OwnPolicy {
		return api.Conflictf("this node reads its policy from the directory of --policy: start it without that first")
	}
	return nil
}

// sourceRemove takes a source and its stacks away. Volumes stay.
func (l *leader) sourceRemove(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	e, ok := v.Sources.Get(op.Source)
	if !ok {
		return api.Result{}, api.NotFoundf("source", op.Source, keys(v.Sources))
	}
	item := state.Item{state.Delete[state.Source](op.Source, e.Version)}
	n := 0
	for name, st := range v.Stacks.All() {
		if st.Value.Source == op.Source {
			goes := policy.Item{Action: policy.ActionRemove, Stack: name, Cause: policy.CausePerson}
			if err := l.mayDo(ctx, applied(v, st.Value), []policy.Item{goes}); err != nil {
				return api.Result{}, err
			}
			next := st.Value
			next.Removing = true
			item = append(item, state.Put(name, st.Version, next))
			n++
		}
	}
	if sec, ok := v.Secrets.Get(e.Value.Auth); ok && e.Value.Auth != "" {
		item = append(item, state.Delete[state.Secret](e.Value.Auth, sec.Version))
	}
	res, err := l.change(ctx, op, fmt.Sprintf("source %s is not followed any more; its %d stacks are removed, their volumes stay", op.Source, n), item)
	if err != nil {
		return res, err
	}
	delete(l.intakes, op.Source)
	if e.Value.Policy {
		return res, l.judgeBy(ctx, l.cfg.Policy)
	}
	return res, nil
}

// applied is what a stack was told to be; of one that was told nothing yet, only its name.
func applied(v *state.View, s state.Stack) manifest.Stack {
	if s.Applied != nil {
		if spec, ok := reconcile.Rendered(v, s.Applied.Release); ok {
			return spec
		}
	}
	return manifest.Stack{Name: s.Name}
}

// secretSet seals a value and has the stacks that use it follow.
func (n *Node) secretSet(ctx context.Context, op api.Operation) (api.Result, error) {
	name := op.Secret.Name
	if e, ok := n.View().Secrets.Get(name); ok && e.Value.Stack != "" {
		return api.Result{}, api.Conflictf("secret %s comes with the revision of stack %s: change it there", name, e.Value.Stack)
	}
	ref, err := n.refOf(ctx, name, op.Secret.Value)
	if err != nil {
		return api.Result{}, err
	}
	if err := n.putSecret(ctx, name, "", op.Secret.Value, ref, op.Actor, "op/"+op.ID); err != nil {
		return api.Result{}, err
	}
	err = n.ask(ctx, func(l *leader) error {
		for _, src := range keys(l.View().Sources) {
			if err := l.again(ctx, src); err != nil {
				return err
			}
		}
		return nil
	})
	return api.Result{Index: n.View().Index, Message: "secret " + name + " is set"}, err
}

func (l *leader) secretRemove(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	e, ok := v.Secrets.Get(op.Secret.Name)
	if !ok {
		return api.Result{}, api.NotFoundf("secret", op.Secret.Name, slices.DeleteFunc(keys(v.Secrets), func(n string) bool { return strings.HasPrefix(n, ".") }))
	}
	for name, st := range v.Stacks.All() {
		if st.Value.Applied == nil {
			continue
		}
		rel, _ := v.Releases.Get(st.Value.Applied.Release)
		for _, s := range rel.Value.Stack.Secrets {
			if s.Name == op.Secret.Name {
				return api.Result{}, api.Conflictf("stack %s uses secret %s: take it out of the stack first", name, op.Secret.Name)
			}
		}
	}
	return l.change(ctx, op, "secret "+op.Secret.Name+" is removed", state.Item{state.Delete[state.Secret](op.Secret.Name, e.Version)})
}
