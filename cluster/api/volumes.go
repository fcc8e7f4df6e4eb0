package api

import (
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// FindVolume finds the volume that a person means among those of [Client.Volumes]: by its key, its name, STACK/NAME, or STACK/KEY as the Compose file calls it.
func FindVolume(all []VolumeInfo, ref string) (VolumeInfo, error) {
	var found []VolumeInfo
	var known []string
	for _, v := range all {
		if v.Key == ref {
			return v, nil
		}
		if v.Name == ref || v.Stack+"/"+v.Name == ref || v.Stack+"/"+strings.TrimPrefix(v.Name, v.Stack+"_") == ref {
			found = append(found, v)
		}
		known = append(known, v.Name)
	}
	switch len(found) {
	case 0:
		return VolumeInfo{}, NotFoundf("volume", ref, slices.Compact(known))
	case 1:
		return found[0], nil
	}
	var keys []string
	for _, v := range found {
		keys = append(keys, v.Key)
	}
	e := Invalidf("there are several volumes %q: say which one by its id: %s", clip(ref, 100), strings.Join(keys, ", "))
	e.Names = keys[:min(len(keys), maxNames)]
	return VolumeInfo{}, e
}

// volumePath is where the worker of its node keeps a volume; empty where that can't be told, as on a node that is gone.
func volumePath(v *state.View, vol state.Volume) string {
	node, ok := v.Nodes.Get(vol.Node)
	root := node.Value.DataRoot
	st, _ := v.Stacks.Get(vol.Stack)
	var rel state.Release
	if st.Value.Applied != nil {
		e, _ := v.Releases.Get(st.Value.Applied.Release)
		rel = e.Value
	}
	switch {
	case vol.Kind == manifest.MountBind:
		return vol.Name
	case !ok || root == "":
		return ""
	case vol.Kind == manifest.MountAnonymous:
		stack, rest, _ := strings.Cut(vol.Name, "/")
		slot, target, _ := strings.Cut(rest, "/")
		return filepath.Join(root, "anonymous", stack, slot, url.PathEscape(target))
	case vol.Kind != manifest.MountVolume:
		if own := rel.Stack.DataRoot; own != "" && !vol.Own {
			return filepath.Join(own, strings.TrimPrefix(vol.Name, vol.Stack+"/"))
		}
		return filepath.Join(root, "data", vol.Name)
	}
	at := slices.IndexFunc(rel.Stack.Volumes, func(m manifest.Volume) bool { return m.Name == vol.Name })
	if at >= 0 && rel.Stack.Volumes[at].Options["type"] != "" {
		return rel.Stack.Volumes[at].Options["device"]
	}
	return filepath.Join(root, "volumes", vol.Name)
}

// CheckVolume says why an operation on a volume may not be done now, with the way out; nil when it may.
func CheckVolume(v *state.View, op Operation) error {
	e, ok := v.Volumes.Get(op.Volume)
	if !ok {
		return NotFoundf("volume", op.Volume, names(v.Volumes))
	}
	vol := e.Value
	on := nodeName(v, vol.Node)
	if on == "" {
		on = vol.Node
	}
	services, tasks := reconcile.VolumeUsers(v, op.Volume)
	if op.Kind == OpVolumeForget {
		if used := slices.Concat(services, tasks); len(used) > 0 && !op.Force {
			return Conflictf("volume %s on %s is used by %s: take it out of the stack first. Or, if that is to start empty on another node, `gitopsctl volume forget %s --force`",
				vol.Name, on, strings.Join(used, ", "), op.Volume)
		}
		return nil
	}
	forget := "`gitopsctl volume forget " + op.Volume + "`"
	_, here := v.Nodes.Get(vol.Node)
	switch {
	case vol.Kind == manifest.MountBind:
		return Conflictf("%s is a path of the host, which is not removed: remove it on %s by hand, then %s", vol.Name, on, forget)
	case !vol.Own:
		return Conflictf("volume %s was not made here: it is external, lies below a dataRoot, or driver options say where it is. Remove its data on %s by hand, then %s", vol.Name, on, forget)
	case len(tasks) > 0:
		return Conflictf("volume %s on %s is used by %s: take it out of the stack, or remove the service, and try again when those are gone", vol.Name, on, strings.Join(tasks, ", "))
	case !here:
		return Conflictf("node %s, which has volume %s, is not in the cluster any more: %s", vol.Node, vol.Name, forget)
	}
	return nil
}
