package compose

import (
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/sys/signal"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// This file checks values that compose-go takes as they are, and that only the kernel or the runtime would refuse: then a task fails on a
// node, far from the line that is wrong.

// capabilityNames are those of linux/capability.h, without CAP_. ALL stands for every one.
var capabilityNames = strings.Fields("ALL AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE " +
	"DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE " +
	"NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT " +
	"SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM")

// ulimitNames are those of setrlimit(2), in lower case and without RLIMIT_.
var ulimitNames = strings.Fields("as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack")

var (
	cpuList    = regexp.MustCompile(`^\d+(-\d+)?(,\d+(-\d+)?)*$`)
	deviceRule = regexp.MustCompile(`^[abc] (\d+|\*):(\d+|\*) [rwm]{1,3}$`)
)

// values checks the values of a service.
func (c *converter) values(in types.ServiceConfig) {
	for _, list := range []struct {
		key   string
		names []string
	}{{"cap_add", capabilities(in.CapAdd)}, {"cap_drop", capabilities(in.CapDrop)}} {
		for _, name := range list.names {
			if !slices.Contains(capabilityNames, name) {
				way := "capabilities(7) lists them"
				if best := nearest(name, capabilityNames); best != "" {
					way = "did you mean " + best + "?"
				}
				c.refuse(in.Name, list.key, "%q is not a capability; %s", name, way)
			}
		}
	}
	for _, name := range sortedKeys(in.Ulimits) {
		if !slices.Contains(ulimitNames, name) {
			c.refuse(in.Name, "ulimits."+name, "%q is not a limit; %s", name, suggest(name, ulimitNames))
		}
	}
	if in.StopSignal != "" {
		if _, err := signal.ParseSignal(in.StopSignal); err != nil {
			c.refuse(in.Name, "stop_signal", "%q is not a signal; write one such as SIGTERM", in.StopSignal)
		}
	}
	if in.CPUSet != "" && !cpuList.MatchString(in.CPUSet) {
		c.refuse(in.Name, "cpuset", "%q is not a list of processors; write one such as 0-3,5", in.CPUSet)
	}
	for _, rule := range in.DeviceCgroupRules {
		if !deviceRule.MatchString(rule) {
			c.refuse(in.Name, "device_cgroup_rules", "%q is not a rule such as c 42:* rwm", rule)
		}
	}
	c.addresses(in)
	c.sysctls(in)
	c.templates(in)
}

// swarmTemplate is a placeholder that Swarm fills in for each task, in hostname, environment and the names of volumes.
var swarmTemplate = regexp.MustCompile(`\{\{[^}]*\.(Service|Node|Task)\.[^}]*\}\}`)

// templates tells of placeholders that stay as they are.
func (c *converter) templates(in types.ServiceConfig) {
	const said = "%s: %s is taken as it is written: Swarm's templates are not filled in here"
	if found := swarmTemplate.FindString(in.Hostname); found != "" {
		c.notice(in.Name, "hostname", said, "hostname", found)
	}
	for _, name := range sortedKeys(in.Environment) {
		if v := in.Environment[name]; v != nil && swarmTemplate.MatchString(*v) {
			c.notice(in.Name, "environment."+name, said, name, swarmTemplate.FindString(*v))
		}
	}
}

// addresses checks those of the service's own files below /etc, and of its ports.
func (c *converter) addresses(in types.ServiceConfig) {
	for _, server := range in.DNS {
		if _, err := netip.ParseAddr(server); err != nil {
			c.refuse(in.Name, "dns", "%q is not an address such as 9.9.9.9", server)
		}
	}
	for _, host := range sortedKeys(in.ExtraHosts) {
		for _, addr := range in.ExtraHosts[host] {
			if _, err := netip.ParseAddr(addr); err != nil && addr != hostGateway {
				c.refuse(in.Name, "extra_hosts", "%q of %s is not an address; write one, or %s for the node", addr, host, hostGateway)
			}
		}
	}
	for _, p := range in.Ports {
		if _, err := netip.ParseAddr(p.HostIP); p.HostIP != "" && err != nil {
			c.refuse(in.Name, "ports", "%q is not an address of the host to publish port %d on", p.HostIP, p.Target)
		}
	}
	macs := map[string]string{"mac_address": in.MacAddress}
	for _, key := range sortedKeys(in.Networks) {
		if n := in.Networks[key]; n != nil {
			macs["networks."+key+".mac_address"] = n.MacAddress
		}
	}
	for _, key := range sortedKeys(macs) {
		if mac, err := net.ParseMAC(macs[key]); macs[key] != "" && (err != nil || len(mac) != 6 || mac[0]&1 != 0) {
			c.refuse(in.Name, key, "%q is not the address of a network card, such as 02:42:ac:11:00:02", macs[key])
		}
	}
}

// hostGateway is Docker's word for the node's address in extra_hosts.
const hostGateway = "host-gateway"

// ipcSysctls are those of an IPC namespace, besides fs.mqueue.*: ipc_namespaces(7).
var ipcSysctls = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_rmid_forced"}

// sysctls refuses those that the container has no namespace of its own for: they would be set for the whole machine, which no runtime does.
func (c *converter) sysctls(in types.ServiceConfig) {
	for _, name := range sortedKeys(in.Sysctls) {
		at := "sysctls." + name
		switch {
		case strings.HasPrefix(name, "net."):
			if in.NetworkMode == "host" {
				c.refuse(in.Name, at, "with the host's network it would change the host; set it on the host")
			}
		case strings.HasPrefix(name, "fs.mqueue.") || slices.Contains(ipcSysctls, name):
			if in.Ipc == "host" {
				c.refuse(in.Name, at, "with ipc: host it would change the host; set it on the host")
			}
		case name == "kernel.domainname":
		case name == "kernel.hostname":
			c.refuse(in.Name, at, "write hostname: instead")
		default:
			c.refuse(in.Name, at, "containers have no %s of their own; set it on the host, with a file below /etc/sysctl.d", name)
		}
	}
}

// numbers checks the owner of a config or secret: the file is made by the node, which does not know the image's users.
func (c *converter) numbers(service, key, what, uid, gid string) {
	for _, id := range [][2]string{{"uid", uid}, {"gid", gid}} {
		if _, err := strconv.ParseUint(id[1], 10, 31); id[1] != "" && err != nil {
			c.refuse(service, key, "the %s of %s is %q; want a number", id[0], what, id[1])
		}
	}
}

// driverOptions checks those of a volume of the local driver: they go to mount(8) as they are.
func (c *converter) driverOptions(key string, options map[string]string) {
	pos, _ := c.locate("volumes", key, "driver_opts")
	refuse := func(format string, args ...any) {
		c.errorf("volume", pos, "volumes."+key+".driver_opts: "+format, args...)
	}
	for _, name := range sortedKeys(options) {
		switch name {
		case "type", "o", "device":
		case "size":
			c.add(manifest.Notice, "key-no-effect", pos, "", "driver_opts.size has no effect here: the size of the volume %s is not limited", key)
		default:
			refuse("%q is not an option of the local driver; it has type, o and device", name)
		}
	}
	kind, device := options["type"], options["device"]
	switch bind := slices.ContainsFunc(strings.Split(options["o"], ","), func(o string) bool { return o == "bind" || o == "rbind" }); {
	case kind == "" && device == "" && options["o"] == "":
	case kind == "" || device == "":
		refuse("type and device are needed together")
	case kind == "none" && !bind:
		refuse("type: none needs o: bind")
	}
}
