package git

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

// Relation is how a new commit stands to an old one.
type Relation int

// The relations of a new commit to the old one.
const (
	// Unknown: the commits that could tell are not to be had. A caller that waits for a person's
	// word on a Rewind waits on Unknown as well.
	Unknown  Relation = iota
	Same              // the same commit
	Forward           // old is an ancestor of new
	Rewind            // new is an ancestor of old
	Diverged          // neither
)

func (r Relation) String() string {
	return [...]string{"unknown", "same", "forward", "rewind", "diverged"}[r]
}

// Relation says how new stands to old; both were fetched for spec before. It answers from the commits
// that are here, which is enough for a branch that moved by less than Limits.History commits in either
// direction. Where it is not, the whole history of new is fetched, and then that of old if the remote
// still gives it, within the limits. Going back behind what was ever fetched can then still be Unknown:
// many servers give no commits that none of their refs can reach.
func (s *Store) Relation(ctx context.Context, spec Spec, old, new string) (rel Relation, err error) {
	if old == new {
		return Same, nil
	}
	if !isHexID(old) || !isHexID(new) {
		return Unknown, fail(RefNotFound, fmt.Sprintf("compare commits of %s: %q and %q are not full commit ids", spec, printable(old, 60), printable(new, 60)), "")
	}
	ctx, done, loc, err := s.begin(ctx, "compare commits of", spec, &err)
	if err != nil {
		return Unknown, err
	}
	defer done()
	repo, unlock, err := s.lock(ctx, loc)
	if err != nil {
		return Unknown, err
	}
	defer unlock()
	if rel, err = relate(ctx, repo, old, new); rel != Unknown || err != nil {
		return rel, err
	}
	remote := &lazyRemote{open: func() (remote, error) { return openRemote(spec, loc, s.limits) }}
	for _, commit := range []string{new, old} {
		if len(repo.shallow) == 0 && repo.objects().HasEncodedObject(plumbing.NewHash(commit)) == nil {
			continue // all of it is here
		}
		tip := Tip{Commit: commit, Object: commit}
		for _, t := range repo.tips {
			if t.commit == commit {
				tip.Object = t.object
			}
		}
		err := repo.fetch(ctx, remote, tip, s.limits, fullDepth)
		remote.close()
		if err != nil && !errors.Is(err, TooLarge) && !errors.Is(err, RefNotFound) {
			return Unknown, err
		}
		if rel, err = relate(ctx, repo, old, new); rel != Unknown || err != nil {
			return rel, err
		}
	}
	return Unknown, nil
}

// relate walks back from both commits at once, newest first, until one walk meets the other's start or
// both have come to an end. A commit whose parents are not here makes its walk inconclusive.
func relate(ctx context.Context, repo *repository, old, new string) (Relation, error) {
	objects := repo.objects()
	walkers := [2]*walker{
		{goal: plumbing.NewHash(old), found: Forward},
		{goal: plumbing.NewHash(new), found: Rewind},
	}
	walkers[0].add(plumbing.NewHash(new), time.Time{})
	walkers[1].add(plumbing.NewHash(old), time.Time{})
	for busy := true; busy; {
		busy = false
		for _, w := range walkers {
			if len(w.queue) == 0 {
				continue
			}
			busy = true
			if err := ctx.Err(); err != nil {
				return Unknown, err
			}
			next := heap.Pop(&w.queue).(walkItem)
			if next.id == w.goal {
				return w.found, nil
			}
			c, err := readCommit(objects, next.id)
			if err != nil {
				if objects.HasEncodedObject(next.id) == nil {
					return Unknown, err
				}
				w.gap = true
				continue
			}
			for _, p := range c.parents {
				w.add(p, c.when)
			}
		}
	}
	if walkers[0].gap || walkers[1].gap {
		return Unknown, nil
	}
	return Diverged, nil
}

type walker struct {
	goal  plumbing.Hash
	found Relation
	queue walkQueue
	seen  map[plumbing.Hash]bool
	gap   bool
}

// walkItem is a commit to visit; when is the date of the child it was found by, so that a commit need
// not be read to be queued.
type walkItem struct {
	id   plumbing.Hash
	when time.Time
}

func (w *walker) add(id plumbing.Hash, when time.Time) {
	if w.seen == nil {
		w.seen = map[plumbing.Hash]bool{}
	}
	if !w.seen[id] {
		w.seen[id] = true
		heap.Push(&w.queue, walkItem{id, when})
	}
}

// walkQueue is a heap with the newest first.
type walkQueue []walkItem

func (q walkQueue) Len() int           { return len(q) }
func (q walkQueue) Less(i, j int) bool { return q[i].when.After(q[j].when) }
func (q walkQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *walkQueue) Push(x any)        { *q = append(*q, x.(walkItem)) }
func (q *walkQueue) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}
