package git

import (
	"context"
	"errors"
	"strings"
)

// Reason is the class of an Error. It is an error itself, so that a caller can ask
// errors.Is(err, git.Unsigned). The text is an id that may be shown and documented.
type Reason string

func (r Reason) Error() string { return string(r) }

// The classes of what can go wrong with a source.
const (
	// InvalidSource: the Spec itself is refused; nothing was asked of the network.
	InvalidSource Reason = "source-invalid"
	// Unreachable: name lookup, connection, TLS or protocol failed; trying again may help.
	Unreachable Reason = "source-unreachable"
	// TimedOut: the deadline of the operation or of the caller ended it.
	TimedOut Reason = "source-timeout"
	// AuthFailed: the server did not accept the credentials, or wants some.
	AuthFailed Reason = "source-auth"
	// HostKeyUnknown: known_hosts has no key for the SSH server.
	HostKeyUnknown Reason = "source-hostkey-unknown"
	// HostKeyMismatch: the SSH server shows another key than the one in known_hosts.
	HostKeyMismatch Reason = "source-hostkey-mismatch"
	// RepositoryNotFound: the server (or the disk) has no repository there, or does not show it to us.
	RepositoryNotFound Reason = "source-not-found"
	// EmptyRepository: there is no commit yet.
	EmptyRepository Reason = "source-empty"
	// RefNotFound: the branch, tag or commit does not exist.
	RefNotFound Reason = "source-ref-not-found"
	// PathNotFound: the commit has no such directory.
	PathNotFound Reason = "source-path-not-found"
	// Unsigned: a signature is required and there is none.
	Unsigned Reason = "commit-unsigned"
	// UnknownSigner: there is a good signature of a key that is not allowed.
	UnknownSigner Reason = "commit-unknown-signer"
	// BadSignature: there is a signature that does not match, or that can't be judged.
	BadSignature Reason = "commit-bad-signature"
	// Hostile: an entry of the tree could write outside the checkout; the commit is refused.
	Hostile Reason = "commit-hostile"
	// Corrupt: objects are missing, damaged or malformed; the commit is refused.
	Corrupt Reason = "commit-corrupt"
	// TooLarge: a limit on bytes, entries or depth was passed; the commit is refused.
	TooLarge Reason = "commit-too-large"
	// StoreFailed: reading or writing our own directory failed.
	StoreFailed Reason = "source-store"
)

// Error is what every operation of this package returns. Error() reads "fetch shop@main: sentence. way out."
type Error struct {
	Op     string // what was tried, "fetch shop@main"
	Reason Reason
	Text   string // what is the matter, one sentence without a full stop
	WayOut string // what a person can do, one sentence without a full stop; may be empty
	Path   string // the entry of the tree, if it is about one

	ctx error // context.Canceled or context.DeadlineExceeded, so that errors.Is finds them
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Op != "" {
		b.WriteString(e.Op)
		b.WriteString(": ")
	}
	b.WriteString(e.Text)
	if e.WayOut != "" {
		b.WriteString(". ")
		b.WriteString(strings.ToUpper(e.WayOut[:1]))
		b.WriteString(e.WayOut[1:])
	}
	return b.String()
}

// Is reports whether target is this error's Reason.
func (e *Error) Is(target error) bool {
	r, ok := target.(Reason)
	return ok && r == e.Reason
}

// Unwrap gives the context's error and nothing else: the text of an error from below may hold a credential.
func (e *Error) Unwrap() error { return e.ctx }

func fail(r Reason, text, wayOut string) *Error {
	return &Error{Reason: r, Text: text, WayOut: wayOut}
}

func failPath(r Reason, path, text, wayOut string) *Error {
	return &Error{Reason: r, Text: text, WayOut: wayOut, Path: path}
}

// explain gives err an operation and a reason, and takes the secrets out of its text.
// Reason is used when err has none of its own.
func explain(ctx context.Context, op string, reason Reason, err error, secrets []string) error {
	if err == nil {
		return nil
	}
	var own *Error
	out := &Error{Reason: reason, Text: err.Error()}
	if errors.As(err, &own) {
		*out = *own
	}
	if cause := ctxCause(ctx, err); cause != nil {
		out.ctx = cause
		if own == nil || own.Reason == Unreachable || own.Reason == StoreFailed || own.Reason == Corrupt {
			out.Reason, out.Path = TimedOut, ""
			if errors.Is(cause, context.DeadlineExceeded) {
				out.Text = "the deadline passed before the repository had answered in full"
				out.WayOut = "check the network, or give the source a longer time limit"
			} else {
				out.Text, out.WayOut = "stopped before it was done", ""
			}
		}
	}
	if out.Op == "" {
		out.Op = op
	}
	out.Op, out.Text, out.WayOut = redact(out.Op, secrets), redact(out.Text, secrets), redact(out.WayOut, secrets)
	return out
}

func ctxCause(ctx context.Context, err error) error {
	for _, e := range []error{err, ctx.Err()} {
		if errors.Is(e, context.DeadlineExceeded) {
			return context.DeadlineExceeded
		}
		if errors.Is(e, context.Canceled) {
			return context.Canceled
		}
	}
	return nil
}

// redact replaces each secret in s. Very short secrets are left: replacing one letter everywhere
// would tell more than it hides, and nothing of that length protects anything.
func redact(s string, secrets []string) string {
	for _, secret := range secrets {
		if len(secret) >= 4 {
			s = strings.ReplaceAll(s, secret, "[redacted]")
		}
	}
	return s
}

// printable makes text of a stranger (a server's message, a commit's subject, a file's name) safe to show
// on a terminal and in a log: one line, no control characters, at most max bytes.
func printable(s string, max int) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < 0x20, r >= 0x7f && r < 0xa0, r == 0xfffd:
			return '?'
		case r >= 0x200b && r <= 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069, r == 0x2028, r == 0x2029, r == 0xfeff:
			return '?' // marks that reorder or hide the text around them
		}
		return r
	}, strings.TrimSpace(s))
	if len(clean) > max {
		cut := max
		for cut > 0 && clean[cut]&0xc0 == 0x80 {
			cut--
		}
		clean = clean[:cut] + "…"
	}
	return clean
}
