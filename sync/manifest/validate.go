package manifest

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// The most that names may have. A task's id is stack/service.slot.generation and is a label's value and a file's name; a service's name is a
// DNS label.
const (
	MaxStackName   = 63
	MaxServiceName = 63
	MaxObjectName  = 200 // of a volume, whose directory has it, a network and an external secret
)

var (
	stackName   = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)
	serviceName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)
)

// Validate finds what does not fit together in one stack, in a fixed order: references to nothing, ports and mounts taken twice, addresses
// outside of their network, circles of dependencies, and values that no file could have. Each Problem has its place in a file, as far
// as Origins knows it; all are errors but for a host port that two services share, which is a warning.
func Validate(s *Stack) []Problem {
	v := &validator{stack: s, networks: map[string]*Network{}, volumes: map[string]bool{}, secrets: map[string]bool{}}
	v.names()
	for i := range s.Services {
		v.service(&s.Services[i])
	}
	v.ports()
	v.circles()
	return v.out
}

type validator struct {
	stack    *Stack
	networks map[string]*Network
	volumes  map[string]bool
	secrets  map[string]bool
	out      []Problem
}

func (v *validator) add(rule, service, path, format string, args ...any) {
	pos := v.stack.Origin(path)
	v.out = append(v.out, Problem{Severity: Error, Rule: rule, Stack: v.stack.Name, Service: service, File: pos.File, Line: pos.Line,
		Message: fmt.Sprintf(format, args...)})
}

func (v *validator) names() {
	s := v.stack
	if !stackName.MatchString(s.Name) || len(s.Name) > MaxStackName {
		v.add("stack-name", "", "",
			"the stack name %q must be of lower-case letters, digits, - and _, begin with a letter or digit and have at most %d characters",
			s.Name, MaxStackName)
	}
	for i := range s.Networks {
		n := &s.Networks[i]
		v.networks[n.Name] = n
		v.object("network", "networks."+n.Key, n.Name)
		v.network(n)
	}
	for _, vol := range s.Volumes {
		v.volumes[vol.Name] = true
		v.object("volume", "volumes."+vol.Key, vol.Name)
	}
	for _, sec := range s.Secrets {
		v.secrets[sec.Name] = true
		if sec.External && sec.Name != s.Name+"/"+sec.Key {
			v.object("secret", "secrets."+sec.Key, sec.Name)
		}
	}
}

// object checks the real name of what is kept outside of the stack, where a / or .. in it would lead to what is not the stack's.
func (v *validator) object(kind, at, name string) {
	if !serviceName.MatchString(name) || len(name) > MaxObjectName {
		v.add("object-name", "", at, "the name %q of the %s must be of letters, digits, ., - and _, begin with a letter or digit and have at most %d characters",
			name, kind, MaxObjectName)
	}
}

func (v *validator) network(n *Network) {
	at := "networks." + n.Key
	if n.Subnet == "" {
		if n.Gateway != "" {
			v.add("network-subnet", "", at, "the network %s has a gateway but no subnet; give it a subnet under ipam.config", n.Key)
		}
		return
	}
	subnet, err := netip.ParsePrefix(n.Subnet)
	switch {
	case err != nil || !subnet.Addr().Is4():
		v.add("network-subnet", "", at, "the subnet %q of the network %s is not an IPv4 network such as 10.5.0.0/24", n.Subnet, n.Key)
		return
	case subnet.Masked() != subnet:
		v.add("network-subnet",
			"", at, "the subnet %s of the network %s has bits set behind its length; did you mean %s?", n.Subnet, n.Key, subnet.Masked())
	case subnet.Bits() > 29:
		v.add("network-subnet", "", at, "the subnet %s of the network %s is too small; take /29 or a larger one", n.Subnet, n.Key)
	}
	if n.Gateway != "" {
		if gw, err := netip.ParseAddr(n.Gateway); err != nil || !subnet.Contains(gw) {
			v.add("network-subnet", "", at, "the gateway %q of the network %s is not an address of its subnet %s", n.Gateway, n.Key, n.Subnet)
		}
	}
}

