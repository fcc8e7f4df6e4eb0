package compose

import (
	"errors"
	"io/fs"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// deploy reads scale, restart and the deploy section, but for resources.
func (c *converter) deploy(in types.ServiceConfig, s *manifest.Service) {
	d := in.Deploy
	if d == nil {
		d = &types.DeployConfig{}
	}
	switch mode := manifest.Mode(d.Mode); mode {
	case "", "replicated":
	case manifest.Global, manifest.ReplicatedJob, manifest.GlobalJob:
		s.Mode = mode
	default:
		c.refuse(in.Name, "deploy.mode", "%q is not known; want replicated, global, replicated-job or global-job", d.Mode)
	}
	s.Replicas = c.replicas(in, d, s.Mode)
	s.Restart = c.restart(in, d, s.Job())
	s.Update = c.update(in.Name, "update_config", d.UpdateConfig)
	s.Rollback = c.update(in.Name, "rollback_config", d.RollbackConfig)
	if len(d.Labels) > 0 {
		s.Labels = d.Labels
	}
	s.Placement = manifest.Placement{Constraints: d.Placement.Constraints, MaxPerNode: int(min(d.Placement.MaxReplicas, math.MaxInt32))}
	for _, p := range d.Placement.Preferences {
		s.Placement.Spread = append(s.Placement.Spread, p.Spread)
	}
	for _, k := range d.Placement.Constraints {
		if !strings.Contains(k, "==") && !strings.Contains(k, "!=") {
			c.refuse(in.Name, "deploy.placement.constraints", "%q can't be read; write node.labels.NAME==VALUE or !=", k)
		}
	}
	switch d.EndpointMode {
	case "":
	case "vip":
		c.notice(in.Name, "deploy.endpoint_mode", "endpoint_mode: vip is taken as dnsrr: the service's name leads to the addresses of its healthy tasks")
	case "dnsrr":
		s.Endpoint = "dnsrr"
	default:
		c.refuse(in.Name, "deploy.endpoint_mode", "%q is not known; want vip or dnsrr", d.EndpointMode)
	}
}

func (c *converter) replicas(in types.ServiceConfig, d *types.DeployConfig, mode manifest.Mode) int {
	if in.Scale != nil && d.Replicas != nil && *in.Scale != *d.Replicas {
		c.refuse(in.Name, "scale", "scale is %d but deploy.replicas is %d; keep one of them", *in.Scale, *d.Replicas)
	}
	if mode == manifest.Global || mode == manifest.GlobalJob {
		if in.Scale != nil || d.Replicas != nil {
			c.refuse(in.Name, "deploy.replicas", "the mode %s runs one task on each node; remove replicas", mode)
		}
		return 0
	}
	n := 1
	for _, v := range []*int{d.Replicas, in.Scale} {
		if v != nil {
			n = *v
		}
	}
	const most = 10_000
	if n < 0 || n > most {
		c.refuse(in.Name, "deploy.replicas", "%d is not a number of replicas; want 0 to %d", n, most)
		return 1
	}
	if n > 1 && in.ContainerName != "" {
		c.refuse(in.Name, "container_name", "one name can't be that of %d containers; remove it, or replicas", n)
	}
	return n
}

func (c *converter) restart(in types.ServiceConfig, d *types.DeployConfig, job bool) manifest.RestartPolicy {
	out := manifest.RestartPolicy{Condition: manifest.RestartOnFailure}
	switch policy, attempts, _ := strings.Cut(in.Restart, ":"); policy {
	case "":
	case "no":
		out.Condition = manifest.RestartNever
	case "always", "unless-stopped":
		out.Condition = manifest.RestartAny
	case "on-failure":
		if attempts != "" {
			n, err := strconv.Atoi(attempts)
			if err != nil || n < 1 {
				c.refuse(in.Name, "restart", "%q: want a number of attempts, such as on-failure:3", in.Restart)
			}
			out.MaxAttempts = n
		}
	default:
		c.refuse(in.Name, "restart", "%q is not known; want no, always, on-failure or unless-stopped", in.Restart)
	}
	if r := d.RestartPolicy; r != nil {
		out = manifest.RestartPolicy{Condition: manifest.RestartAny}
		switch cond := manifest.RestartCondition(r.Condition); cond {
		case "", manifest.RestartAny:
		case manifest.RestartOnFailure, manifest.RestartNever:
			out.Condition = cond
		case "always", "unless-stopped":
			c.notice(in.Name, "deploy.restart_policy.condition", "%s is a word of restart:; it is taken as any", cond)
		default:
			c.refuse(in.Name, "deploy.restart_policy.condition", "%q is not known; want any, on-failure or none", cond)
		}
		if r.MaxAttempts != nil {
			out.MaxAttempts = int(min(*r.MaxAttempts, math.MaxInt32))
		}
		if r.Delay != nil {
			out.Delay = c.span(in.Name, "deploy.restart_policy.delay", *r.Delay)
		}
		if r.Window != nil {
			out.Window = c.span(in.Name, "deploy.restart_policy.window", *r.Window)
		}
	}
	if job && out.Condition == manifest.RestartAny {
		out.Condition = manifest.RestartOnFailure // as in Swarm: a job that succeeded is done
	}
	return out
}

func (c *converter) span(service, key string, d types.Duration) manifest.Duration {
	if d < 0 {
		c.refuse(service, key, "a time can't be negative")
	}
	return manifest.Duration(d)
}

func (c *converter) update(service, key string, u *types.UpdateConfig) manifest.UpdatePolicy {
	out := manifest.UpdatePolicy{Parallelism: 1}
	if u == nil {
		return out
	}
	at := "deploy." + key
	if u.Parallelism != nil {
		out.Parallelism = int(min(*u.Parallelism, math.MaxInt32))
	}
	out.Delay, out.Monitor = c.span(service, at+".delay", u.Delay), c.span(service, at+".monitor", u.Monitor)
	switch action := manifest.FailureAction(u.FailureAction); action {
	case "", manifest.ActionPause, manifest.ActionContinue, manifest.ActionRollback:
		out.FailureAction = action
	default:
		c.refuse(service, at+".failure_action", "%q is not known; want pause, continue or rollback", action)
	}
	switch u.Order {
	case "", "stop-first":
	case "start-first":
		out.StartFirst = true
	default:
		c.refuse(service, at+".order", "%q is not known; want stop-first or start-first", u.Order)
	}
	ratio, err := exact(u.MaxFailureRatio)
	if err != nil || ratio < 0 || ratio > 1e9 {
		c.refuse(service, at+".max_failure_ratio", "want a number from 0 to 1")
	}
	out.MaxFailures = int(ratio / 1000)
	return out
}

// exact reads a number that compose-go holds as a float32 as the decimal that was written, in billionths.
func exact(f float32) (int64, error) {
	text := strconv.FormatFloat(float64(f), 'f', -1, 32)
	if whole, frac, ok := strings.Cut(text, "."); ok && len(frac) > 9 {
		text = whole + "." + frac[:9]
	}
	v, err := manifest.ParseCPU(text)
	return int64(v), err
}

// resources merges the keys of Compose v2 with those of deploy. Where both say something else, the file is wrong.
func (c *converter) resources(in types.ServiceConfig) manifest.Resources {
	limits, reserve := &types.Resource{}, &types.Resource{}
	if in.Deploy != nil {
		if r := in.Deploy.Resources.Limits; r != nil {
			limits = r
		}
		if r := in.Deploy.Resources.Reservations; r != nil {
			reserve = r
		}
	}
	amount := func(key string, old, deploy int64, deployKey string) int64 {
		if old != 0 && deploy != 0 && old != deploy {
			c.refuse(in.Name, key, "it says something else than deploy.resources.%s; keep one of them", deployKey)
		}
		if deploy != 0 {
			return deploy
		}
		return old
	}
	cores := func(key string, f float32) int64 {
		v, err := exact(f)
		if err != nil {
			c.refuse(in.Name, key, "want a number of cores such as 0.5")
		}
		return v
	}
	cpu := cores("cpus", in.CPUS)
	if in.CPUQuota > 0 {
		period := in.CPUPeriod
		if period == 0 {
			period = 100_000
		}
		if period < 1000 || period > 1_000_000 || in.CPUQuota > math.MaxInt64/1_000_000_000 {
			c.refuse(in.Name, "cpu_period", "want 1000 to 1000000 microseconds")
			period = 100_000
		}
		if quota := in.CPUQuota * 1_000_000_000 / period; cpu == 0 {
			cpu = quota
		} else if cpu != quota {
			c.refuse(in.Name, "cpu_quota", "cpus and cpu_quota exclude each other; keep cpus")
		}
	}
	r := manifest.Resources{
		Memory:        manifest.Bytes(amount("mem_limit", int64(in.MemLimit), int64(limits.MemoryBytes), "limits.memory")),
		MemorySwap:    manifest.Bytes(in.MemSwapLimit),
		CPU:           manifest.CPU(amount("cpus", cpu, cores("deploy.resources.limits.cpus", limits.NanoCPUs.Value()), "limits.cpus")),
		CPUSet:        in.CPUSet,
		Pids:          amount("pids_limit", in.PidsLimit, limits.Pids, "limits.pids"),
		ReserveMemory: manifest.Bytes(amount("mem_reservation", int64(in.MemReservation), int64(reserve.MemoryBytes), "reservations.memory")),
		ReserveCPU:    manifest.CPU(cores("deploy.resources.reservations.cpus", reserve.NanoCPUs.Value())),
		ShmSize:       manifest.Bytes(in.ShmSize), OOMKillDisable: in.OomKillDisable,
	}
	if in.CPUShares < 0 || in.OomScoreAdj < -1000 || in.OomScoreAdj > 1000 || in.MemSwappiness < 0 || in.MemSwappiness > 100 {
		c.refuse(in.Name, "deploy.resources", "cpu_shares, oom_score_adj (-1000 to 1000) or mem_swappiness (0 to 100) is out of its range")
		return r
	}
	r.CPUShares, r.OOMScoreAdj = uint64(in.CPUShares), int(in.OomScoreAdj)
	if c.written("services", in.Name, "mem_swappiness") {
		v := int64(in.MemSwappiness)
		r.Swappiness = &v
	}
	if in.CPUPeriod != 0 && in.CPUQuota == 0 {
		c.notice(in.Name, "cpu_period", "cpu_period has no effect without cpu_quota; cpus: 0.5 says both in one")
	}
	for key, set := range map[string]bool{"mem_swappiness": r.Swappiness != nil, "oom_kill_disable": r.OOMKillDisable} {
		if set {
			c.notice(in.Name, key, "%s has no effect on machines with cgroup v2, which has no such switch", key)
		}
	}
	if len(reserve.GenericResources) > 0 {
		c.notice(in.Name, "deploy.resources.reservations.generic_resources", "generic_resources are not counted here: they keep no task from starting")
	}
	for _, g := range reserve.GenericResources {
		if spec := g.DiscreteResourceSpec; spec != nil {
			if r.Generic == nil {
				r.Generic = map[string]int64{}
			}
			r.Generic[spec.Kind] += spec.Value
		}
	}
	c.defaults(in.Name, &r)
	return r
}

// defaults fills in the limits of gitops.yaml where the service sets none. The origin leads to the line that gives them.
func (c *converter) defaults(service string, r *manifest.Resources) {
	d := c.loader.settings.Defaults
	pos := manifest.Pos{File: c.loader.settingsPath(), Line: c.loader.settings.line("defaults", -1)}
	if m, err := parseBytes(d.Memory); err == nil && m > 0 && r.Memory == 0 {
		r.Memory = max(m, r.ReserveMemory)
		c.out.Origins[service+".resources.memory"] = pos
	}
	if v, err := manifest.ParseCPU(string(d.CPUs)); d.CPUs != "" && err == nil && r.CPU == 0 {
		r.CPU = max(v, r.ReserveCPU)
		c.out.Origins[service+".resources.cpu"] = pos
	}
	if d.Pids > 0 && r.Pids == 0 {
		r.Pids = d.Pids
		c.out.Origins[service+".resources.pids"] = pos
	}
}

// environment merges the env files with the variables of the service, which win.
func (c *converter) environment(in types.ServiceConfig) (env map[string]string, unset []string) {
	env = map[string]string{}
	for _, f := range in.EnvFiles {
		c.envFile(in, f, env)
	}
	for name, value := range in.Environment {
		if value == nil {
			delete(env, name)
			unset = append(unset, name)
			continue
		}
		env[name] = *value
	}
	slices.Sort(unset)
	if len(env) == 0 {
		env = nil
	}
	return env, unset
}

func (c *converter) envFile(in types.ServiceConfig, f types.EnvFile, env map[string]string) {
	name, inside := c.tree.rel(f.Path)
	pos, _ := c.locate("services", in.Name, "env_file", path.Base(f.Path))
	if at, whole := c.locate("services", in.Name, "env_file"); pos.Line == 0 && whole {
		pos = at
	}
	if !inside {
		c.add(manifest.Error,
			"path-outside", pos, in.Name, "an env_file is outside of the repository; only files of the repository can be used")
		return
	}
	data, err := c.tree.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		if f.Required {
			c.add(manifest.Error,
				"file-missing", pos, in.Name, "the env_file %s is not in the repository; commit it, or write path: and required: false", name)
		}
		return
	}
	if err != nil {
		c.unreadable(name, err, pos)
		return
	}
	values := map[string]string{}
	fault := parseEnv(name, data, values, f.Format, func(key string) (string, bool) {
		if v, ok := c.vars.lookup(key); ok {
			return v, true
		}
		if v := in.Environment[key]; v != nil {
			return *v, true
		}
		v, ok := env[key]
		return v, ok
	})
	if fault != nil {
		c.add(manifest.Error, fault.rule, manifest.Pos{File: name, Line: fault.line}, in.Name, "%s", fault.msg)
		return
	}
	for key := range values {
		if _, own := in.Environment[key]; !own {
			c.out.Origins[in.Name+".env."+key] = manifest.Pos{File: name, Line: lineOf(data, key)}
		}
	}
	maps.Copy(env, values)
}

