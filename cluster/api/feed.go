package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

// feed is an answer that grows: one JSON value at a time, each flushed.
type feed struct {
	w   http.ResponseWriter
	rc  *http.ResponseController
	sse bool // server-sent events; else JSON lines
}

func newFeed(w http.ResponseWriter, sse bool) (*feed, error) {
	f := &feed{w: w, rc: http.NewResponseController(w), sse: sse}
	kind := "application/x-ndjson"
	if sse {
		kind = "text/event-stream"
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	return f, f.rc.Flush()
}

// send writes one value. JSON has no line ends of its own, so a value is one line in both forms.
func (f *feed) send(event, id string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := f.rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if f.sse {
		if id != "" {
			id = "id: " + id + "\n"
		}
		_, err = fmt.Fprintf(f.w, "event: %s\n%sdata: %s\n\n", event, id, b)
	} else {
		_, err = f.w.Write(append(b, '\n'))
	}
	if err != nil {
		return err
	}
	return f.rc.Flush()
}

// fail ends a feed with an error: the status has been sent, so it is one more value.
func (f *feed) fail(err error) error {
	var e *Error
	if !errors.As(err, &e) {
		e = newError(Internal, err.Error())
	}
	if f.sse {
		return errors.Join(err, f.send("error", "", e))
	}
	return errors.Join(err, f.send("", "", logRecord{Error: e}))
}

// events sends the newest events, and with watch those that come. Last-Event-ID goes on where an earlier feed broke.
func (s *Server) events(w http.ResponseWriter, r *http.Request) error {
	q := EventQuery{Stack: r.FormValue("stack"), Tail: -1, Watch: r.FormValue("watch") != ""}
	if t := r.FormValue("tail"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil {
			return Invalidf("tail=%q is no number", clip(t, 20))
		}
		q.Tail = n
	}
	v := s.cfg.Backend.View()
	if q.Stack != "" {
		if _, ok := v.Stacks.Get(q.Stack); !ok && len(eventsAfter(v, "", q)) == 0 {
			return noStack(v, q.Stack)
		}
	}
	last := r.Header.Get("Last-Event-ID")
	list := eventsAfter(v, last, q)
	if q.Tail >= 0 && len(list) > q.Tail {
		list = list[len(list)-q.Tail:]
	}
	if !q.Watch {
		return reply(w, list)
	}
	ctx, cancel := untilClosing(r)
	defer cancel()
	f, err := newFeed(w, true)
	if err != nil {
		return err
	}
	for {
		for _, e := range list {
			if err := f.send("event", e.Key, e); err != nil {
				return err
			}
		}
		// Keys grow with time, so all that is new comes after the newest that there was, shown or not.
		for k := range v.Events.All() {
			last = max(last, k)
		}
		if v = s.next(ctx, v.Index); v == nil {
			return nil
		}
		list = eventsAfter(v, last, q)
	}
}

// next waits for a view past index; nil = the context ended.
func (s *Server) next(ctx context.Context, index uint64) *state.View {
	select {
	case <-s.cfg.Backend.Changed(index):
		return s.cfg.Backend.View()
	case <-ctx.Done():
		return nil
	}
}

// Change says that the facts moved.
type Change struct {
	Index uint64 `json:"index"`
}

// paceOfChanges bounds how often a watcher is told of changes: what it does with them costs more than a change.
const paceOfChanges = 100 * time.Millisecond

// changes tells a watcher that it should ask again.
func (s *Server) changes(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := untilClosing(r)
	defer cancel()
	f, err := newFeed(w, true)
	if err != nil {
		return err
	}
	v := s.cfg.Backend.View()
	for {
		if err := f.send("change", "", Change{Index: v.Index}); err != nil {
			return err
		}
		pace := time.NewTimer(paceOfChanges)
		select {
		case <-pace.C:
		case <-ctx.Done():
			pace.Stop()
			return nil
		}
		if v = s.next(ctx, v.Index); v == nil {
			return nil
		}
	}
}

// progress follows a stack, or all of a source, to a revision, until each came to an end.
func (s *Server) progress(w http.ResponseWriter, r *http.Request) error {
	after, err := strconv.ParseUint(r.FormValue("after"), 10, 64)
	if err != nil {
		return Invalidf("progress needs after=INDEX, where the sync was judged")
	}
	ctx, cancel := untilClosing(r)
	defer cancel()
	v := s.cfg.Backend.View()
	if v.Index < after {
		if v = s.next(ctx, after-1); v == nil {
			return ctx.Err()
		}
	}
	j := journey{source: r.FormValue("source"), stack: r.FormValue("stack")}
	if j.stack != "" {
		e, ok := v.Stacks.Get(j.stack)
		switch {
		case ok:
			j.source = e.Value.Source
		case j.source == "" || after == 0:
			return noStack(v, j.stack)
		default: // it was there at that index, and may be removed since
			j.targets = map[string]string{j.stack: ""}
		}
	}
	src, ok := v.Sources.Get(j.source)
	if !ok {
		return noSource(v, j.source)
	}
	j.revision = src.Value.Seen
	f, err := newFeed(w, true)
	if err != nil {
		return err
	}
	told := map[string]Progress{}
	for {
		all, done := j.look(v)
		for _, p := range all {
			if told[p.Stack] != p {
				if err := f.send("progress", "", p); err != nil {
					return err
				}
				told[p.Stack] = p
			}
		}
		if done {
			return f.send("done", "", all)
		}
		if v = s.next(ctx, v.Index); v == nil {
			return nil
		}
	}
}

// logRecord is one line of the logs feed: a line of a task, or the error that ends it.
type logRecord struct {
	*LogLine
	Error *Error `json:"error,omitempty"`
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) error {
	var q LogQuery
	if err := json.Unmarshal([]byte(r.FormValue("query")), &q); err != nil {
		return Invalidf("logs needs a query: %s", clip(err.Error(), 200))
	}
	v := s.cfg.Backend.View()
	if _, ok := v.Tasks.Get(q.Task); q.Task != "" && !ok {
		return noTask(v, q.Task)
	}
	if q.Task == "" {
		if _, ok := v.Stacks.Get(q.Stack); !ok {
			return noStack(v, q.Stack)
		}
		if _, ok := v.Services.Get(q.Stack + "/" + q.Service); q.Service != "" && !ok {
			return NotFoundf("service", q.Stack+"/"+q.Service, names(v.Services))
		}
	}
	ctx, cancel := untilClosing(r)
	defer cancel()
	f, err := newFeed(w, false)
	if err != nil {
		return err
	}
	err = s.cfg.Live.Logs(ctx, q, func(l LogLine) error { return f.send("", "", logRecord{LogLine: &l}) })
	if err != nil && ctx.Err() == nil {
		return f.fail(fmt.Errorf("read logs: %w", err))
	}
	return nil
}

// execProtocol is what the connection of a session speaks after HTTP.
const execProtocol = "gitopsd-exec"

// exec runs a command. After the checks the connection leaves HTTP and carries frames.
func (s *Server) exec(w http.ResponseWriter, r *http.Request) error {
	if r.Header.Get("Upgrade") != execProtocol {
		return Invalidf("exec needs the header Upgrade: %s", execProtocol)
	}
	var req ExecRequest
	if err := s.read(w, r, maxBody, &req); err != nil {
		return err
	}
	v := s.cfg.Backend.View()
	if _, ok := v.Tasks.Get(req.Task); !ok {
		return noTask(v, req.Task)
	}
	if len(req.Command) == 0 {
		return Invalidf("exec needs a command")
	}
	ctx, cancel := untilClosing(r)
	defer cancel()
	s.sessions.Add(1)
	defer s.sessions.Done()
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", execProtocol)
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("take over the connection: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	return session(ctx, cancel, conn, buf.Reader, req, s.cfg.Live)
}

// session carries frames between a connection and a command until the command ends or the client is gone.
func session(ctx context.Context, cancel func(), conn io.WriteCloser, in io.Reader, req ExecRequest, live Live) error {
	var mu sync.Mutex
	stdinR, stdinW := io.Pipe()
	resize := make(chan Size, 1)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(resize)
		defer cancel() // the client is gone, or ended the session
		readInput(in, stdinW, resize)
	})
	streams := ExecStreams{Stdout: frameWriter{FrameStdout, &mu, conn}, Resize: resize}
	if req.Stdin {
		streams.Stdin = stdinR
	}
	if !req.TTY {
		streams.Stderr = frameWriter{FrameStderr, &mu, conn}
	}
	code, err := live.Exec(ctx, req, streams)
	last := frameWriter{mu: &mu, w: conn}
	if err != nil {
		err = last.send(errorFrame(fmt.Errorf("exec in %s: %w", req.Task, err)))
	} else {
		err = last.send(exitFrame(code))
	}
	_ = conn.Close()   // the reader below ends by it
	_ = stdinR.Close() // and does not wait for a command that is gone
	reading.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// readInput takes the client's frames until the connection ends. A size that nobody has taken yet is replaced by the newer one.
func readInput(in io.Reader, stdin *io.PipeWriter, resize chan Size) {
	defer stdin.Close()
	for {
		f, err := ReadFrame(in)
		if err != nil {
			return
		}
		switch f.Kind {
		case FrameStdin:
			if len(f.Payload) == 0 {
				_ = stdin.Close()
				continue
			}
			_, _ = stdin.Write(f.Payload) // a command that closed its input gets no more
		case FrameResize:
			size, ok := f.size()
			if !ok {
				return
			}
			select {
			case <-resize:
			default:
			}
			resize <- size
		default:
			return // not for a client to send
		}
	}
}
