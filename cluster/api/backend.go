package api

import (
	"context"
	"encoding/json"
	"io"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Backend gives the facts and takes operations. All methods are safe for concurrent use.
type Backend interface {
	// View is the newest snapshot that this node has. It never blocks.
	View() *state.View
	// Changed gives a channel that is closed as soon as the view's index is greater than after; at once, if it is already.
	Changed(after uint64) <-chan struct{}
	// Operate does one write and returns when it is in the log and in View (or failed). A sync returns when the source was fetched and its
	// tip was judged: Result then names the revision, and the view at Result.Index holds what was decided of it. An operation with the id
	// of an earlier one changes nothing and gets its answer. Errors are of type *Error where the caller can act on them; ctx bounds the
	// wait, not the operation.
	Operate(ctx context.Context, op Operation) (Result, error)
}

// Live asks what runs, at the source: the node that runs it. All methods are safe for concurrent use and honour their context.
type Live interface {
	// Drift compares what runs of a stack with what its applied revision asks for, now. It lists only tasks that differ.
	Drift(ctx context.Context, stack string) ([]TaskDrift, error)
	// Logs calls line for each line, in order of time, until the end, or with Follow until ctx ends or line fails.
	Logs(ctx context.Context, q LogQuery, line func(LogLine) error) error
	// Exec runs a command in a task's container and returns its exit code. It does not close the streams, and touches none of them after it
	// returned.
	Exec(ctx context.Context, req ExecRequest, streams ExecStreams) (int, error)
	// Inspect is the runtime's own record of a task, as a JSON object. The server masks what looks like a secret in it.
	Inspect(ctx context.Context, task string) (json.RawMessage, error)
}

// Planner says what a revision would change. Nothing of what it is asked about is run or kept.
type Planner interface {
	// PlanBundle plans a directory that the caller rendered. The bundle names the source that it stands for; its Blobs and SecretValues are
	// empty.
	PlanBundle(ctx context.Context, b *manifest.Bundle) (Preview, error)
	// PlanRevision fetches a ref of a source (a branch, a tag, refs/pull/7/head or a commit; empty = what the source follows), renders and
	// plans it.
	PlanRevision(ctx context.Context, source, ref string) (Preview, error)
	// TestSource tries a source step by step, and keeps nothing. What is wrong with the source is in the report; an error means that
	// nothing could be tried.
	TestSource(ctx context.Context, s SourceSpec) (SourceReport, error)
}

// ExecStreams are a session's ends on the server. Stdin is nil where the request has none; Stderr is nil for a terminal. Resize is closed
// when the client is gone.
type ExecStreams struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Resize <-chan Size
}