func (v *validator) service(s *Service) {
	name := s.Name
	if !serviceName.MatchString(name) || len(name) > MaxServiceName {
		v.add("service-name", name,
			name, "the service name %q must be of letters, digits, ., - and _, begin with a letter or digit and have at most %d characters",
			name, MaxServiceName)
	}
	if s.Replicas < 0 {
		v.add("replicas", name, name+".replicas", "replicas is %d; want 0 or more", s.Replicas)
	}
	if s.Job() && s.Restart.Condition == RestartAny {
		v.add("job-restart", name, name+".restart", "a job ends, so it can't restart after every exit; take on-failure or none")
	}
	if len(s.Containers) == 0 {
		v.add("service-empty", name, name, "the service has no container")
	}
	for i := range s.Containers {
		v.container(s, &s.Containers[i])
	}
	for _, a := range s.Networks {
		v.attachment(s, a)
	}
	v.lookups(s)
	if s.NetworkMode != "" && len(s.Networks) > 0 {
		v.add("network-mode", name, name+".networkMode", "network_mode %s and networks exclude each other; keep one of them", s.NetworkMode)
	}
	if s.NetworkMode == "none" && len(s.Ports) > 0 {
		v.add("network-mode", name, name+".ports", "a service without a network can't publish ports; remove ports: or network_mode: none")
	}
	for _, d := range s.DependsOn {
		switch dep := v.stack.Service(d.Service); {
		case d.Service == name:
			v.add("depends-on-circle", name, name+".dependsOn", "the service depends on itself")
		case dep == nil && !d.Optional:
			v.add("depends-on-unknown", name, name+".dependsOn", "it depends on the service %q, which the stack does not have", d.Service)
		case dep != nil && d.Condition == Completed && dep.Restart.Condition == RestartAny && !dep.Job():
			v.add("depends-on-never", name, name+".dependsOn",
				"it waits for %q to complete, which restarts after every exit; set restart: on-failure or restart: \"no\" there", d.Service)
		}
	}
	v.update(s)
}

// lookups checks what ends up in a container's resolv.conf, hosts file and host name.
func (v *validator) lookups(s *Service) {
	if n := s.Hostname; n != "" && !strings.Contains(n, "{{") && (!serviceName.MatchString(n) || len(n) > 64) {
		v.add("container-value", s.Name, s.Name+".hostname", "the host name %q must be of letters, digits, ., - and _ and have at most 64 characters", n)
	}
	for _, w := range slices.Concat(s.DNS.Search, s.DNS.Options) {
		if strings.ContainsFunc(w, blank) {
			v.add("container-value", s.Name, s.Name+".dns", "%q can't be written into resolv.conf; write one word for each search domain and option", w)
		}
	}
	for _, h := range s.ExtraHosts {
		if name, _, _ := strings.Cut(h, "="); name == "" || strings.ContainsFunc(name, blank) {
			v.add("container-value", s.Name, s.Name+".extraHosts", "the extra host %q must be a name and an address, as db=10.0.0.5", h)
		}
	}
}

// blank finds what separates words in the files of a container, and bytes that end them.
func blank(r rune) bool { return r <= ' ' || r == 0x7f }

func (v *validator) update(s *Service) {
	for i, u := range []UpdatePolicy{s.Update, s.Rollback} {
		what := [...]string{"update", "rollback"}[i]
		if u.MaxFailures < 0 || u.MaxFailures > 1_000_000 {
			v.add("update-ratio", s.Name, s.Name+"."+what, "max_failure_ratio must be from 0 to 1")
		}
		if u.Parallelism < 0 || u.Delay < 0 || u.Monitor < 0 {
			v.add("update-value", s.Name, s.Name+"."+what, "%s_config holds a negative number", what)
		}
	}
	if s.Rollback.FailureAction == ActionRollback {
		v.add("update-value",
			s.Name, s.Name+".rollback", "a rollback can't be rolled back; set failure_action to pause or continue in rollback_config")
	}
}

