package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Limits of requests.
const (
	maxBody       = 1 << 20  // bytes
	maxBundle     = 64 << 20 // bytes of a rendered directory: about 1,000 stacks of 5 services take 8 MiB
	readTimeout   = 30 * time.Second
	writeTimeout  = 30 * time.Second // for one piece of a feed: a client that does not read is given up
	shutdownGrace = 3 * time.Second
)

// Config says what a server serves, and where.
type Config struct {
	Socket  string // path of the unix socket; its directory is made
	Version string
	Node    string
	Backend Backend
	Live    Live
	Planner Planner
	// Rendered counts the stacks that were rendered since the daemon started; nil = that is not told.
	Rendered func() int
	Log      *slog.Logger // nil = nothing is logged
}

// Server answers on a unix socket of mode 0600.
type Server struct {
	cfg      Config
	mux      *http.ServeMux
	metrics  *metrics
	sessions sync.WaitGroup // exec sessions: their connections are no longer the HTTP server's

	readTimeout time.Duration // for a body
}

// NewServer makes a server. It listens only in Run.
func NewServer(c Config) *Server {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: c, mux: http.NewServeMux(), metrics: newMetrics(c), readTimeout: readTimeout}
	s.get("/v1/version", s.version)
	s.get("/v1/status", func(r *http.Request) (any, error) { return statusOf(s.cfg.Backend.View(), r.FormValue("stack")) })
	s.get("/v1/history", func(r *http.Request) (any, error) { return historyOf(s.cfg.Backend.View(), r.FormValue("stack")) })
	s.get("/v1/volumes", func(*http.Request) (any, error) { return volumesOf(s.cfg.Backend.View()), nil })
	s.get("/v1/secrets", func(*http.Request) (any, error) { return secretsOf(s.cfg.Backend.View()), nil })
	s.get("/v1/drift", s.drift)
	s.get("/v1/inspect", s.inspect)
	post(s, "/v1/operations", maxBody, s.operate)
	post(s, "/v1/plan", maxBundle, s.planBundle)
	post(s, "/v1/plan/revision", maxBody, s.planRevision)
	post(s, "/v1/sources/test", maxBody, s.testSource)
	s.handle("GET /v1/events", s.events)
	s.handle("GET /v1/changes", s.changes)
	s.handle("GET /v1/progress", s.progress)
	s.handle("GET /v1/logs", s.logs)
	s.handle("POST /v1/exec", s.exec)
	s.handle("GET /metrics", func(w http.ResponseWriter, r *http.Request) error { s.metrics.ServeHTTP(w, r); return nil })
	s.handle("/", func(_ http.ResponseWriter, r *http.Request) error {
		return newError(NotFound, fmt.Sprintf("this daemon (version %s) has no %s %s: is gitopsctl of another version?",
			c.Version, r.Method, clip(r.URL.Path, 100)))
	})
	return s
}

// Metrics answers with the metrics in Prometheus' form: for a daemon that serves them on an address of its own, too.
func (s *Server) Metrics() http.Handler { return s.metrics }

// Run listens and answers until ctx ends; then it closes feeds and sessions, and returns when all have ended. It refuses a socket that
// another daemon answers on, and takes over one that nobody does.
func (s *Server) Run(ctx context.Context) error {
	l, unlock, err := listen(ctx, s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", s.cfg.Socket, err)
	}
	defer unlock()
	// Feeds and sessions, which have no end of their own, end with ctx. Other requests get a moment to be answered.
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), closingKey{}, ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           s.mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       withPeer,
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err = <-served:
		err = fmt.Errorf("serve %s: %w", s.cfg.Socket, err)
	case <-ctx.Done():
		grace, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer done()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close() // who has not ended by now is cut off
		}
		if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
			err = fmt.Errorf("serve %s: %w", s.cfg.Socket, serr)
		}
	}
	cancel()
	s.sessions.Wait()
	return err
}

type closingKey struct{}

// untilClosing is the context of a feed or session: it ends with the request, and as soon as the server is told to end.
func untilClosing(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	closing, ok := r.Context().Value(closingKey{}).(context.Context)
	if !ok {
		return ctx, cancel
	}
	stop := context.AfterFunc(closing, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// listen opens the socket. A lock beside it tells a daemon that lives from a socket that a killed one left.
func listen(ctx context.Context, path string) (net.Listener, func(), error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, nil, err
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nil, err
	}
	unlock := func() { _ = lock.Close() }
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unlock()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil, errors.New("another gitopsd answers there; stop it first, or give this one a socket and a data directory of its own")
		}
		return nil, nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		unlock()
		return nil, nil, err
	case info.Mode()&fs.ModeSocket == 0:
		unlock()
		return nil, nil, errors.New("there is a file that is no socket; remove it, or set another path")
	default:
		if err := os.Remove(path); err != nil {
			unlock()
			return nil, nil, fmt.Errorf("remove the socket that an earlier gitopsd left: %w", err)
		}
	}
	// The mode is set before the socket has a name, so that there is no moment in which others could open it.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		if err := c.Control(func(fd uintptr) { set = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return set
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return l, unlock, nil
}

