package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// scriptNow is the time on the clock of the scripts' gitopsctl.
var scriptNow = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

// world is a daemon's inside for scripts: real facts in a real State, and canned answers for what runs. A script describes it in a file:
//
//	TABLE KEY JSON     an object of the state, as package state has it; $A, $B, $C stand for revisions
//	drift JSON         a task that differs           log JSON       a line of a task's log
//	inspect JSON       the runtime's record           exec JSON      what a command does: {"stdout", "stderr", "code"}
//	preview JSON       the answer to plan             report JSON    the answer to source test
//	refuse KIND TEXT   the answer to every operation
//	== sync            what follows is what a sync changes before it returns
//	== later           what follows happens after that
//	== restarted       what follows happened when the daemon is back
type world struct {
	mu      sync.Mutex
	state   *state.State
	index   uint64
	changed chan struct{}
	later   []state.Item
	onSync  []state.Item
	done    map[string]api.Result
	onStart []state.Item // what happened when it is back
	watched bool         // somebody waits for a change

	drift   []api.TaskDrift
	logs    []api.LogLine
	inspect json.RawMessage
	exec    struct {
		Stdout, Stderr string
		Code           int
	}
	preview api.Preview
	report  api.SourceReport
	refuse  error
}

var revisions = map[string]string{
	"A": `{"ref":"main","commit":"aaaa111122223333444455556666777788889999"}`,
	"B": `{"ref":"main","commit":"bbbb111122223333444455556666777788889999"}`,
	"C": `{"ref":"main","commit":"cccc111122223333444455556666777788889999"}`,
}

func newWorld(text string) (*world, error) {
	w := &world{state: state.New(), changed: make(chan struct{}), done: map[string]api.Result{}}
	var now []state.Item
	into := &now
	sc := bufio.NewScanner(strings.NewReader(text))
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
			continue
		case line == "== sync":
			into = &w.onSync
			continue
		case line == "== later":
			into = &w.later
			continue
		case line == "== restarted":
			into = &w.onStart
			continue
		}
		line = os.Expand(line, func(k string) string { return cmp.Or(revisions[k], "$"+k) })
		word, rest, _ := strings.Cut(line, " ")
		if err := w.line(word, rest, into); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	later := w.later
	w.later = nil
	if err := w.apply(now); err != nil {
		return nil, err
	}
	w.later = later
	return w, nil
}

func (w *world) line(word, rest string, into *[]state.Item) error {
	switch word {
	case "drift":
		return appendJSON(rest, &w.drift)
	case "log":
		l := struct {
			api.LogLine
			Text string `json:"text"`
		}{}
		err := strictJSON(rest, &l)
		l.LogLine.Text = []byte(l.Text)
		w.logs = append(w.logs, l.LogLine)
		return err
	case "inspect":
		w.inspect = json.RawMessage(rest)
		return nil
	case "exec":
		return strictJSON(rest, &w.exec)
	case "preview":
		return strictJSON(rest, &w.preview)
	case "report":
		return strictJSON(rest, &w.report)
	case "refuse":
		kind, text, _ := strings.Cut(rest, " ")
		switch kind {
		case "denied":
			w.refuse = api.Deniedf(reconcile.ReasonPolicy, "%s", text)
		case "noquorum":
			w.refuse = api.NoQuorumf("%s", text)
		default:
			return fmt.Errorf("refuse %s is not known", kind)
		}
		return nil
	}
	key, object, _ := strings.Cut(rest, " ")
	*into = append(*into, state.Item{{Table: word, Key: key, Object: json.RawMessage(object), Force: true}})
	return nil
}

func appendJSON[T any](text string, into *[]T) error {
	var v T
	err := strictJSON(text, &v)
	*into = append(*into, v)
	return err
}

func strictJSON(text string, into any) error {
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

// apply writes items as one log entry. The caller need not hold the lock.
func (w *world) apply(items []state.Item) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, err := state.Encode(state.Command{At: scriptNow.Add(-time.Minute), Items: items})
	if err != nil {
		return err
	}
	if _, err := w.state.Apply(w.index+1, 1, b); err != nil {
		return err
	}
	w.index++
	close(w.changed)
	w.changed = make(chan struct{})
	return nil
}

func (w *world) View() *state.View {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.View()
}

// Changed lets what is to happen later happen as soon as somebody waits for it.
func (w *world) Changed(after uint64) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.index > after {
		c := make(chan struct{})
		close(c)
		return c
	}
	if _, synced := w.done["sync"]; synced && len(w.later) > 0 {
		later := w.later
		w.later = nil
		go func() { _ = w.apply(later) }()
	}
	w.watched = true
	return w.changed
}

