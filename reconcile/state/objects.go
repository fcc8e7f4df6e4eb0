package state

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Object is one of the kinds of objects that tables hold.
type Object interface {
	Cluster | Node | Source | Stack | Release | Spec | Service | Retired | Task | Report | Volume | Network | Image | Secret | Event
	table() string
}

func (Cluster) table() string { return "clusters" }
func (Node) table() string    { return "nodes" }
func (Source) table() string  { return "sources" }
func (Stack) table() string   { return "stacks" }
func (Release) table() string { return "releases" }
func (Spec) table() string    { return "specs" }
func (Service) table() string { return "services" }
func (Retired) table() string { return "retired" }
func (Task) table() string    { return "tasks" }
func (Report) table() string  { return "reports" }
func (Volume) table() string  { return "volumes" }
func (Network) table() string { return "networks" }
func (Image) table() string   { return "images" }
func (Secret) table() string  { return "secrets" }
func (Event) table() string   { return "events" }

var tables = map[string]ops{
	"clusters": opsOf(func(v *View) *Table[Cluster] { return &v.Clusters }),
	"nodes":    opsOf(func(v *View) *Table[Node] { return &v.Nodes }),
	"sources":  opsOf(func(v *View) *Table[Source] { return &v.Sources }),
	"stacks":   opsOf(func(v *View) *Table[Stack] { return &v.Stacks }),
	"releases": opsOf(func(v *View) *Table[Release] { return &v.Releases }),
	"specs":    opsOf(func(v *View) *Table[Spec] { return &v.Specs }),
	"services": opsOf(func(v *View) *Table[Service] { return &v.Services }),
	"retired":  opsOf(func(v *View) *Table[Retired] { return &v.Retired }),
	"tasks":    opsOf(func(v *View) *Table[Task] { return &v.Tasks }),
	"reports":  opsOf(func(v *View) *Table[Report] { return &v.Reports }),
	"volumes":  opsOf(func(v *View) *Table[Volume] { return &v.Volumes }),
	"networks": opsOf(func(v *View) *Table[Network] { return &v.Networks }),
	"images":   opsOf(func(v *View) *Table[Image] { return &v.Images }),
	"secrets":  opsOf(func(v *View) *Table[Secret] { return &v.Secrets }),
	"events":   opsOf(func(v *View) *Table[Event] { return &v.Events }),
}

var tableNames = slices.Sorted(maps.Keys(tables))

// Reason says why something is as it is: an id that `gitopsctl explain` knows, and a sentence with the names and numbers of the case.
type Reason struct {
	ID      string `json:"id"`
	Message string `json:"message"`
}

func (r Reason) String() string {
	if r.ID == "" {
		return r.Message
	}
	return r.ID + ": " + r.Message
}

// Cluster is the one object that says which cluster this log is of. Its key is "cluster".
type Cluster struct {
	ID   string   `json:"id"`
	Name string   `json:"name,omitempty"`
	Pool []string `json:"pool"` // CIDRs that node blocks are cut from
}

// Node is a machine that runs the agent, by its id. Its raft address is not here: it may change, the id does not.
type Node struct {
	Name     string            `json:"name"`
	Block    string            `json:"block"` // CIDR that the subnets of its networks are cut from
	Labels   map[string]string `json:"labels,omitempty"`
	Platform string            `json:"platform"` // os/arch
	CPU      manifest.CPU      `json:"cpu"`
	Memory   manifest.Bytes    `json:"memory"`
	DataRoot string            `json:"dataRoot"`
	Version  string            `json:"version,omitempty"`
	SealKey  string            `json:"sealKey,omitempty"` // public key that secrets for this node are sealed to
	Boot     string            `json:"boot,omitempty"`    // the kernel's id of the machine's present boot
	// Booted is the log time at which that boot was first told of. What the node reported to run before it does not run any more.
	Booted time.Time `json:"booted,omitzero"`
}

// Source is a Git repository that the cluster follows, by name.
type Source struct {
	Name     string            `json:"name"`
	URL      string            `json:"url"` // without credentials
	Branch   string            `json:"branch,omitempty"`
	Tag      string            `json:"tag,omitempty"`
	Path     string            `json:"path,omitempty"`
	Interval manifest.Duration `json:"interval"`
	Verify   string            `json:"verify,omitempty"`  // "", ssh or gpg
	Signers  string            `json:"signers,omitempty"` // allowed signers or an armored key ring: public
	Known    string            `json:"knownHosts,omitempty"`
	Auth     string            `json:"auth,omitempty"` // name of the Secret with the credentials
	Yes      bool              `json:"yes,omitempty"`  // the first revision needs no approval
	// Policy says that it holds no stacks but the policy that judges those of all other sources. There is one such source at most.
	Policy     bool   `json:"policy,omitempty"`
	PolicyHash string `json:"policyHash,omitempty"` // of the policy that Accepted made, as verdicts name it

	Seen     manifest.Revision `json:"seen,omitzero"`      // newest tip that was fetched and judged
	Accepted manifest.Revision `json:"accepted,omitzero"`  // newest one that the stacks follow
	Approved string            `json:"approved,omitempty"` // commit that a person approved
	// PruneVolumes is what Accepted says of the volumes of what is pruned, where the stack has no word of its own.
	PruneVolumes bool               `json:"pruneVolumes,omitempty"`
	Waiting      []Reason           `json:"waiting,omitempty"` // why Seen is not Accepted
	Trouble      *Reason            `json:"trouble,omitempty"` // the last fetch failed
	Removing     bool               `json:"removing,omitempty"`
	Problems     []manifest.Problem `json:"problems,omitempty"` // of the revision as a whole
}