func (v *validator) container(s *Service, c *Container) {
	if c.Image == "" {
		v.add("image", s.Name, c.Name+".image", "the container %s has no image", c.Name)
	}
	targets := map[string]bool{}
	for _, m := range c.Mounts {
		at := c.Name + ".mounts[" + m.Target + "]"
		if targets[m.Target] {
			v.add("mount-twice", s.Name, at, "two mounts have the target %s; remove one of them", m.Target)
		}
		targets[m.Target] = true
		if !strings.HasPrefix(m.Target, "/") || m.Target == "/" {
			v.add("mount-target", s.Name, at, "the mount target %q must be an absolute path inside the container, other than /", m.Target)
		}
		if m.Kind == MountVolume && !v.volumes[m.Source] {
			v.add("volume-unknown", s.Name, at, "the volume %q is not declared under the top-level volumes:", m.Source)
		}
	}
	v.process(s, c)
	secrets := map[string]bool{}
	for _, u := range c.Secrets {
		at := c.Name + ".secrets[" + u.Target + "]"
		if !strings.HasPrefix(u.Target, "/") || strings.Contains(u.Target+"/", "/../") {
			v.add("mount-target", s.Name, at, "the target %q of a secret must be a name, or an absolute path without ..", u.Target)
		}
		if secrets[u.Target] || targets[u.Target] {
			v.add("mount-twice", s.Name, at, "two mounts have the target %s; remove one of them", u.Target)
		}
		secrets[u.Target] = true
		if !v.secrets[u.Secret] {
			v.add("secret-unknown", s.Name, at, "the secret %q is not declared under the top-level secrets:", u.Secret)
		}
	}
	v.resources(s, c)
}

// process checks what the kernel or the runtime would refuse only when the container is made.
func (v *validator) process(s *Service, c *Container) {
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(c.Env[name], "\x00") {
			v.add("container-value", s.Name, c.Name+".env["+name+"]", "the variable %q can't be set: its name is empty or has a = in it, or a NUL byte is in it", name)
		}
	}
	if strings.ContainsFunc(c.User, blank) || strings.Count(c.User, ":") > 1 {
		v.add("container-value", s.Name, c.Name+".user", "the user %q must be a name or a number, with a group behind a colon or without", c.User)
	}
	if c.WorkingDir != "" && !strings.HasPrefix(c.WorkingDir, "/") {
		v.add("container-value", s.Name, c.Name+".workingDir", "the working directory %q must be an absolute path", c.WorkingDir)
	}
	if n := c.ContainerName; n != "" && (!serviceName.MatchString(n) || len(n) > MaxServiceName) {
		v.add("container-value", s.Name, c.Name+".containerName",
			"the container_name %q must be of letters, digits, ., - and _, begin with a letter or digit and have at most %d characters", n, MaxServiceName)
	}
	const least = Duration(1e6) // as in Docker
	if h := c.Health; h != nil && (h.Interval != 0 && h.Interval < least || h.Timeout != 0 && h.Timeout < least || h.StartInterval != 0 && h.StartInterval < least) {
		v.add("container-value", s.Name, c.Name+".health", "an interval or timeout of the health check is below 1ms")
	}
}

func (v *validator) resources(s *Service, c *Container) {
	r, at := c.Resources, c.Name+".resources"
	const least = 6 << 20 // as in Docker: below it no container starts
	switch {
	case r.Memory < 0 || r.ReserveMemory < 0 || r.ShmSize < 0 || r.CPU < 0 || r.ReserveCPU < 0 || r.Pids < -1:
		v.add("resources", s.Name, at, "a limit of %s is negative", c.Name)
	case r.Memory > 0 && r.Memory < least:
		v.add("resources", s.Name, at+".memory", "the memory limit is %s; containers need at least %s", r.Memory, Bytes(least))
	case r.Memory > 0 && r.ReserveMemory > r.Memory:
		v.add("resources", s.Name, at+".memory", "more memory is reserved (%s) than the limit allows (%s)", r.ReserveMemory, r.Memory)
	case r.MemorySwap > 0 && r.Memory == 0:
		v.add("resources", s.Name, at+".memorySwap", "memswap_limit needs a mem_limit")
	case r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		v.add("resources",
			s.Name, at+".memorySwap", "memswap_limit counts memory and swap together, so it can't be below mem_limit (%s)", r.Memory)
	case r.CPU > 0 && r.ReserveCPU > r.CPU:
		v.add("resources", s.Name, at+".cpu", "more cores are reserved (%s) than the limit allows (%s)", r.ReserveCPU, r.CPU)
	}
	for _, u := range c.Ulimits {
		if u.Hard >= 0 && (u.Soft > u.Hard || u.Soft < 0) {
			v.add("ulimit", s.Name, c.Name+".ulimits", "the soft limit of %s is above its hard limit", u.Name)
		}
	}
}

