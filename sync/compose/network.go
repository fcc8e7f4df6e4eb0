package compose

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// networks converts the top-level networks. External ones called host or none stand for a mode, as in Swarm.
func (c *converter) networks() {
	for _, key := range sortedKeys(c.project.Networks) {
		in := c.project.Networks[key]
		c.at("networks."+key, "networks", key)
		if in.External && networkMode(in.Name) != "" {
			continue
		}
		n := manifest.Network{Name: in.Name, Key: key, External: bool(in.External), Internal: in.Internal, Labels: in.Labels}
		refuse := func(part, format string, args ...any) {
			pos, _ := c.locate("networks", key, part)
			c.errorf("network", pos, "networks."+key+": "+format, args...)
		}
		switch in.Driver {
		case "", "bridge", "overlay", "default":
		case "host":
			refuse("driver", "there is one such network, and it is no stack's own: write network_mode: host in the services")
		case "null":
			refuse("driver", "there is one such network, and it is no stack's own: write network_mode: none in the services")
		default:
			refuse("driver", "the driver %s is not here; leave it out for a network of containers", in.Driver)
		}
		if in.EnableIPv6 != nil && *in.EnableIPv6 {
			pos, _ := c.locate("networks", key, "enable_ipv6")
			c.add(manifest.Notice, "key-no-effect",
				pos, "", "enable_ipv6 has no effect here: containers have IPv4 addresses among themselves; ports are published on both")
		}
		if in.EnableIPv4 != nil && !*in.EnableIPv4 {
			refuse("enable_ipv4", "a network without IPv4 is not supported here")
		}
		if d := in.Ipam.Driver; d != "" && d != "default" {
			refuse("ipam", "the address driver %s is not here; leave it out", d)
		}
		for _, pool := range in.Ipam.Config {
			if pool == nil {
				continue
			}
			if strings.Contains(pool.Subnet, ":") {
				pos, _ := c.locate("networks", key, "ipam")
				c.add(manifest.Notice, "key-no-effect",
					pos, "", "the subnet %s has no effect here: containers have IPv4 addresses among themselves", pool.Subnet)
				continue
			}
			if n.Subnet != "" && pool.Subnet != "" {
				refuse("ipam", "a network has one subnet here; keep %s or %s", n.Subnet, pool.Subnet)
				continue
			}
			n.Subnet, n.Gateway = cmp.Or(pool.Subnet, n.Subnet), cmp.Or(pool.Gateway, n.Gateway)
		}
		c.out.Networks = append(c.out.Networks, n)
	}
	slices.SortFunc(c.out.Networks, func(a, b manifest.Network) int { return strings.Compare(a.Name+"\x00"+a.Key, b.Name+"\x00"+b.Key) })
}

// networkMode says whether the name of an external network stands for a mode.
func networkMode(name string) string {
	if name == "host" || name == "none" {
		return name
	}
	return ""
}

// network gives a service its networks, or the mode that stands for them, and its ports.
func (c *converter) network(in types.ServiceConfig, p *part) {
	s := &p.service
	switch mode := in.NetworkMode; {
	case mode == "host" || mode == "none":
		s.NetworkMode = mode
	case mode == "bridge" || mode == "default":
		c.notice(in.Name, "network_mode", "network_mode: %s is taken as the stack's own network", mode)
		c.attach(in, p, "default", nil)
	case strings.HasPrefix(mode, types.ServicePrefix):
		p.join = strings.TrimPrefix(mode, types.ServicePrefix)
	case strings.HasPrefix(mode, types.ContainerPrefix):
		p.join = c.byContainerName(strings.TrimPrefix(mode, types.ContainerPrefix))
		if p.join == "" {
			c.refuse(in.Name,
				"network_mode", "%q: no service of this stack has that container_name, and containers of other stacks are not joined; "+
					"move both into one stack and write service:NAME", mode)
		}
	case mode != "":
		c.refuse(in.Name, "network_mode", "%q is not known; want host, none or service:NAME", mode)
	}
	if in.NetworkMode != "" && len(in.Networks) > 0 {
		c.refuse(in.Name, "network_mode", "network_mode and networks exclude each other; keep one of them")
		return
	}
	for _, key := range byPriority(in.Networks) {
		c.attach(in, p, key, in.Networks[key])
	}
	if s.NetworkMode != "" && len(s.Networks) > 0 {
		c.notice(in.Name, "networks", "with the %s network, the other networks of the service have no effect", s.NetworkMode)
		s.Networks = nil
	}
	if in.MacAddress != "" {
		if len(s.Networks) == 0 {
			c.refuse(in.Name, "mac_address", "there is no network of the service's own to give the address on")
		} else if s.Networks[0].MAC == "" {
			s.Networks[0].MAC = in.MacAddress
		}
	}
	s.Ports = c.ports(in)
	if len(s.Ports) > 0 && s.NetworkMode == "host" {
		c.notice(in.Name, "ports", "ports: has no effect with the host's network: the program's own ports are the host's")
		s.Ports = nil
	}
	if len(s.Ports) > 0 && p.join != "" {
		c.refuse(in.Name, "ports", "the service shares the network of %s; publish the ports there", p.join)
	}
}