// Decision is what became of what a revision asks of a stack.
type Decision string

// The decisions.
const (
	DecisionAccepted Decision = "accepted"
	DecisionBlocked  Decision = "blocked" // policy, signature, prune budget, approval
	DecisionFailed   Decision = "failed"  // does not render
)

// Wanted is what the newest judged revision asks of a stack, and what was said to that.
type Wanted struct {
	Revision manifest.Revision  `json:"revision"`
	Release  string             `json:"release,omitempty"` // empty when it does not render
	Decision Decision           `json:"decision"`
	Reasons  []Reason           `json:"reasons,omitempty"`
	Problems []manifest.Problem `json:"problems,omitempty"` // notices, warnings and errors, bounded
	Verdict  Verdict            `json:"verdict,omitzero"`
}

// Verdict is what policy said of a stack, and how long that holds.
type Verdict struct {
	Policy string    `json:"policy,omitempty"` // hash of the policy that was asked
	Deny   bool      `json:"deny,omitempty"`
	Until  time.Time `json:"until,omitzero"` // when an exemption that was used ends
}

// Applied is a release that a stack was told to be.
type Applied struct {
	Revision manifest.Revision `json:"revision"`
	Release  string            `json:"release"`
}

// Stack is a Compose project of the cluster, by name.
type Stack struct {
	Name      string    `json:"name"`
	Source    string    `json:"source"`
	Dir       string    `json:"dir,omitempty"`
	Wanted    Wanted    `json:"wanted"`
	Applied   *Applied  `json:"applied,omitempty"`   // what it should be now
	Stable    *Applied  `json:"stable,omitempty"`    // the newest one that became Ready
	Outcome   Outcome   `json:"outcome,omitzero"`    // of Applied
	History   []Outcome `json:"history,omitempty"`   // earlier ones, newest first
	Suspended *Reason   `json:"suspended,omitempty"` // a person said so
	Pinned    *Reason   `json:"pinned,omitempty"`    // a person rolled back; Git is followed again after unpin
	Removing  bool      `json:"removing,omitempty"`  // Git no longer names it
	// WithVolumes says of one that is being removed that its volumes go with it.
	WithVolumes bool    `json:"withVolumes,omitempty"`
	Back        *Reason `json:"back,omitempty"`   // one service failed and the stack asks to go back as a whole
	Banned      *Reason `json:"banned,omitempty"` // policy denies Stable today: nothing may be rolled back to it
}

// KeepHistory is the number of earlier outcomes that a stack remembers.
const KeepHistory = 20

// OutcomeKind is what became of a revision in a stack.
type OutcomeKind string

// The outcomes. An empty one means that the rollout goes on.
const (
	Deployed   OutcomeKind = "Deployed"
	RolledBack OutcomeKind = "RolledBack"
	Superseded OutcomeKind = "Superseded"
	Aborted    OutcomeKind = "Aborted"
	Stalled    OutcomeKind = "Stalled"
)

// Outcome tells the truth about a revision in a stack.
type Outcome struct {
	Revision manifest.Revision `json:"revision"`
	Release  string            `json:"release,omitempty"`
	Kind     OutcomeKind       `json:"kind,omitempty"`
	Reason   Reason            `json:"reason,omitzero"`
	To       manifest.Revision `json:"to,omitzero"` // RolledBack: to which
	Started  time.Time         `json:"started"`     // log time
	Ended    time.Time         `json:"ended,omitzero"`
}

// Release is a rendered stack, by its hash: the stack without its services, and the hash of each service's Spec.
type Release struct {
	Stack    manifest.Stack    `json:"stack"`
	Services map[string]string `json:"services"`
}

// Names lists the services of the release, sorted.
func (r Release) Names() []string { return slices.Sorted(maps.Keys(r.Services)) }

// Spec is a rendered service, by its hash.
type Spec struct {
	Service manifest.Service `json:"service"`
}

// Step is where the rollout of a service is.
type Step string

