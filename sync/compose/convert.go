package compose

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/distribution/reference"
	units "github.com/docker/go-units"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// converter turns one merged project into a stack.
type converter struct {
	*scanner
	loader  *loading
	plan    plan
	project *types.Project
	vars    *variables
	blobs   map[string]manifest.BlobRef
	out     *manifest.Stack
	shared  map[string]bool // real names of volumes marked storage: shared
	perTask map[string]bool // keys of volumes that each task has its own of
	used    map[string]bool // networks that a service joins
}

// part is one Compose service on its way: what concerns the task is in service, what concerns the container is its only container.
type part struct {
	service manifest.Service
	join    string // the service whose network it shares: then it becomes a container of that one's tasks
	compose types.ServiceConfig
}

func (c *converter) stack() *manifest.Stack {
	c.out = &manifest.Stack{Name: c.project.Name,
		Dir: c.plan.dir, Files: c.plan.files, Origins: map[string]manifest.Pos{}, SecretValues: map[string][]byte{}}
	c.shared, c.perTask, c.used = map[string]bool{}, map[string]bool{}, map[string]bool{}
	c.out.Origins[""] = manifest.Pos{File: c.plan.files[0]}
	c.settings()
	c.volumes()
	c.networks()
	c.secrets()
	parts := map[string]*part{}
	for _, name := range sortedKeys(c.project.Services) {
		p := c.service(c.project.Services[name])
		parts[name] = p
	}
	c.links(parts)
	c.join(parts)
	for _, name := range sortedKeys(parts) {
		if parts[name].join == "" {
			c.out.Services = append(c.out.Services, parts[name].service)
		}
	}
	if len(c.out.Services) == 0 {
		c.add(manifest.Notice, "stack-empty", c.out.Origins[""], "", "no service of the stack runs%s", c.offProfiles())
	}
	c.out.Networks = slices.DeleteFunc(c.out.Networks, func(n manifest.Network) bool { return !c.used[n.Name] })
	return c.out
}

// offProfiles names the profiles that would switch services on.
func (c *converter) offProfiles() string {
	var names []string
	for _, s := range c.project.DisabledServices {
		names = append(names, s.Profiles...)
	}
	if len(names) == 0 {
		return ""
	}
	return "; these profiles are off: " + strings.Join(sorted(names), ", ") + "; switch one on with profiles: in " + settingsFile
}

// at notes where a field of the manifest was written, when the files say it at all.
func (c *converter) at(field string, parts ...string) {
	if pos, whole := c.locate(parts...); whole {
		c.out.Origins[field] = pos
	}
}

// say adds a Problem at a key of a service.
func (c *converter) say(sev manifest.Severity, rule, service, key, format string, args ...any) {
	pos, _ := c.locate(append([]string{"services", service}, strings.Split(key, ".")...)...)
	c.add(sev, rule, pos, service, format, args...)
}

func (c *converter) refuse(service, key, format string, args ...any) {
	c.say(manifest.Error, "key-value", service, key, key+": "+format, args...)
}

func (c *converter) notice(service, key, format string, args ...any) {
	c.say(manifest.Notice, "key-no-effect", service, key, format, args...)
}

