package reconcile

import (
	"maps"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// Collect lists what nothing names any more: releases, specs and digests of what neither runs nor is remembered as somewhere to go back to, networks that
// none of them is on, subnets of networks on nodes where no task is on them, and the oldest events. Its cost is that of the whole state: it is for quiet moments.
func Collect(v *state.View) Plan {
	releases, specs := map[string]bool{}, map[string]bool{}
	keep := func(release string) {
		r, ok := v.Releases.Get(release)
		if !ok || releases[release] {
			return
		}
		releases[release] = true
		for _, name := range r.Value.Names() {
			specs[r.Value.Services[name]] = true
		}
	}
	for _, s := range v.Stacks.All() {
		for _, a := range []*state.Applied{s.Value.Applied, s.Value.Stable} {
			if a != nil {
				keep(a.Release)
			}
		}
		for _, o := range s.Value.History {
			keep(o.Release)
		}
	}
	for _, s := range v.Services.All() {
		specs[s.Value.Target], specs[s.Value.Stable] = true, true
	}
	busy := map[place]bool{}
	for _, t := range v.Tasks.All() {
		specs[t.Value.Spec] = true
		for _, n := range sortedKeys(t.Value.Addrs) {
			busy[place{t.Value.Node, n}] = true
		}
	}
	nets := map[string]bool{}
	for _, hash := range sortedKeys(specs) {
		spec, _ := v.Specs.Get(hash)
		for _, at := range spec.Value.Service.Networks {
			nets[at.Network] = true
		}
	}
	var p Plan
	drop(&p, v.Reports, func(key string) bool { return !has(v.Tasks, key) }) // told once more after the task was forgotten
	drop(&p, v.Releases, func(key string) bool { return !releases[key] })
	drop(&p, v.Specs, func(key string) bool { return !specs[key] })
	drop(&p, v.Images, func(key string) bool { return len(key) < hashLen || !specs[key[:hashLen]] })
	drop(&p, v.Networks, func(key string) bool { return !nets[key] })
	for name, n := range v.Networks.All() {
		next := n.Value
		next.Subnets = maps.Clone(next.Subnets)
		maps.DeleteFunc(next.Subnets, func(node, _ string) bool { return !busy[place{node, name}] })
		if nets[name] && len(next.Subnets) < len(n.Value.Subnets) {
			p.Items = append(p.Items, state.Item{state.Put(name, n.Version, next)})
		}
	}
	left := v.Events.Len() - state.KeepEvents
	drop(&p, v.Events, func(string) bool { left--; return left >= 0 })
	return p
}

// hashLen is the length of a hash in hex: what keys of images begin with.
const hashLen = 64

func drop[T state.Object](p *Plan, t state.Table[T], unused func(key string) bool) {
	for key, e := range t.All() {
		if unused(key) {
			p.Items = append(p.Items, state.Item{state.Delete[T](key, e.Version)})
		}
	}
}

// Blobs lists the digests of the files that kept releases mount or confine their containers with, sorted: the others may be removed.
func Blobs(v *state.View) []string {
	set := map[string]bool{}
	for _, s := range v.Specs.All() {
		for i := range s.Value.Service.Containers {
			c := &s.Value.Service.Containers[i]
			for _, m := range c.Mounts {
				set[m.Digest] = true
			}
			set[c.SeccompDigest()] = true
		}
	}
	delete(set, "") // of what is no content
	return sortedKeys(set)
}