func (s *Server) handle(pattern string, h func(http.ResponseWriter, *http.Request) error) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{ResponseWriter: w, code: http.StatusOK}
		if err := h(rec, r); err != nil {
			s.fail(rec, r, err)
		}
		s.metrics.requests.WithLabelValues(pattern, strconv.Itoa(rec.code)).Inc()
	})
}

// get answers with what h returns.
func (s *Server) get(path string, h func(*http.Request) (any, error)) {
	s.handle("GET "+path, func(w http.ResponseWriter, r *http.Request) error {
		v, err := h(r)
		if err != nil {
			return err
		}
		return reply(w, v)
	})
}

// post answers with what h makes of the body.
func post[T any](s *Server, path string, limit int64, h func(context.Context, *T) (any, error)) {
	s.handle("POST "+path, func(w http.ResponseWriter, r *http.Request) error {
		var req T
		if err := s.read(w, r, limit, &req); err != nil {
			return err
		}
		v, err := h(r.Context(), &req)
		if err != nil {
			return err
		}
		return reply(w, v)
	})
}

// read reads a request's body in the time that there is for it. Afterwards the connection has no deadline any more: one that passes while the
// request is worked on would end the request.
func (s *Server) read(w http.ResponseWriter, r *http.Request, limit int64, into any) error {
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(time.Now().Add(s.readTimeout)); err != nil {
		return err
	}
	if err := decode(r.Body, limit, into); err != nil {
		return err
	}
	return rc.SetReadDeadline(time.Time{})
}

func reply(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

// fail answers with an error, unless an answer has begun.
func (s *Server) fail(w *recorder, r *http.Request, err error) {
	var e *Error
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &e):
	case errors.As(err, &tooLarge):
		e = newError(TooLarge, fmt.Sprintf("the request is larger than %d bytes", tooLarge.Limit))
	default:
		e = newError(Internal, err.Error())
	}
	if e.Kind == Internal && r.Context().Err() == nil {
		s.cfg.Log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if w.began {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(e.Kind))
	_ = json.NewEncoder(w).Encode(e) // the client is gone: there is nobody to tell
}

// recorder remembers the status, and whether an answer began.
type recorder struct {
	http.ResponseWriter
	code  int
	began bool
}

