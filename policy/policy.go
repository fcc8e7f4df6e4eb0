package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Level says what a finding does to a stack.
type Level string

// The levels, strictest first. The empty level means that nobody said: the enclosing scope's counts, and in the end [Enforce].
const (
	Enforce Level = "enforce" // a finding of severity error denies
	Advise  Level = "warn"    // findings are shown, nothing is denied
	Off     Level = "off"     // the stack is not judged
)

var strictness = map[Level]int{Off: 0, Advise: 1, Enforce: 2}

// ParseLevel reads enforce, warn or off.
func ParseLevel(s string) (Level, error) {
	if _, ok := strictness[Level(s)]; !ok {
		return "", fmt.Errorf("%q is no policy level: write enforce, warn or off", s)
	}
	return Level(s), nil
}

func stricter(a, b Level) Level {
	if strictness[a] >= strictness[b] {
		return a
	}
	return b
}

func weaker(a, b Level) Level {
	if strictness[a] <= strictness[b] {
		return a
	}
	return b
}

// Gate is the moment at which policy is asked.
type Gate string

// The two gates.
const (
	RevisionGate Gate = "revision" // a commit was rendered and wants to be accepted
	PlanGate     Gate = "plan"     // a plan wants to be proposed
)

// Cause says why a plan holds an item. Heals, evacuations and whatever else follows from the state of the machines are never judged:
// policy must not keep an accepted stack from running.
type Cause string

// The causes that the plan gate judges. An item with any other cause passes.
const (
	CauseRevision Cause = "revision" // a new revision
	CausePrune    Cause = "prune"    // Git no longer names it
	CausePerson   Cause = "person"   // somebody asked
)

// The actions of an item.
const (
	ActionStart   = "start"   // a service that was not there
	ActionReplace = "replace" // the tasks of a service are replaced
	ActionUpdate  = "update"  // a service changes in place: no task restarts
	ActionRemove  = "remove"  // a service goes, or without Service the whole stack
)

// Item is what a plan does to one service, as the rules see it.
type Item struct {
	Action  string `json:"action"`
	Stack   string `json:"stack"`
	Service string `json:"service,omitempty"`
	Cause   Cause  `json:"cause"`
}

func (i Item) judged() bool {
	return i.Cause == CauseRevision || i.Cause == CausePrune || i.Cause == CausePerson
}

func (i Item) starts() bool { return i.Action != ActionRemove }

// Input is what one review judges: a stack as it would run (see [Harden]), and at the plan gate what would be done to it.
type Input struct {
	Gate  Gate
	Stack manifest.Stack
	Now   time.Time // decides which exemptions count; also given to the rules
	// Items are the plan's, of this stack. Only the plan gate reads them.
	Items []Item
	// ImageUsers tells the USER of images whose configuration is known, by Container.Image; "" is an image without USER, which is root.
	ImageUsers map[string]string
	// ImageTroubles tells, by Container.Image, why the configuration of an image is not known although its registry was asked.
	ImageTroubles map[string]string
	// Sets are switched on for this review at level enforce, beside those that the policy source names: `policy check --set restricted`.
	Sets []string
}

// Decision is the outcome of a review.
type Decision string

// The decisions. The zero Decision allows nothing.
const (
	Allow Decision = "allow"
	Warn  Decision = "warn" // runs, with findings that a person should see
	Deny  Decision = "deny" // the stack is Blocked: what runs keeps running and is healed, nothing new starts
)

// Verdict is what policy says of a stack or a plan.
type Verdict struct {
	Decision   Decision  `json:"decision"`
	Level      Level     `json:"level"`              // the one that counted for the stack
	Findings   []Finding `json:"findings,omitempty"` // by file, line, service, path and rule
	PolicyHash string    `json:"policyHash"`         // of [Engine.Hash]: another hash means that the verdict must be renewed
	Until      time.Time `json:"until,omitzero"`     // end of the first exemption that was used
}

// Allowed says whether what was judged may start.
func (v Verdict) Allowed() bool { return v.Decision == Allow || v.Decision == Warn }

// Finding is one thing that a rule has against a stack.
type Finding struct {
	Set      string            `json:"set"`
	Rule     string            `json:"rule"` // the rule's id, as baseline/privileged
	Severity manifest.Severity `json:"severity"`

	Stack     string `json:"stack,omitempty"`
	Service   string `json:"service,omitempty"`
	Container string `json:"container,omitempty"`
	Path      string `json:"path,omitempty"` // the field, as Stack.Origin takes it
	File      string `json:"file,omitempty"`
	Line      int    `json:"line,omitzero"`

	Message string `json:"message"`
	WayOut  string `json:"wayOut,omitempty"`

	// Exempted findings deny nothing. Exemption is the reason that the policy source gives, Until its end. Both are set for an exemption that
	// has ended, too, so that a person sees why the stack was allowed yesterday.
	Exempted  bool      `json:"exempted,omitzero"`
	Exemption string    `json:"exemption,omitempty"`
	Until     time.Time `json:"until,omitzero"`
}

// Problem writes the finding as a problem of the revision, the form that validate and plan print.
func (f Finding) Problem() manifest.Problem {
	msg := f.Message
	if f.Exempted {
		msg += fmt.Sprintf(" Exempted until %s: %s", lastDay(f.Until), f.Exemption)
	} else if f.WayOut != "" {
		msg += " " + f.WayOut
	}
	return manifest.Problem{Severity: f.Severity, Rule: f.Rule, Stack: f.Stack, Service: f.Service, File: f.File, Line: f.Line, Message: msg}
}

func (f Finding) String() string { return f.Problem().String() }

func sortFindings(fs []Finding) {
	slices.SortStableFunc(fs, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Service, b.Service),
			cmp.Compare(a.Container, b.Container), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Rule, b.Rule),
			strings.Compare(a.Message, b.Message), strings.Compare(string(a.Severity), string(b.Severity)))
	})
}

// Rule describes one rule. All of it comes from the annotations of its Rego file, the only place where it is written.
type Rule struct {
	ID     string `json:"id"`  // set/name
	Set    string `json:"set"` // baseline, restricted or custom
	Title  string `json:"title"`
	Reason string `json:"reason,omitempty"` // why it is a rule
	WayOut string `json:"wayOut,omitempty"` // what to do instead
	File   string `json:"file,omitempty"`   // of the policy source; empty for built-in rules
}
