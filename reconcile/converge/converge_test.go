package converge_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Each file is one situation of one task on its node. Its commands:
//
//	task [restart=C] [delay=D] [max-attempts=N] [window=D] [containers=(a,b)] [memory=N] [address] [drift=report] [ignore=PATH] [check] [job] [fate=D/CODE …]
//	desired run|ready|stop          what the node is told
//	gate WHY… / open                a dependency is not there yet / is there
//	exit CODE [oom] [container=C]   a container ends by itself
//	pause / limit memory=N / image  somebody pauses it, sets a limit, puts another image in its place
//	vanish                          somebody removes the containers
//	health VERDICT                  what the checks say: healthy, unhealthy
//	reboot / agent                  the machine / the agent restarts
//	broken VERB [fault] [permanent] [times=N]   an action fails, N times or always
//	stranger [settled]              containers of a task that is not assigned here
//	play [for=D] [only=WORD]        the node works until nothing happens any more; only lines with the word are shown
//	drift                           what a person is told who asks what differs
//
// fate=2s/1: each attempt ends after two seconds with code 1. Each action takes 100 ms.
func TestConverge(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		n := &host{start: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), settled: true}
		n.now = n.start
		datadriven.RunTest(t, path, n.run)
	})
}

const actionTime = 100 * time.Millisecond

type host struct {
	start, now time.Time
	a          converge.Assignment
	check      bool
	containers []converge.Container
	mem        converge.Memory
	settled    bool
	life       time.Duration
	code       int
	broken     map[converge.Verb]*broken
	told       string
	out        strings.Builder
}

type broken struct {
	trouble converge.Trouble
	times   int
}

func (h *host) say(format string, args ...any) {
	fmt.Fprintf(&h.out, "%7s  %s\n", h.now.Sub(h.start), fmt.Sprintf(format, args...))
}

func (h *host) run(t *testing.T, d *datadriven.TestData) string {
	h.out.Reset()
	text := func(key string) string {
		for _, a := range d.CmdArgs {
			if a.Key == key && len(a.Vals) > 0 {
				return a.Vals[0]
			}
		}
		return ""
	}
	arg := func() string { return d.CmdArgs[0].Key }
	switch d.Cmd {
	case "task":
		h.task(t, d)
	case "desired":
		h.a.Desired = state.Desired(arg())
	case "gate":
		var words []string
		for _, a := range d.CmdArgs {
			words = append(words, a.Key)
		}
		h.a.Gate = state.Reason{ID: converge.ReasonDependency, Message: strings.Join(words, " ")}
	case "open":
		h.a.Gate = state.Reason{}
	case "exit":
		name := text("container")
		if name == "" {
			name = h.a.Spec.Main().Name
		}
		var code int
		fmt.Sscan(arg(), &code)
		h.end(name, code, d.HasArg("oom"))
	case "pause":
		h.each(func(c *converge.Container) { c.Phase = converge.Paused })
	case "limit":
		var m manifest.Bytes
		if err := m.UnmarshalText([]byte(text("memory"))); err != nil {
			t.Fatal(err)
		}
		h.each(func(c *converge.Container) { c.Limits.Memory = m })
	case "image":
		h.each(func(c *converge.Container) { c.Digest = "sha256:other" })
	case "vanish":
		h.containers = nil
	case "health":
		h.mem.Health = state.Health(arg())
		if h.mem.Health == state.HealthUnhealthy {
			h.mem.Why = "connection refused"
		}
	case "reboot":
		h.mem = converge.Memory{}
		h.each(func(c *converge.Container) { c.Phase = converge.Lost })
	case "agent":
		h.mem = converge.Memory{}
	case "broken":
		b := &broken{trouble: converge.Trouble{
			Reason: state.Reason{ID: "task." + arg(), Message: arg() + " does not work"}, Fault: d.HasArg("fault"), Permanent: d.HasArg("permanent"),
		}, times: 1 << 30}
		if s := text("times"); s != "" {
			fmt.Sscan(s, &b.times)
		}
		h.broken[converge.Verb(arg())] = b
	case "stranger":
		h.containers = append(h.containers, converge.Container{ID: "stranger", Task: "old/web.1.1", Name: "web", Attempt: 1, Phase: converge.Running})
		h.settled = d.HasArg("settled")
	case "settled":
		h.settled = true
	case "drift":
		h.drift(t)
	case "play":
		if s := text("for"); s != "" {
			end := h.now.Add(duration(t, s))
			h.play(t, end)
			h.now = end
		} else {
			h.play(t, h.now.Add(time.Hour))
			h.now = h.now.Add(time.Second)
		}
		h.filter(text("only"))
	default:
		t.Fatalf("unknown command %s", d.Cmd)
	}
	if h.out.Len() == 0 {
		return "ok\n"
	}
	return h.out.String()
}

