package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSocketIsForItsOwnerOnly(t *testing.T) {
	socket := filepath.Join(shortDir(t), "deep", "s")
	stop := start(t, newFake(), socket)
	defer stop()
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("the socket's mode is %o, want 600", got)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	stop := start(t, newFake(), socket)
	defer stop()
	second := NewServer(Config{Socket: socket, Backend: newFake()})
	err := second.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "another gitopsd answers there; stop it first") {
		t.Fatalf("the second daemon got %v", err)
	}
	if _, err := NewClient(socket).Version(t.Context()); err != nil {
		t.Errorf("the first daemon does not answer any more: %v", err)
	}
}

func TestStaleSocketIsTakenOver(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close() // as a killed daemon leaves it
	if _, err := NewClient(socket).Version(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("a stale socket gives %v", err)
	}
	start(t, newFake(), socket)()
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left after the end: %v", err)
	}
}

func TestFileInPlaceOfTheSocketIsKept(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	if err := os.WriteFile(path, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	err := NewServer(Config{Socket: path, Backend: newFake()}).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "a file that is no socket") {
		t.Errorf("got %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Error("the file was overwritten")
	}
}

func TestErrorsKeepTheirKind(t *testing.T) {
	f := newFake()
	f.shop(t)
	c := serve(t, f)
	for _, want := range []*Error{Deniedf(reconcile.ReasonPolicy, "no"), Conflictf("moved"), NoQuorumf("alone"), Invalidf("odd")} {
		f.operate = func(Operation) (Result, error) { return Result{}, want }
		_, err := c.Operate(t.Context(), Operation{Kind: OpSuspend, ID: "1", Stack: "shop"})
		var got *Error
		if !errors.As(err, &got) || got.Kind != want.Kind || got.Reason != want.Reason || got.Message != want.Message {
			t.Errorf("sent %+v, got %+v", want, err)
		}
	}
	_, err := c.Status(t.Context(), "shpo")
	var got *Error
	if !errors.As(err, &got) || got.Kind != NotFound || len(got.Names) != 1 || !strings.Contains(got.Message, "did you mean shop?") {
		t.Errorf("an unknown stack gives %+v", err)
	}
}

func TestOperationsAreChecked(t *testing.T) {
	f := newFake()
	f.shop(t)
	f.apply(t, state.Set(".cluster/hash-key", state.Secret{Name: ".cluster/hash-key"}))
	f.operate = func(op Operation) (Result, error) {
		return Result{Message: op.Actor + " " + op.Source + " " + op.Stack}, nil
	}
	c := serve(t, f)
	for _, bad := range []struct {
		op   Operation
		want string
	}{
		{Operation{Kind: "reboot", ID: "1"}, `"reboot" is no operation`},
		{Operation{Kind: OpSync}, "needs an id"},
		{Operation{Kind: OpSync, ID: strings.Repeat("x", 129)}, "needs an id"},
		{Operation{Kind: OpSuspend, ID: "1"}, "suspend needs a stack"},
		{Operation{Kind: OpApprove, ID: "1", Stack: "shop", Source: "home"}, "approve needs a source or a stack"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "x"}}, "a name and a URL"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "x", URL: "/r.git", Verify: "foo"}}, "no way to verify"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "x", URL: "/r.git", Verify: "gpg"}}, "needs the signers"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "x", URL: "/r.git", Interval: 1}}, "too short"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "x", URL: "/r.git", Branch: "a", Tag: "b"}}, "not both"},
		{Operation{Kind: OpSourceAdd, ID: "1", SourceSpec: &SourceSpec{Name: "-x\ny", URL: "/r.git"}}, "the name of a source has letters"},
		{Operation{Kind: OpSecretSet, ID: "1"}, "a secret with a name"},
		{Operation{Kind: OpSecretSet, ID: "1", Secret: &SecretValue{Name: ".cluster/hash-key"}}, "a secret with a name of letters"},
		{Operation{Kind: OpRestart, ID: "1", Stack: "shop", Service: "wbe"}, "did you mean shop/web"},
		{Operation{Kind: OpSourceRemove, ID: "1", Source: "hoem"}, "did you mean home"},
		{Operation{Kind: OpSecretRemove, ID: "1", Secret: &SecretValue{Name: "pv"}}, "did you mean pw"},
		{Operation{Kind: OpSecretRemove, ID: "1", Secret: &SecretValue{Name: "quite-another"}}, "; there is pw"},
	} {
		if _, err := c.Operate(t.Context(), bad.op); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: got %v, want %q", bad.op.Kind, err, bad.want)
		}
	}
	res, err := c.Operate(t.Context(), Operation{Kind: OpSync, ID: "1", Stack: "shop", Actor: "ann"})
	if err != nil || res.Message != "ann home " {
		t.Errorf("sync of a stack asks for its source: got %q, %v", res.Message, err)
	}
	res, err = c.Operate(t.Context(), Operation{Kind: OpSuspend, ID: "1", Stack: "shop"})
	if err != nil || strings.HasPrefix(res.Message, " ") || strings.HasPrefix(res.Message, "unknown") {
		t.Errorf("without an actor, the kernel says who asks: got %q, %v", res.Message, err)
	}
}