// The steps of a rollout.
const (
	StepDone       Step = ""           // every task is of the target and healthy
	StepUpdating   Step = "updating"   // tasks are being replaced
	StepMonitoring Step = "monitoring" // all are replaced, the last are watched
	StepPaused     Step = "paused"     // too many failed; a person or a new revision must act
	StepRollback   Step = "rollback"   // going back to the stable spec
)

// Service is where a service stands between two specs, by "stack/service".
type Service struct {
	Target         string            `json:"target"` // spec that its tasks should have
	Revision       manifest.Revision `json:"revision"`
	Stable         string            `json:"stable,omitempty"` // spec of the last rollout that ended well
	StableRevision manifest.Revision `json:"stableRevision,omitzero"`
	Step           Step              `json:"step,omitempty"`
	Started        time.Time         `json:"started,omitzero"` // log time
	Failed         []string          `json:"failed,omitempty"` // tasks of this rollout that failed, sorted
	Bad            string            `json:"bad,omitempty"`    // spec that was rolled back from: not tried again until Git changes
	BadRevision    manifest.Revision `json:"badRevision,omitzero"`
	Reason         Reason            `json:"reason,omitzero"`
	Restart        uint64            `json:"restart,omitempty"` // counts `gitopsctl restart`: tasks of a lower generation are replaced
	// After has the services whose rollouts restart this one (depends_on with restart), each with the generation of the newest task that this one was restarted for.
	After    map[string]int    `json:"after,omitempty"`
	Removing bool              `json:"removing,omitempty"`
	Gen      int               `json:"gen,omitempty"`   // generation of the newest task; that of the first is above Retired.Gen
	Ports    map[string]uint16 `json:"ports,omitempty"` // host ports chosen for ports that name none, by "protocol/target"
}

// Retired is what has to be known of all services that are gone, so that no task gets the id of one of theirs when one of that name comes back. Its key is RetiredKey;
// it is not there before the first service went.
type Retired struct {
	Gen int `json:"gen"` // the highest generation of their tasks
}

// RetiredKey is the key of the one Retired object.
const RetiredKey = "services"

// ServiceKey is the key of a service.
func ServiceKey(stack, service string) string { return stack + "/" + service }

// Desired is what a node is told to do with a task.
type Desired string

// The desired states. They only move down this list.
const (
	DesiredReady Desired = "ready" // pull and create, do not start: the old task stops only when the new one could
	DesiredRun   Desired = "run"
	DesiredStop  Desired = "stop" // out of names and ports, then stop and remove
)

// Task is one instance of a service on a node, by its id.
type Task struct {
	ID       string            `json:"id"` // stack/service.slot.generation
	Stack    string            `json:"stack"`
	Service  string            `json:"service"`
	Slot     int               `json:"slot"`
	Gen      int               `json:"gen"`
	Node     string            `json:"node"`
	Spec     string            `json:"spec"`     // hash of its Spec
	Revision manifest.Revision `json:"revision"` // that asked for it, verified and allowed
	Restart  uint64            `json:"restart,omitempty"`
	Desired  Desired           `json:"desired"`
	Images   map[string]string `json:"images,omitempty"` // container -> digest, where known when it was made
	Addrs    map[string]string `json:"addrs,omitempty"`  // network -> address
	Made     time.Time         `json:"made"`             // log time
	Done     time.Time         `json:"done,omitzero"`    // log time when it was first seen ready: update_config's delay and monitor count from here
	Why      Reason            `json:"why"`              // what made it
	StopWhy  Reason            `json:"stopWhy,omitzero"`
}

// TaskID derives the id of a task.
func TaskID(stack, service string, slot, gen int) string {
	return fmt.Sprintf("%s/%s.%d.%d", stack, service, slot, gen)
}

// Key is the service that the task is of.
func (t Task) Key() string { return ServiceKey(t.Stack, t.Service) }

// TaskPrefix is what the ids of all tasks of a service begin with.
func TaskPrefix(stack, service string) string { return stack + "/" + service + "." }

// Phase is how far a task has come. Within one attempt it only moves forward.
type Phase string

// The phases of a task, in order.
const (
	PhasePending  Phase = "" // the node has not said anything
	PhasePulling  Phase = "pulling"
	PhaseCreated  Phase = "created" // could start at once
	PhaseWaiting  Phase = "waiting" // for a dependency, or for its restart
	PhaseRunning  Phase = "running"
	PhaseStopping Phase = "stopping"
	PhaseComplete Phase = "complete" // ended with 0, and that is how it should be
	PhaseFailed   Phase = "failed"   // ended, and will not be started again
	PhaseGone     Phase = "gone"     // stopped and removed: nothing of it is left on the node
)

// Health is what is known of a running task's health.
type Health string

