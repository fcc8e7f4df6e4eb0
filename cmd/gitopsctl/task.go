package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// taskHelp tells how a task is named on the command line.
const taskHelp = `A TASK is shop/web.1.3 (slot 1, third generation), shop/web.1 (its newest generation) or shop/web (the first slot that runs).`

// findTask finds the task that a person means.
func (c *cli) findTask(ctx context.Context, name string) (reconcile.TaskStatus, error) {
	st, err := c.daemon().Status(ctx, "")
	if err != nil {
		return reconcile.TaskStatus{}, err
	}
	var best reconcile.TaskStatus
	found := false
	var known []string
	for _, t := range allTasks(st) {
		known = append(known, t.ID)
		slot := fmt.Sprintf("%s/%s.%d", t.Stack, t.Service, t.Slot)
		switch {
		case t.ID == name:
			return t, nil
		case name != slot && name != t.Key():
			continue
		case !found || better(t, best):
			best, found = t, true
		}
	}
	if !found {
		return best, api.NotFoundf("task", name, append(known, serviceNames(st)...))
	}
	return best, nil
}

// better says whether a task is the one that is meant, rather than another of its slot or service: one that runs, else the newest.
func better(t, than reconcile.TaskStatus) bool {
	if t.Report.Running() != than.Report.Running() {
		return t.Report.Running()
	}
	return t.Slot == than.Slot && t.Gen > than.Gen
}

func allTasks(st api.Status) []reconcile.TaskStatus {
	var out []reconcile.TaskStatus
	for _, s := range st.Stacks {
		for _, svc := range s.Services {
			out = append(out, svc.Tasks...)
		}
	}
	return out
}

// logTarget reads what logs are of: STACK, STACK/SERVICE or a task. one says that it is a single task.
func logTarget(st api.Status, name string) (q api.LogQuery, one bool, err error) {
	stack, rest, deep := strings.Cut(name, "/")
	q.Stack = stack
	for _, s := range st.Stacks {
		if s.Name != stack {
			continue
		}
		if !deep {
			return q, false, nil
		}
		for _, svc := range s.Services {
			if svc.Name == rest {
				q.Service = rest
				return q, false, nil
			}
		}
	}
	newest := state.Task{}
	var known []string
	for _, t := range allTasks(st) {
		known = append(known, t.ID)
		if t.ID == name || fmt.Sprintf("%s/%s.%d", t.Stack, t.Service, t.Slot) == name && t.Gen > newest.Gen {
			newest = t.Task
		}
	}
	if newest.ID == "" {
		if !deep {
			return q, false, api.NotFoundf("stack", name, stackNames(st))
		}
		return q, false, api.NotFoundf("service or task", name, append(serviceNames(st), known...))
	}
	q.Service, q.Task = newest.Service, newest.ID
	return q, true, nil
}