func (v *validator) attachment(s *Service, a Attachment) {
	at := s.Name + ".networks[" + a.Network + "]"
	n := v.networks[a.Network]
	if n == nil {
		v.add("network-unknown", s.Name, at, "the network %q is not declared under the top-level networks:", a.Network)
		return
	}
	for _, alias := range a.Aliases {
		if !serviceName.MatchString(alias) {
			v.add("container-value", s.Name, at, "the alias %q must be of letters, digits, ., - and _, and begin with a letter or digit", alias)
		}
	}
	if a.IPv4 == "" {
		return
	}
	addr, err := netip.ParseAddr(a.IPv4)
	if err != nil || !addr.Is4() {
		v.add("address", s.Name, at, "%q is not an IPv4 address", a.IPv4)
		return
	}
	if s.Mode != Replicated || s.Replicas > 1 {
		v.add("address", s.Name, at, "the fixed address %s is for one task; the service has more", a.IPv4)
	}
	if n.External {
		return // its subnet is another stack's
	}
	subnet, err := netip.ParsePrefix(n.Subnet)
	if n.Subnet == "" || err != nil {
		v.add("address", s.Name, at, "the fixed address %s needs a network with a subnet; give %s one under ipam.config", a.IPv4, n.Key)
		return
	}
	if !subnet.Contains(addr) || addr == subnet.Masked().Addr() || a.IPv4 == n.Gateway {
		v.add("address", s.Name, at, "the fixed address %s is not a free address of the network %s (%s)", a.IPv4, n.Key, n.Subnet)
	}
	for i := range v.stack.Services {
		other := &v.stack.Services[i]
		for _, b := range other.Networks {
			if other.Name < s.Name && b.Network == a.Network && b.IPv4 == a.IPv4 {
				v.add("address", s.Name, at, "the fixed address %s is taken by the service %s", a.IPv4, other.Name)
			}
		}
	}
}

// ports finds host ports that two services of the stack publish, or one service with two targets.
func (v *validator) ports() {
	type key struct {
		port  uint16
		proto string
	}
	type use struct{ service, ip string }
	taken := map[key][]use{}
	for i := range v.stack.Services {
		s := &v.stack.Services[i]
		for _, p := range s.Ports {
			at := s.Name + ".ports"
			if p.Target == 0 {
				v.add("port", s.Name, at, "a port of the container must be from 1 to 65535")
			}
			if !slices.Contains([]string{"tcp", "udp", "sctp"}, p.Proto()) {
				v.add("port", s.Name, at, "the protocol %q of port %d is not tcp, udp or sctp", p.Protocol, p.Target)
			}
			if p.Published == 0 {
				continue
			}
			k := key{p.Published, p.Proto()}
			for _, u := range taken[k] {
				if u.ip == "" || p.HostIP == "" || u.ip == p.HostIP {
					if u.service == s.Name {
						v.add("port-twice",
							s.Name, at, "the host port %d/%s is published twice; remove one of the entries", p.Published, p.Proto())
						break
					}
					v.add("port-shared", s.Name, at, "port %d/%s is published by the service %s too; on one node only one of them gets it",
						p.Published, p.Proto(), u.service)
					v.out[len(v.out)-1].Severity = Warn // on different nodes both work
					break
				}
			}
			taken[k] = append(taken[k], use{s.Name, p.HostIP})
		}
	}
}

func (v *validator) circles() {
	graph := map[string][]string{}
	for i := range v.stack.Services {
		s := &v.stack.Services[i]
		for _, d := range s.DependsOn {
			if d.Service != s.Name {
				graph[s.Name] = append(graph[s.Name], d.Service)
			}
		}
	}
	if circle := Cycle(graph); circle != nil {
		v.add("depends-on-circle", circle[0], circle[0]+".dependsOn", "services wait for each other in a circle: %s; take one depends_on out",
			strings.Join(circle, " -> "))
	}
}

// Cycle finds a circle in a graph of names: a, b, a. The result is the same for the same graph; nil when there is none.
func Cycle(graph map[string][]string) []string {
	const visiting, done = 1, 2
	state := map[string]int{}
	var stack []string
	var visit func(n string) []string
	visit = func(n string) []string {
		switch state[n] {
		case done:
			return nil
		case visiting:
			return append(slices.Clone(stack[slices.Index(stack, n):]), n)
		}
		state[n] = visiting
		stack = append(stack, n)
		for _, next := range slices.Sorted(slices.Values(graph[n])) {
			if c := visit(next); c != nil {
				return c
			}
		}
		stack = stack[:len(stack)-1]
		state[n] = done
		return nil
	}
	for _, n := range slices.Sorted(maps.Keys(graph)) {
		if c := visit(n); c != nil {
			return c
		}
	}
	return nil
}
