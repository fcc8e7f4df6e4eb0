package manifest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Severity says what a Problem means for its stack.
type Severity string

// The severities, worst first.
const (
	Error  Severity = "error"  // the stack does not render: it is Failed, and what runs of it keeps running
	Warn   Severity = "warn"   // policy advises against it; it runs
	Notice Severity = "notice" // a key has no effect here; it runs without it
)

// Problem is one thing that is wrong or worth knowing in a revision, with its place and the way out.
type Problem struct {
	Severity Severity `json:"severity"`
	Rule     string   `json:"rule"` // a stable id: what `gitopsctl explain` takes
	Stack    string   `json:"stack,omitempty"`
	Service  string   `json:"service,omitempty"`
	File     string   `json:"file,omitempty"`
	Line     int      `json:"line,omitempty"`
	Message  string   `json:"message"` // what is wrong and what to do about it, one or two sentences
}

// String writes file:line: severity: message [rule], as compilers do.
func (p Problem) String() string {
	var b strings.Builder
	switch {
	case p.File != "" && p.Line > 0:
		fmt.Fprintf(&b, "%s:%d: ", p.File, p.Line)
	case p.File != "":
		b.WriteString(p.File + ": ")
	case p.Stack != "":
		b.WriteString(p.Stack + ": ")
	}
	b.WriteString(string(p.Severity) + ": " + p.Message)
	if p.Rule != "" {
		b.WriteString(" [" + p.Rule + "]")
	}
	return b.String()
}

// SortProblems orders problems by file, line, stack, service, rule and message.
func SortProblems(ps []Problem) {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Stack, b.Stack),
			cmp.Compare(a.Service, b.Service), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Message, b.Message))
	})
}

// HasErrors says whether any of the problems is an error.
func HasErrors(ps []Problem) bool {
	return slices.ContainsFunc(ps, func(p Problem) bool { return p.Severity == Error })
}