// lineOf finds the line of a file of NAME=VALUE lines that sets a name.
func lineOf(data []byte, name string) int {
	for i, l := range strings.Split(string(data), "\n") {
		l = strings.TrimPrefix(strings.TrimSpace(l), "export ")
		if rest, ok := strings.CutPrefix(strings.TrimSpace(l), name); ok && strings.HasPrefix(strings.TrimLeft(rest, " "), "=") {
			return i + 1
		}
	}
	return 0
}

// labels merges the label files with the labels of the service, which win.
func (c *converter) labels(in types.ServiceConfig) map[string]string {
	out := map[string]string{}
	for _, f := range in.LabelFiles {
		pos, _ := c.locate("services", in.Name, "label_file")
		name, inside := c.tree.rel(f)
		if !inside {
			c.add(manifest.Error,
				"path-outside", pos, in.Name, "a label_file is outside of the repository; only files of the repository can be used")
			continue
		}
		data, err := c.tree.read(name)
		if err != nil {
			c.unreadable(name, err, pos)
			continue
		}
		if f := parseEnv(name, data, out, "", c.vars.lookup); f != nil {
			c.add(manifest.Error, f.rule, manifest.Pos{File: name, Line: f.line}, in.Name, "%s", f.msg)
		}
	}
	maps.Copy(out, in.Labels)
	if len(out) == 0 {
		return nil
	}
	return out
}