func duration(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (h *host) filter(word string) {
	if word == "" {
		return
	}
	lines := slices.DeleteFunc(strings.SplitAfter(h.out.String(), "\n"), func(l string) bool { return !strings.Contains(l, word) })
	h.out.Reset()
	h.out.WriteString(strings.Join(lines, ""))
}

func (h *host) task(t *testing.T, d *datadriven.TestData) {
	spec := manifest.Service{Name: "web", Replicas: 1, Containers: []manifest.Container{{Name: "web", Image: "web:1"}}}
	h.broken = map[converge.Verb]*broken{}
	for _, a := range d.CmdArgs {
		val := ""
		if len(a.Vals) > 0 {
			val = a.Vals[0]
		}
		switch a.Key {
		case "restart":
			spec.Restart.Condition = manifest.RestartCondition(val)
		case "delay":
			spec.Restart.Delay = manifest.Duration(duration(t, val))
		case "max-attempts":
			fmt.Sscan(val, &spec.Restart.MaxAttempts)
		case "window":
			spec.Restart.Window = manifest.Duration(duration(t, val))
		case "containers":
			spec.Containers = nil
			for _, name := range a.Vals {
				spec.Containers = append(spec.Containers, manifest.Container{Name: name, Image: name + ":1"})
			}
		case "memory":
			if err := spec.Containers[0].Resources.Memory.UnmarshalText([]byte(val)); err != nil {
				t.Fatal(err)
			}
		case "address":
			spec.Networks = []manifest.Attachment{{Network: "shop_default", IPv4: "10.9.0.5"}}
		case "drift":
			h.a.Report = true
		case "ignore":
			h.a.Ignore = a.Vals
		case "check":
			h.check = true
		case "job":
			spec.Mode = manifest.ReplicatedJob
		case "fate":
			life, code, _ := strings.Cut(val, "/")
			h.life = duration(t, life)
			fmt.Sscan(code, &h.code)
		default:
			t.Fatalf("unknown argument %s", a.Key)
		}
	}
	manifest.Resolve(&spec)
	h.a.Task = state.Task{ID: "shop/web.1.1", Stack: "shop", Service: "web", Slot: 1, Gen: 1, Node: "n1", Desired: state.DesiredRun}
	h.a.Spec = spec
}

func (h *host) each(f func(*converge.Container)) {
	for i := range h.containers {
		f(&h.containers[i])
	}
}

func (h *host) end(name string, code int, oom bool) {
	h.each(func(c *converge.Container) {
		if c.Name == name && c.Phase == converge.Running {
			c.Phase, c.ExitCode, c.OOM, c.Exited = converge.Exited, code, oom, h.now
			how := ""
			if oom {
				how = ", out of memory"
			}
			h.say("!       %s ends with code %d%s", c.Name, code, how)
			h.mem.Ends = append(h.mem.Ends, h.now)
		}
	})
}

func (h *host) next() converge.Output {
	return converge.Next(converge.Input{
		Node: "n1", Assigned: []converge.Assignment{h.a}, Containers: slices.Clone(h.containers), Memory: map[string]converge.Memory{h.a.ID: h.mem},
		Settled: h.settled, Now: h.now,
	})
}

// play asks and performs until there is nothing to do, and says what the node reports whenever that changes.
func (h *host) play(t *testing.T, end time.Time) {
	for range 10000 {
		out, again := h.next(), h.next()
		if fmt.Sprint(out) != fmt.Sprint(again) {
			t.Fatalf("asked twice, two answers:\n%v\n%v", out, again)
		}
		h.report(out.Reports[h.a.ID])
		if len(out.Actions) > 0 {
			for _, a := range out.Actions {
				h.perform(a)
			}
			continue
		}
		next := out.Wake
		if h.life > 0 {
			h.each(func(c *converge.Container) {
				if at := c.Started.Add(h.life); c.Phase == converge.Running && (next.IsZero() || at.Before(next)) {
					next = at
				}
			})
		}
		if next.IsZero() || next.After(end) {
			return
		}
		h.now = next
		if h.life > 0 {
			for _, c := range slices.Clone(h.containers) {
				if c.Phase == converge.Running && !h.now.Before(c.Started.Add(h.life)) {
					h.end(c.Name, h.code, false)
				}
			}
		}
	}
	t.Fatal("it never comes to rest")
}

func (h *host) report(r state.Report) {
	h.a.Last = r
	s := string(r.Phase)
	if r.Phase == state.PhaseRunning || r.Health != "" {
		s += " " + string(r.Health)
	}
	if r.Attempt > 0 {
		s += fmt.Sprintf(", attempt %d", r.Attempt)
	}
	if r.Failures > 0 {
		s += fmt.Sprintf(", failed %d", r.Failures)
	}
	if r.Retry {
		s += ", tries again"
	}
	if r.Reason.ID != "" {
		s += ": " + r.Reason.Message
	}
	for _, d := range r.Drift {
		s += fmt.Sprintf("; drift %s: %s %s, not %s", d.Kind, d.Path, d.Have, d.Want)
	}
	if s != h.told {
		h.told = s
		h.say("        is %s", s)
	}
}

// perform does an action as the worker would, in its time.
func (h *host) perform(a converge.Action) {
	what := string(a.Verb)
	if a.Verb == converge.Create {
		what += fmt.Sprintf(" attempt %d", a.Attempt)
	}
	if a.Task != h.a.ID {
		what += " " + a.Task
	}
	h.say("%s", what)
	if a.Verb == converge.Kill {
		h.mem.Killed = a.Attempt
	}
	h.mem.Busy = true
	out := h.next()
	h.report(out.Reports[h.a.ID])
	for _, other := range out.Actions {
		if a.Task == h.a.ID && other.Task == a.Task {
			h.say("BUG: %s while %s is under way", other.Verb, a.Verb)
		}
	}
	h.mem.Busy = false
	h.now = h.now.Add(actionTime)
	if a.Verb == converge.Create {
		h.mem.Network = true // a create that fails may have got so far
	}
	if b := h.broken[a.Verb]; b != nil && b.times > 0 {
		b.times--
		tr := b.trouble
		if h.mem.Trouble != nil {
			tr.Count = h.mem.Trouble.Count
		}
		tr.Count++
		tr.At = h.now
		h.mem.Trouble = &tr
		return
	}
	h.mem.Trouble = nil
	has := func(c converge.Container) bool { return slices.Contains(a.Containers, c.ID) }
	switch a.Verb {
	case converge.Pull:
		h.mem.Images = map[string]string{}
		for _, c := range h.a.Spec.Containers {
			h.mem.Images[c.Name] = "sha256:" + c.Name
		}
	case converge.Create:
		h.containers = slices.DeleteFunc(h.containers, has)
		for _, c := range h.a.Spec.Containers {
			limits := c.Resources
			if limits.Memory == 0 {
				limits.Memory = -1
			}
			limits.CPU = -1
			h.containers = append(h.containers, converge.Container{
				ID: fmt.Sprintf("%s.%d", c.Name, a.Attempt), Task: a.Task, Name: c.Name, Attempt: a.Attempt, Streak: a.Streak, Failures: a.Failures,
				Digest: "sha256:" + c.Name, Phase: converge.Created, Limits: limits,
			})
		}
		h.mem.Network, h.mem.Health, h.mem.Why = true, state.HealthUnknown, ""
	case converge.Start:
		h.each(func(c *converge.Container) {
			if has(*c) {
				c.Phase, c.Started = converge.Running, h.now
			}
		})
		h.mem.Health = state.HealthHealthy
		if h.check {
			h.mem.Health = state.HealthStarting
		}
	case converge.Kill:
		h.each(func(c *converge.Container) {
			if has(*c) {
				c.Phase, c.ExitCode, c.Exited = converge.Exited, 143, h.now
			}
		})
		h.mem.Ends = append(h.mem.Ends, h.now)
	case converge.Remove, converge.Reap:
		h.containers = slices.DeleteFunc(h.containers, has)
		if a.Task == h.a.ID {
			h.mem.Network = false
		}
	case converge.Limit:
		h.each(func(c *converge.Container) { c.Limits.Memory = h.a.Spec.Main().Resources.Memory })
	case converge.Resume:
		h.each(func(c *converge.Container) {
			if c.Phase == converge.Paused {
				c.Phase = converge.Running
			}
		})
		h.mem.Health = state.HealthHealthy // its checks begin anew
	}
}

// drift says what a person is told who asks what differs now.
func (h *host) drift(t *testing.T) {
	t.Helper()
	found := converge.Drifts(converge.Input{Node: "n1", Assigned: []converge.Assignment{h.a}, Containers: h.containers, Memory: map[string]converge.Memory{h.a.ID: h.mem}, Now: h.now})
	for _, task := range []string{h.a.ID, "old/web.1.1"} {
		for _, d := range found[task] {
			fmt.Fprintf(&h.out, "%s: %s %s: %s, not %s\n", task, d.Kind, d.Path, d.Have, d.Want)
		}
	}
	if h.out.Len() == 0 {
		h.out.WriteString("none\n")
	}
}
