package git

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

const canary = "s3cr3t-canary-0451"

// gitHTTP serves the builder's repository through git http-backend, for user "git" with the canary as token.
func gitHTTP(b *builder, requests *[]string) http.Handler {
	b.t.Helper()
	out, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		b.t.Fatal(err)
	}
	backend := filepath.Join(strings.TrimSpace(string(out)), "git-http-backend")
	if _, err := os.Stat(backend); err != nil {
		b.t.Skip("git http-backend is not installed")
	}
	h := &cgi.Handler{Path: backend, Env: []string{"GIT_PROJECT_ROOT=" + filepath.Dir(b.Dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null"},
		Stderr: io.Discard}
	var mu sync.Mutex
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests != nil {
			mu.Lock()
			*requests = append(*requests, r.Method+" "+r.URL.RequestURI())
			mu.Unlock()
		}
		if user, pass, _ := r.BasicAuth(); user != "git" || pass != canary {
			http.Error(w, "no, "+pass+" is wrong", http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func tlsServer(t *testing.T, h http.Handler) (url, ca string) {
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv.URL, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
}

// sshServer serves git-upload-pack for one key.
type sshServer struct {
	addr    string
	hostKey ssh.Signer
	userKey string // PEM
}

func newSSH(t *testing.T, b *builder, more ...ssh.Signer) *sshServer {
	t.Helper()
	s := &sshServer{}
	var user ssh.Signer
	for _, key := range []*ssh.Signer{&s.hostKey, &user} {
		_, priv, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if *key, err = ssh.NewSignerFromKey(priv); err != nil {
			t.Fatal(err)
		}
		block, err := ssh.MarshalPrivateKey(priv, "")
		if err != nil {
			t.Fatal(err)
		}
		s.userKey = string(pem.EncodeToMemory(block))
	}
	conf := &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if c.User() == "git" && string(key.Marshal()) == string(user.PublicKey().Marshal()) {
			return nil, nil
		}
		return nil, errors.New("no")
	}}
	for _, k := range append(more, s.hostKey) {
		conf.AddHostKey(k)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serveSSH(conn, conf, b) })
		}
	})
	return s
}

func serveSSH(conn net.Conn, conf *ssh.ServerConfig, b *builder) {
	defer conn.Close()
	_, chans, reqs, err := ssh.NewServerConn(conn, conf)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			return
		}
		for req := range reqs {
			if req.Type != "exec" {
				_ = req.Reply(false, nil)
				continue
			}
			_ = req.Reply(true, nil)
			path, ok := strings.CutPrefix(string(req.Payload[4:]), "git-upload-pack '")
			path = strings.TrimSuffix(path, "'")
			cmd := exec.Command("git", "upload-pack", path)
			cmd.Env = append(b.env, "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
			cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
			in, err := cmd.StdinPipe()
			code := []byte{0, 0, 0, 0}
			if !ok || err != nil || cmd.Start() != nil {
				code[3] = 1
			} else {
				go func() { _, _ = io.Copy(in, ch); in.Close() }()
				if cmd.Wait() != nil {
					code[3] = 1
				}
			}
			_, _ = ch.SendRequest("exit-status", false, code)
			_ = ch.Close()
		}
	}
}

func (s *sshServer) spec(b *builder) Spec {
	return Spec{Name: "shop", URL: "ssh://git@" + s.addr + b.Dir, Auth: Auth{
		PrivateKey: s.userKey, KnownHosts: knownhosts.Line([]string{s.addr}, s.hostKey.PublicKey()),
	}}
}