// settings are those of gitops.yaml for this stack, over x-gitops at the top of its files.
func (c *converter) settings() {
	var x stackExtension
	c.extension(c.project.Extensions, &x, "")
	s, e := c.out, c.plan.entry
	pos, _ := c.locate(extensionKey)
	if c.plan.line > 0 {
		c.out.Origins["dependsOn"] = manifest.Pos{File: c.loader.settingsPath(), Line: c.plan.line}
	} else {
		c.out.Origins["dependsOn"] = pos
	}
	s.DependsOn = sorted(slices.Concat(e.DependsOn, x.DependsOn))
	s.Suspended = e.Suspend || x.Suspend
	if cl := e.Clusters[c.loader.opts.Cluster]; cl.Suspend != nil {
		s.Suspended = *cl.Suspend
	}
	prune := x.Prune
	if e.Prune != nil {
		prune = e.Prune
	}
	s.PruneOff = prune != nil && !*prune
	s.PruneVolumes = x.Volumes
	if e.Volumes != nil {
		s.PruneVolumes = e.Volumes
	}
	drift := x.Drift
	if e.Drift != "" {
		drift = e.Drift
	}
	if drift == "report" {
		s.Drift = manifest.DriftReport
	}
	s.IgnoreDrift = sorted(slices.Concat(e.Ignore, x.Ignore))
	if s.Policy = e.Policy; s.Policy == "" {
		s.Policy = c.loader.settings.Policy
	}
	c.fromSettings("policy", e.Policy != "")
	if root := c.loader.settings.DataRoot; root != "" {
		s.DataRoot = path.Join(root, s.Name) // stacks that both have ./data share nothing
	}
	for _, root := range []string{x.DataRoot, e.DataRoot} {
		if root != "" {
			s.DataRoot = root
		}
	}
	if c.fromSettings("dataRoot", e.DataRoot != ""); x.DataRoot != "" && e.DataRoot == "" {
		s.Origins["dataRoot"] = pos
	}
	if r := x.DataRoot; r != "" && (!path.IsAbs(r) || path.Clean(r) != r || r == "/") {
		c.errorf("extension", pos, "dataRoot is %q; want an absolute directory without . and .., other than /", r)
	}
	s.RollbackStack = e.Rollback == "stack" || e.Rollback == "" && x.Rollback == "stack"
}

// fromSettings notes where gitops.yaml says something for the stack: in its entry, else for all stacks.
func (c *converter) fromSettings(key string, entry bool) {
	pos := manifest.Pos{File: c.loader.settingsPath(), Line: c.plan.line}
	if !entry {
		pos.Line = c.loader.settings.line(key, -1)
	}
	if pos.Line > 0 {
		c.out.Origins[key] = pos
	}
}

// service converts one Compose service.
func (c *converter) service(in types.ServiceConfig) *part {
	p := &part{compose: in}
	name := in.Name
	var x serviceExtension
	c.extension(in.Extensions, &x, name, "services", name)
	if x.Rollback == "stack" {
		c.out.RollbackStack = true
	}
	c.origins(in)
	c.values(in)
	k := manifest.Container{
		Name: name, Image: c.image(in), Platform: c.platform(in), Runtime: c.shim(in), PullPolicy: c.pullPolicy(in),
		WorkingDir: in.WorkingDir, User: in.User, Groups: in.GroupAdd, ContainerName: in.ContainerName,
		StopSignal: in.StopSignal, Privileged: in.Privileged, ReadOnly: in.ReadOnly,
		CapAdd: capabilities(in.CapAdd), CapDrop: capabilities(in.CapDrop), CgroupRules: in.DeviceCgroupRules,
		Init: in.Init != nil && *in.Init, TTY: in.Tty, StdinOpen: in.StdinOpen,
		Labels: c.labels(in), Health: c.health(in), Probe: c.probe(name, x.Probe), Logging: c.logging(in),
	}
	if in.Entrypoint != nil {
		v := slices.Clone([]string(in.Entrypoint))
		k.Entrypoint = &v
	}
	if in.Command != nil {
		v := slices.Clone([]string(in.Command))
		k.Command = &v
	}
	k.Env, k.EnvUnset = c.environment(in)
	k.SecurityOpt, k.NoNewPrivs = c.security(in)
	k.Devices = c.devices(in)
	k.Ulimits = ulimits(in)
	k.Resources = c.resources(in)
	k.Mounts = c.mounts(in, x)
	k.Secrets = c.secretUses(in)

	s := &p.service
	*s = manifest.Service{Name: name, Hostname: in.Hostname, Domainname: in.DomainName,
		DNS:     manifest.DNS{Servers: in.DNS, Search: in.DNSSearch, Options: in.DNSOpts},
		Sysctls: in.Sysctls, ExtraHosts: in.ExtraHosts.AsList("="), Containers: []manifest.Container{k}}
	slices.Sort(s.ExtraHosts)
	if len(s.ExtraHosts) == 0 {
		s.ExtraHosts = nil
	}
	if in.StopGracePeriod != nil {
		s.StopGrace = max(c.span(name, "stop_grace_period", *in.StopGracePeriod), 1) // 0 is the default; the least there is kills as soon
	}
	c.namespaces(in, s)
	c.deploy(in, s)
	c.network(in, p)
	c.dependencies(in, s)
	c.strangers(in, k)
	return p
}

