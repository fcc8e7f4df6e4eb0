// Package manifest holds desired state: what one revision of a source asks for, rendered and resolved, as plain data.
//
// The flow: sync/compose reads a checkout and builds a [Bundle]: [Stack] > [Service] > [Container], with the networks, volumes and
// files that they name, and the [Problem]s it met. [Resolve] writes the defaults into it, so that a later version of this program
// with other defaults changes nothing that runs. [Canonical] gives the one byte form of an object, [Hash] its identity, and
// [Compare] says what a change of a service means for its tasks: nothing, a change in place, or a replacement.
//
// The package is pure: no I/O, no clock, no YAML and no type of another project. Unset fields are left out of the canonical form, so a field that
// is added later changes no hash.
package manifest

import "slices"

// Bundle is everything that one revision of one source asks for, rendered.
type Bundle struct {
	Source   string    `json:"source"`
	Revision Revision  `json:"revision"`
	Stacks   []Stack   `json:"stacks,omitempty"`   // sorted by name; those with an error among Problems are not in it
	Problems []Problem `json:"problems,omitempty"` // in the order of file and line
	// Found names every stack that the revision holds, broken ones too: a stack that does not render is not a stack that was removed.
	Found []FoundStack `json:"found,omitempty"`
	// Settings are the source-wide ones of gitops.yaml.
	Settings Settings `json:"settings,omitzero"`
	// Blobs maps the digest of each file that the stacks mount to its place in the checkout. Not part of any hash.
	Blobs map[string]BlobRef `json:"-"`
}

// FoundStack names a stack of the revision and the directory it lives in.
type FoundStack struct {
	Name string `json:"name"`
	Dir  string `json:"dir"` // relative to the repository, "." for its root
	// Files are the Compose files that were merged, in order, relative to the repository.
	Files []string `json:"files,omitempty"`
}

// BlobRef is where the bytes of a blob are: a file of the checkout, or Data itself.
type BlobRef struct {
	Path string // relative to the checkout's root
	Data []byte // for content that no single file holds: inline configs and directory listings
	Size int64  // bytes
}

// Revision is one commit of a source.
type Revision struct {
	Ref    string `json:"ref,omitempty"`    // branch or tag, without refs/heads/
	Commit string `json:"commit,omitempty"` // full hex id
}

// String writes a revision as users see it: main@sha1:2f6c0d1b (the first 8 digits).
func (r Revision) String() string {
	if r.Commit == "" {
		return "none"
	}
	kind := "sha1"
	if len(r.Commit) > 40 {
		kind = "sha256"
	}
	short := r.Commit[:min(8, len(r.Commit))]
	if r.Ref == "" {
		return kind + ":" + short
	}
	return r.Ref + "@" + kind + ":" + short
}

// Settings are what gitops.yaml says for the whole source.
type Settings struct {
	PruneOff    bool `json:"pruneOff,omitzero"`    // nothing is removed when Git no longer names it
	PruneBudget int  `json:"pruneBudget,omitzero"` // percent of a source's stacks, services or volumes one revision may remove unasked; 0 = the default of 50
	// PruneVolumes says that what is pruned goes with its volumes, where the stack has no word of its own.
	PruneVolumes bool `json:"pruneVolumes,omitzero"`
}

// Stack is one Compose project.
type Stack struct {
	Name     string    `json:"name"`
	Services []Service `json:"services"`           // sorted by name
	Networks []Network `json:"networks,omitempty"` // sorted by name
	Volumes  []Volume  `json:"volumes,omitempty"`  // sorted by name
	Secrets  []Secret  `json:"secrets,omitempty"`  // sorted by name

	DependsOn     []string `json:"dependsOn,omitempty"` // stacks that must be Ready first, sorted
	Suspended     bool     `json:"suspended,omitzero"`  // Git says: do not follow Git
	PruneOff      bool     `json:"pruneOff,omitzero"`
	PruneVolumes  *bool    `json:"pruneVolumes,omitempty"` // whether volumes go with what is pruned; nil = as its source says
	Drift         Drift    `json:"drift,omitempty"`        // what to do about drift; empty = heal
	IgnoreDrift   []string `json:"ignoreDrift,omitempty"`  // field paths whose drift is neither healed nor reported, as `web.resources.memory`
	Policy        string   `json:"policy,omitempty"`       // enforce, warn or off; empty = enforce
	DataRoot      string   `json:"dataRoot,omitempty"`     // absolute host directory below which data paths live; empty = the node's
	RollbackStack bool     `json:"rollbackStack,omitzero"` // one failed service rolls the whole stack back

	// Origins tells where a field was written: key "web.privileged" (service, field path) or "" for the stack. Not part of the hash.
	Origins map[string]Pos `json:"-"`
	// Dir and Files are where the stack was found: a moved directory is no change.
	Dir   string   `json:"-"`
	Files []string `json:"-"`
	// SecretValues are the bytes of secrets that come with the revision, by Secret.Name. They are sealed before anything is logged.
	SecretValues map[string][]byte `json:"-"`
}