func (r *recorder) WriteHeader(code int) {
	if !r.began {
		r.code, r.began = code, true
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(p []byte) (int, error) {
	r.began = true
	return r.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// decode reads a request's body strictly: a field that this daemon does not know is refused, not passed over.
func decode(body io.ReadCloser, limit int64, into any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, body, limit))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil && d.More() {
		err = errors.New("there is more than one value")
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Invalidf("the request did not arrive in time")
	case err == nil, errors.As(err, &tooLarge):
		return err
	case errors.Is(err, io.EOF):
		return Invalidf("the request is empty")
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) { // its own text would quote the value
		return Invalidf("read the request: %s can't be a %s", typ.Field, typ.Value)
	}
	return Invalidf("read the request: %s", clip(err.Error(), 300))
}

func (s *Server) version(*http.Request) (any, error) {
	v := s.cfg.Backend.View()
	out := Version{Version: s.cfg.Version, Node: s.cfg.Node, Format: v.Format, Index: v.Index, At: v.At}
	if c, ok := v.Clusters.Get("cluster"); ok {
		out.Cluster = c.Value.Name
	}
	return out, nil
}

func (s *Server) drift(r *http.Request) (any, error) {
	v, stack := s.cfg.Backend.View(), r.FormValue("stack")
	stacks := []string{stack}
	if stack == "" {
		stacks = names(v.Stacks)
	} else if _, ok := v.Stacks.Get(stack); !ok {
		return nil, noStack(v, stack)
	}
	out := []TaskDrift{}
	for _, name := range stacks {
		d, err := s.cfg.Live.Drift(r.Context(), name)
		if err != nil {
			return nil, fmt.Errorf("look at what runs of stack %s: %w", name, err)
		}
		out = append(out, d...)
	}
	for i := range out {
		out[i].NodeName = nodeName(v, out[i].Node)
	}
	maskDrift(out)
	return out, nil
}

func (s *Server) inspect(r *http.Request) (any, error) {
	v, id := s.cfg.Backend.View(), r.FormValue("task")
	if _, ok := v.Tasks.Get(id); !ok {
		return nil, noTask(v, id)
	}
	raw, err := s.cfg.Live.Inspect(r.Context(), id)
	if err != nil {
		return nil, fmt.Errorf("inspect %s: %w", id, err)
	}
	return maskRecord(raw)
}

func (s *Server) operate(ctx context.Context, op *Operation) (any, error) {
	if err := op.Check(); err != nil {
		return nil, err
	}
	v := s.cfg.Backend.View()
	if op.Stack != "" {
		e, ok := v.Stacks.Get(op.Stack)
		if !ok && op.Kind != OpSync { // a fetch may bring it
			return nil, noStack(v, op.Stack)
		}
		if op.Service != "" {
			if _, ok := v.Services.Get(op.Stack + "/" + op.Service); !ok {
				return nil, NotFoundf("service", op.Stack+"/"+op.Service, names(v.Services))
			}
		}
		if ok && op.Kind == OpSync {
			op.Source, op.Stack = e.Value.Source, ""
		}
	}
	if op.Source != "" {
		if _, ok := v.Sources.Get(op.Source); !ok {
			return nil, noSource(v, op.Source)
		}
	}
	if op.Kind == OpSecretRemove {
		if _, ok := v.Secrets.Get(op.Secret.Name); !ok {
			return nil, NotFoundf("secret", op.Secret.Name, slices.DeleteFunc(names(v.Secrets), ownSecret))
		}
	}
	if op.Actor = clip(op.Actor, 100); op.Actor == "" {
		op.Actor = peer(ctx)
	}
	return s.cfg.Backend.Operate(ctx, *op)
}

// wireBundle is a bundle with what its own JSON leaves out because it is no part of any hash: where things were written.
type wireBundle struct {
	Bundle *manifest.Bundle       `json:"bundle"`
	Places map[string]wireOrigins `json:"places"` // by stack
}

type wireOrigins struct {
	Origins map[string]manifest.Pos `json:"origins"`
	Dir     string                  `json:"dir"`
	Files   []string                `json:"files"`
}

func (s *Server) planBundle(ctx context.Context, req *wireBundle) (any, error) {
	if req.Bundle == nil {
		return nil, Invalidf("plan needs a bundle")
	}
	for i := range req.Bundle.Stacks {
		st := &req.Bundle.Stacks[i]
		st.Origins, st.Dir, st.Files = req.Places[st.Name].Origins, req.Places[st.Name].Dir, req.Places[st.Name].Files
	}
	var err error
	if req.Bundle.Source, err = s.oneSource(req.Bundle.Source); err != nil {
		return nil, err
	}
	p, err := s.cfg.Planner.PlanBundle(ctx, req.Bundle)
	return finish(p), err
}

// wireRef names a revision to be planned.
type wireRef struct {
	Source string `json:"source"`
	Ref    string `json:"ref"`
}

func (s *Server) planRevision(ctx context.Context, req *wireRef) (any, error) {
	source, err := s.oneSource(req.Source)
	if err != nil {
		return nil, err
	}
	p, err := s.cfg.Planner.PlanRevision(ctx, source, req.Ref)
	return finish(p), err
}

// oneSource is the source of that name, or the only one where none is named.
func (s *Server) oneSource(name string) (string, error) {
	v := s.cfg.Backend.View()
	if _, ok := v.Sources.Get(name); ok {
		return name, nil
	}
	all := slices.DeleteFunc(names(v.Sources), func(n string) bool { e, _ := v.Sources.Get(n); return e.Value.Policy })
	switch {
	case name != "":
		return "", noSource(v, name)
	case len(all) == 1:
		return all[0], nil
	case len(all) == 0:
		return "", newError(NotFound, "there is no source yet; add one with `gitopsctl source add NAME URL`")
	default:
		e := Invalidf("there are %d sources: say which one with --source", len(all))
		e.Names = all[:min(len(all), maxNames)]
		return "", e
	}
}

// finish makes a preview fit to be sent.
func finish(p Preview) Preview {
	maskSteps(p.Steps)
	p.Summary = Summarize(p.Steps)
	if p.Steps == nil {
		p.Steps = []reconcile.Step{}
	}
	return p
}

func (s *Server) testSource(ctx context.Context, spec *SourceSpec) (any, error) {
	if spec.URL == "" {
		// The test of a source that is there: the Planner knows its credentials.
		if v := s.cfg.Backend.View(); spec.Name == "" {
			return nil, Invalidf("source test needs a name or a URL")
		} else if _, ok := v.Sources.Get(spec.Name); !ok {
			return nil, noSource(v, spec.Name)
		}
	}
	rep, err := s.cfg.Planner.TestSource(ctx, *spec)
	if rep.Steps == nil {
		rep.Steps = []SourceStep{}
	}
	return rep, err
}
