package reconcile_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/fixtures/scenario"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// judged is a world in which two sources were added and a revision of the first was accepted.
func judged(t *testing.T, text string) *world {
	t.Helper()
	w := &world{t: t, state: state.New(), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	for _, name := range []string{"one", "two"} {
		w.put(state.Put(name, 0, state.Source{Name: name, URL: "/srv/" + name, Yes: true}))
	}
	w.accept(intake(t, "one", "c1", text))
	return w
}

func intake(t *testing.T, source, commit, text string) reconcile.Intake {
	t.Helper()
	in, err := scenario.Intake(source, commit, text)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// A stack that belongs to another source is told with the source that can't have it, as long as that is so.
func TestOwnedIsToldWithItsSource(t *testing.T) {
	w := judged(t, "shop\n  web web:1")
	w.accept(intake(t, "two", "d1", "shop\n  web web:9\nblog\n  www www:1"))
	two, _ := w.view().Sources.Get("two")
	if ps := two.Value.Problems; len(ps) != 1 || ps[0].Rule != reconcile.ReasonOwned || ps[0].Stack != "shop" || ps[0].Severity != manifest.Error {
		t.Errorf("the source's problems are %v", ps)
	}
	w.accept(intake(t, "two", "d2", "blog\n  www www:1"))
	if two, _ = w.view().Sources.Get("two"); len(two.Value.Problems) > 0 {
		t.Errorf("it is told still: %v", two.Value.Problems)
	}
}

// Files that are planned before they are committed have no commit: they wait like any other revision, and the way out names none.
func TestPlanOfFilesWaitsForAPerson(t *testing.T) {
	w := judged(t, "shop\n  web web:1\nblog\n  www www:1")
	in := intake(t, "one", "c2", "wiki\n  www www:1")
	in.Bundle.Revision = manifest.Revision{}
	p, err := reconcile.Preview(w.view(), in, w.time())
	if err != nil {
		t.Fatal(err)
	}
	first := p.Steps[0]
	if first.Action != reconcile.ActWait || first.Reason.ID != reconcile.ReasonBudget || !strings.HasSuffix(first.Reason.Message, "`gitopsctl approve one`") {
		t.Errorf("the plan begins with %s: %s", first.Action, first.Reason)
	}
	if !slices.ContainsFunc(p.Steps, func(s reconcile.Step) bool { return s.Action == reconcile.ActRemove && s.Stack == "shop" }) {
		t.Errorf("what it would change is not shown: %v", p.Steps)
	}
}
