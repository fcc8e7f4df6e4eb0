package policy

import (
	"slices"
	"strconv"
	"strings"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// DefaultCapabilities are the ones that Docker gives a container unasked (moby: daemon/pkg/oci/caps), without CAP_, sorted.
func DefaultCapabilities() []string {
	return []string{"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP",
		"SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}
}

// Defaults are the limits for containers that write none, from `defaults:`. Zero means no limit, but for Pids, where it means 4096.
type Defaults struct {
	Memory manifest.Bytes
	CPU    manifest.CPU
	Pids   int64
}

// Applied is one restriction that nobody wrote. The plan lists it with the line that gives back what it takes.
type Applied struct {
	Service  string `json:"service"` // as written in Compose: a container of a task has its own
	Path     string `json:"path"`    // the field, as Stack.Origin takes it
	Value    string `json:"value"`
	GiveBack string `json:"giveBack"` // a line of Compose, to be written below the service
}

// Harden returns the stack with the limits that nobody wrote, and tells all that is restricted unasked. Capabilities, seccomp and
// AppArmor have no field of their own: the runtime applies Docker's to every container that says nothing else, so they are only told. The
// stack given is not changed. Hardening a hardened stack changes nothing more.
func Harden(s manifest.Stack, d Defaults) (manifest.Stack, []Applied) {
	if d.Pids == 0 {
		d.Pids = manifest.DefaultPids
	}
	var told []Applied
	s.Services = slices.Clone(s.Services)
	for i := range s.Services {
		svc := &s.Services[i]
		svc.Containers = slices.Clone(svc.Containers)
		for j := range svc.Containers {
			told = append(told, harden(&svc.Containers[j], d)...)
		}
	}
	return s, told
}

func harden(c *manifest.Container, d Defaults) []Applied {
	var told []Applied
	tell := func(field, value, back string) {
		told = append(told, Applied{Service: c.Name, Path: c.Name + "." + field, Value: value, GiveBack: back})
	}
	r := &c.Resources
	if r.Pids == 0 {
		r.Pids = d.Pids
		tell("resources.pids", strconv.FormatInt(r.Pids, 10), "pids_limit: -1")
	}
	if r.Memory == 0 && d.Memory != 0 {
		r.Memory = max(d.Memory, r.ReserveMemory)
		// A swap limit written without a memory limit may be below the default; the kernel wants memory <= memory+swap.
		if r.MemorySwap > 0 && r.MemorySwap < r.Memory {
			r.Memory = r.MemorySwap
		}
		tell("resources.memory", r.Memory.String(), "mem_limit: 2g  # your own value wins over defaults:")
	}
	if r.CPU == 0 && d.CPU != 0 {
		r.CPU = max(d.CPU, r.ReserveCPU)
		tell("resources.cpu", r.CPU.String(), "cpus: 2  # your own value wins over defaults:")
	}
	if c.Privileged {
		return told
	}
	if !slices.Contains(c.CapDrop, "ALL") && !slices.Contains(c.CapAdd, "ALL") {
		tell("capAdd", "only Docker's default capabilities: "+strings.Join(DefaultCapabilities(), ", "), "cap_add: [NET_ADMIN]  # name what it needs")
	}
	if !hasOption(c.SecurityOpt, "seccomp") {
		tell("securityOpt", "Docker's default seccomp profile", `security_opt: ["seccomp=unconfined"]`)
	}
	if !hasOption(c.SecurityOpt, "apparmor") {
		tell("securityOpt", "Docker's default AppArmor profile, where the kernel has AppArmor", `security_opt: ["apparmor=unconfined"]`)
	}
	return told
}

// hasOption says whether security_opt sets the key, in either spelling: key=value or key:value.
func hasOption(opts []string, key string) bool {
	return slices.ContainsFunc(opts, func(o string) bool {
		rest, ok := strings.CutPrefix(strings.TrimSpace(o), key)
		return ok && rest != "" && (rest[0] == '=' || rest[0] == ':')
	})
}