// Pos is a place in a file of the repository.
type Pos struct {
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitzero"` // from 1; 0 = the file as a whole
}

// Drift says what happens to running state that is not what the revision asks for.
type Drift string

// The drift modes of a stack.
const (
	DriftHeal   Drift = ""       // set right
	DriftReport Drift = "report" // only told
)

// Service looks a service of the stack up by name; nil when there is none.
func (s *Stack) Service(name string) *Service {
	for i := range s.Services {
		if s.Services[i].Name == name {
			return &s.Services[i]
		}
	}
	return nil
}

// Origin finds the place where the field of a service was written, or the nearest enclosing one that is known.
func (s *Stack) Origin(path string) Pos {
	for p := path; ; {
		if pos, ok := s.Origins[p]; ok {
			return pos
		}
		cut := -1
		for i := len(p) - 1; i >= 0; i-- {
			if p[i] == '.' || p[i] == '[' {
				cut = i
				break
			}
		}
		if cut < 0 {
			pos := s.Origins[""]
			if pos.File == "" && len(s.Files) > 0 {
				pos.File = s.Files[0]
			}
			return pos
		}
		p = p[:cut]
	}
}

// Mode is how many tasks a service has and when they end.
type Mode string

// The modes of a service, as in Compose.
const (
	Replicated    Mode = ""               // Replicas long-running tasks
	Global        Mode = "global"         // one on each eligible node
	ReplicatedJob Mode = "replicated-job" // Replicas tasks that end
	GlobalJob     Mode = "global-job"
)

// Service is one kind of workload of a stack: what every task of it looks like, how many there are, and how they change.
type Service struct {
	Name     string `json:"name"`
	Mode     Mode   `json:"mode,omitempty"`
	Replicas int    `json:"replicas"` // Replicated and ReplicatedJob

	// Containers of each task, in start order. The first carries the service's name; others joined it by network_mode service:NAME.
	Containers []Container `json:"containers"`

	Networks []Attachment `json:"networks,omitempty"` // in order of priority, then name: the first gives the default route
	// NetworkMode is "" (own namespace, Networks), "host", or "none".
	NetworkMode string `json:"networkMode,omitempty"`
	Ports       Ports  `json:"ports,omitempty"`

	Hostname   string            `json:"hostname,omitempty"`
	Domainname string            `json:"domainname,omitempty"`
	DNS        DNS               `json:"dns,omitzero"`
	ExtraHosts []string          `json:"extraHosts,omitempty"` // "name=address", sorted
	Sysctls    map[string]string `json:"sysctls,omitempty"`
	PID        string            `json:"pid,omitempty"` // "" or "host"
	IPC        string            `json:"ipc,omitempty"` // "", "host", "private", "shareable" or "none"
	UserNS     string            `json:"userns,omitempty"`

	DependsOn []Dependency  `json:"dependsOn,omitempty"` // sorted by service
	Restart   RestartPolicy `json:"restart"`
	Update    UpdatePolicy  `json:"update"`
	Rollback  UpdatePolicy  `json:"rollback"`
	Placement Placement     `json:"placement,omitzero"`
	StopGrace Duration      `json:"stopGrace,omitzero"` // from the stop signal to the kill; resolved to 10s
	Endpoint  string        `json:"endpoint,omitempty"` // endpoint_mode: "" or vip, dnsrr

	Labels map[string]string `json:"labels,omitempty"` // deploy.labels: of the service, not of its containers
}

// Main is the container that carries the service's name.
func (s *Service) Main() *Container { return &s.Containers[0] }

// Job says whether the service's tasks are meant to end.
func (s *Service) Job() bool { return s.Mode == ReplicatedJob || s.Mode == GlobalJob }

// FixedAddress says whether its tasks have an address of their own, which only one task of a slot can hold at a time.
func (s *Service) FixedAddress() bool {
	return slices.ContainsFunc(s.Networks, func(a Attachment) bool { return a.IPv4 != "" })
}