func (w *world) Operate(_ context.Context, op api.Operation) (api.Result, error) {
	if w.refuse != nil {
		return api.Result{}, w.refuse
	}
	v := w.View()
	why := state.Reason{ID: "person", Message: cmp.Or(op.Reason, "a person said so")}
	var item state.Item
	res := api.Result{Message: string(op.Kind) + " is done"}
	stack, _ := v.Stacks.Get(op.Stack)
	put := func(change func(*state.Stack)) {
		s := stack.Value
		change(&s)
		item = append(item, state.Set(op.Stack, s))
	}
	switch op.Kind {
	case api.OpSync:
		change := w.onSync
		if src, ok := v.Sources.Get(op.Source); ok {
			change = append([]state.Item{{state.Set(op.Source, src.Value)}}, change...)
		}
		if err := w.apply(change); err != nil {
			return res, err
		}
		if op.Stack != "" {
			st, ok := w.View().Stacks.Get(op.Stack)
			if !ok {
				return res, api.NotFoundf("stack", op.Stack, nil)
			}
			op.Source = st.Value.Source
		}
		src, _ := w.View().Sources.Get(op.Source)
		res.Source, res.Revision = op.Source, src.Value.Seen
		res.Message = fmt.Sprintf("%s is at %s", op.Source, src.Value.Seen)
		w.mu.Lock()
		w.done["sync"] = res
		w.mu.Unlock()
	case api.OpSuspend:
		put(func(s *state.Stack) { s.Suspended = &why })
	case api.OpResume:
		put(func(s *state.Stack) { s.Suspended = nil })
	case api.OpUnpin:
		put(func(s *state.Stack) { s.Pinned = nil })
	case api.OpRollback:
		put(func(s *state.Stack) { s.Pinned = &why })
	case api.OpSecretSet:
		item = append(item, state.Set(op.Secret.Name, state.Secret{Name: op.Secret.Name, Ref: fmt.Sprint(len(op.Secret.Value)), Keys: map[string][]byte{"n1": {1}}}))
	case api.OpSecretRemove:
		item = append(item, state.Change{Table: "secrets", Key: op.Secret.Name, Force: true})
	case api.OpVolumeForget, api.OpVolumeRemove:
		if err := api.CheckVolume(v, op); err != nil {
			return res, err
		}
		item = append(item, state.Change{Table: "volumes", Key: op.Volume, Force: true})
		if e, _ := v.Volumes.Get(op.Volume); op.Kind == api.OpVolumeRemove && e.Value.Name == "stuck" {
			e.Value.Stuck = &state.Reason{ID: "volume.stuck", Message: "stuck could not be removed: something is mounted at /x; it is tried again"}
			item[0] = state.Set(op.Volume, e.Value)
		}
	case api.OpSourceAdd:
		s := op.SourceSpec
		item = append(item, state.Set(s.Name, state.Source{Name: s.Name, URL: s.URL, Branch: s.Branch, Interval: s.Interval, Auth: strings.Repeat("x", min(1, len(s.Token)))}))
	case api.OpSourceRemove:
		item = append(item, state.Change{Table: "sources", Key: op.Source, Force: true})
	}
	e := state.Event{Time: scriptNow, Kind: string(op.Kind), Stack: op.Stack, Service: op.Service, Source: op.Source, Actor: op.Actor, Reason: why}
	item = append(item, state.Set(state.EventKey(scriptNow, int(w.View().Index)), e))
	err := w.apply([]state.Item{item})
	res.Index = w.View().Index
	return res, err
}

func (w *world) Drift(_ context.Context, stack string) ([]api.TaskDrift, error) {
	var out []api.TaskDrift
	for _, d := range w.drift {
		if d.Stack == stack {
			out = append(out, d)
		}
	}
	return out, nil
}

func (w *world) Logs(ctx context.Context, q api.LogQuery, line func(api.LogLine) error) error {
	for _, l := range w.logs {
		if q.Task != "" && l.Task != q.Task || q.Service != "" && !strings.HasPrefix(l.Task, q.Stack+"/"+q.Service+".") || l.Time.Before(q.Since) {
			continue
		}
		if err := line(l); err != nil {
			return err
		}
	}
	if q.Follow {
		w.mu.Lock()
		w.watched = true
		w.mu.Unlock()
		<-ctx.Done()
	}
	return ctx.Err()
}

func (w *world) Exec(_ context.Context, req api.ExecRequest, s api.ExecStreams) (int, error) {
	if req.Command[0] == "missing" {
		return 0, errors.New("the container has no command missing")
	}
	_, _ = io.WriteString(s.Stdout, strings.Join(req.Command, " ")+"\n"+w.exec.Stdout)
	if s.Stdin != nil && req.TTY { // a terminal has no end: take a line
		line, _ := bufio.NewReader(s.Stdin).ReadString('\n')
		_, _ = fmt.Fprintf(s.Stdout, "%s at %dx%d\n", strings.TrimSpace(line), req.Size.Columns, req.Size.Rows)
	} else if s.Stdin != nil {
		_, _ = io.Copy(s.Stdout, s.Stdin)
	}
	if s.Stderr != nil {
		_, _ = io.WriteString(s.Stderr, w.exec.Stderr)
	}
	return w.exec.Code, nil
}

func (w *world) Inspect(context.Context, string) (json.RawMessage, error) {
	return bytes.TrimSpace(w.inspect), nil
}

// PlanBundle answers with the canned preview, and what it was given: which stacks, and where a field was written.
func (w *world) PlanBundle(_ context.Context, b *manifest.Bundle) (api.Preview, error) {
	p := w.preview
	p.Source = b.Source
	for _, s := range b.Stacks {
		p.Steps = append(p.Steps, reconcile.Step{Action: reconcile.ActCreate, Stack: s.Name, Reason: state.Reason{ID: "revision",
			Message: fmt.Sprintf("%s in %s", plural(len(s.Services), "service"), s.Origin("").File)}})
	}
	p.Problems = b.Problems
	return p, nil
}

func (w *world) PlanRevision(_ context.Context, source, ref string) (api.Preview, error) {
	p := w.preview
	p.Source = source
	if ref == "gone" {
		return p, api.NotFoundf("branch or tag", ref, []string{"main", "gone-too"})
	}
	return p, nil
}

func (w *world) TestSource(_ context.Context, s api.SourceSpec) (api.SourceReport, error) {
	rep := w.report
	rep.Source = s.Name
	return rep, nil
}