// fields are the places of a service's fields in its file, for those that policy and plans point at.
var fields = [][2]string{
	{"image", "image"}, {"platform", "platform"}, {"user", "user"}, {"groups", "group_add"}, {"privileged", "privileged"},
	{"readOnly", "read_only"}, {"capAdd", "cap_add"}, {"capDrop", "cap_drop"}, {"securityOpt", "security_opt"}, {"noNewPrivs", "security_opt"},
	{"devices", "devices"}, {"cgroupRules", "device_cgroup_rules"}, {"ulimits", "ulimits"}, {"networkMode", "network_mode"}, {"pid", "pid"},
	{"ipc", "ipc"}, {"userns", "userns_mode"}, {"ports", "ports"}, {"networks", "networks"}, {"env", "environment"}, {"labels", "labels"},
	{"mounts", "volumes"}, {"secrets", "secrets"}, {"health", "healthcheck"}, {"probe", "x-gitops.probe"}, {"command", "command"},
	{"entrypoint", "entrypoint"}, {"dependsOn", "depends_on"}, {"restart", "deploy.restart_policy"}, {"restart", "restart"},
	{"update", "deploy.update_config"}, {"rollback", "deploy.rollback_config"}, {"replicas", "scale"}, {"replicas", "deploy.replicas"},
	{"mode", "deploy.mode"}, {"placement", "deploy.placement"}, {"sysctls", "sysctls"}, {"hostname", "hostname"}, {"logging", "logging"},
	{"extraHosts", "extra_hosts"}, {"dns", "dns"}, {"stopGrace", "stop_grace_period"}, {"containerName", "container_name"},
	{"resources", "deploy.resources"}, {"resources.memory", "mem_limit"}, {"resources.memory", "deploy.resources.limits.memory"},
	{"resources.cpu", "cpus"}, {"resources.cpu", "deploy.resources.limits.cpus"}, {"resources.pids", "pids_limit"},
	{"resources.pids", "deploy.resources.limits.pids"}, {"resources.oomScoreAdj", "oom_score_adj"}, {"resources.oomKillDisable", "oom_kill_disable"},
}

func (c *converter) origins(in types.ServiceConfig) {
	c.at(in.Name, "services", in.Name)
	for _, f := range fields {
		c.at(in.Name+"."+f[0], append([]string{"services", in.Name}, strings.Split(f[1], ".")...)...)
	}
	for name := range in.Environment {
		c.at(in.Name+".env."+name, "services", in.Name, "environment", name)
	}
	for name := range in.Labels {
		c.at(in.Name+".labels."+name, "services", in.Name, "labels", name)
	}
}

// image normalises the reference: docker.io/library/nginx:latest.
func (c *converter) image(in types.ServiceConfig) string {
	if in.Image == "" {
		if in.Build == nil && in.Provider == nil {
			c.say(manifest.Error,
				"image", in.Name, "image", "the service has no image; name one, such as image: docker.io/library/nginx:1.29")
		}
		return ""
	}
	named, err := reference.ParseNormalizedNamed(in.Image)
	if err != nil {
		c.say(manifest.Error,
			"image", in.Name, "image", "the image %q is not a name of an image (is a variable in it empty?): %v", in.Image, err)
		return in.Image
	}
	return reference.TagNameOnly(named).String()
}