// The healths of a task. A task without a check is healthy as soon as it runs.
const (
	HealthUnknown   Health = ""
	HealthStarting  Health = "starting"
	HealthHealthy   Health = "healthy"
	HealthUnhealthy Health = "unhealthy"
)

// Report is what a node says of a task, by the task's id. Only that node writes it, and only when something changed.
type Report struct {
	Node     string            `json:"node"`
	Phase    Phase             `json:"phase,omitempty"`
	Attempt  int               `json:"attempt,omitempty"` // from 1: starts of the main container
	Health   Health            `json:"health,omitempty"`
	ExitCode int               `json:"exitCode,omitempty"` // of the last end
	Reason   Reason            `json:"reason,omitzero"`    // why it is not running or not healthy
	Ended    Reason            `json:"ended,omitzero"`     // how the attempt before this one ended
	Failures int               `json:"failures,omitempty"` // ends and failed health checks that were failures, since the task was made
	Images   map[string]string `json:"images,omitempty"`   // container -> digest that it was created from
	Drift    []Drift           `json:"drift,omitempty"`    // found now and not healed
	Retry    bool              `json:"retry,omitempty"`    // it will be tried again by itself
}

// Running says whether the task's containers run.
func (r Report) Running() bool { return r.Phase == PhaseRunning }

// Ready says whether the task does its work: it runs and is healthy, or it ended as it should.
func (r Report) Ready() bool {
	return r.Phase == PhaseRunning && r.Health == HealthHealthy || r.Phase == PhaseComplete
}

// Drift is one field of what runs that is not what it should be.
type Drift struct {
	Kind string    `json:"kind"` // missing, extra, stopped, paused, limits, image, stranger
	Path string    `json:"path,omitempty"`
	Want string    `json:"want,omitempty"`
	Have string    `json:"have,omitempty"`
	Time time.Time `json:"time,omitzero"` // when it was first seen, log time
}

// Volume is data that a task left on a node: a named or anonymous volume, a data path, a writable bind. Its key is VolumeKey.
type Volume struct {
	Name    string             `json:"name"` // real name, or path
	Kind    manifest.MountKind `json:"kind"`
	Stack   string             `json:"stack"`
	Service string             `json:"service,omitempty"` // of an anonymous one
	Slot    int                `json:"slot,omitempty"`
	Node    string             `json:"node"`
	Orphan  bool               `json:"orphan,omitempty"` // no release names it any more
	// Own says that its directory is made for the stack, by its node: only such data are ever removed.
	Own bool `json:"own,omitempty"`
	// Removing says why its node removes it with its data; the record goes when that is done. Stuck is why that could not be done yet.
	Removing *Reason `json:"removing,omitempty"`
	Stuck    *Reason `json:"stuck,omitempty"`
}

// VolumeKey is the key of a volume: data on a node.
func VolumeKey(node string, kind manifest.MountKind, name string) string {
	return node + "/" + string(kind) + "/" + strings.TrimPrefix(name, "/")
}

// Network is a network that tasks of a stack, or of several, share, by its real name.
type Network struct {
	Stack    string            `json:"stack,omitempty"` // that declares it; empty = external: made for whoever names it
	Internal bool              `json:"internal,omitempty"`
	Subnets  map[string]string `json:"subnets,omitempty"` // node -> CIDR, since a task was placed there; kept as long as one is
	Subnet   string            `json:"subnet,omitempty"`  // the file's (ipam), for every node; empty = a part of each node's block
	Gateway  string            `json:"gateway,omitempty"` // of the file's subnet
}

// Image is the digest that a spec's image reference was resolved to, once, by "spec/container".
type Image struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
}

// Secret is a sealed value, by name. Only nodes that it is sealed to can open it.
type Secret struct {
	Name   string            `json:"name"`
	Ref    string            `json:"ref"`             // keyed hash of the value
	Sealed []byte            `json:"sealed"`          // the value, encrypted with a data key
	Keys   map[string][]byte `json:"keys"`            // node -> the data key, sealed to that node
	Stack  string            `json:"stack,omitempty"` // the stack whose release brought it; empty = set by a person
}

// Event is one line of history. Keys grow with time.
type Event struct {
	Time     time.Time         `json:"time"` // wall time of the node that wrote it
	Kind     string            `json:"kind"`
	Stack    string            `json:"stack,omitempty"`
	Service  string            `json:"service,omitempty"`
	Task     string            `json:"task,omitempty"`
	Source   string            `json:"source,omitempty"`
	Revision manifest.Revision `json:"revision,omitzero"`
	Actor    string            `json:"actor,omitempty"`
	Reason   Reason            `json:"reason"`
}

// EventKey makes the key of the n-th event of a command proposed at the given log time, such that keys sort by time.
func EventKey(at time.Time, n int) string { return fmt.Sprintf("%020d.%04d", at.UnixNano(), n) }

// KeepEvents is the number of events that are kept.
const KeepEvents = 1000
