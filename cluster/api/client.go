package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Client talks to a daemon on its socket. It is safe for concurrent use. Its errors are of type *Error where the daemon refused.
type Client struct {
	socket string
	http   *http.Client
	met    atomic.Bool // the daemon answered once
}

// NewClient makes a client. It connects when it is first asked something.
func NewClient(socket string) *Client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableCompression: true,
	}
	return &Client{socket: socket, http: &http.Client{Transport: t}}
}

// Close gives idle connections back.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// NewRequestID makes an id for an operation.
func NewRequestID() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Version asks the daemon what it is.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return ask[Version](ctx, c, "GET", "/v1/version", nil, nil)
}

// Status tells of a stack, or with an empty name of all.
func (c *Client) Status(ctx context.Context, stack string) (Status, error) {
	return ask[Status](ctx, c, "GET", "/v1/status", params("stack", stack), nil)
}

// History tells what became of a stack's revisions, newest first.
func (c *Client) History(ctx context.Context, stack string) (StackHistory, error) {
	return ask[StackHistory](ctx, c, "GET", "/v1/history", params("stack", stack), nil)
}

// Volumes lists the data that tasks left on nodes.
func (c *Client) Volumes(ctx context.Context) ([]VolumeInfo, error) {
	return ask[[]VolumeInfo](ctx, c, "GET", "/v1/volumes", nil, nil)
}

// Secrets lists the names of the secrets.
func (c *Client) Secrets(ctx context.Context) ([]SecretInfo, error) {
	return ask[[]SecretInfo](ctx, c, "GET", "/v1/secrets", nil, nil)
}

// Drift compares what runs of a stack (or of all) with what should.
func (c *Client) Drift(ctx context.Context, stack string) ([]TaskDrift, error) {
	return ask[[]TaskDrift](ctx, c, "GET", "/v1/drift", params("stack", stack), nil)
}

// Inspect is the runtime's record of a task.
func (c *Client) Inspect(ctx context.Context, task string) (json.RawMessage, error) {
	return ask[json.RawMessage](ctx, c, "GET", "/v1/inspect", params("task", task), nil)
}

// Operate does one write.
func (c *Client) Operate(ctx context.Context, op Operation) (Result, error) {
	return ask[Result](ctx, c, "POST", "/v1/operations", nil, op)
}

// PlanBundle plans a directory that the caller rendered. Values of secrets and the bytes of files stay here.
func (c *Client) PlanBundle(ctx context.Context, b *manifest.Bundle) (Preview, error) {
	req := wireBundle{Bundle: b, Places: map[string]wireOrigins{}}
	for i := range b.Stacks {
		s := &b.Stacks[i]
		req.Places[s.Name] = wireOrigins{s.Origins, s.Dir, s.Files}
	}
	return ask[Preview](ctx, c, "POST", "/v1/plan", nil, req)
}

// PlanRevision plans a ref of a source; an empty source is the only one, an empty ref what the source follows.
func (c *Client) PlanRevision(ctx context.Context, source, ref string) (Preview, error) {
	return ask[Preview](ctx, c, "POST", "/v1/plan/revision", nil, wireRef{Source: source, Ref: ref})
}

// TestSource tries a source; with a name only, the one of that name.
func (c *Client) TestSource(ctx context.Context, s SourceSpec) (SourceReport, error) {
	return ask[SourceReport](ctx, c, "POST", "/v1/sources/test", nil, s)
}

// Events lists events, oldest first.
func (c *Client) Events(ctx context.Context, q EventQuery) ([]EventInfo, error) {
	return ask[[]EventInfo](ctx, c, "GET", "/v1/events", params("stack", q.Stack, "tail", strconv.Itoa(q.Tail)), nil)
}