// TestNoAnswerHoldsASecret asks everything that there is to ask.
func TestNoAnswerHoldsASecret(t *testing.T) {
	f := newFake()
	f.shop(t)
	f.operate = func(op Operation) (Result, error) {
		return Result{Message: fmt.Sprintf("%v %+v %#v", op.Secret, op.SourceSpec, op)}, nil
	}
	f.plan = func(*manifest.Bundle) (Preview, error) {
		quoted := `"` + canary + `"`
		return Preview{Steps: []reconcile.Step{{Action: reconcile.ActReplace, Fields: []manifest.Change{
			{Path: "containers[web].env.DB_PASSWORD", Old: quoted, New: quoted},
			{Path: "containers[new]", New: `{"env":{"API_TOKEN":` + quoted + `}}`},
			{Path: "containers[web].env", New: `{"API_TOKEN":` + quoted + `}`},
			{Path: "containers", New: `[{"env":{"API_TOKEN":` + quoted + `}}]`},
		}}}}, nil
	}
	f.drift = func(string) ([]TaskDrift, error) {
		return []TaskDrift{{Drift: []state.Drift{{Path: "containers[web].env.DB_PASSWORD", Want: canary, Have: canary}}}}, nil
	}
	f.inspect = func(string) (json.RawMessage, error) {
		return json.RawMessage(`{"spec":{"process":{"env":["A_TOKEN=` + canary + `"]},"annotations":{"x":"y"}},"labels":{"my.password":"` + canary + `"},"environment":{"SECRET_KEY":"` + canary + `"}}`), nil
	}
	c := serve(t, f)
	get := func(method, path, body string) string {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://gitopsd"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s %s: %s: %s", method, path, resp.Status, b)
		}
		return string(b)
	}
	for _, q := range [][3]string{
		{"GET", "/v1/status", ""}, {"GET", "/v1/status?stack=shop", ""}, {"GET", "/v1/history?stack=shop", ""}, {"GET", "/v1/volumes", ""}, {"GET", "/v1/secrets", ""},
		{"GET", "/v1/drift", ""}, {"GET", "/v1/inspect?task=shop/web.1.1", ""}, {"GET", "/v1/events", ""}, {"GET", "/metrics", ""},
		{"POST", "/v1/plan", `{"bundle":{"source":"home","revision":{}}}`},
		{"POST", "/v1/operations", `{"kind":"secret.set","id":"1","secret":{"name":"x","value":"czNjcjN0LWNhbmFyeQ=="}}`},
		{"POST", "/v1/operations", `{"kind":"source.add","id":"1","sourceSpec":{"name":"x","url":"https://x","token":"` + canary + `"}}`},
	} {
		if out := get(q[0], q[1], q[2]); strings.Contains(out, canary) {
			t.Errorf("%s %s holds the secret: %s", q[0], q[1], out)
		}
	}
	// A body that can't be read is not quoted.
	_, err := ask[Result](t.Context(), c, "POST", "/v1/operations", nil, map[string]any{"kind": 1, "secret": canary})
	if err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("the error quotes the secret: %v", err)
	}
}

