package worker

import (
	"context"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/cluster/network/names"
	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// adoptNetworks takes over what an earlier agent left: networks that are no longer wanted are removed once nothing is on them.
func (w *Worker) adoptNetworks(ctx context.Context) error {
	have, err := w.cfg.Network.List(ctx)
	if err != nil {
		return err
	}
	for _, n := range have.Networks {
		w.networks[n.ID] = n
	}
	for _, e := range have.Endpoints {
		w.remember(e.Task).Network = true
	}
	return nil
}

// ensureNetworks makes the networks of this node's tasks and removes those that the log has no longer, or has elsewhere.
func (w *Worker) ensureNetworks(ctx context.Context, view *state.View, assigned []converge.Assignment) {
	want := map[string]bool{}
	for _, a := range assigned {
		if a.Spec.NetworkMode != "" {
			continue
		}
		for _, at := range a.Spec.Networks {
			want[at.Network] = true
		}
	}
	// First, because a new network may have the subnet of one that left it. While a task is still on one, the network refuses, and the next pass tries again.
	for id, have := range w.networks {
		e, _ := view.Networks.Get(id)
		n, placed := parseNetwork(id, e.Value.Subnets[w.cfg.Node], e.Value.Gateway, e.Value.Internal)
		if placed && n == have || !placed && want[id] {
			continue
		}
		if err := w.cfg.Network.RemoveNetwork(ctx, id); err != nil {
			w.log.Debug("remove a network", "network", id, "err", err)
			continue
		}
		delete(w.networks, id)
	}
	refused := map[string]error{}
	for _, id := range slices.Sorted(maps.Keys(want)) {
		e, ok := view.Networks.Get(id)
		if !ok {
			continue
		}
		n, ok := parseNetwork(id, e.Value.Subnets[w.cfg.Node], e.Value.Gateway, e.Value.Internal)
		if !ok || w.networks[id] == n {
			continue
		}
		if err := w.cfg.Network.EnsureNetwork(ctx, n); err != nil {
			refused[id] = err
			if was := w.refused[id]; was == nil || was.Error() != err.Error() {
				w.log.Error("make a network", "network", id, "err", err)
			}
			continue
		}
		w.networks[id] = n
	}
	w.refused = refused
}

// backend is the address at which a task takes connections from outside: on its first network that is not internal.
func backend(t *state.Task, spec *manifest.Service, nets map[string]network.Network) netip.Addr {
	for _, at := range spec.Networks {
		if n, ok := nets[at.Network]; ok && !n.Internal {
			if a, err := netip.ParseAddr(t.Addrs[at.Network]); err == nil {
				return a
			}
		}
	}
	return netip.Addr{}
}

// reachable says whether names and ports lead to a task: it is to run, the log knows it as ready, and this node sees nothing to the contrary.
func (w *Worker) reachable(a *converge.Assignment) bool {
	return a.Desired == state.DesiredRun && a.Last.Ready() && w.last[a.ID].Ready()
}

// makeReachable brings published ports and names up to date. It runs before any action of the same pass, so that a task that is to stop is left by all
// new connections before it is told.
func (w *Worker) makeReachable(ctx context.Context, view *state.View, assigned []converge.Assignment) {
	services := w.services(view, assigned)
	if !reflect.DeepEqual(services, w.published) {
		if err := w.cfg.Network.SetPublished(ctx, services); err != nil {
			if err.Error() != w.told {
				w.told = err.Error()
				w.log.Warn("publish ports", "err", err)
			}
		} else {
			w.told = ""
		}
		w.published = services
	}
	n := w.records(assigned)
	if reflect.DeepEqual(n, w.names) {
		return
	}
	if err := w.cfg.Network.SetNames(ctx, n); err != nil {
		w.log.Error("write the names of tasks", "err", err)
		return
	}
	w.names = n
}

// services lists what is published on this node, with the tasks behind it.
func (w *Worker) services(view *state.View, assigned []converge.Assignment) []network.Service {
	var out []network.Service
	at := map[string]int{}
	for i := range assigned {
		a := &assigned[i]
		if len(a.Spec.Ports) == 0 || a.Spec.NetworkMode != "" {
			continue
		}
		key := a.Key()
		n, ok := at[key]
		if !ok {
			svc, _ := view.Services.Get(key)
			ports := w.ports(view, a, svc.Value)
			if len(ports) == 0 {
				continue
			}
			n = len(out)
			at[key] = n
			out = append(out, network.Service{Key: key, Ports: ports})
		}
		if w.reachable(a) {
			if addr := backend(&a.Task, &a.Spec, w.networks); addr.IsValid() {
				out[n].Backends = append(out[n].Backends, addr)
			}
		}
	}
	return out
}

// ports are the host ports of a service: those of the spec that it is to have.
func (w *Worker) ports(view *state.View, a *converge.Assignment, svc state.Service) []network.Port {
	spec := &a.Spec
	if target, ok := view.Specs.Get(svc.Target); ok {
		spec = &target.Value.Service
	}
	var out []network.Port
	for _, p := range spec.Ports {
		host := p.Published
		if host == 0 {
			host = svc.Ports[converge.PortName(p)]
		}
		np := network.Port{HostPort: host, Protocol: network.Protocol(p.Proto()), Target: p.Target}
		if addr, err := netip.ParseAddr(p.HostIP); err == nil {
			np.HostIP = addr
		}
		out = append(out, np)
	}
	return out
}

// newPorts are the host ports of the task's service that are not published yet: only those may be held by another program.
func (w *Worker) newPorts(view *state.View, a *converge.Assignment) []network.Port {
	key := a.Key()
	if a.Spec.NetworkMode != "" || slices.ContainsFunc(w.published, func(s network.Service) bool { return s.Key == key && len(s.Backends) > 0 }) {
		return nil
	}
	svc, _ := view.Services.Get(key)
	return w.ports(view, a, svc.Value)
}

// records lists the names of this node's tasks, network by network.
func (w *Worker) records(assigned []converge.Assignment) network.Names {
	out := network.Names{Domain: w.cfg.Domain, Records: map[string][]names.Record{}}
	type place struct{ network, key string }
	at := map[place]int{}
	for i := range assigned {
		a := &assigned[i]
		if a.Spec.NetworkMode != "" {
			continue
		}
		var addrs []netip.Addr
		var nets []string
		for _, n := range a.Spec.Networks {
			addr, err := netip.ParseAddr(a.Addrs[n.Network])
			if err != nil {
				continue
			}
			addrs, nets = append(addrs, addr), append(nets, n.Network)
			p := place{n.Network, a.Key()}
			r, ok := at[p]
			if !ok {
				r = len(out.Records[n.Network])
				at[p] = r
				out.Records[n.Network] = append(out.Records[n.Network], names.Record{Stack: a.Stack, Names: serviceNames(a, n)})
			}
			if w.reachable(a) {
				out.Records[n.Network][r].Addrs = append(out.Records[n.Network][r].Addrs, addr)
			}
		}
		out.Clients = append(out.Clients, names.Client{Addrs: addrs, Stack: a.Stack, Networks: nets, Resolvers: a.Spec.DNS.Servers})
	}
	return out
}

func serviceNames(a *converge.Assignment, n manifest.Attachment) []string {
	var aliases []string
	for _, c := range a.Spec.Containers {
		if c.ContainerName != "" {
			aliases = append(aliases, c.ContainerName)
		}
		if c.Name != a.Service {
			aliases = append(aliases, c.Name)
		}
	}
	if a.Spec.Hostname != "" && a.Spec.Hostname != a.Service {
		aliases = append(aliases, a.Spec.Hostname)
	}
	return names.ServiceNames(a.Stack, a.Service, append(aliases, n.Aliases...)...)
}