func (c *converter) platform(in types.ServiceConfig) string {
	if in.Platform == "" || in.Platform == "linux" {
		return ""
	}
	parts := strings.Split(in.Platform, "/")
	if len(parts) > 3 || slices.Contains(parts, "") {
		c.refuse(in.Name, "platform", "%q is not a platform; write linux/amd64 or linux/arm64", in.Platform)
	}
	if len(parts) == 1 {
		return "linux/" + in.Platform // only the processor is named
	}
	return in.Platform
}

// shim is the containerd runtime for a container; empty = the default one, runc.
func (c *converter) shim(in types.ServiceConfig) string {
	switch r := in.Runtime; {
	case r == "" || r == "runc" || r == "io.containerd.runc.v2":
	case strings.HasPrefix(r, "io.containerd."):
		return r
	default:
		c.refuse(in.Name, "runtime",
			"%q is a name from Docker's configuration; name the containerd shim, such as io.containerd.runsc.v1, or leave the key out", r)
	}
	return ""
}

func (c *converter) pullPolicy(in types.ServiceConfig) string {
	switch p := in.PullPolicy; {
	case p == "" || p == types.PullPolicyMissing || p == types.PullPolicyIfNotPresent:
		return ""
	case p == types.PullPolicyAlways || p == types.PullPolicyNever:
		return p
	case p == types.PullPolicyBuild:
		c.notice(in.Name, "pull_policy", "pull_policy: build is taken as missing: nothing is built here")
	case p == "daily" || p == "weekly" || p == types.PullPolicyRefresh || strings.HasPrefix(p, "every_"):
		c.notice(in.Name,
			"pull_policy", "pull_policy: %s is taken as missing: images are not looked up again by age; push a new tag or digest", p)
	default:
		c.refuse(in.Name, "pull_policy", "%q is not known; want always, missing or never", p)
	}
	return ""
}

func capabilities(in []string) []string {
	var out []string
	for _, s := range in {
		out = append(out, strings.TrimPrefix(strings.ToUpper(s), "CAP_"))
	}
	return sorted(out)
}

// security normalises security_opt to key=value, and takes no-new-privileges out. Where a key is there twice, the last one counts.
func (c *converter) security(in types.ServiceConfig) (opts []string, noNewPrivs bool) {
	for _, o := range in.SecurityOpt {
		key, value, ok := strings.Cut(o, "=")
		if !ok {
			key, value, _ = strings.Cut(o, ":")
		}
		switch key {
		case "no-new-privileges":
			on, err := strconv.ParseBool(value)
			noNewPrivs = value == "" || on
			if err != nil && value != "" {
				c.refuse(in.Name, "security_opt", "%q: want no-new-privileges:true", o)
			}
			continue
		case "seccomp":
			opts = slices.DeleteFunc(opts, func(o string) bool { return strings.HasPrefix(o, "seccomp=") })
			if value == "builtin" {
				continue // Docker's word for the default
			}
			if value != "unconfined" {
				if profile := c.seccomp(in.Name, value); profile != "" {
					opts = append(opts, profile)
				}
				continue
			}
		case "label":
			if value != "disable" {
				c.notice(in.Name, "security_opt", "security_opt: %q has no effect here: containers get no SELinux labels", o)
			}
			continue
		case "systempaths":
			if value != "unconfined" {
				c.refuse(in.Name, "security_opt", "%q: want systempaths=unconfined", o)
			}
		case "apparmor":
		default:
			c.refuse(in.Name, "security_opt", "%q is not known; want no-new-privileges, seccomp, apparmor, label or systempaths", o)
		}
		opts = append(opts, key+"="+value)
	}
	return sorted(opts), noNewPrivs
}

