package api

import (
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// DefaultSocket is where a daemon listens unless its configuration says otherwise.
const DefaultSocket = "/run/gitopsd/gitopsd.sock"

// OperationKind is what an operation does.
type OperationKind string

// The operations, with the fields of Operation that they take.
const (
	OpSync         OperationKind = "sync"          // Source or Stack: fetch and judge now. Neither, or a stack that is not known yet = all sources
	OpSuspend      OperationKind = "suspend"       // Stack, Reason: do not follow Git
	OpResume       OperationKind = "resume"        // Stack: follow Git again
	OpApprove      OperationKind = "approve"       // Source, Revision (commit or its beginning; empty = the one that waits); or Stack
	OpRollback     OperationKind = "rollback"      // Stack, Revision (empty = the last that was Deployed), Reason. Pins the stack
	OpUnpin        OperationKind = "unpin"         // Stack: follow Git again after a rollback
	OpRestart      OperationKind = "restart"       // Stack, Service (empty = all): replace each task, by the update policy
	OpSourceAdd    OperationKind = "source.add"    // SourceSpec; a source of that name is replaced
	OpSourceRemove OperationKind = "source.remove" // Source: its stacks are pruned
	OpSecretSet    OperationKind = "secret.set"    // Secret
	OpSecretRemove OperationKind = "secret.remove" // Secret.Name
	OpVolumeForget OperationKind = "volume.forget" // Volume, Force: its data stay, and bind no slot to their node any more
	OpVolumeRemove OperationKind = "volume.remove" // Volume: its node removes it with its data
)

var operationKinds = []OperationKind{OpSync, OpSuspend, OpResume, OpApprove, OpRollback, OpUnpin, OpRestart,
	OpSourceAdd, OpSourceRemove, OpSecretSet, OpSecretRemove, OpVolumeForget, OpVolumeRemove}

// Operation is one write: a person's word. What runs is only changed by Git and by these.
type Operation struct {
	Kind       OperationKind `json:"kind"`
	ID         string        `json:"id"`              // the request: one that is sent again does nothing twice
	Actor      string        `json:"actor,omitempty"` // who asks; for the history
	Source     string        `json:"source,omitempty"`
	Stack      string        `json:"stack,omitempty"`
	Service    string        `json:"service,omitempty"`
	Revision   string        `json:"revision,omitempty"` // a commit, or its first digits
	Reason     string        `json:"reason,omitempty"`   // a sentence for the history
	SourceSpec *SourceSpec   `json:"sourceSpec,omitempty"`
	Secret     *SecretValue  `json:"secret,omitempty"`
	Volume     string        `json:"volume,omitempty"` // the key of a VolumeInfo
	Force      bool          `json:"force,omitempty"`  // although services use it
}

// Check says what is missing in an operation, before anything is asked of a Backend.
func (op Operation) Check() error {
	need := func(ok bool, what string) error {
		if ok {
			return nil
		}
		return Invalidf("%s needs %s", op.Kind, what)
	}
	if !slices.Contains(operationKinds, op.Kind) {
		return Invalidf("%q is no operation; those are %v", op.Kind, operationKinds)
	}
	if op.ID == "" || len(op.ID) > 128 {
		return Invalidf("%s needs an id of 1 to 128 characters, so that it may be sent again", op.Kind)
	}
	switch op.Kind {
	case OpSync:
		return need(op.Source == "" || op.Stack == "", "a source or a stack, not both")
	case OpSuspend, OpResume, OpRollback, OpUnpin, OpRestart:
		return need(op.Stack != "", "a stack")
	case OpApprove:
		return need((op.Source == "") != (op.Stack == ""), "a source or a stack")
	case OpSourceAdd:
		if err := need(op.SourceSpec != nil, "a source"); err != nil {
			return err
		}
		return op.SourceSpec.Check()
	case OpSourceRemove:
		return need(op.Source != "", "a source")
	case OpVolumeForget, OpVolumeRemove:
		return need(op.Volume != "", "a volume")
	case OpSecretSet, OpSecretRemove:
		return need(op.Secret != nil && secretName.MatchString(op.Secret.Name), "a secret with a name of letters, digits, ., - and _, or STACK/NAME for one of a stack")
	}
	return nil
}

// Result is what became of an operation.
type Result struct {
	Index    uint64            `json:"index"`             // of the log entry that holds it; for sync: by which the tip was judged
	Message  string            `json:"message,omitempty"` // one sentence
	Source   string            `json:"source,omitempty"`
	Revision manifest.Revision `json:"revision,omitzero"` // sync: the tip that was judged; rollback: where to
	Again    bool              `json:"again,omitempty"`   // the same id had been done before
}

// sourceName keeps names apart from flags, paths and the lines of a table.
var sourceName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

// secretName leaves the names that begin with a dot to what the cluster keeps for itself.
var secretName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*(/[a-zA-Z0-9][a-zA-Z0-9._-]*)?$`)

// SourceSpec is a source as a person asks for it, with its credentials. It never prints them.
type SourceSpec struct {
	Name       string            `json:"name"`
	URL        string            `json:"url"`
	Branch     string            `json:"branch,omitempty"`
	Tag        string            `json:"tag,omitempty"`
	Path       string            `json:"path,omitempty"`
	Interval   manifest.Duration `json:"interval,omitempty"` // 0 = the daemon's default
	Verify     string            `json:"verify,omitempty"`   // none, ssh or gpg
	Signers    string            `json:"signers,omitempty"`  // text of allowed_signers, or an armored key ring
	Username   string            `json:"username,omitempty"`
	Token      string            `json:"token,omitempty"`
	Key        string            `json:"key,omitempty"` // ssh: a private key in PEM form
	Passphrase string            `json:"passphrase,omitempty"`
	KnownHosts string            `json:"knownHosts,omitempty"`
	CA         string            `json:"ca,omitempty"`  // PEM certificates that are trusted beside the system's
	Yes        bool              `json:"yes,omitempty"` // its first revision needs no approval
	// Policy says that it holds the policy (policy.yaml, exemptions.yaml, *.rego), and no stacks.
	Policy bool `json:"policy,omitempty"`
}

// Check says what can't be followed whatever is at the URL. What is at the URL is for [Client.TestSource].
func (s SourceSpec) Check() error {
	switch {
	case s.Name == "" || s.URL == "":
		return Invalidf("a source needs a name and a URL")
	case !sourceName.MatchString(s.Name):
		return Invalidf("the name of a source has letters, digits, ., - and _, begins with a letter or digit, and is at most 63 characters long: not %q", clip(s.Name, 100))
	case s.Branch != "" && s.Tag != "":
		return Invalidf("source %s: it follows a branch or a tag, not both", s.Name)
	case s.Interval != 0 && s.Interval < minInterval:
		return Invalidf("source %s: an interval of %s is too short; write %s or more", s.Name, s.Interval, minInterval)
	case !slices.Contains([]string{"", "none", "ssh", "gpg"}, s.Verify):
		return Invalidf("source %s: %q is no way to verify commits; those are none, ssh and gpg", s.Name, clip(s.Verify, 100))
	case (s.Verify == "ssh" || s.Verify == "gpg") && s.Signers == "":
		return Invalidf("source %s: to verify commits with %s it needs the signers that are allowed, in a file", s.Name, s.Verify)
	}
	return nil
}

// minInterval keeps a slip of the pen from being a flood for the forge.
const minInterval = manifest.Duration(time.Second)

// String names the source and none of its credentials.
func (s SourceSpec) String() string { return "source " + s.Name }

// Format implements fmt.Formatter, so that no verb shows the credentials.
func (s SourceSpec) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue implements slog.LogValuer.
func (s SourceSpec) LogValue() slog.Value { return slog.StringValue(s.String()) }

// SecretValue is a secret on its way in. It never prints its value.
type SecretValue struct {
	Name  string `json:"name"`
	Value []byte `json:"value,omitempty"`
}

// String names the secret only.
func (s SecretValue) String() string { return "secret " + s.Name }

// Format implements fmt.Formatter, so that no verb shows the value.
func (s SecretValue) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue implements slog.LogValuer.
func (s SecretValue) LogValue() slog.Value { return slog.StringValue(s.String()) }

// SourceReport says which part of a source is wrong: the steps that were tried, in order, up to and including the first that failed.
type SourceReport struct {
	Source string       `json:"source"`
	Steps  []SourceStep `json:"steps"`
}

// SourceStep is one thing that was tried: url, credentials, server, ref, commit, signature, path.
type SourceStep struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// OK says whether every step held.
func (r SourceReport) OK() bool { return len(r.Steps) > 0 && r.Steps[len(r.Steps)-1].OK }

// Preview is a plan that nobody carries out: what a revision would change.
type Preview struct {
	Source   string            `json:"source"`
	Revision manifest.Revision `json:"revision,omitzero"`
	Steps    []reconcile.Step  `json:"steps"`
	// Problems are of the files; Findings are policy's. An error among them is of a stack that would be Failed or Blocked.
	Problems []manifest.Problem `json:"problems,omitempty"`
	Findings []manifest.Problem `json:"findings,omitempty"`
	// Hardening lists the restrictions that nobody wrote, with the line that gives each back.
	Hardening []Hardening `json:"hardening,omitempty"`
	// Data names each volume or directory that would start empty or be left behind.
	Data    []DataNote `json:"data,omitempty"`
	Summary Summary    `json:"summary"`
}

// Hardening is a restriction of a stack that nobody wrote.
type Hardening struct {
	Stack string `json:"stack"`
	policy.Applied
}

// DataNote says what a plan means for data on a node.
type DataNote struct {
	Stack   string `json:"stack"`
	Name    string `json:"name"` // of the volume, or path of the directory
	Kind    string `json:"kind"` // volume, data, anonymous, bind
	Node    string `json:"node,omitempty"`
	Message string `json:"message"`
}

// Summary counts the steps of a plan.
type Summary struct {
	Create  int `json:"create"`  // tasks, services or stacks
	Replace int `json:"replace"` // tasks by others
	Update  int `json:"update"`  // in place
	Stop    int `json:"stop"`
	Remove  int `json:"remove"` // what Git no longer names
	Blocked int `json:"blocked"`
	Failed  int `json:"failed"`
	Waiting int `json:"waiting"` // for a person
	Refused int `json:"refused"` // tasks without a place
}

// Summarize counts the steps of a plan.
func Summarize(steps []reconcile.Step) Summary {
	var s Summary
	for _, step := range steps {
		switch step.Action {
		case reconcile.ActCreate, reconcile.ActStart:
			s.Create++
		case reconcile.ActReplace, reconcile.ActRollback:
			s.Replace++
		case reconcile.ActUpdate:
			s.Update++
		case reconcile.ActStop:
			s.Stop++
		case reconcile.ActRemove:
			s.Remove++
		case reconcile.ActBlock:
			s.Blocked++
		case reconcile.ActFail:
			s.Failed++
		case reconcile.ActWait:
			s.Waiting++
		case reconcile.ActRefuse:
			s.Refused++
		}
	}
	return s
}

// Denied says whether anything of the revision would not be run: a stack that is blocked or does not render.
func (p Preview) Denied() bool {
	return p.Summary.Blocked+p.Summary.Failed > 0 || manifest.HasErrors(p.Problems) || manifest.HasErrors(p.Findings)
}

// Empty says whether the revision changes nothing.
func (p Preview) Empty() bool { return len(p.Steps) == 0 }

// TaskDrift is a task that is not what it should be.
type TaskDrift struct {
	Task    string `json:"task"` // its id, or of a stranger: the container's
	Stack   string `json:"stack"`
	Service string `json:"service,omitempty"`
	Node    string `json:"node,omitempty"`
	// NodeName is what people call the node. The server fills it in.
	NodeName string        `json:"nodeName,omitempty"`
	Drift    []state.Drift `json:"drift"`
	Healed   bool          `json:"healed,omitempty"` // the stack heals drift; else it only reports it
}

// LogQuery says which lines of which tasks.
type LogQuery struct {
	Stack    string    `json:"stack"`
	Service  string    `json:"service,omitempty"` // empty = all
	Task     string    `json:"task,omitempty"`    // id; wins over Service
	Follow   bool      `json:"follow,omitempty"`
	Since    time.Time `json:"since,omitzero"`
	Tail     int       `json:"tail"` // lines of each task; -1 = all
	Previous bool      `json:"previous,omitempty"`
}

// LogLine is one line of a task's output.
type LogLine struct {
	Task    string    `json:"task"`
	Time    time.Time `json:"time"`
	Stream  string    `json:"stream"` // stdout, stderr, or keeper: about lines that were lost
	Attempt int       `json:"attempt,omitempty"`
	Partial bool      `json:"partial,omitempty"` // the line goes on in the next one of this stream
	Text    []byte    `json:"text"`              // as the program wrote it, without a newline
}

// ExecRequest is a command to run in a task.
type ExecRequest struct {
	Task       string   `json:"task"`
	Container  string   `json:"container,omitempty"` // empty = the main one
	Command    []string `json:"command"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"workingDir,omitempty"`
	Env        []string `json:"env,omitempty"`
	Stdin      bool     `json:"stdin,omitempty"`
	TTY        bool     `json:"tty,omitempty"`
	Size       Size     `json:"size,omitzero"` // of the terminal at the start
}

// Size is a terminal's.
type Size struct {
	Columns uint16 `json:"columns"`
	Rows    uint16 `json:"rows"`
}

// Version tells what a daemon is and how far its log is.
type Version struct {
	Version string    `json:"version"`
	Node    string    `json:"node,omitempty"`
	Cluster string    `json:"cluster,omitempty"`
	Format  int       `json:"format"`
	Index   uint64    `json:"index"`
	At      time.Time `json:"at,omitzero"` // log time
}

// Status is the answer to `gitopsctl status`.
type Status struct {
	Index   uint64                  `json:"index"`
	At      time.Time               `json:"at,omitzero"` // log time
	Sources []SourceStatus          `json:"sources"`
	Stacks  []reconcile.StackStatus `json:"stacks"`
}

// SourceStatus is what is true of a source now. Of its credentials it says only whether there are some.
type SourceStatus struct {
	Name     string             `json:"name"`
	URL      string             `json:"url"`
	Branch   string             `json:"branch,omitempty"`
	Tag      string             `json:"tag,omitempty"`
	Path     string             `json:"path,omitempty"`
	Interval manifest.Duration  `json:"interval"`
	Verify   string             `json:"verify,omitempty"`
	Auth     bool               `json:"auth,omitempty"`
	Seen     manifest.Revision  `json:"seen,omitzero"`
	Accepted manifest.Revision  `json:"accepted,omitzero"`
	State    string             `json:"state"` // Following, Waiting, Failing, New, Removing
	Waiting  []state.Reason     `json:"waiting,omitempty"`
	Trouble  *state.Reason      `json:"trouble,omitempty"`
	Problems []manifest.Problem `json:"problems,omitempty"`
	Stacks   int                `json:"stacks"`
	// Policy says that it holds the policy; PolicyHash is that of the policy in force, as verdicts name it.
	Policy     bool   `json:"policy,omitempty"`
	PolicyHash string `json:"policyHash,omitempty"`
}

// The states of a source.
const (
	SourceFollowing = "Following" // its newest commit is what the stacks follow
	SourceWaiting   = "Waiting"   // its newest commit waits for a person
	SourceFailing   = "Failing"   // it could not be fetched
	SourceNew       = "New"       // nothing was fetched yet
	SourceRemoving  = "Removing"
)

// VolumeInfo is data on a node.
type VolumeInfo struct {
	Key string `json:"key"`
	state.Volume
	Path     string    `json:"path,omitempty"`     // where it is on the node
	NodeName string    `json:"nodeName,omitempty"` // what people call the node
	Since    time.Time `json:"since"`              // log time
}

// SecretInfo says that there is a secret of that name. Its value never leaves the node that uses it.
type SecretInfo struct {
	Name  string    `json:"name"`
	Stack string    `json:"stack,omitempty"` // whose revision brought it; empty = set by a person
	Since time.Time `json:"since"`           // log time of its last change
	Nodes int       `json:"nodes"`           // nodes that can open it
}

// EventInfo is one line of history with its place in it.
type EventInfo struct {
	Key string `json:"key"` // sorts by time
	state.Event
}

// StackHistory is what became of a stack's revisions, newest first.
type StackHistory struct {
	Stack    string            `json:"stack"`
	Pinned   *state.Reason     `json:"pinned,omitempty"`
	Stable   manifest.Revision `json:"stable,omitzero"` // newest one that became Ready: where a rollback without revision goes
	Outcomes []state.Outcome   `json:"outcomes"`
}