// links says whether the dependency on a service comes from links, which are judged by themselves.
func links(in types.ServiceConfig, name string) bool {
	return slices.ContainsFunc(in.Links, func(l string) bool { return l == name || strings.HasPrefix(l, name+":") })
}

// dependencies reads depends_on, with what links and shared namespaces imply. A service of a profile that is off counts as missing.
func (c *converter) dependencies(in types.ServiceConfig, s *manifest.Service) {
	for _, name := range sortedKeys(in.DependsOn) {
		d := in.DependsOn[name]
		if _, ok := c.project.Services[name]; !ok {
			if !d.Required {
				continue
			}
			pos, _ := c.locate("services", in.Name, "depends_on", name)
			if off, isOff := c.project.DisabledServices[name]; isOff {
				c.add(manifest.Error, "depends-on-unknown",
					pos, in.Name, "it depends on the service %q, which is off: switch its profile %s on with profiles: in gitops.yaml, "+
						"or write required: false", name, strings.Join(off.Profiles, " or "))
			} else if in.NetworkMode != types.ServicePrefix+name && !links(in, name) {
				c.add(manifest.Error, "depends-on-unknown", pos, in.Name, "it depends on the service %q, which the stack does not have", name)
			}
			continue
		}
		dep := manifest.Dependency{Service: name, Condition: manifest.Condition(d.Condition), Restart: d.Restart, Optional: !d.Required}
		switch dep.Condition {
		case "":
			dep.Condition = manifest.Started
		case manifest.Started, manifest.Healthy, manifest.Completed:
		default:
			c.refuse(in.Name, "depends_on",
				"the condition %q is not known; want service_started, service_healthy or service_completed_successfully", d.Condition)
		}
		s.DependsOn = append(s.DependsOn, dep)
	}
}