// The same story over each transport: first fetch, forward, rewind, another branch, a tag.
func TestTransports(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"https", "ssh", "local", "file"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			b := newRepo(t)
			var spec Spec
			switch kind {
			case "https":
				url, ca := tlsServer(t, gitHTTP(b, nil))
				spec = Spec{Name: "shop", URL: url + "/repo.git", Auth: Auth{Token: canary, CA: ca}}
			case "ssh":
				spec = newSSH(t, b).spec(b)
			case "local":
				spec = b.spec()
			case "file":
				spec = Spec{Name: "shop", URL: "file://" + b.Dir}
			}
			s := newStore(t, Limits{History: 5})
			if _, err := pull(t, s, spec); !errors.Is(err, EmptyRepository) {
				t.Fatalf("empty: %v", err)
			}
			files := map[string]string{}
			for i := range 40 {
				files[fmt.Sprintf("dir%d/file%d", i%7, i)] = strings.Repeat(fmt.Sprintf("line %d\n", i), 50)
			}
			var ids []string
			for i := range 20 {
				files["n"] = fmt.Sprint(i)
				ids = append(ids, b.push(files))
			}
			check := func(want string) {
				t.Helper()
				c := mustPull(t, s, spec)
				got := readCheckout(t, c.Dir)
				if got["n"] != want || len(got) != 41 || got["dir3/file10"] != files["dir3/file10"] {
					t.Fatalf("n = %q, %d files", got["n"], len(got))
				}
			}
			relation := func(old, new string, want Relation) {
				t.Helper()
				if r, err := s.Relation(testCtx(t), spec, old, new); r != want || err != nil {
					t.Fatalf("%v %v, want %v", r, err, want)
				}
			}
			b.ref("refs/heads/main", ids[10])
			check("10")
			for i := 11; i < 15; i++ {
				b.ref("refs/heads/main", ids[i])
				check(fmt.Sprint(i))
				relation(ids[i-1], ids[i], Forward)
			}
			b.ref("refs/heads/main", ids[12])
			check("12")
			relation(ids[14], ids[12], Rewind)
			b.ref("refs/heads/main", ids[19])
			check("19")
			relation(ids[12], ids[19], Forward)
			files["n"] = "other"
			other := b.ref("refs/heads/main", b.commit(files, ids[9]))
			check("other")
			relation(ids[19], other, Diverged)
			b.run("", "tag", "-a", "-m", "one", "v1", ids[15])
			spec.Tag = "v1"
			check("15")
		})
	}
}

// A first fetch of a long history is shallow, and a second look costs nothing but the list of refs.
func TestFetchIsShallow(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	for i := range 30 {
		b.push(map[string]string{"n": fmt.Sprint(i)})
	}
	var requests []string
	url, ca := tlsServer(t, gitHTTP(b, &requests))
	spec := Spec{Name: "shop", URL: url + "/repo.git", Auth: Auth{Token: canary, CA: ca}}
	s := newStore(t, Limits{History: 3})
	mustPull(t, s, spec)
	loc, _ := spec.location()
	count := func() (n int) {
		objects := openObjects(filepath.Join(s.dir, "repos", loc.repoKey()))
		defer objects.Close()
		iter, err := objects.IterEncodedObjects(1)
		if err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := iter.Next(); err != nil {
				return n
			}
			n++
		}
	}
	if n := count(); n != 3 {
		t.Errorf("%d commits are here, want 3", n)
	}
	requests = nil
	mustPull(t, s, spec)
	if len(requests) != 1 || !strings.HasPrefix(requests[0], "GET ") {
		t.Errorf("a look without news asked %q", requests)
	}
}