// seccomp reads a profile of the repository and returns its resolved option; empty after an error told.
func (c *converter) seccomp(service, file string) string {
	pos, _ := c.locate("services", service, "security_opt")
	if path.IsAbs(file) || file == "" {
		c.refuse(service, "security_opt", "seccomp=%s: want a profile of the repository, such as seccomp=profile.json, or unconfined", file)
		return ""
	}
	name := path.Join(c.plan.dir, file)
	data, err := c.tree.read(name)
	if err != nil {
		c.unreadable(name, err, pos)
		return ""
	}
	profile, err := manifest.ParseSeccomp(data)
	if err != nil {
		at := manifest.Pos{File: name}
		var bad *manifest.SeccompError
		if errors.As(err, &bad) {
			at.Line = bad.Line
		}
		c.add(manifest.Error, "seccomp", at, service, "the seccomp profile: %v", err)
		return ""
	}
	d := digest(data)
	c.blobs[d] = manifest.BlobRef{Path: name, Size: int64(len(data))}
	return profile.Option(d)
}

func (c *converter) devices(in types.ServiceConfig) []manifest.Device {
	var out []manifest.Device
	for _, d := range in.Devices {
		if !path.IsAbs(d.Source) {
			c.refuse(in.Name, "devices", "%q is not a device file; name one such as /dev/ttyUSB0", d.Source)
			continue
		}
		dev := manifest.Device{Source: path.Clean(d.Source), Target: d.Target, Permissions: d.Permissions}
		if dev.Target == "" {
			dev.Target = dev.Source
		}
		if dev.Permissions == "rwm" {
			dev.Permissions = ""
		}
		if strings.Trim(dev.Permissions, "rwm") != "" {
			c.refuse(in.Name, "devices", "%q: the permissions %q must be of r, w and m", d.Source, d.Permissions)
		}
		out = append(out, dev)
	}
	return out
}

func ulimits(in types.ServiceConfig) []manifest.Ulimit {
	var out []manifest.Ulimit
	for _, name := range sortedKeys(in.Ulimits) {
		u := in.Ulimits[name]
		if u == nil {
			continue
		}
		soft, hard := int64(u.Soft), int64(u.Hard)
		if u.Single != 0 {
			soft, hard = int64(u.Single), int64(u.Single)
		}
		out = append(out, manifest.Ulimit{Name: name, Soft: soft, Hard: hard})
	}
	return out
}

func (c *converter) health(in types.ServiceConfig) *manifest.Health {
	h := in.HealthCheck
	if h == nil {
		return nil
	}
	if h.Disable || len(h.Test) > 0 && h.Test[0] == "NONE" {
		return &manifest.Health{Disabled: true}
	}
	if len(h.Test) > 0 && h.Test[0] != "CMD" && h.Test[0] != "CMD-SHELL" {
		c.refuse(in.Name, "healthcheck.test", "a list must begin with CMD, CMD-SHELL or NONE, not %q", h.Test[0])
	}
	if len(h.Test) == 1 || len(h.Test) > 1 && h.Test[0] == "CMD-SHELL" && len(h.Test) > 2 {
		c.refuse(in.Name, "healthcheck.test", "want a command after %s (one text after CMD-SHELL)", h.Test[0])
	}
	out := &manifest.Health{Test: h.Test}
	span := func(key string, d *types.Duration) manifest.Duration {
		if d != nil && *d < 0 {
			c.refuse(in.Name, "healthcheck."+key, "a time can't be negative")
		}
		if d == nil {
			return 0
		}
		return manifest.Duration(*d)
	}
	out.Interval, out.Timeout = span("interval", h.Interval), span("timeout", h.Timeout)
	out.StartPeriod, out.StartInterval = span("start_period", h.StartPeriod), span("start_interval", h.StartInterval)
	if h.Retries != nil {
		out.Retries = int(min(*h.Retries, 1000))
	}
	return out
}