// WatchEvents calls each for every event, first those that there are, until ctx ends or each fails.
func (c *Client) WatchEvents(ctx context.Context, q EventQuery, each func(EventInfo) error) error {
	return c.follow(ctx, "/v1/events", params("stack", q.Stack, "tail", strconv.Itoa(q.Tail), "watch", "1"), q.After, func(_ string, data []byte) error {
		return with(data, each)
	})
}

// WatchChanges calls each at once and whenever the facts moved, until ctx ends or each fails.
func (c *Client) WatchChanges(ctx context.Context, each func(Change) error) error {
	return c.follow(ctx, "/v1/changes", nil, "", func(_ string, data []byte) error { return with(data, each) })
}

// WatchProgress follows a stack, or all stacks of a source, from the index of a sync's Result to an end, and returns the end of each stack.
func (c *Client) WatchProgress(ctx context.Context, source, stack string, after uint64, each func(Progress) error) ([]Progress, error) {
	var ends []Progress
	finished := false
	q := params("source", source, "stack", stack, "after", strconv.FormatUint(after, 10))
	err := c.follow(ctx, "/v1/progress", q, "", func(event string, data []byte) error {
		if event == "done" {
			finished = true
			return json.Unmarshal(data, &ends)
		}
		return with(data, each)
	})
	if finished && errors.Is(err, ErrGone) {
		err = nil
	}
	return ends, err
}

// Logs calls each for every line, until the end, ctx ends or each fails.
func (c *Client) Logs(ctx context.Context, q LogQuery, each func(LogLine) error) error {
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	resp, err := c.do(ctx, "GET", "/v1/logs", params("query", string(b)), nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(resp.Body)
	for {
		var rec logRecord
		switch err := d.Decode(&rec); {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF) && !q.Follow:
			return nil
		case err != nil:
			return broken(err)
		case rec.Error != nil:
			return rec.Error
		case rec.LogLine != nil:
			if err := each(*rec.LogLine); err != nil {
				return err
			}
		}
	}
}

// ClientStreams are a session's ends on the client. Stdin may be nil; it is read until its end or that of the session, and one more read
// may be under way when Exec returns.
type ClientStreams struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Resize <-chan Size
}

// Exec runs a command in a task and returns its exit code.
func (c *Client) Exec(ctx context.Context, req ExecRequest, s ClientStreams) (int, error) {
	req.Stdin = s.Stdin != nil
	resp, err := c.do(ctx, "POST", "/v1/exec", nil, req, http.Header{"Connection": {"Upgrade"}, "Upgrade": {execProtocol}})
	if err != nil {
		return 0, err
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if !ok || resp.StatusCode != http.StatusSwitchingProtocols {
		_ = resp.Body.Close()
		return 0, fmt.Errorf("exec: the daemon answered %s, not with a session", resp.Status)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	done := make(chan struct{})
	defer close(done)
	var mu sync.Mutex
	out := frameWriter{kind: FrameStdin, mu: &mu, w: conn}
	if s.Stdin != nil {
		// It may sit in a read of the terminal when the session ends; nothing it reads then goes anywhere.
		go func() {
			if _, err := io.Copy(out, s.Stdin); err == nil {
				_ = out.send(Frame{Kind: FrameStdin})
			}
		}()
	}
	if s.Resize != nil {
		go func() {
			for {
				select {
				case size, ok := <-s.Resize:
					if !ok || out.send(resizeFrame(size)) != nil {
						return
					}
				case <-done:
					return
				}
			}
		}()
	}
	return receive(ctx, conn, s)
}

// receive copies a session's output until it says how the command ended.
func receive(ctx context.Context, conn io.Reader, s ClientStreams) (int, error) {
	in := bufio.NewReader(conn)
	for {
		f, err := ReadFrame(in)
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case err != nil:
			return 0, fmt.Errorf("exec: %w", broken(err))
		}
		w := s.Stdout
		switch f.Kind {
		case FrameExit:
			return f.exitCode()
		case FrameError:
			return 0, f.err()
		case FrameStderr:
			w = s.Stderr
		case FrameStdout:
		default:
			return 0, fmt.Errorf("exec: the daemon sent a frame of kind %d", f.Kind)
		}
		if _, err := w.Write(f.Payload); err != nil {
			return 0, fmt.Errorf("exec: write the output: %w", err)
		}
	}
}

func params(kv ...string) url.Values {
	v := url.Values{}
	for i := 0; i < len(kv); i += 2 {
		if kv[i+1] != "" {
			v.Set(kv[i], kv[i+1])
		}
	}
	return v
}

func with[T any](data []byte, each func(T) error) error {
	var v T
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("read a feed: %w", err)
	}
	return each(v)
}