func TestServerFaults(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	good := gitHTTP(b, nil)
	elsewhere, _ := tlsServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials went to another host")
		}
	}))
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		change  func(*Spec)
		reason  Reason
		text    string
	}{
		"wrong token":  {good.ServeHTTP, func(s *Spec) { s.Auth.Token = canary + "x" }, AuthFailed, "the server did not accept the user and token (status 401)"},
		"no token":     {good.ServeHTTP, func(s *Spec) { s.Auth.Token = "" }, AuthFailed, "the server wants credentials (status 401) and none are set"},
		"wrong user":   {good.ServeHTTP, func(s *Spec) { s.Auth.Username = "x" }, AuthFailed, "(status 401)"},
		"forbidden":    {func(w http.ResponseWriter, r *http.Request) { http.Error(w, canary, http.StatusForbidden) }, nil, AuthFailed, "(status 403)"},
		"not found":    {good.ServeHTTP, func(s *Spec) { s.URL += "-no" }, RepositoryNotFound, "no repository at this URL (status 404)"},
		"web page":     {func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>") }, nil, Unreachable, "not with the smart Git protocol"},
		"server error": {func(w http.ResponseWriter, r *http.Request) { http.Error(w, canary, 500) }, nil, Unreachable, "status 500"},
		"too often":    {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "", http.StatusTooManyRequests) }, nil, Unreachable, "Poll less often"},
		"unknown CA":   {good.ServeHTTP, func(s *Spec) { s.Auth.CA = "" }, Unreachable, "signed by nobody we know"},
		"bad CA":       {good.ServeHTTP, func(s *Spec) { s.Auth.CA = "x" }, InvalidSource, "holds no certificate"},
		"another host": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere+r.URL.RequestURI(), http.StatusMovedPermanently)
		}, nil, Unreachable, "set the source's URL to it"},
		"redirect loop": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.RequestURI(), http.StatusMovedPermanently)
		}, nil, Unreachable, "redirects in circles"},
		"endless refs":   {advertise(func(w io.Writer) { endless(w) }), nil, TooLarge, "the list of refs is larger than 64 MiB"},
		"cut refs":       {advertise(func(w io.Writer) { fmt.Fprint(w, "00ff") }), nil, Unreachable, "ended in the middle"},
		"ERR":            {advertise(func(w io.Writer) { pkt(w, "ERR Repository not found \x1b[31m") }), nil, RepositoryNotFound, "the server answered: Repository not found ?[31m"},
		"junk refs":      {advertise(func(w io.Writer) { fmt.Fprint(w, "000ahello\n0000") }), nil, Corrupt, "malformed line"},
		"sha256":         {advertise(func(w io.Writer) { pkt(w, strings.Repeat("a", 64)+" HEAD\x00 object-format=sha256\n") }), nil, InvalidSource, "SHA-256"},
		"pack is refs":   {packAnswer("0008NAK\n" + "0005\x01" + "0000"), nil, Corrupt, "the pack ends in the middle"},
		"error in band":  {packAnswer("0008NAK\n" + "0014\x03access denied!!"), nil, AuthFailed, "the server answered: access denied!!"},
		"junk for pack":  {packAnswer("zzzz"), nil, Unreachable, "not of the Git protocol"},
		"not our ref":    {packAnswer("0018ERR not our ref abc!"), nil, RefNotFound, "the next look takes the new tip"},
		"cut pack":       {packAnswer("0008NAK\n" + "0011\x01PACK\x00\x00\x00\x02\x00\x00\x00"), nil, Unreachable, "ended in the middle"},
		"corrupt object": {packAnswer("0008NAK\n" + string(band(packOf(1, packEntry(1, 3, nil, []byte("x y"))))) + "0000"), nil, Corrupt, "is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, ca := tlsServer(t, c.handler)
			spec := Spec{Name: "shop", URL: url + "/repo.git", Auth: Auth{Token: canary, CA: ca}}
			if c.change != nil {
				c.change(&spec)
			}
			_, err := pull(t, newStore(t, Limits{}), spec)
			if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v\nwant %s … %q", err, c.reason, c.text)
			}
			if err != nil && strings.Contains(err.Error(), canary) {
				t.Errorf("the error holds the token: %v", err)
			}
		})
	}
}

func pkt(w io.Writer, s string) { fmt.Fprintf(w, "%04x%s", len(s)+4, s) }

func band(b []byte) []byte { return fmt.Appendf(nil, "%04x\x01%s", len(b)+5, b) }

func endless(w io.Writer) {
	pkt(w, strings.Repeat("a", 40)+" HEAD\x00 shallow\n")
	for i := 0; ; i++ {
		s := strings.Repeat("a", 40) + fmt.Sprintf(" refs/heads/%d-%s\n", i, strings.Repeat("x", 60000))
		if _, err := fmt.Fprintf(w, "%04x%s", len(s)+4, s); err != nil {
			return
		}
	}
}

func advertise(write func(io.Writer)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
		pkt(w, "# service=git-upload-pack\n")
		fmt.Fprint(w, "0000")
		write(w)
	}
}

// packAnswer advertises one branch and answers the fetch with text.
func packAnswer(text string) http.HandlerFunc {
	ad := advertise(func(w io.Writer) {
		pkt(w, strings.Repeat("a", 40)+" HEAD\x00side-band-64k symref=HEAD:refs/heads/main\n")
		pkt(w, strings.Repeat("a", 40)+" refs/heads/main\n")
		fmt.Fprint(w, "0000")
	})
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			ad(w, r)
			return
		}
		fmt.Fprint(w, text)
	}
}