func TestBundleKeepsItsPlaces(t *testing.T) {
	f := newFake()
	f.shop(t)
	var got *manifest.Bundle
	f.plan = func(b *manifest.Bundle) (Preview, error) { got = b; return Preview{}, nil }
	c := serve(t, f)
	in := &manifest.Bundle{Stacks: []manifest.Stack{{Name: "shop", Services: []manifest.Service{}, Dir: "d", Files: []string{"d/compose.yaml"},
		Origins:      map[string]manifest.Pos{"web.image": {File: "d/compose.yaml", Line: 3}},
		SecretValues: map[string][]byte{"pw": []byte(canary)}}}}
	if _, err := c.PlanBundle(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if pos := got.Stacks[0].Origin("web.image"); pos.Line != 3 || got.Stacks[0].Dir != "d" || got.Source != "home" {
		t.Errorf("arrived as %+v", got)
	}
	if got.Stacks[0].SecretValues != nil {
		t.Error("the values of secrets went over the wire")
	}
}

func TestLargeRequestIsRefused(t *testing.T) {
	f := newFake()
	f.shop(t)
	c := serve(t, f)
	_, err := c.Operate(t.Context(), Operation{Kind: OpSecretSet, ID: "1", Secret: &SecretValue{Name: "x", Value: make([]byte, maxBody)}})
	if KindOf(err) != TooLarge {
		t.Errorf("got %v", err)
	}
}

func TestUnknownRouteTellsOfVersions(t *testing.T) {
	c := serve(t, newFake())
	_, err := ask[Result](t.Context(), c, "GET", "/v9/future", nil, nil)
	if KindOf(err) != NotFound || !strings.Contains(err.Error(), "version v1") {
		t.Errorf("got %v", err)
	}
}

func TestEventsGoOn(t *testing.T) {
	f := newFake()
	event := func(n int) state.Change {
		return state.Set(state.EventKey(time.Unix(int64(n), 0), 0), state.Event{Kind: "accept", Stack: "shop", Reason: state.Reason{Message: fmt.Sprint(n)}})
	}
	f.apply(t, event(1), event(2))
	c := serve(t, f)
	var got []string
	stop := errors.New("enough")
	err := c.WatchEvents(t.Context(), EventQuery{Tail: 1, Watch: true}, func(e EventInfo) error {
		got = append(got, e.Reason.Message)
		switch len(got) {
		case 1:
			f.apply(t, event(3))
		case 2:
			f.apply(t, event(4), event(5))
		case 4:
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || strings.Join(got, " ") != "2 3 4 5" {
		t.Errorf("got %v, %v", got, err)
	}
}

// A stack can be gone before the wait for it begins: the sync that removed it knew it.
func TestProgressOfWhatIsGoneAlready(t *testing.T) {
	f := newFake()
	f.apply(t, state.Set("home", state.Source{Name: "home"}))
	c := serve(t, f)
	quiet := func(Progress) error { return nil }
	all, err := c.WatchProgress(t.Context(), "home", "shop", f.View().Index, quiet)
	if err != nil || len(all) != 1 || all[0].Stack != "shop" || all[0].End != EndRemoved {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := c.WatchProgress(t.Context(), "", "shop", f.View().Index, quiet); KindOf(err) != NotFound {
		t.Errorf("a stack of no source: %v", err)
	}
}

func TestFeedsEndWithTheServer(t *testing.T) {
	f := newFake()
	f.shop(t)
	socket := filepath.Join(shortDir(t), "s")
	stop := start(t, f, socket)
	c := NewClient(socket)
	defer c.Close()
	begun, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		first := true
		ended <- c.WatchChanges(context.Background(), func(Change) error {
			if first {
				close(begun)
				first = false
			}
			return nil
		})
	}()
	<-begun
	stop()
	if err := <-ended; !errors.Is(err, ErrGone) {
		t.Errorf("the feed ended with %v", err)
	}
	if _, err := c.Status(t.Context(), ""); !errors.Is(err, ErrGone) || !errors.Is(err, ErrUnreachable) {
		t.Errorf("a daemon that answered before and does not now gives %v", err)
	}
}

// TestKilledDaemon: an answer that breaks off says that the daemon is gone, in a sentence.
func TestKilledDaemon(t *testing.T) {
	for name, ask := range map[string]func(*Client) error{
		"a feed": func(c *Client) error { return c.WatchChanges(context.Background(), func(Change) error { return nil }) },
		"logs": func(c *Client) error {
			return c.Logs(context.Background(), LogQuery{Stack: "shop"}, func(LogLine) error { return nil })
		},
		"an answer": func(c *Client) error { _, err := c.Status(context.Background(), ""); return err },
	} {
		socket := filepath.Join(shortDir(t), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"in")
			_ = conn.Close()
		}()
		c := NewClient(socket)
		if err := ask(c); !errors.Is(err, ErrGone) || strings.Contains(err.Error(), "EOF") {
			t.Errorf("%s ends with %v", name, err)
		}
		c.Close()
		_ = l.Close()
	}
}

// TestSlowOperationIsNotCutOff: the time that a body may take is not the time that an operation may take.
func TestSlowOperationIsNotCutOff(t *testing.T) {
	f := newFake()
	f.shop(t)
	s := NewServer(Config{Socket: filepath.Join(shortDir(t), "s"), Backend: f})
	s.readTimeout = 20 * time.Millisecond
	f.waiting = func(ctx context.Context) error {
		select {
		case <-time.After(10 * s.readTimeout):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.operate = func(Operation) (Result, error) { return Result{Message: "done"}, nil }
	stop := run(t, s)
	defer stop()
	c := NewClient(s.cfg.Socket)
	defer c.Close()
	if res, err := c.Operate(t.Context(), Operation{Kind: OpSync, ID: "1"}); err != nil || res.Message != "done" {
		t.Errorf("got %+v, %v", res, err)
	}
	conn, err := net.Dial("unix", s.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "POST /v1/operations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), "did not arrive in time") {
		t.Errorf("a body that does not come: %q, %v", answer, err)
	}
}

// TestEndLetsRequestsFinish: an operation that is under way when the server is told to end gets its answer.
func TestEndLetsRequestsFinish(t *testing.T) {
	f := newFake()
	f.shop(t)
	begun, proceed := make(chan struct{}), make(chan struct{})
	f.waiting = func(ctx context.Context) error {
		close(begun)
		select {
		case <-proceed:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.operate = func(Operation) (Result, error) { return Result{Message: "done"}, nil }
	socket := filepath.Join(shortDir(t), "s")
	stop := start(t, f, socket)
	c := NewClient(socket)
	defer c.Close()
	got := make(chan error, 1)
	go func() {
		_, err := c.Operate(context.Background(), Operation{Kind: OpSync, ID: "1"})
		got <- err
	}()
	<-begun
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		stop()
	}()
	for { // until nobody is let in any more: the end has begun
		late := NewClient(socket)
		_, err := late.Version(t.Context())
		late.Close()
		if err != nil {
			break
		}
	}
	close(proceed)
	if err := <-got; err != nil {
		t.Errorf("the operation was cut off: %v", err)
	}
	<-ended
}

func TestLogsEndWithTheirError(t *testing.T) {
	f := newFake()
	f.shop(t)
	f.logs = func(_ context.Context, _ LogQuery, line func(LogLine) error) error {
		if err := line(LogLine{Task: "shop/web.1.1", Text: []byte("a \xff\n")}); err != nil {
			return err
		}
		return errors.New("the disk is gone")
	}
	c := serve(t, f)
	var got []string
	err := c.Logs(t.Context(), LogQuery{Stack: "shop"}, func(l LogLine) error { got = append(got, string(l.Text)); return nil })
	if len(got) != 1 || got[0] != "a \xff\n" || err == nil || !strings.Contains(err.Error(), "the disk is gone") {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestExec(t *testing.T) {
	f := newFake()
	f.shop(t)
	f.exec = func(ctx context.Context, r ExecRequest, s ExecStreams) (int, error) {
		switch r.Command[0] {
		case "cat":
			n, err := io.Copy(s.Stdout, s.Stdin)
			_, _ = fmt.Fprintf(s.Stderr, "%d bytes", n)
			return -1, err
		case "size":
			size := <-s.Resize
			_, _ = fmt.Fprintf(s.Stdout, "%dx%d tty=%v", size.Columns, size.Rows, s.Stderr == nil)
			return 0, nil
		case "wait":
			_, _ = io.WriteString(s.Stdout, "begun")
			<-ctx.Done()
			return 0, ctx.Err()
		}
		return 0, errors.New("there is no such command")
	}
	c := serve(t, f)
	big := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
	var out, errs bytes.Buffer
	code, err := c.Exec(t.Context(), ExecRequest{Task: "shop/web.1.1", Command: []string{"cat"}}, ClientStreams{Stdin: bytes.NewReader(big), Stdout: &out, Stderr: &errs})
	if err != nil || code != -1 || !bytes.Equal(out.Bytes(), big) || errs.String() != "320000 bytes" {
		t.Errorf("cat: code %d, %v, %d bytes, %q", code, err, out.Len(), errs.String())
	}
	out.Reset()
	sizes := make(chan Size, 1)
	sizes <- Size{Columns: 80, Rows: 24}
	if _, err := c.Exec(t.Context(), ExecRequest{Task: "shop/web.1.1", Command: []string{"size"}, TTY: true}, ClientStreams{Stdout: &out, Stderr: &errs, Resize: sizes}); err != nil || out.String() != "80x24 tty=true" {
		t.Errorf("size: %q, %v", out.String(), err)
	}
	if _, err := c.Exec(t.Context(), ExecRequest{Task: "shop/web.1.1", Command: []string{"nope"}}, ClientStreams{Stdout: &out, Stderr: &errs}); err == nil || err.Error() != "exec in shop/web.1.1: there is no such command" {
		t.Errorf("nope: %v", err)
	}
	if _, err := c.Exec(t.Context(), ExecRequest{Task: "shop/wbe.1.1", Command: []string{"cat"}}, ClientStreams{Stdout: &out, Stderr: &errs}); KindOf(err) != NotFound {
		t.Errorf("unknown task: %v", err)
	}
	// A client that goes ends the command.
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := c.Exec(ctx, ExecRequest{Task: "shop/web.1.1", Command: []string{"wait"}}, ClientStreams{Stdout: onWrite(cancel), Stderr: &errs}); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
}

type onWrite func()

func (w onWrite) Write(p []byte) (int, error) { w(); return len(p), nil }

func TestMetricsTellWhatStatusTells(t *testing.T) {
	f := newFake()
	f.shop(t)
	s := NewServer(Config{Version: "v1", Node: "n1", Backend: f})
	w := httptest.NewRecorder()
	s.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{
		`gitopsd_stack_status{health="Healthy",outcome="Deployed",reason="",source="home",stack="shop",sync="Synced"} 1`,
		`gitopsd_stack_ready{stack="shop"} 1`, `gitopsd_stacks{health="Healthy",sync="Synced"} 1`, `gitopsd_stack_outcomes{outcome="Deployed",stack="shop"} 1`,
		`gitopsd_tasks{health="healthy",phase="running",service="web",stack="shop"} 1`, `gitopsd_service_tasks_desired{service="web",stack="shop"} 1`,
		`gitopsd_source_status{reason="",source="home",state="Following"} 1`, `gitopsd_log_index 1`, `gitopsd_build_info{node="n1",version="v1"} 1`,
	} {
		if !strings.Contains(w.Body.String(), want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
}

func TestNearest(t *testing.T) {
	for _, c := range []struct {
		typed, names, want string
	}{
		{"shpo", "shop blog", "shop"}, {"web", "shop/web shop/db", "shop/web"}, {"sh", "shop blog", "shop"}, {"SHOP", "shop", "shop"}, {"xyz", "shop blog", ""}, {"", "a b", ""},
	} {
		if got := strings.Join(Nearest(c.typed, strings.Fields(c.names)), " "); got != c.want {
			t.Errorf("Nearest(%q, %s) = %q, want %q", c.typed, c.names, got, c.want)
		}
	}
}

// TestDistanceIsAMetricOfSorts: equal names are 0 apart, it is the same both ways, and never more than the longer name.
func TestDistanceIsAMetricOfSorts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a-c]{0,8}`)
		a, b := name.Draw(t, "a"), name.Draw(t, "b")
		d := distance(a, b)
		if (d == 0) != (a == b) || d != distance(b, a) || d > max(len(a), len(b)) {
			t.Fatalf("distance(%q, %q) = %d", a, b, d)
		}
	})
}

func TestFramesComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var buf bytes.Buffer
		var in []Frame
		for range rapid.IntRange(0, 5).Draw(t, "n") {
			f := Frame{FrameKind(rapid.IntRange(1, 6).Draw(t, "kind")), rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "payload")}
			if _, err := f.WriteTo(&buf); err != nil {
				t.Fatal(err)
			}
			in = append(in, f)
		}
		for _, want := range in {
			got, err := ReadFrame(&buf)
			if err != nil || got.Kind != want.Kind || !bytes.Equal(got.Payload, want.Payload) {
				t.Fatalf("got %v, %v; want %v", got, err, want)
			}
		}
		if _, err := ReadFrame(&buf); !errors.Is(err, io.EOF) {
			t.Fatalf("after the last: %v", err)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 2, 'h', 'i'})
	f.Add([]byte{3, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{5, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for {
			fr, err := ReadFrame(r)
			if err != nil {
				return
			}
			if len(fr.Payload) > MaxFrame {
				t.Fatalf("a payload of %d bytes", len(fr.Payload))
			}
			fr.size()
			_, _ = fr.exitCode()
			_ = fr.err()
		}
	})
}

// FuzzRequests sends bytes to the routes that read most of what they get: no panic, and no answer of the kind "internal".
func FuzzRequests(f *testing.F) {
	f.Add(true, []byte(`{"kind":"sync","id":"1"}`))
	f.Add(true, []byte(`{"kind":"secret.set","id":"1","secret":{"name":"x","value":"czNjcjN0"}}`))
	f.Add(true, []byte(`{"kind":"source.add","id":"1","sourceSpec":{"name":"x","url":"https://x","interval":"1s"}}`))
	f.Add(false, []byte(`{"bundle":{"stacks":[{"name":"x","services":[{}]}]},"places":{"x":{"files":["a"]}}}`))
	f.Add(false, []byte(`[[[[[[`))
	fk := newFake()
	fk.shop(f)
	fk.operate = func(Operation) (Result, error) { return Result{}, nil }
	fk.plan = func(*manifest.Bundle) (Preview, error) { return Preview{}, nil }
	s := NewServer(Config{Backend: fk, Live: fk, Planner: fk})
	f.Fuzz(func(t *testing.T, operation bool, body []byte) {
		var err error
		if operation {
			var op Operation
			if err = decode(io.NopCloser(bytes.NewReader(body)), maxBody, &op); err == nil {
				_, err = s.operate(t.Context(), &op)
			}
		} else {
			var req wireBundle
			if err = decode(io.NopCloser(bytes.NewReader(body)), maxBundle, &req); err == nil {
				_, err = s.planBundle(t.Context(), &req)
			}
		}
		if err != nil && KindOf(err) == Internal {
			t.Fatalf("%q: %v", body, err)
		}
	})
}

// Where the worker keeps a volume; the lab finds them there.
func TestVolumePaths(t *testing.T) {
	t.Parallel()
	f := newFake()
	rel := state.Release{Stack: manifest.Stack{Name: "apart", DataRoot: "/srv/apart", Volumes: []manifest.Volume{
		{Name: "bound", Options: map[string]string{"type": "none", "o": "bind", "device": "/srv/bound"}}, {Name: "plain"},
	}}}
	f.apply(t, state.Set("n1", state.Node{Name: "one", DataRoot: "/data"}), state.Set("r1", rel),
		state.Set("apart", state.Stack{Name: "apart", Applied: &state.Applied{Release: "r1"}}))
	v := f.View()
	for _, c := range []struct {
		vol  state.Volume
		want string
	}{
		{state.Volume{Kind: manifest.MountVolume, Name: "shop_db", Stack: "shop", Own: true}, "/data/volumes/shop_db"},
		{state.Volume{Kind: manifest.MountVolume, Name: "plain", Stack: "apart", Own: true}, "/data/volumes/plain"},
		{state.Volume{Kind: manifest.MountVolume, Name: "bound", Stack: "apart"}, "/srv/bound"},
		{state.Volume{Kind: manifest.MountAnonymous, Name: "shop/web.1/var/lib/a b", Stack: "shop", Own: true}, "/data/anonymous/shop/web.1/var%2Flib%2Fa%20b"},
		{state.Volume{Kind: manifest.MountData, Name: "shop/state/x", Stack: "shop", Own: true}, "/data/data/shop/state/x"},
		{state.Volume{Kind: manifest.MountData, Name: "apart/state", Stack: "apart"}, "/srv/apart/state"},
		{state.Volume{Kind: manifest.MountContent, Name: "shop/seeded", Stack: "shop", Own: true}, "/data/data/shop/seeded"},
		{state.Volume{Kind: manifest.MountBind, Name: "/srv/files", Stack: "shop"}, "/srv/files"},
	} {
		c.vol.Node = "n1"
		if got := volumePath(v, c.vol); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.vol.Kind, c.vol.Name, got, c.want)
		}
	}
	if got := volumePath(v, state.Volume{Kind: manifest.MountVolume, Name: "db", Node: "gone"}); got != "" {
		t.Errorf("on a node that is gone: %s", got)
	}
}
