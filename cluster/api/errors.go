package api

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Kind is what a caller can do about an error. Its number is the HTTP status.
type Kind int

// The kinds of errors.
const (
	Invalid  Kind = http.StatusBadRequest            // the request can never work as it is
	Denied   Kind = http.StatusForbidden             // policy, or a state that a person must change first
	NotFound Kind = http.StatusNotFound              // Names lists what there is
	Conflict Kind = http.StatusConflict              // it changed meanwhile: look and try again
	TooLarge Kind = http.StatusRequestEntityTooLarge // of a request
	Internal Kind = http.StatusInternalServerError   // everything else
	NoQuorum Kind = http.StatusServiceUnavailable    // nothing can be written now: try again with the same id
)

// Reasons of errors that no other reason tells more of.
const (
	ReasonInvalid  = "api.invalid"
	ReasonDenied   = "api.denied"
	ReasonNotFound = "api.notfound"
	ReasonConflict = "api.conflict"
	ReasonTooLarge = "api.toolarge"
	ReasonInternal = "api.internal"
	ReasonNoQuorum = "api.noquorum"
)

var kindReasons = map[Kind]string{Invalid: ReasonInvalid, Denied: ReasonDenied, NotFound: ReasonNotFound, Conflict: ReasonConflict,
	TooLarge: ReasonTooLarge, Internal: ReasonInternal, NoQuorum: ReasonNoQuorum}

// Error is a refusal that both sides of the socket understand.
type Error struct {
	Kind    Kind     `json:"-"`
	Message string   `json:"error"`           // a sentence with the way out; never a secret
	Reason  string   `json:"reason"`          // what `gitopsctl explain` takes
	Names   []string `json:"names,omitempty"` // NotFound: names that there are, sorted
}

func (e *Error) Error() string { return e.Message }

// KindOf finds the kind of an error; Internal where it has none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

func newError(kind Kind, message string) *Error {
	return &Error{Kind: kind, Message: message, Reason: kindReasons[kind]}
}

// Invalidf makes an error of kind Invalid.
func Invalidf(format string, args ...any) *Error {
	return newError(Invalid, fmt.Sprintf(format, args...))
}

// Deniedf makes an error of kind Denied with the reason why, an id that explain knows.
func Deniedf(reason, format string, args ...any) *Error {
	e := newError(Denied, fmt.Sprintf(format, args...))
	if reason != "" {
		e.Reason = reason
	}
	return e
}

// Conflictf makes an error of kind Conflict.
func Conflictf(format string, args ...any) *Error {
	return newError(Conflict, fmt.Sprintf(format, args...))
}

// NoQuorumf makes an error of kind NoQuorum.
func NoQuorumf(format string, args ...any) *Error {
	return newError(NoQuorum, fmt.Sprintf(format, args...))
}

const maxNames = 200

// NotFoundf makes an error of kind NotFound: there is no kind (stack, source, task …) of that name. It offers the nearest of the names that
// there are.
func NotFoundf(kind, name string, known []string) *Error {
	e := newError(NotFound, fmt.Sprintf("there is no %s %q", kind, clip(name, 100)))
	known = slices.Sorted(slices.Values(known))
	switch near := Nearest(name, known); {
	case len(near) > 0:
		e.Message += "; did you mean " + strings.Join(near, " or ") + "?"
	case len(known) == 0:
		e.Message += fmt.Sprintf("; there is no %s at all yet", kind)
	case len(known) <= 10:
		e.Message += "; there is " + strings.Join(known, ", ")
	}
	e.Names = known[:min(len(known), maxNames)]
	return e
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

// Nearest lists up to three of the names that are so near to what was typed that it may have been meant, the nearest first.
func Nearest(typed string, names []string) []string {
	type near struct {
		name string
		dist int
	}
	typed = clip(strings.ToLower(typed), 100)
	if typed == "" {
		return nil
	}
	limit := max(1, len(typed)/3)
	var found []near
	for _, n := range names {
		low := strings.ToLower(n)
		d := distance(typed, clip(low, 100))
		if strings.HasPrefix(low, typed) || strings.HasSuffix(low, "/"+typed) {
			d = min(d, 1)
		}
		if d <= limit {
			found = append(found, near{n, d})
		}
	}
	slices.SortStableFunc(found, func(a, b near) int { return a.dist - b.dist })
	var out []string
	for _, f := range found[:min(len(found), 3)] {
		out = append(out, f.name)
	}
	return out
}

// distance counts the letters to insert, drop, change or swap with their neighbour to get from a to b.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
