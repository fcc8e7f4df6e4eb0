package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/cluster"
	"github.com/gitopsd/gitopsd/fixtures/repo"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

const hookKey = "0123456789abcdef0123456789abcdef"

// What is wrong with the webhook's flags is told before anything runs.
func TestWebhookFlags(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", hookKey+"\n", 0o600)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, c := range []struct{ addr, secret, want string }{
		{"", "", ""},
		{"127.0.0.1:0", good, ""},
		{"", good, "no use without --webhook"},
		{"127.0.0.1:0", "", "needs --webhook-secret-file"},
		{"127.0.0.1:0", filepath.Join(dir, "missing"), "no such file"},
		{"127.0.0.1:0", file("empty", " \n", 0o600), "is empty"},
		{"127.0.0.1:0", file("short", "secret", 0o600), "fewer than 16 characters"},
		{"127.0.0.1:0", file("open", hookKey, 0o640), "mode 0640): chmod 600 "},
		{"nowhere", good, "--webhook nowhere: "},
		{taken.Addr().String(), good, "address already in use"},
	} {
		src, err := newSources(filepath.Join(t.TempDir(), "git"), "", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		hook, err := (&options{hookAddr: c.addr, hookSecret: c.secret}).webhook(src, slog.New(slog.DiscardHandler))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("--webhook %q --webhook-secret-file %q: %v, want %q", c.addr, c.secret, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), hookKey) {
			t.Errorf("the secret is told: %v", err)
		}
		hook.Close()
		src.store.Close()
	}
}

// port is a webhook on loopback, before a source whose looks wait until the test lets them go on.
type port struct {
	*webhook
	url   string
	looks chan struct{} // one for each look that began
	pass  chan struct{} // one lets a look end
}

func openPort(t *testing.T, change func(*http.Server)) *port {
	t.Helper()
	dir := t.TempDir()
	r := repo.New(t, filepath.Join(dir, "shop.git"))
	r.Commit("begin", repo.Files{"shop/compose.yaml": "services: {web: {image: web}}\n"})
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte(hookKey), 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := newSources(filepath.Join(dir, "git"), "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	hook, err := (&options{hookAddr: "127.0.0.1:0", hookSecret: secret}).webhook(src, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(hook.server)
	}
	if err := src.Follow([]cluster.Source{{Source: state.Source{Name: "shop", URL: r.Dir(), Interval: manifest.Duration(time.Hour)}}}); err != nil {
		t.Fatal(err)
	}
	p := &port{webhook: hook, url: "http://" + hook.listener.Addr().String() + "/hooks/git", looks: make(chan struct{}, 1000), pass: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := hook.Run(ctx); err != nil {
			t.Errorf("webhook: %v", err)
		}
	})
	wg.Go(func() {
		_ = src.Run(ctx, func(ctx context.Context, _ cluster.Tip) error {
			p.looks <- struct{}{}
			select {
			case <-p.pass:
			case <-ctx.Done():
			}
			return nil
		})
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		src.store.Close()
	})
	return p
}

// send sends a push, signed with a key, and returns the status of the answer.
func (p *port) send(client *http.Client, key string) (int, error) {
	return p.post(client, key, strings.NewReader(push), int64(len(push)))
}

// post sends a body of a length, -1 = that is not said, with the signature of a push.
func (p *port) post(client *http.Client, key string, body io.Reader, length int64) (int, error) {
	req, err := http.NewRequest(http.MethodPost, p.url, body)
	if err != nil {
		return 0, err
	}
	m := hmac.New(sha256.New, []byte(key))
	_, _ = io.WriteString(m, push)
	req.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(m.Sum(nil)))
	req.ContentLength = length
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Body.Close()
}

const push = `{"zen":"no repository named: all sources are looked at"}`

// A flood of requests, signed and not, is one look that runs and one that waits; nothing of it is left when it is over, and the next push is heard.
func TestWebhookFlood(t *testing.T) {
	p := openPort(t, nil)
	<-p.looks // the first one, at the start; it does not end yet
	before := runtime.NumGoroutine()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 20}}
	var accepted, refused, limited, other atomic.Int32
	var wg sync.WaitGroup
	for worker := range 20 {
		wg.Go(func() {
			for range 50 {
				code, err := p.send(client, []string{hookKey, "not the key"}[worker%2])
				switch {
				case err != nil:
					t.Error(err)
				case code == http.StatusAccepted:
					accepted.Add(1)
				case code == http.StatusUnauthorized:
					refused.Add(1)
				case code == http.StatusTooManyRequests:
					limited.Add(1)
				default:
					other.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if other.Load() > 0 || accepted.Load() == 0 || refused.Load() != 500 || limited.Load() == 0 {
		t.Errorf("of 1000 requests %d were accepted, %d refused, %d too many, %d answered otherwise", accepted.Load(), refused.Load(), limited.Load(), other.Load())
	}
	client.CloseIdleConnections()
	settled(t, "the goroutines of the flood end", func() bool { return runtime.NumGoroutine() <= before && p.open.Load() == 0 })
	p.pass <- struct{}{}
	<-p.looks // all that was accepted
	p.pass <- struct{}{}
	select {
	case <-p.looks:
		t.Error("the flood is more than one look")
	case <-time.After(300 * time.Millisecond):
	}
	settled(t, "a push is heard after the flood", func() bool {
		code, err := p.send(client, hookKey)
		return err == nil && code == http.StatusAccepted
	})
	<-p.looks
	client.CloseIdleConnections()
}

// Senders that never come to an end, more than the port takes, are dropped when their time is up, and hold no push up after that.
func TestWebhookSlowSenders(t *testing.T) {
	p := openPort(t, func(s *http.Server) { s.ReadTimeout = 300 * time.Millisecond })
	<-p.looks
	var wg sync.WaitGroup
	for n := range hookConns + 50 {
		conn, err := net.Dial("tcp", p.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer conn.Close()
			_, _ = fmt.Fprintf(conn, "POST /hooks/git HTTP/1.1\r\nHost: x\r\nX-Slow-%d: ", n)
			_, _ = io.Copy(io.Discard, conn) // until the port gives it up
		})
	}
	wg.Wait()
	settled(t, "all connections are given back", func() bool { return p.open.Load() == 0 })
	if code, err := p.send(http.DefaultClient, hookKey); err != nil || code != http.StatusAccepted {
		t.Errorf("a push after that: %d, %v", code, err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// zeros has no end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A body of 100 MB is refused whether or not its length is said, without being kept.
func TestWebhookHugeBody(t *testing.T) {
	p := openPort(t, nil)
	<-p.looks
	const size = 100 << 20
	for _, length := range []int64{size, -1} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		code, err := p.post(http.DefaultClient, hookKey, io.LimitReader(zeros{}, size), length)
		// A client that still writes when the answer comes may see only that the connection is gone.
		if err == nil && code != http.StatusRequestEntityTooLarge {
			t.Errorf("announced length %d: status %d", length, code)
		}
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 20<<20 {
			t.Errorf("announced length %d: it took %d MB", length, used>>20)
		}
	}
	select {
	case <-p.looks:
		t.Error("a refused body is a look")
	default:
	}
	http.DefaultClient.CloseIdleConnections()
}

func settled(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