// Container is one container of a task.
type Container struct {
	Name       string `json:"name"`                 // the Compose service it was written as
	Image      string `json:"image"`                // reference as written, normalised: registry/name:tag or @digest
	Platform   string `json:"platform,omitempty"`   // os/arch[/variant]; empty = the node's
	Runtime    string `json:"runtime,omitempty"`    // containerd shim, as io.containerd.runsc.v1; empty = runc's
	PullPolicy string `json:"pullPolicy,omitempty"` // "" (missing), always, never

	// Entrypoint and Command: nil = the image's; Entrypoint set resets the image's command (as Docker does).
	Entrypoint *[]string         `json:"entrypoint,omitempty"`
	Command    *[]string         `json:"command,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	// EnvUnset are variables of the image that the file sets to nothing (`KEY:` without a value), sorted.
	EnvUnset      []string `json:"envUnset,omitempty"`
	WorkingDir    string   `json:"workingDir,omitempty"`
	User          string   `json:"user,omitempty"`
	Groups        []string `json:"groups,omitempty"`        // group_add
	ContainerName string   `json:"containerName,omitempty"` // container_name: one more name on the networks

	Mounts  []Mount     `json:"mounts,omitempty"`  // sorted by target
	Secrets []SecretUse `json:"secrets,omitempty"` // sorted by target

	Health     *Health   `json:"health,omitempty"` // nil = the image's; Disabled switches that off
	Probe      *Probe    `json:"probe,omitempty"`  // x-gitops: probe
	Resources  Resources `json:"resources,omitzero"`
	StopSignal string    `json:"stopSignal,omitempty"` // empty = the image's, else SIGTERM

	Privileged  bool              `json:"privileged,omitzero"`
	ReadOnly    bool              `json:"readOnly,omitzero"`
	CapAdd      []string          `json:"capAdd,omitempty"`  // without CAP_, upper case, sorted
	CapDrop     []string          `json:"capDrop,omitempty"` // "ALL" drops all
	SecurityOpt []string          `json:"securityOpt,omitempty"`
	NoNewPrivs  bool              `json:"noNewPrivs,omitzero"`
	Devices     []Device          `json:"devices,omitempty"`
	CgroupRules []string          `json:"cgroupRules,omitempty"` // device_cgroup_rules
	Ulimits     []Ulimit          `json:"ulimits,omitempty"`     // sorted by name
	Init        bool              `json:"init,omitzero"`
	TTY         bool              `json:"tty,omitzero"`
	StdinOpen   bool              `json:"stdinOpen,omitzero"`
	Logging     Logging           `json:"logging,omitzero"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Attachment puts a service on a network.
type Attachment struct {
	Network string   `json:"network"` // the network's real name: stack_name, or an external one's
	Aliases []string `json:"aliases,omitempty"`
	IPv4    string   `json:"ipv4,omitempty"` // a fixed address; one replica only
	MAC     string   `json:"mac,omitempty"`
}

// Network is a network that tasks of the stack can join.
type Network struct {
	Name     string            `json:"name"` // real name
	Key      string            `json:"key"`  // as the file calls it
	External bool              `json:"external,omitzero"`
	Internal bool              `json:"internal,omitzero"`
	Subnet   string            `json:"subnet,omitempty"` // ipam: CIDR
	Gateway  string            `json:"gateway,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

// Volume is a named volume.
type Volume struct {
	Name     string            `json:"name"` // real name: stack_key, or as `name:` says
	Key      string            `json:"key"`
	External bool              `json:"external,omitzero"`
	Driver   string            `json:"driver,omitempty"` // "" or local
	Options  map[string]string `json:"options,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

// Local says whether the volume's data live on one node only. An NFS volume is not local: every node reaches it.
func (v Volume) Local() bool {
	switch v.Options["type"] {
	case "nfs", "nfs4", "cifs":
		return false
	}
	return true
}

// Own says whether the volume is a directory that is made for the stack: no other stack's or person's, and nothing that driver options name.
func (v Volume) Own() bool { return !v.External && v.Options["type"] == "" }

// Secret is a secret that services of the stack mount. Its value is never here.
type Secret struct {
	Name     string `json:"name"` // real name: stack/key, or the external one
	Key      string `json:"key"`
	External bool   `json:"external,omitzero"`
	// Ref identifies the value: a keyed hash, written at acceptance. A new value is a new Ref, so it replaces the tasks that use it.
	Ref string `json:"ref,omitempty"`
}

// SecretUse mounts a secret into a container, on a tmpfs.
type SecretUse struct {
	Secret string `json:"secret"` // Secret.Name
	Ref    string `json:"ref,omitempty"`
	Target string `json:"target"` // absolute path
	UID    string `json:"uid,omitempty"`
	GID    string `json:"gid,omitempty"`
	Mode   uint32 `json:"mode,omitzero"` // permission bits; 0 = 0444
}

// MountKind says what is mounted.
type MountKind string

// The kinds of mounts.
const (
	MountVolume    MountKind = "volume"    // a named volume
	MountAnonymous MountKind = "anonymous" // a volume of its own for each slot, kept with it
	MountBind      MountKind = "bind"      // an absolute path of the host
	MountData      MountKind = "data"      // a relative path that is not in the commit: kept below the data root
	MountContent   MountKind = "content"   // a file or directory of the commit, read-only
	MountTmpfs     MountKind = "tmpfs"
)

// Mount puts something into a container's file system.
type Mount struct {
	Kind     MountKind `json:"kind"`
	Target   string    `json:"target"`           // absolute, clean
	Source   string    `json:"source,omitempty"` // volume: real name; bind: host path; data: path below the stack's data root; content: path from the stack's directory
	ReadOnly bool      `json:"readOnly,omitzero"`
	// Digest is the content's blob, as sha256:HEX: of a file, or of a directory's [Listing].
	Digest string `json:"digest,omitempty"`
	Dir    bool   `json:"dir,omitzero"` // content is a directory
	// Seed copies the content once into a writable directory kept like a volume (x-gitops: seed).
	Seed bool   `json:"seed,omitzero"`
	UID  string `json:"uid,omitempty"` // configs: owner and mode of the file
	GID  string `json:"gid,omitempty"`
	Mode uint32 `json:"mode,omitzero"` // content: permission bits for a config; tmpfs: of its root

	NoCopy      bool   `json:"noCopy,omitzero"`       // volume: do not fill it from the image
	Subpath     string `json:"subpath,omitempty"`     // of a volume
	Propagation string `json:"propagation,omitempty"` // bind
	MustExist   bool   `json:"mustExist,omitzero"`    // bind in the long form: a missing host path is an error, not created
	Recursive   string `json:"recursive,omitempty"`   // bind: what is mounted below comes along, writable; disabled = it does not; readonly = it is read-only too
	Size        Bytes  `json:"size,omitzero"`         // tmpfs
	Options     string `json:"options,omitempty"`     // tmpfs: further mount options
	Shared      bool   `json:"shared,omitzero"`       // x-gitops: storage: shared — not local data
}

// Local says whether what the mount holds is local data: it binds a slot to its node. Volumes are judged by [Volume.Local].
func (m Mount) Local() bool {
	if m.Shared {
		return false
	}
	switch m.Kind {
	case MountVolume, MountAnonymous, MountData:
		return true
	case MountContent:
		return m.Seed
	case MountBind:
		if m.ReadOnly {
			return false
		}
		for _, root := range []string{"/proc", "/sys", "/dev"} {
			if under(m.Source, root) {
				return false
			}
		}
		return !socketPath(m.Source)
	}
	return false
}

// Port publishes a container's port on the node.
type Port struct {
	HostIP    string `json:"hostIP,omitempty"`   // empty = all addresses
	Published uint16 `json:"published,omitzero"` // 0 = one is chosen and kept
	Target    uint16 `json:"target"`
	Protocol  string `json:"protocol,omitempty"` // "" = tcp, udp, sctp
	Mode      string `json:"mode,omitempty"`     // "" = ingress, host
}

// Proto is the protocol with the default written out.
func (p Port) Proto() string {
	if p.Protocol == "" {
		return "tcp"
	}
	return p.Protocol
}

// DNS is the resolver configuration of a task.
type DNS struct {
	Servers []string `json:"servers,omitempty"`
	Search  []string `json:"search,omitempty"`
	Options []string `json:"options,omitempty"`
}

// Condition is what a dependency must have reached.
type Condition string

// The conditions of depends_on.
const (
	Started   Condition = "service_started"
	Healthy   Condition = "service_healthy"
	Completed Condition = "service_completed_successfully"
)

// Dependency orders services of a stack.
type Dependency struct {
	Service   string    `json:"service"`
	Condition Condition `json:"condition"`
	Restart   bool      `json:"restart,omitzero"`  // once a rollout of that service replaced its tasks, those of this one are replaced too
	Optional  bool      `json:"optional,omitzero"` // required: false
}

// RestartCondition says after which exits a container starts again.
type RestartCondition string

// The restart conditions of deploy.restart_policy; Compose's `restart` maps onto them.
const (
	RestartAny       RestartCondition = "any"
	RestartOnFailure RestartCondition = "on-failure"
	RestartNever     RestartCondition = "none"
)

// RestartPolicy is what happens when a container of a task ends by itself.
type RestartPolicy struct {
	Condition   RestartCondition `json:"condition"`
	Delay       Duration         `json:"delay,omitzero"`       // base of the backoff after the first, immediate restart
	MaxAttempts int              `json:"maxAttempts,omitzero"` // 0 = unlimited
	Window      Duration         `json:"window,omitzero"`      // MaxAttempts counts within it; 0 = for ever
}

// FailureAction is what a rollout does when too many of its new tasks fail.
type FailureAction string

// The failure actions of update_config.
const (
	ActionPause    FailureAction = "pause"
	ActionContinue FailureAction = "continue"
	ActionRollback FailureAction = "rollback"
)

// UpdatePolicy is update_config and rollback_config, with Swarm's defaults and meaning but for the default failure action.
type UpdatePolicy struct {
	Parallelism   int           `json:"parallelism"`          // slots at once; 0 = all
	Delay         Duration      `json:"delay,omitzero"`       // between batches
	FailureAction FailureAction `json:"failureAction"`        // default: rollback where there is a stable revision, else pause
	Monitor       Duration      `json:"monitor"`              // how long a new task is watched after it became healthy
	MaxFailures   int           `json:"maxFailures,omitzero"` // max_failure_ratio in millionths of the slots
	StartFirst    bool          `json:"startFirst,omitzero"`  // order: start-first
	Deadline      Duration      `json:"deadline"`             // a new task that is not healthy by then counts as failed
}

// Placement is kept for the cluster: which nodes may run a task.
type Placement struct {
	Constraints []string `json:"constraints,omitempty"`
	Spread      []string `json:"spread,omitempty"` // preferences, in order
	MaxPerNode  int      `json:"maxPerNode,omitzero"`
}

// Health is a health check run inside the container.
type Health struct {
	Test          []string `json:"test,omitempty"` // CMD or CMD-SHELL form, as Compose has it; empty = the image's test with these times
	Disabled      bool     `json:"disabled,omitzero"`
	Interval      Duration `json:"interval,omitzero"`
	Timeout       Duration `json:"timeout,omitzero"`
	StartPeriod   Duration `json:"startPeriod,omitzero"`
	StartInterval Duration `json:"startInterval,omitzero"`
	Retries       int      `json:"retries,omitzero"`
}

// Probe is a health check made by the agent over the network (x-gitops: probe). It costs no process in the container.
type Probe struct {
	HTTP   string `json:"http,omitempty"` // path, asked with GET; 200 to 399 is healthy
	TCP    bool   `json:"tcp,omitzero"`   // a connection is enough
	Port   uint16 `json:"port"`
	Timing Health `json:"timing,omitzero"`
}

// Resources limits and reserves what a container uses.
type Resources struct {
	Memory         Bytes            `json:"memory,omitzero"` // limit
	MemorySwap     Bytes            `json:"memorySwap,omitzero"`
	CPU            CPU              `json:"cpu,omitzero"` // limit
	CPUShares      uint64           `json:"cpuShares,omitzero"`
	CPUSet         string           `json:"cpuset,omitempty"`
	Pids           int64            `json:"pids,omitzero"`          // limit; -1 = none
	ReserveMemory  Bytes            `json:"reserveMemory,omitzero"` // what the scheduler counts, and what the kernel leaves when memory is short
	ReserveCPU     CPU              `json:"reserveCPU,omitzero"`
	Generic        map[string]int64 `json:"generic,omitempty"`
	ShmSize        Bytes            `json:"shmSize,omitzero"`
	OOMScoreAdj    int              `json:"oomScoreAdj,omitzero"`
	OOMKillDisable bool             `json:"oomKillDisable,omitzero"`
	Swappiness     *int64           `json:"swappiness,omitempty"`
}

// Device gives a host device to a container.
type Device struct {
	Source      string `json:"source"`
	Target      string `json:"target"`
	Permissions string `json:"permissions,omitempty"` // "" = rwm
}

// Ulimit is one resource limit of the container's processes.
type Ulimit struct {
	Name string `json:"name"`
	Soft int64  `json:"soft"` // -1 = unlimited
	Hard int64  `json:"hard"`
}

// Logging is how much of a container's output is kept. There is one driver here: a local one.
type Logging struct {
	MaxSize Bytes `json:"maxSize,omitzero"` // 0 = 10 MiB
	MaxFile int   `json:"maxFile,omitzero"` // 0 = 5
	Off     bool  `json:"off,omitzero"`     // driver none
}

// ListingEntry is one file of a content directory.
type ListingEntry struct {
	Path   string `json:"path"`             // relative, slash-separated
	Digest string `json:"digest,omitempty"` // of the file's bytes
	Exec   bool   `json:"exec,omitzero"`
	Link   string `json:"link,omitempty"` // symbolic link inside the directory
	Size   int64  `json:"size,omitzero"`
}