// byContainerName finds the service that network_mode: container:NAME means.
func (c *converter) byContainerName(name string) string {
	for _, key := range sortedKeys(c.project.Services) {
		if c.project.Services[key].ContainerName == name {
			return key
		}
	}
	if _, ok := c.project.Services[name]; ok {
		return name
	}
	return ""
}

// byPriority orders the networks of a service: the first one gives the default route.
func byPriority(networks map[string]*types.ServiceNetworkConfig) []string {
	keys := sortedKeys(networks)
	rank := func(key string) (gateway, priority int) {
		if n := networks[key]; n != nil {
			return n.GatewayPriority, n.Priority
		}
		return 0, 0
	}
	slices.SortStableFunc(keys, func(a, b string) int {
		ag, ap := rank(a)
		bg, bp := rank(b)
		return cmp.Or(cmp.Compare(bg, ag), cmp.Compare(bp, ap))
	})
	return keys
}

func (c *converter) attach(in types.ServiceConfig, p *part, key string, cfg *types.ServiceNetworkConfig) {
	decl, ok := c.project.Networks[key]
	if !ok && key == "default" {
		decl, ok = types.NetworkConfig{Name: c.out.Name + "_default"}, true
		c.out.Networks = append(c.out.Networks, manifest.Network{Name: decl.Name, Key: key})
		c.project.Networks = addNetwork(c.project.Networks, key, decl)
	}
	pos, _ := c.locate("services", in.Name, "networks", key)
	if !ok {
		c.add(manifest.Error,
			"network-unknown", pos, in.Name, "the network %q is not declared under the top-level networks:; declare it there, "+
				"with external: true if another stack has it", key)
		return
	}
	if mode := networkMode(decl.Name); decl.External && mode != "" {
		p.service.NetworkMode = mode
		c.out.Origins[in.Name+".networkMode"] = pos
		return
	}
	a := manifest.Attachment{Network: decl.Name}
	if cfg != nil {
		a.Aliases, a.IPv4, a.MAC = sorted(cfg.Aliases), cfg.Ipv4Address, cfg.MacAddress
		if len(a.Aliases) == 0 {
			a.Aliases = nil
		}
		if !cfg.ServiceNameAliasEnabled() {
			c.notice(in.Name, "networks."+key+".use_service_name_alias",
				"use_service_name_alias: false has no effect: a service is always known by its name")
		}
	}
	c.used[decl.Name] = true
	c.out.Origins[in.Name+".networks["+decl.Name+"]"] = pos
	p.service.Networks = append(p.service.Networks, a)
}

func addNetwork(m types.Networks, key string, n types.NetworkConfig) types.Networks {
	if m == nil {
		m = types.Networks{}
	}
	m[key] = n
	return m
}

func (c *converter) ports(in types.ServiceConfig) []manifest.Port {
	var out []manifest.Port
	for _, p := range in.Ports {
		target := strconv.Itoa(int(p.Target))
		if p.Target == 0 || p.Target > 65535 {
			c.refuse(in.Name, "ports", "%s is not a port; want 1 to 65535", target)
			continue
		}
		m := manifest.Port{HostIP: p.HostIP, Target: uint16(p.Target), Protocol: strings.ToLower(p.Protocol)}
		if m.Protocol == "tcp" {
			m.Protocol = ""
		}
		switch p.Mode {
		case "", "ingress":
		case "host":
			m.Mode = p.Mode
		default:
			c.refuse(in.Name, "ports", "the mode %q of port %s is not known; want ingress or host", p.Mode, target)
		}
		if p.Published != "" {
			first, last, isRange := strings.Cut(p.Published, "-")
			n, err := strconv.ParseUint(first, 10, 16)
			if err != nil {
				c.refuse(in.Name, "ports", "the published port %q is not a number from 0 to 65535", p.Published)
				continue
			}
			if isRange && last != first {
				c.notice(in.Name, "ports", "of the range %s for port %s the first port is published", p.Published, target)
			}
			m.Published = uint16(n)
			c.at(in.Name+".ports["+first+"]", "services", in.Name, "ports", first)
		}
		out = append(out, m)
	}
	slices.SortStableFunc(out, manifest.ComparePorts)
	return slices.Compact(out)
}

