package worker

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile/converge"
)

// Labels of our containers. They are the node's own record of what it made and why it was allowed to.
const (
	labelCluster   = "gitops/cluster"
	labelNode      = "gitops/node"
	labelTask      = "gitops/task"
	labelContainer = "gitops/container"
	labelAttempt   = "gitops/attempt"
	labelStreak    = "gitops/streak"
	labelFailures  = "gitops/failures"
	labelSpec      = "gitops/spec"
	labelSource    = "gitops/source"
	labelRevision  = "gitops/revision"
	labelPolicy    = "gitops/policy"
)

// observed reads a container of ours.
func observed(c Container) converge.Container {
	n := func(label string) int { v, _ := strconv.Atoi(c.Labels[label]); return v }
	out := converge.Container{
		ID: c.ID, Task: c.Labels[labelTask], Name: c.Labels[labelContainer], Attempt: n(labelAttempt), Streak: n(labelStreak), Failures: n(labelFailures),
		Digest: c.Digest, ExitCode: c.ExitCode, OOM: c.OOMKilled, Started: c.StartedAt, Exited: c.ExitedAt, Limits: c.Limits,
	}
	switch c.Phase {
	case Created:
		out.Phase = converge.Created
	case Running:
		out.Phase = converge.Running
	case Paused:
		out.Phase = converge.Paused
	case Lost:
		out.Phase = converge.Lost
	default:
		out.Phase = converge.Exited
	}
	return out
}

func compareContainers(a, b converge.Container) int {
	return cmp.Or(cmp.Compare(a.Task, b.Task), cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.Name, b.Name))
}

// validID is what containerd takes for the id of a container.
var validID = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$`)

// maxID leaves room for what the runtime appends.
const maxID = 64

// containerID derives the id of a container. It reads shop-web.3.7.1; a name that is too long or has characters that the runtime refuses is cut and
// made unique by a hash.
func containerID(task, container, service string, attempt int) string {
	id := fmt.Sprintf("%s.%d", strings.ReplaceAll(task, "/", "-"), attempt)
	if container != service {
		id += "." + container
	}
	if len(id) <= maxID && validID.MatchString(id) {
		return id
	}
	sum := sha256.Sum256([]byte(id))
	head := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, id)
	return head[:min(len(head), maxID-17)] + "-" + hex.EncodeToString(sum[:8])
}

// fileName derives a name for a task's directory.
func fileName(task string) string { return strings.ReplaceAll(task, "/", "_") }
