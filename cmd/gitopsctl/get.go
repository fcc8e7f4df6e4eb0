package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// getOptions say of which kind, and of which stack; an empty one is all.
type getOptions struct{ kind, stack string }

var getKinds = []string{"stacks", "services", "tasks", "sources", "volumes"}

func (c *cli) getCmd() *cobra.Command {
	return c.watchable(&cobra.Command{
		Use:   "get stacks|services|tasks|sources|volumes [STACK]",
		Short: "List things of one kind",
		Long: `List all things of a kind, or those of one stack.

Exit codes: 0 done, 2 error.`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return getKinds, cobra.ShellCompDirectiveNoFileComp
			}
			return c.complete(oneOf(stackNames))(cmd, args[1:], typed)
		},
	}, func(ctx context.Context, args []string) error {
		return c.get(ctx, getOptions{args[0], strings.Join(args[1:], "")})
	})
}

func (c *cli) get(ctx context.Context, o getOptions) error {
	kind, stack := o.kind, o.stack
	if slices.Contains(getKinds, kind+"s") {
		kind += "s"
	}
	if err := c.only("wide", "name"); err != nil {
		return err
	}
	ctx, cancel := c.limit(ctx, readLimit)
	defer cancel()
	if kind == "volumes" {
		return c.getVolumes(ctx, stack)
	}
	if !slices.Contains(getKinds, kind) {
		return api.NotFoundf("kind of things", kind, getKinds)
	}
	st, err := c.daemon().Status(ctx, stack)
	if err != nil {
		return err
	}
	var services []reconcile.ServiceStatus
	for _, s := range st.Stacks {
		services = append(services, s.Services...)
	}
	switch kind {
	case "stacks":
		return c.print(stackTable(c, st.Stacks), st.Stacks)
	case "services":
		for i := range services {
			services[i].Tasks = nil // `get tasks` has them
		}
		return c.print(serviceTable(services, true), list(services))
	case "tasks":
		var tasks []reconcile.TaskStatus
		for _, s := range services {
			tasks = append(tasks, s.Tasks...)
		}
		return c.print(taskTable(c, services, true), list(tasks))
	}
	return c.print(sourceTable(st.Sources), list(st.Sources))
}

// list is never null for a program.
func list[T any](l []T) []T { return append([]T{}, l...) }

func serviceTable(services []reconcile.ServiceStatus, long bool) *table {
	t := &table{columns: []string{"SERVICE", "HEALTH", "TASKS", "UPDATED", "IMAGE", "PORTS"}, wide: []string{"MODE", "STEP", "REVISION", "REASON"}}
	for _, s := range services {
		name := s.Name
		if long {
			name = s.Stack + "/" + s.Name
		}
		mode := string(s.Mode)
		if s.Mode == manifest.Replicated {
			mode = "replicated"
		}
		t.add(s.Stack+"/"+s.Name, text(name), word(string(s.Health)), text(fmt.Sprintf("%d/%d", s.Ready, s.Desired)),
			text(fmt.Sprintf("%d/%d", s.Updated, s.Desired)), text(s.Image), text(ports(s.Ports)), text(mode), text(string(s.Step)),
			text(revision(s.Revision)), text(s.Reason.ID))
	}
	return t
}

func ports(ps []manifest.Port) string {
	var out []string
	for _, p := range ps {
		s := fmt.Sprintf("%d->%d/%s", p.Published, p.Target, p.Proto())
		if p.HostIP != "" {
			s = p.HostIP + ":" + s
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

// taskTable lists the tasks of services: with all, those too that are being stopped or are gone.
func taskTable(c *cli, services []reconcile.ServiceStatus, all bool) *table {
	t := &table{columns: []string{"TASK", "NODE", "PHASE", "HEALTH", "RESTARTS", "SINCE", "REASON"},
		wide: []string{"DESIRED", "IMAGE", "REVISION", "WHY"}}
	for _, s := range services {
		for _, k := range s.Tasks {
			if !all && k.Desired == state.DesiredStop {
				continue
			}
			phase := cmp.Or(string(k.Report.Phase), "pending")
			t.add(k.ID, text(k.ID), text(cmp.Or(k.NodeName, k.Node)), word(phase), word(string(k.Report.Health)),
				text(fmt.Sprint(max(0, k.Report.Attempt-1))), text(c.when(k.Since)), text(k.Report.Reason.ID),
				text(string(k.Desired)), text(k.Image), text(revision(k.Revision)), text(k.Why.ID))
		}
	}
	return t
}

func sourceTable(sources []api.SourceStatus) *table {
	t := &table{columns: []string{"SOURCE", "STATE", "FOLLOWS", "ACCEPTED", "SEEN", "STACKS"},
		wide: []string{"URL", "PATH", "INTERVAL", "VERIFY", "POLICY", "REASON"}}
	for _, s := range sources {
		follows := s.Branch
		if s.Tag != "" {
			follows = "tag " + s.Tag
		}
		why := ""
		if s.Trouble != nil {
			why = s.Trouble.ID
		} else if len(s.Waiting) > 0 {
			why = s.Waiting[0].ID
		}
		every := "default"
		if s.Interval > 0 {
			every = s.Interval.String()
		}
		policy := ""
		if s.Policy {
			policy = cmp.Or(s.PolicyHash[:min(12, len(s.PolicyHash))], "not yet in force")
		}
		t.add(s.Name, text(s.Name), word(s.State), text(cmp.Or(follows, "HEAD")), text(revision(s.Accepted)), text(revision(s.Seen)),
			text(fmt.Sprint(s.Stacks)), text(s.URL), text(s.Path), text(every), text(cmp.Or(s.Verify, "none")), text(policy), text(why))
	}
	return t
}

func (c *cli) getVolumes(ctx context.Context, stack string) error {
	vols, err := c.daemon().Volumes(ctx)
	if err != nil {
		return err
	}
	if stack != "" {
		vols = slices.DeleteFunc(vols, func(v api.VolumeInfo) bool { return v.Stack != stack })
		if len(vols) == 0 { // that of a stack that was removed may be there still
			if _, err := c.daemon().Status(ctx, stack); err != nil {
				return err
			}
		}
	}
	t := &table{columns: []string{"VOLUME", "KIND", "STACK", "NODE", "USED"}, wide: []string{"PATH", "SERVICE", "SINCE"}}
	for _, v := range vols {
		used := cell{text: "yes"}
		if v.Orphan {
			used = cell{"no", warn}
		}
		if v.Removing != nil {
			used.text = "removing"
		}
		kind := v.Kind
		if kind == manifest.MountContent { // what was seeded is data from then on
			kind = manifest.MountData
		}
		t.add(v.Key, text(v.Name), text(string(kind)), text(v.Stack), text(cmp.Or(v.NodeName, v.Node)), used, text(v.Path), text(v.Service), text(c.when(v.Since)))
	}
	return c.print(t, list(vols))
}
