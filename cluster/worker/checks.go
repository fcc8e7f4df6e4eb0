package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// maxProbeBody bounds what is read of a probe's answer or a check's output.
const maxProbeBody = 4096

// checking is the health check that runs for one attempt of a task.
type checking struct {
	attempt int
	spec    manifest.Health
	probe   *manifest.Probe
	cancel  context.CancelFunc
}

func (c *checking) stop() { c.cancel() }

// checks begins the health checks of attempts that run, and ends those of attempts that don't. A task without a check is healthy because it runs.
func (w *Worker) checks(ctx context.Context, group *sync.WaitGroup, assigned []converge.Assignment) {
	running := map[string]converge.Container{} // the main container of the newest attempt, where it runs
	for _, c := range w.containers {           // ordered by attempt
		delete(running, c.Task)
		if c.Phase == converge.Running {
			running[c.Task] = c
		}
	}
	for i := range assigned {
		a := &assigned[i]
		m := w.remember(a.ID)
		c, runs := running[a.ID]
		runs = runs && a.Desired == state.DesiredRun
		spec, probe, has := w.checkOf(a, m)
		if m.check != nil && (!runs || m.check.attempt != c.Attempt || !reflect.DeepEqual(m.check.spec, spec) || !reflect.DeepEqual(m.check.probe, probe)) {
			m.check.stop()
			m.check = nil
		}
		if !runs || m.check != nil {
			continue
		}
		cctx, cancel := context.WithCancel(ctx)
		m.check = &checking{attempt: c.Attempt, spec: spec, probe: probe, cancel: cancel}
		m.Health, m.Why = state.HealthHealthy, ""
		if !has {
			continue
		}
		if !a.Last.Ready() || a.Last.Attempt != c.Attempt { // an adopted task that was healthy stays so until a check says otherwise
			m.Health = state.HealthStarting
		}
		id := containerID(a.ID, a.Spec.Main().Name, a.Spec.Name, c.Attempt)
		check, first := m.check, converge.NewCheck(spec, c.Started, m.Health)
		ask := w.asker(a, id, spec, probe)
		group.Go(func() { w.check(cctx, a.ID, check, first, ask) })
	}
}

// checkOf is the check of a task: the probe of its spec, its health check, or the image's. has is false when there is none.
func (w *Worker) checkOf(a *converge.Assignment, m *memory) (spec manifest.Health, probe *manifest.Probe, has bool) {
	main := a.Spec.Main()
	if main.Probe != nil {
		return main.Probe.Timing, main.Probe, true
	}
	if h := main.Health; h != nil {
		spec = *h
	}
	image := m.images[main.Name].Config.Health
	if spec.Disabled || main.Health == nil && image != nil && image.Disabled {
		return manifest.Health{}, nil, false
	}
	spec = spec.WithDefaults(image)
	if len(spec.Test) == 0 || spec.Test[0] == "NONE" {
		return manifest.Health{}, nil, false
	}
	return spec, nil, true
}

// check asks again and again until ctx ends.
func (w *Worker) check(ctx context.Context, task string, of *checking, c converge.Check, ask func(context.Context) error) {
	timer := time.NewTimer(time.Until(c.Next))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		actx, cancel := context.WithTimeout(ctx, c.Spec.Timeout.Std())
		err := ask(actx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, ErrUnavailable) { // the runtime could not be asked: that says nothing of the task
			timer.Reset(c.Spec.Interval.Std())
			continue
		}
		was := c.Health
		c = c.Result(err == nil, time.Now())
		if c.Health != was || err != nil {
			said := ""
			if err != nil {
				said = err.Error()
			}
			w.post(ctx, func() {
				if m := w.memory[task]; m != nil && m.check == of {
					m.Health, m.Why = c.Health, said
				}
			})
		}
		timer.Reset(max(time.Until(c.Next), 10*time.Millisecond))
	}
}

// asker makes the function that asks once.
func (w *Worker) asker(a *converge.Assignment, id string, spec manifest.Health, probe *manifest.Probe) func(context.Context) error {
	if probe == nil {
		command := spec.Test[1:]
		if spec.Test[0] == "CMD-SHELL" {
			command = append([]string{"/bin/sh", "-c"}, command...)
		}
		return func(ctx context.Context) error { return w.checkExec(ctx, id, command, spec.Timeout.Std()) }
	}
	host := "127.0.0.1"
	if addr := probeAddr(a); addr.IsValid() {
		host = addr.String()
	}
	at := net.JoinHostPort(host, fmt.Sprint(probe.Port))
	if probe.HTTP == "" {
		return func(ctx context.Context) error { return probeTCP(ctx, at) }
	}
	return func(ctx context.Context) error { return probeHTTP(ctx, "http://"+at+probe.HTTP) }
}

func probeAddr(a *converge.Assignment) netip.Addr {
	for _, at := range a.Spec.Networks {
		if addr, err := netip.ParseAddr(a.Addrs[at.Network]); err == nil {
			return addr
		}
	}
	return netip.Addr{}
}

func (w *Worker) checkExec(ctx context.Context, id string, command []string, timeout time.Duration) error {
	var out tail
	code, err := w.cfg.Inspector.Exec(ctx, id, ExecRequest{Command: command, Stdout: &out, Stderr: &out, Timeout: timeout})
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the health check took longer than %s", timeout)
	case err != nil:
		return err
	case code != 0:
		return fmt.Errorf("the health check exited with %d%s", code, out.said())
	}
	return nil
}

// tail keeps the end of what a check prints.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - maxProbeBody; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

// said is the last line of the output, for a reason.
func (t *tail) said() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := bytes.TrimSpace(t.buf)
	if i := bytes.LastIndexByte(b, '\n'); i >= 0 {
		b = b[i+1:]
	}
	if len(b) == 0 {
		return ""
	}
	return ": " + strings.ToValidUTF8(string(b[:min(len(b), 200)]), "?")
}

func probeTCP(ctx context.Context, at string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at)
	if err != nil {
		return err
	}
	return c.Close()
}

// probeClient follows no redirect and keeps no connection: each probe is one new request.
var probeClient = &http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true, Proxy: nil},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func probeHTTP(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := probeClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxProbeBody))
	if resp.StatusCode < 200 || resp.StatusCode >= 400 {
		return fmt.Errorf("GET %s: status %s", url, resp.Status)
	}
	return nil
}