func TestRedirectInsideTheHostIsFollowed(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	good := gitHTTP(b, nil)
	url, ca := tlsServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/old.git") {
			http.Redirect(w, r, strings.Replace(r.URL.RequestURI(), "/old.git", "/repo.git", 1), http.StatusMovedPermanently)
			return
		}
		good.ServeHTTP(w, r)
	}))
	c := mustPull(t, newStore(t, Limits{}), Spec{Name: "shop", URL: url + "/old.git", Auth: Auth{Token: canary, CA: ca}})
	if readCheckout(t, c.Dir)["a"] != "1" {
		t.Error("not fetched")
	}
}

func TestCredentialsInTheURL(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	url, ca := tlsServer(t, gitHTTP(b, nil))
	spec := Spec{Name: "shop", URL: strings.Replace(url, "https://", "https://git:"+canary+"@", 1) + "/repo.git", Auth: Auth{CA: ca}}
	mustPull(t, newStore(t, Limits{}), spec)
	spec.Branch = "no"
	_, err := pull(t, newStore(t, Limits{}), spec)
	shown := fmt.Sprintf("%v %+v %#v %s %q %v", spec, spec, spec, spec, spec, err) + spec.Location() + Test(testCtx(t), spec).String()
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "spec", spec, "auth", spec.Auth, "error", err)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "spec", spec, "event", Event{Spec: spec, Err: err}, "auth", Auth{Token: canary, PrivateKey: canary, Passphrase: canary}, "error", err)
	shown += fmt.Sprintf("%v %+v %#v", spec.Auth, Auth{Token: canary}, []Auth{{Passphrase: canary}}) + log.String()
	if strings.Contains(shown, canary) {
		t.Errorf("the token is shown: %s", shown)
	}
}

func TestSSHFaults(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	srv, other := newSSH(t, b), newSSH(t, b)
	otherKey := knownhosts.Line([]string{srv.addr}, other.hostKey.PublicKey())
	for name, c := range map[string]struct {
		change func(*Spec)
		reason Reason
		text   string
	}{
		"unknown host": {func(s *Spec) { s.Auth.KnownHosts = "example.com " + strings.SplitN(otherKey, " ", 2)[1] }, HostKeyUnknown, "then add the line: [127.0.0.1]:"},
		"other key":    {func(s *Spec) { s.Auth.KnownHosts = otherKey }, HostKeyMismatch, "shows another host key (ssh-ed25519 SHA256:"},
		"revoked":      {func(s *Spec) { s.Auth.KnownHosts = "@revoked " + s.Auth.KnownHosts }, HostKeyMismatch, "marked as revoked"},
		"bad file":     {func(s *Spec) { s.Auth.KnownHosts = "nonsense" }, InvalidSource, "known_hosts can't be read"},
		"no key":       {func(s *Spec) { s.Auth.PrivateKey = "" }, AuthFailed, "no private key is set"},
		"bad key":      {func(s *Spec) { s.Auth.PrivateKey = canary }, AuthFailed, "the private key can't be read"},
		"wrong key":    {func(s *Spec) { s.Auth.PrivateKey = other.userKey }, AuthFailed, "does not accept the key for user git"},
		"wrong user":   {func(s *Spec) { s.URL = strings.Replace(s.URL, "git@", "ann@", 1) }, AuthFailed, "for user ann"},
		"no such repo": {func(s *Spec) { s.URL += "-no" }, RepositoryNotFound, "does not appear to be a git repository"},
		"no server": {func(s *Spec) {
			s.URL = "ssh://127.0.0.1:1/x"
			s.Auth.KnownHosts = knownhosts.Line([]string{"127.0.0.1:1"}, srv.hostKey.PublicKey())
		}, Unreachable, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := srv.spec(b)
			c.change(&spec)
			_, err := pull(t, newStore(t, Limits{}), spec)
			if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v\nwant %s … %q", err, c.reason, c.text)
			}
			if err != nil && strings.Contains(err.Error(), canary) {
				t.Errorf("the error holds the key: %v", err)
			}
		})
	}
}

func TestPassphrase(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKeyWithPassphrase(priv, "", []byte(canary))
	if err != nil {
		t.Fatal(err)
	}
	key := string(pem.EncodeToMemory(block))
	if _, err := parseKey(Auth{PrivateKey: key, Passphrase: canary}); err != nil {
		t.Error(err)
	}
	for pass, text := range map[string]string{"": "is locked with a passphrase", "wrong": "can't be opened with this passphrase"} {
		spec := Spec{Name: "x", URL: "git@127.0.0.1:" + b.Dir, Auth: Auth{PrivateKey: key, Passphrase: pass}}
		if _, err := pull(t, newStore(t, Limits{}), spec); !errors.Is(err, AuthFailed) || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", pass, err)
		}
	}
}

