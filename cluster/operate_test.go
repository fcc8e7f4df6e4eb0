package cluster

import (
	"errors"
	"testing"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/fixtures/scenario"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// A stack that was pushed a moment ago is found by fetching; a source that fails meanwhile holds it up no more than a stack that nobody has.
func TestSyncOfAStackNotKnownYet(t *testing.T) {
	r := newRig(t)
	r.push("fleet", revision{id: "c1", stacks: "shop\n  web web:1"})
	r.push("away", revision{id: "c1", stacks: "far\n  web web:1"})
	r.start(setup{sources: []state.Source{{Name: "away"}, {Name: "fleet"}}})
	known := func(stacks ...string) {
		t.Helper()
		r.until("the stacks are known", func(v *state.View) bool {
			for _, s := range stacks {
				if _, ok := v.Stacks.Get(s); !ok {
					return false
				}
			}
			return true
		})
	}
	known("shop", "far")
	r.hub.mu.Lock()
	r.heads["fleet"] = revision{id: "c2", stacks: "shop\n  web web:1\nblog\n  web web:1"} // nobody tells of it
	r.heads["away"] = revision{err: errors.New("no route to host")}
	r.hub.mu.Unlock()

	sync := func(stack string) (api.Result, error) {
		return r.Operate(t.Context(), api.Operation{Kind: api.OpSync, ID: api.NewRequestID(), Stack: stack})
	}
	res, err := sync("blog")
	if err != nil || res.Source != "fleet" || res.Revision.Commit != scenario.Commit("c2") || res.Message == "" {
		t.Errorf("sync blog: %+v, %v", res, err)
	}
	known("blog")
	if _, err := sync("bolg"); api.KindOf(err) != api.NotFound {
		t.Errorf("sync bolg: %v", err)
	}
	if _, err := sync("far"); err == nil || api.KindOf(err) != api.Invalid {
		t.Errorf("sync far, whose source fails: %v", err)
	}
}