func ask[T any](ctx context.Context, c *Client, method, path string, q url.Values, body any) (T, error) {
	var out T
	resp, err := c.do(ctx, method, path, q, body, nil)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		return out, broken(err)
	}
	return out, nil
}

// do sends a request and turns a refusal into an *Error.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, body any, header http.Header) (*http.Response, error) {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("write the request: %w", err)
		}
		in = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "gitopsd", Path: path, RawQuery: q.Encode()}
	r, err := http.NewRequestWithContext(ctx, method, u.String(), in)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		r.Header[k] = v
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	c.met.Store(true)
	if resp.StatusCode < http.StatusBadRequest {
		return resp, nil
	}
	defer resp.Body.Close()
	e := &Error{Kind: Kind(resp.StatusCode)}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(e); err != nil || e.Message == "" {
		return nil, newError(Internal, "the daemon answered "+resp.Status)
	}
	return nil, e
}

// ErrUnreachable is wrapped by errors that tell that no daemon answers.
var ErrUnreachable = errors.New("no daemon answers")

// ErrGone is wrapped by errors that tell that a daemon which answered ended before it had said all, or does not answer any more. It may be back in a moment.
var ErrGone = errors.New("the daemon ended or was restarted meanwhile")

// broken makes an error of an answer that can't be read to its end: either it broke off, or it is not what this client knows.
func broken(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	if errors.As(err, &syntax) || errors.As(err, &kind) || errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return ErrGone
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	var way string
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrNotExist):
		way = "there is no such socket; start gitopsd, or name its socket with --socket or GITOPSCTL_SOCKET"
	case errors.Is(err, syscall.ECONNREFUSED):
		way = "nobody listens there; gitopsd was stopped or has failed: start it, and look at its log"
	case errors.Is(err, fs.ErrPermission):
		way = "only root may open it; run this with sudo"
	default:
		way = err.Error()
		var ue *url.Error
		if errors.As(err, &ue) {
			way = ue.Err.Error()
		}
	}
	if c.met.Load() {
		return fmt.Errorf("%w: %w on %s: %s", ErrGone, ErrUnreachable, c.socket, way)
	}
	return fmt.Errorf("%w on %s: %s", ErrUnreachable, c.socket, way)
}

// maxEvent bounds one event of a feed, in bytes.
const maxEvent = 4 << 20

// follow reads server-sent events, those after an id where one is given, until ctx ends, each fails or the daemon closes the feed.
func (c *Client) follow(ctx context.Context, path string, q url.Values, after string, each func(event string, data []byte) error) error {
	header := http.Header{"Accept": {"text/event-stream"}}
	if after != "" {
		header["Last-Event-ID"] = []string{after}
	}
	resp, err := c.do(ctx, "GET", path, q, nil, header)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, maxEvent)
	event := ""
	for sc.Scan() {
		line := sc.Text()
		if e, ok := strings.CutPrefix(line, "event: "); ok {
			event = e
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		if event == "error" {
			e := &Error{Kind: Internal}
			if err := json.Unmarshal([]byte(data), e); err != nil {
				return fmt.Errorf("read a feed: %w", err)
			}
			return e
		}
		if err := each(event, []byte(data)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return broken(sc.Err())
}
