package git

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Step is one thing that Test tried.
type Step struct {
	Name   string // "url", "credentials", "server", "ref", "commit", "signature", "path"
	OK     bool
	Detail string // what was found, or what is wrong and the way out
}

// Report is the answer of Test: the steps in order, up to and including the first that failed.
type Report struct{ Steps []Step }

// OK reports whether every step held.
func (r Report) OK() bool { return len(r.Steps) > 0 && r.Steps[len(r.Steps)-1].OK }

// String has one line for each step.
func (r Report) String() string {
	var b strings.Builder
	for _, s := range r.Steps {
		mark := "ok    "
		if !s.OK {
			mark = "failed"
		}
		fmt.Fprintf(&b, "%-12s %s %s\n", s.Name, mark, s.Detail)
	}
	return b.String()
}

// Test tries a source step by step and says which part of it is wrong. It fetches the tip with the
// default limits into a temporary directory and keeps nothing.
func Test(ctx context.Context, spec Spec) Report {
	var rep Report
	ok := func(name, detail string) { rep.Steps = append(rep.Steps, Step{name, true, detail}) }
	failed := func(name string, err error) Report {
		err = explain(ctx, "", Unreachable, err, spec.secrets())
		var own *Error
		if errors.As(err, &own) {
			own.Op = "" // the step's name says it
		}
		rep.Steps = append(rep.Steps, Step{name, false, err.Error()})
		return rep
	}
	loc, err := spec.location()
	if err != nil {
		return failed("url", err)
	}
	ok("url", spec.Location())
	limits := Limits{History: 1}.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, limits.Time)
	defer cancel()
	r, err := openRemote(spec, loc, limits)
	if err != nil {
		if loc.scheme == schemeLocal {
			return failed("server", err)
		}
		return failed("credentials", err)
	}
	defer r.close()
	a, err := r.refs(ctx)
	switch {
	case errors.Is(err, AuthFailed):
		return failed("credentials", err)
	case err != nil:
		return failed("server", err)
	}
	ok("credentials", spec.Auth.String())
	ok("server", fmt.Sprintf("answers with %d refs", len(a.refs)))
	tip, err := a.tip(spec)
	if err != nil {
		return failed("ref", err)
	}
	ok("ref", tip.Ref+" is at "+tip.Commit)

	dir, err := os.MkdirTemp("", "gitopsd-source-test-")
	if err != nil {
		return failed("commit", err)
	}
	defer os.RemoveAll(dir)
	store, err := Open(dir, limits)
	if err != nil {
		return failed("commit", err)
	}
	defer store.Close()
	c, err := store.Fetch(ctx, spec, tip)
	switch {
	case errors.Is(err, Unsigned), errors.Is(err, UnknownSigner), errors.Is(err, BadSignature):
		ok("commit", "fetched")
		return failed("signature", err)
	case errors.Is(err, PathNotFound):
		ok("commit", "fetched")
		ok("signature", signatureDetail(spec, ""))
		return failed("path", err)
	case err != nil:
		return failed("commit", err)
	}
	ok("commit", fmt.Sprintf("fetched, %d entries that can't be used", len(c.Problems)))
	ok("signature", signatureDetail(spec, c.Signer))
	path := cleanSubPath(spec.Path)
	if path == "" {
		path = "the root of the repository"
	}
	ok("path", path)
	return rep
}

func signatureDetail(spec Spec, signer string) string {
	switch {
	case spec.Verify.Mode == "" || spec.Verify.Mode == VerifyNone:
		return "not asked for"
	case signer == "":
		return "good"
	}
	return "good, by " + signer
}
