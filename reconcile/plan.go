// Package reconcile decides: from what Git asks and what nodes report, to what has to change.
//
// The flow: [Accept] takes a judged revision and says which stacks follow it, which are blocked and which wait for a person; [Decide] compares what was
// accepted with the tasks that there are, service by service, through rollout (how many may change now) and schedule (where), and returns a [Plan];
// [Preview] is both as a dry run for a plan in a pull request; [Stack] and its siblings in status.go tell what is true of a stack right now. The plan is data: steps
// for people, and items for the log. Whoever leads proposes the items and calls again when the log moved or the plan's wake time came, until
// there is nothing to do.
//
// Everything here is a function of a View and a time. There is no clock, no goroutine and no log.
package reconcile

import (
	"fmt"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Now is the time that decisions are made at. Log time rules all waits; wall time dates events and ends exemptions.
type Now struct {
	Log  time.Time
	Wall time.Time
}

// Action is what a step of a plan does, as people see it.
type Action string

// The actions.
const (
	ActCreate   Action = "create"   // a task, or a whole stack or service that was not there
	ActReplace  Action = "replace"  // a task by one of a new spec
	ActUpdate   Action = "update"   // in place: nothing restarts
	ActStart    Action = "start"    // a task that was made ready
	ActStop     Action = "stop"     // a task
	ActRemove   Action = "remove"   // a stack or service that Git no longer names
	ActAccept   Action = "accept"   // a stack follows a revision
	ActBlock    Action = "block"    // a stack may not follow it
	ActFail     Action = "fail"     // a stack does not render
	ActWait     Action = "wait"     // for a person's word
	ActRollback Action = "rollback" // a service or stack goes back
	ActFinish   Action = "finish"   // a rollout ended
	ActRefuse   Action = "refuse"   // a task has no place to run
)

// Cause is what a step comes from. Policy at the plan gate judges only what a revision, a prune or a person caused.
type Cause string

// The causes.
const (
	CauseRevision Cause = "revision"
	CauseHeal     Cause = "heal"
	CausePrune    Cause = "prune"
	CausePerson   Cause = "person"
)

// Step is one line of a plan.
type Step struct {
	Action   Action            `json:"action"`
	Cause    Cause             `json:"cause,omitempty"`
	Source   string            `json:"source,omitempty"`
	Stack    string            `json:"stack,omitempty"`
	Service  string            `json:"service,omitempty"`
	Task     string            `json:"task,omitempty"`
	Node     string            `json:"node,omitempty"`
	Volume   string            `json:"volume,omitempty"` // the name of data that go with the stack or service
	Revision manifest.Revision `json:"revision,omitzero"`
	Reason   state.Reason      `json:"reason,omitzero"`
	Fields   []manifest.Change `json:"fields,omitempty"`
}

// Plan is what has to change, and why.
type Plan struct {
	Steps []Step       `json:"steps"`
	Items []state.Item `json:"-"`
	// Wakes tells for each stack that was decided when time alone changes the answer; a stack that is not in it waits for a change only.
	Wakes map[string]time.Time `json:"-"`
}

// Empty says that there is nothing to do.
func (p *Plan) Empty() bool { return len(p.Items) == 0 }

// wake asks to decide a stack again at that time, or earlier.
func (p *Plan) wake(stack string, at time.Time) {
	if at.IsZero() {
		return
	}
	if was, ok := p.Wakes[stack]; !ok || at.Before(was) {
		if p.Wakes == nil {
			p.Wakes = map[string]time.Time{}
		}
		p.Wakes[stack] = at
	}
}

// chunk is how much of an entry the items of one command fill at most.
const chunk = state.MaxEntry * 3 / 4

// Commands cuts the plan's items into log entries that stand alone, with the events that tell of its steps. The commands carry the term that they were decided
// in, so that a leader that lost its term writes nothing.
func (p *Plan) Commands(term uint64, index uint64, now Now) []state.Command {
	var out []state.Command
	var items []state.Item
	size := 0
	flush := func() {
		if len(items) == 0 {
			return
		}
		id := fmt.Sprintf("plan/%d/%d/%d/%d", term, index, now.Log.UnixNano(), len(out))
		out = append(out, state.Command{Term: term, Request: id, At: now.Log, Actor: "leader", Items: items})
		items, size = nil, 0
	}
	for _, it := range append(p.Items[:len(p.Items):len(p.Items)], p.events(now)...) {
		n := 0
		for _, c := range it {
			n += len(c.Object) + len(c.Key) + 64
		}
		if size+n > chunk {
			flush()
		}
		items, size = append(items, it), size+n
	}
	flush()
	return out
}

func (p *Plan) events(now Now) []state.Item {
	var out []state.Item
	for i, s := range p.Steps {
		e := state.Event{Time: now.Wall.UTC(), Kind: string(s.Action), Source: s.Source, Stack: s.Stack, Service: s.Service, Task: s.Task, Revision: s.Revision, Reason: s.Reason}
		if s.Volume != "" { // an event has no other place for its name
			e.Reason.Message = fmt.Sprintf("volume %s on %s, %s", s.Volume, s.Node, s.Reason.Message)
		}
		out = append(out, state.Item{state.Set(state.EventKey(now.Log, i), e)})
	}
	return out
}