func (c *converter) logging(in types.ServiceConfig) manifest.Logging {
	var out manifest.Logging
	if in.Logging == nil {
		return out
	}
	switch in.Logging.Driver {
	case "", "json-file", "local":
	case "none":
		out.Off = true
	default:
		c.notice(in.Name, "logging", "the log driver %s is not here: logs are kept on the node; see gitopsctl logs", in.Logging.Driver)
		return out
	}
	var other []string
	for _, key := range sortedKeys(in.Logging.Options) {
		value := in.Logging.Options[key]
		switch key {
		case "max-size":
			size, err := parseBytes(value)
			if err != nil || size < 0 {
				c.refuse(in.Name, "logging.options.max-size", "%q is not a size such as 10m", value)
			}
			out.MaxSize = size
		case "max-file":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 1000 {
				c.refuse(in.Name, "logging.options.max-file", "%q is not a number from 1 to 1000", value)
			}
			out.MaxFile = n
		default:
			other = append(other, key)
		}
	}
	if len(other) > 0 {
		c.notice(in.Name, "logging.options", "log options without effect here: %s; max-size and max-file are read", strings.Join(other, ", "))
	}
	return out
}

// parseBytes reads 64m, 1gb or plain bytes, as Docker does.
func parseBytes(s string) (manifest.Bytes, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not an amount such as 64m", s)
	}
	return manifest.Bytes(n), nil
}

// namespaces reads pid, ipc, uts, cgroup and userns_mode.
func (c *converter) namespaces(in types.ServiceConfig, s *manifest.Service) {
	const ownService = "a namespace of another container is not joined here; network_mode: service:NAME puts both into one task"
	switch in.Pid {
	case "":
	case "host":
		s.PID = in.Pid
	default:
		c.refuse(in.Name, "pid", "%q: %s", in.Pid, ownService)
	}
	switch in.Ipc {
	case "", "host", "private", "shareable", "none":
		s.IPC = in.Ipc
	default:
		c.refuse(in.Name, "ipc", "%q: %s", in.Ipc, ownService)
	}
	switch in.UserNSMode {
	case "", "host":
		s.UserNS = in.UserNSMode
	default:
		c.refuse(in.Name, "userns_mode", "%q is not known; want host, or leave it out", in.UserNSMode)
	}
	if in.Uts != "" {
		c.refuse(in.Name, "uts", "%q: containers have their own host name; set hostname:", in.Uts)
	}
	if in.Cgroup != "" && in.Cgroup != "private" {
		c.refuse(in.Name, "cgroup", "%q: containers have a cgroup namespace of their own; leave the key out", in.Cgroup)
	}
}

// readers are programs that read labels through an engine's API, by the start of the labels' names.
var readers = []struct{ prefix, who string }{
	{"traefik.", "traefik"}, {"caddy", "caddy"}, {"com.centurylinklabs.watchtower.", "watchtower"},
}

// engineSockets are the APIs of container engines, which nothing here offers.
var engineSockets = []string{"docker.sock", "containerd.sock", "podman.sock", "crio.sock"}

// strangers tells of what only an engine's API would make work.
func (c *converter) strangers(in types.ServiceConfig, k manifest.Container) {
	for _, r := range readers {
		key := ""
		for l := range k.Labels {
			if strings.HasPrefix(l, r.prefix) {
				key = "labels"
			}
		}
		if in.Deploy != nil && key == "" {
			for l := range in.Deploy.Labels {
				if strings.HasPrefix(l, r.prefix) {
					key = "deploy.labels"
				}
			}
		}
		if key != "" {
			c.say(manifest.Notice,
				"labels-unread", in.Name, key, "nothing reads the labels of %s here: it finds containers through an engine's API; "+
					"give it a configuration file, with the service names as addresses", r.who)
		}
	}
	for _, m := range k.Mounts {
		if m.Kind == manifest.MountBind && slices.Contains(engineSockets, path.Base(m.Source)) {
			pos := c.out.Origin(in.Name + ".mounts[" + m.Target + "]")
			c.add(manifest.Notice, "engine-socket", pos, in.Name,
				"%s is the API of an engine that does not know of what runs here: a program that reads it sees nothing of this cluster",
				m.Source)
		}
	}
}