// A server that accepts and then says nothing is left when the context ends.
func TestSilentServers(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	accepted := make(chan net.Conn, 8)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	b := newRepo(t)
	srv := newSSH(t, b)
	for _, spec := range []Spec{
		{Name: "h", URL: "http://" + l.Addr().String() + "/x"},
		{Name: "s", URL: "ssh://" + l.Addr().String() + "/x", Auth: Auth{PrivateKey: srv.userKey, KnownHosts: knownhosts.Line([]string{l.Addr().String()}, srv.hostKey.PublicKey())}},
	} {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			_, err := newStore(t, Limits{}).Resolve(ctx, spec)
			done <- err
		}()
		conn := <-accepted
		cancel()
		if err := <-done; !errors.Is(err, TimedOut) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", spec.Name, err)
		}
		conn.Close()
	}
}

func TestSourceTest(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"deploy/x": "1"})
	url, ca := tlsServer(t, gitHTTP(b, nil))
	base := Spec{Name: "shop", URL: url + "/repo.git", Path: "deploy", Auth: Auth{Token: canary, CA: ca}}
	for name, c := range map[string]struct {
		change func(*Spec)
		steps  string
	}{
		"good":        {func(*Spec) {}, "url credentials server ref commit signature path"},
		"url":         {func(s *Spec) { s.URL = "-x" }, "!url"},
		"credentials": {func(s *Spec) { s.Auth.Token = "x" }, "url !credentials"},
		"ca":          {func(s *Spec) { s.Auth.CA = "x" }, "url !credentials"},
		"server":      {func(s *Spec) { s.URL += "x" }, "url !server"},
		"local":       {func(s *Spec) { s.URL = "/nowhere" }, "url !server"},
		"ref":         {func(s *Spec) { s.Branch = "x" }, "url credentials server !ref"},
		"path":        {func(s *Spec) { s.Path = "x" }, "url credentials server ref commit signature !path"},
		"signature": {func(s *Spec) {
			s.Verify = Verify{Mode: VerifySSH, AllowedSigners: "a@b " + string(ssh.MarshalAuthorizedKey(newSSH(t, b).hostKey.PublicKey()))}
		}, "url credentials server ref commit !signature"},
	} {
		spec := base
		c.change(&spec)
		rep := Test(testCtx(t), spec)
		var got []string
		for _, s := range rep.Steps {
			mark := ""
			if !s.OK {
				mark = "!"
			}
			got = append(got, mark+s.Name)
		}
		if strings.Join(got, " ") != c.steps || rep.OK() == strings.Contains(c.steps, "!") {
			t.Errorf("%s: %s\n%s", name, got, rep)
		}
		if strings.Contains(rep.String(), canary) {
			t.Errorf("%s: the token is shown", name)
		}
	}
}

func FuzzAdvert(f *testing.F) {
	f.Add([]byte("001e# service=git-upload-pack\n0000"), true)
	f.Add([]byte("003e"+strings.Repeat("a", 40)+" HEAD\x00 symref=HEAD:x0000"), false)
	f.Fuzz(func(t *testing.T, raw []byte, service bool) {
		a, _, err := readAdvert(strings.NewReader(string(raw)), service)
		if err != nil {
			return
		}
		for name, id := range a.refs {
			if !isHexID(id) || name != "HEAD" && (!strings.HasPrefix(name, "refs/") || badRefName(name) != "") {
				t.Errorf("ref %q at %q", name, id)
			}
		}
	})
}

// A server with keys of several kinds is known by any of them.
func TestSSHServerWithTwoHostKeys(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	second, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	srv := newSSH(t, b, second)
	for _, key := range []ssh.Signer{srv.hostKey, second} {
		spec := srv.spec(b)
		spec.Auth.KnownHosts = knownhosts.Line([]string{srv.addr}, key.PublicKey())
		if c, err := pull(t, newStore(t, Limits{}), spec); err != nil || readCheckout(t, c.Dir)["a"] != "1" {
			t.Errorf("known by %s: %v", key.PublicKey().Type(), err)
		}
	}
}