// links gives the services that others link to the aliases that those use.
func (c *converter) links(parts map[string]*part) {
	for _, name := range sortedKeys(parts) {
		p := parts[name]
		for _, l := range p.compose.Links {
			target, alias, _ := strings.Cut(l, ":")
			to, ok := parts[target]
			if !ok {
				c.refuse(name, "links", "it links to the service %q, which the stack does not have", target)
				continue
			}
			if alias == "" || alias == target {
				continue
			}
			if _, taken := parts[alias]; taken {
				c.refuse(name, "links", "the alias %q is the name of another service", alias)
				continue
			}
			for i := range to.service.Networks {
				a := &to.service.Networks[i]
				if slices.ContainsFunc(p.service.Networks, func(b manifest.Attachment) bool { return b.Network == a.Network }) {
					a.Aliases = sorted(slices.Concat(a.Aliases, []string{alias}))
				}
			}
		}
	}
}

// join moves each service that shares another one's network into that one's tasks, as one more container.
func (c *converter) join(parts map[string]*part) {
	root := map[string]string{} // sidecar -> the service whose tasks it is in
	for _, name := range sortedKeys(parts) {
		at, hops := name, 0
		for parts[at] != nil && parts[at].join != "" && hops <= len(parts) {
			at, hops = parts[at].join, hops+1
		}
		switch {
		case parts[name].join == "":
		case parts[at] == nil:
			c.refuse(name, "network_mode", "it shares the network of the service %q, which the stack does not have", at)
			parts[name].join = ""
		case hops > len(parts):
			c.refuse(name, "network_mode", "services share each other's network in a circle")
			parts[name].join = ""
		default:
			root[name] = at
		}
	}
	for _, name := range sortedKeys(root) {
		c.absorb(parts[root[name]], parts[name])
	}
	for _, name := range sortedKeys(parts) {
		if parts[name].join == "" {
			redirect(&parts[name].service, root)
		}
	}
}

// absorb adds a sidecar to its host. What both say of the task as a whole must agree.
func (c *converter) absorb(host, side *part) {
	h, s := &host.service, &side.service
	in := side.compose
	h.Containers = append(h.Containers, s.Containers...)
	h.DependsOn = append(h.DependsOn, s.DependsOn...)
	h.StopGrace = max(h.StopGrace, s.StopGrace)
	counted := in.Scale != nil || in.Deploy != nil && (in.Deploy.Replicas != nil || in.Deploy.Mode != "")
	if counted && (s.Replicas != h.Replicas || s.Mode != h.Mode) {
		c.refuse(s.Name, "deploy", "it runs in the tasks of %s, so it has as many as that; remove replicas and mode here", h.Name)
	}
	if s.Restart != h.Restart {
		c.notice(s.Name, "restart", "it runs in the tasks of %s and restarts as that says", h.Name)
	}
	var dropped []string
	for key, set := range map[string]bool{"hostname": s.Hostname != "", "domainname": s.Domainname != "", "extra_hosts": len(s.ExtraHosts) > 0,
		"dns": len(s.DNS.Servers)+len(s.DNS.Search)+len(s.DNS.Options) > 0, "deploy.labels": len(s.Labels) > 0,
		"deploy.update_config":   in.Deploy != nil && in.Deploy.UpdateConfig != nil,
		"deploy.rollback_config": in.Deploy != nil && in.Deploy.RollbackConfig != nil,
		"deploy.placement":       len(s.Placement.Constraints)+len(s.Placement.Spread)+s.Placement.MaxPerNode > 0} {
		if set {
			dropped = append(dropped, key)
		}
	}
	if len(dropped) > 0 {
		slices.Sort(dropped)
		c.notice(s.Name, dropped[0], "%s has no effect: it is that of %s, whose network it shares", strings.Join(dropped, ", "), h.Name)
	}
	if s.PID != h.PID || s.IPC != h.IPC || s.UserNS != h.UserNS || len(s.Sysctls) > 0 {
		c.refuse(s.Name, "network_mode", "pid, ipc, userns_mode and sysctls are of a whole task; set them on %s", h.Name)
	}
}

// redirect turns dependencies on sidecars into those on their hosts, and drops those within the task: its containers start in order.
func redirect(s *manifest.Service, root map[string]string) {
	strength := map[manifest.Condition]int{manifest.Started: 1, manifest.Healthy: 2, manifest.Completed: 3}
	byName := map[string]manifest.Dependency{}
	for _, d := range s.DependsOn {
		if to, ok := root[d.Service]; ok {
			d.Service = to
		}
		if d.Service == s.Name && len(s.Containers) > 1 {
			continue
		}
		if old, ok := byName[d.Service]; ok {
			if strength[old.Condition] > strength[d.Condition] {
				d.Condition = old.Condition
			}
			d.Restart, d.Optional = d.Restart || old.Restart, d.Optional && old.Optional
		}
		byName[d.Service] = d
	}
	s.DependsOn = nil
	for _, name := range sortedKeys(byName) {
		s.DependsOn = append(s.DependsOn, byName[name])
	}
}
