package worker

import (
	"context"
	"io"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Runtime runs containers on this node. All methods are safe for concurrent use and honour their context. An error of kind [ErrNotFound] means that
// the container is not there; one of kind [ErrPermanent] will not go away by trying again with the same spec.
type Runtime interface {
	// List tells of every container that this node made, in any state, from the runtime's own record. It is complete or an error.
	List(ctx context.Context) ([]Container, error)
	// Get tells of one of them.
	Get(ctx context.Context, id string) (Container, error)
	// Watch calls changed for each container that exited, ran out of memory, was paused or vanished, until ctx ends or the connection breaks; then it
	// returns the reason. The first event has no ID: from then on none is missed, so that is the time to List. Events may be lost across a break.
	Watch(ctx context.Context, changed func(Event)) error
	// Create makes the container and its task without running it: root file system, mounts, log and cgroup are ready when it returns.
	// A container of the same id that is already there is an error.
	Create(ctx context.Context, spec ContainerSpec) error
	// Start runs a created container.
	Start(ctx context.Context, id string) error
	// Stop sends the signal, waits for grace, then kills; it returns when the process is gone. Stopping what has stopped is no error.
	Stop(ctx context.Context, id string, signal string, grace time.Duration) error
	// Remove deletes a container, killing it first where it still runs, with its snapshot. Log files stay until the task is removed. Removing nothing is no error.
	Remove(ctx context.Context, id string) error
}

// Images brings images to this node.
type Images interface {
	// Resolve turns a reference into a digest by asking the registry, or, where the policy allows, from what is on the node.
	Resolve(ctx context.Context, ref, platform string) (digest string, err error)
	// Ensure makes the image's content and snapshot present, pulling by digest when it is not, and describes it. ref names the repository to pull from.
	Ensure(ctx context.Context, ref, digest, platform string) (Image, error)
	// Local looks an image up on this node only. ErrNotFound when it is not here.
	Local(ctx context.Context, ref, platform string) (Image, error)
	// Describe asks the registry what an image is, and brings nothing of it to this node. It reads documents only, never layers.
	Describe(ctx context.Context, ref, platform string) (Image, error)
	// Import loads an OCI or docker archive and returns the references in it.
	Import(ctx context.Context, r io.Reader) ([]string, error)
	// Prune removes the images that were pulled, not imported, and recorded before that time, whose digest is not in keep and that no container was made
	// from. It returns their names.
	Prune(ctx context.Context, keep []string, before time.Time) ([]string, error)
}

// Inspector looks into running containers and changes what can be changed while they run.
type Inspector interface {
	// Exec runs a command in the container and returns its exit code. Output goes to stdio's streams. A timeout of 0 means none; at the timeout the
	// process is killed and the error is context.DeadlineExceeded.
	Exec(ctx context.Context, id string, req ExecRequest) (exitCode int, err error)
	// Update sets limits on the running container.
	Update(ctx context.Context, id string, r manifest.Resources) error
	// Resume lets a paused container go on.
	Resume(ctx context.Context, id string) error
	// Stats reads what the container uses now.
	Stats(ctx context.Context, id string) (Stats, error)
}

// Image is an image on this node.
type Image struct {
	Ref    string
	Digest string // of the manifest or index that the reference resolved to
	Config ImageConfig
}

// ImageConfig is the part of an image's configuration that decides how its containers run.
type ImageConfig struct {
	User       string
	Entrypoint []string
	Cmd        []string
	Env        []string
	WorkingDir string
	Volumes    []string // sorted
	StopSignal string
	Health     *manifest.Health // HEALTHCHECK; nil = none
	Ports      []string         // as 80/tcp, sorted
}

// ContainerSpec is everything that it takes to create a container. Paths are of the host; nothing is left to resolve.
type ContainerSpec struct {
	ID     string            // unique on the node
	Labels map[string]string // the node's own record: the worker finds its tasks again by them
	Image  string            // reference, as Images knows it
	Digest string
	Spec   manifest.Container // process, limits, capabilities; its Mounts are not used

	Mounts   []HostMount
	NetNS    string // path of the network namespace; "" = the host's
	Hostname string
	Domain   string
	PIDMode  string // "" or "host"
	IPCMode  string // "", "host", "private", "shareable", "none"
	UserNS   string // "" or "host"
	Sysctls  map[string]string
	Cgroup   string // absolute cgroup path of the container

	Seccomp string // the container's own seccomp profile, a file in Docker's format; "" = the runtime's, unless SecurityOpt says unconfined

	LogDir string // where the keeper writes the container's log files
}

// HostMount is one mount of a container with its source on the host.
type HostMount struct {
	Type    string // bind or tmpfs
	Source  string
	Target  string
	Options []string
	// From is mounted on the host first, with the host's networks, and Source is then a path in it.
	From   *FileSystem
	CopyUp bool // fill the empty source directory from the image's content at Target: files, owner and mode, as Docker does
}

// FileSystem is what a volume with a type of its own is: a share of a file server, or a device.
type FileSystem struct {
	Type    string // as nfs, cifs, ext4
	Device  string
	Options []string // of mount(8); they may hold a password
}

// Phase is where a container is in its life. It only moves forward.
type Phase string

// The phases of a container.
const (
	Created Phase = "created"
	Running Phase = "running"
	Paused  Phase = "paused"
	Exited  Phase = "exited"
	// Lost: there is a record of the container, but nothing of it runs and nobody saw it end. The machine was restarted.
	Lost Phase = "lost"
)

// Container is a container as the runtime sees it now.
type Container struct {
	ID        string
	Labels    map[string]string
	Image     string
	Digest    string
	Phase     Phase
	PID       int
	ExitCode  int
	OOMKilled bool
	StartedAt time.Time          // zero before the start
	ExitedAt  time.Time          // zero while it runs
	Limits    manifest.Resources // Memory, CPU, Pids as the kernel has them now, for drift: 0 = unknown, -1 = unlimited
}

// Event says that a container may have changed.
type Event struct {
	ID   string
	Kind EventKind
}

// EventKind is what happened to a container.
type EventKind string

// The kinds of events.
const (
	EventExit  EventKind = "exit"
	EventOOM   EventKind = "oom"
	EventOther EventKind = "other"
)

// ExecRequest is a command to run in a container.
type ExecRequest struct {
	Command    []string
	Env        []string // added to the container's
	User       string   // "" = the container's
	WorkingDir string
	TTY        bool
	Stdin      io.Reader
	Stdout     io.Writer
	Stderr     io.Writer
	Timeout    time.Duration
	Resize     <-chan [2]uint16 // columns, rows
}

// Stats is what a container uses.
type Stats struct {
	Memory   manifest.Bytes // in use, without the page cache that can be dropped
	CPUTotal time.Duration  // since its start
	Pids     int64
}
