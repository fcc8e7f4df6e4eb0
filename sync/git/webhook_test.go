package git

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

const hookSecret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

func sign(key, text string) []byte {
	m := hmac.New(sha256.New, []byte(key))
	m.Write([]byte(text))
	return m.Sum(nil)
}

type hookTest struct {
	*Webhook
	now   time.Time
	calls []func(Spec) bool
}

func newHook(t *testing.T) *hookTest {
	t.Helper()
	h := &hookTest{now: time.Unix(1_700_000_000, 0)}
	var err error
	h.Webhook, err = NewWebhook(WebhookConfig{Secret: hookSecret, Now: func() time.Time { return h.now },
		Trigger: func(match func(Spec) bool) int { h.calls = append(h.calls, match); return 1 }})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *hookTest) send(method, body string, head ...string) int {
	r := httptest.NewRequest(method, "/hooks/git", strings.NewReader(body))
	for i := 0; i+1 < len(head); i += 2 {
		r.Header.Add(head[i], head[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code
}

func TestWebhookSignatures(t *testing.T) {
	t.Parallel()
	body := `{"repository":{"clone_url":"https://forge.example/team/shop.git"}}`
	sum := hex.EncodeToString(sign(hookSecret, body))
	key, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(hookSecret, "whsec_"))
	standard := func(stamp string) string {
		return "v1," + base64.StdEncoding.EncodeToString(sign(string(key), "id1."+stamp+"."+body))
	}
	for name, c := range map[string]struct {
		head []string
		code int
	}{
		"github":               {[]string{"X-Hub-Signature-256", "sha256=" + sum}, 202},
		"gitea":                {[]string{"X-Gitea-Signature", sum}, 202},
		"forgejo":              {[]string{"X-Forgejo-Signature", sum, "X-Gitea-Signature", sum, "X-Hub-Signature-256", "sha256=" + sum}, 202},
		"gitlab token":         {[]string{"X-Gitlab-Token", hookSecret}, 202},
		"gitlab signed":        {[]string{"Webhook-Id", "id1", "Webhook-Timestamp", "1700000100", "Webhook-Signature", "v1,AAAA " + standard("1700000100")}, 202},
		"none":                 {nil, 401},
		"empty":                {[]string{"X-Hub-Signature-256", ""}, 401},
		"without prefix":       {[]string{"X-Hub-Signature-256", sum}, 401},
		"sha1 only":            {[]string{"X-Hub-Signature", "sha1=" + sum}, 401},
		"short":                {[]string{"X-Hub-Signature-256", "sha256=" + sum[:8]}, 401},
		"other body":           {[]string{"X-Gitea-Signature", hex.EncodeToString(sign(hookSecret, body+" "))}, 401},
		"other secret":         {[]string{"X-Gitea-Signature", hex.EncodeToString(sign("x", body))}, 401},
		"not hex":              {[]string{"X-Gitea-Signature", "zz"}, 401},
		"twice":                {[]string{"X-Gitea-Signature", sum, "X-Gitea-Signature", sum}, 401},
		"one right, one wrong": {[]string{"X-Gitea-Signature", sum, "X-Hub-Signature-256", "sha256=00"}, 401},
		"wrong token":          {[]string{"X-Gitlab-Token", hookSecret + "x"}, 401},
		"old stamp":            {[]string{"Webhook-Id", "id1", "Webhook-Timestamp", "1699990000", "Webhook-Signature", standard("1699990000")}, 401},
		"other stamp":          {[]string{"Webhook-Id", "id1", "Webhook-Timestamp", "1700000001", "Webhook-Signature", standard("1700000000")}, 401},
		"no id":                {[]string{"Webhook-Timestamp", "1700000000", "Webhook-Signature", standard("1700000000")}, 401},
	} {
		h := newHook(t)
		if code := h.send("POST", body, c.head...); code != c.code || (len(h.calls) == 1) != (c.code == 202) {
			t.Errorf("%s: %d with %d triggers, want %d", name, code, len(h.calls), c.code)
		}
	}
}

func TestWebhookMatchesSources(t *testing.T) {
	t.Parallel()
	shop := Spec{Name: "shop", URL: "git@forge.example:team/shop.git"}
	other := Spec{Name: "other", URL: "https://forge.example/team/other"}
	for name, c := range map[string]struct {
		body, kind string
		all        bool
		shop       bool
	}{
		"github":         {`{"ref":"refs/heads/main","repository":{"html_url":"https://forge.example/Team/Shop"}}`, "", false, true},
		"github form":    {"payload=" + url.QueryEscape(`{"repository":{"clone_url":"https://forge.example/team/shop.git"}}`), "application/x-www-form-urlencoded", false, true},
		"gitlab":         {`{"project":{"git_http_url":"https://inside.example/team/shop.git"}}`, "", false, true},
		"other":          {`{"repository":{"ssh_url":"git@forge.example:team/none.git"}}`, "", false, false},
		"not JSON":       {"hello", "", true, false},
		"empty":          {"", "", true, false},
		"wrong types":    {`{"repository":[1,2]}`, "", true, false},
		"missing fields": {`{"repository":{}}`, "", true, false},
		"null":           {`null`, "", true, false},
		"deep":           {strings.Repeat(`{"repository":`, 5000) + "1" + strings.Repeat("}", 5000), "", true, false},
		"odd URL":        {`{"repository":{"clone_url":"--upload-pack=x"}}`, "", true, false},
	} {
		h := newHook(t)
		if code := h.send("POST", c.body, "X-Gitea-Signature", hex.EncodeToString(sign(hookSecret, c.body)), "Content-Type", c.kind); code != 202 {
			t.Errorf("%s: %d", name, code)
			continue
		}
		match := h.calls[0]
		if (match == nil) != c.all {
			t.Errorf("%s: triggers all: %v", name, match == nil)
		} else if match != nil && (match(shop) != c.shop || match(other)) {
			t.Errorf("%s: shop %v, other %v", name, match(shop), match(other))
		}
	}
}

func TestWebhookBounds(t *testing.T) {
	t.Parallel()
	h := newHook(t)
	for _, method := range []string{"GET", "PUT", "HEAD", "DELETE"} {
		if code := h.send(method, ""); code != 405 {
			t.Errorf("%s: %d", method, code)
		}
	}
	if code := h.send("POST", strings.Repeat("x", maxHookBody+1), "X-Gitlab-Token", hookSecret); code != 413 {
		t.Errorf("large body: %d", code)
	}
	codes := map[int]int{}
	for range 1000 {
		codes[h.send("POST", "{}", "X-Gitlab-Token", hookSecret)]++
	}
	if codes[202] == 0 || codes[202] > hookBurst || codes[429] != 1000-codes[202] {
		t.Errorf("a flood is answered with %v", codes)
	}
	h.now = h.now.Add(10 * time.Second)
	for range 1000 { // strangers use nothing up
		if code := h.send("POST", "{}"); code != 401 {
			t.Fatalf("unsigned: %d", code)
		}
		if code := h.send("POST", "{}", "X-Gitlab-Token", "another secret"); code != 401 {
			t.Fatalf("badly signed: %d", code)
		}
	}
	if code := h.send("POST", "{}", "X-Gitlab-Token", hookSecret); code != 202 {
		t.Errorf("after a pause: %d", code)
	}
	if _, err := NewWebhook(WebhookConfig{Secret: "short"}); err == nil {
		t.Error("a short secret is accepted")
	}
}

// A body whose length is not announced is cut at the limit as well.
func TestWebhookEndlessBody(t *testing.T) {
	t.Parallel()
	h := newHook(t)
	srv := httptest.NewServer(h)
	defer srv.Close()
	conn, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nX-Gitlab-Token: %s\r\n\r\n", hookSecret)
	go func() {
		chunk := fmt.Sprintf("10000\r\n%s\r\n", strings.Repeat("x", 0x10000))
		for {
			if _, err := conn.Write([]byte(chunk)); err != nil {
				return
			}
		}
	}()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 413 {
		t.Errorf("status %d", res.StatusCode)
	}
}

// Bodies that don't come to an end are read a bounded number at a time, and one without a signature is not read at all.
func TestWebhookManyBodies(t *testing.T) {
	t.Parallel()
	h := newHook(t)
	var wg sync.WaitGroup
	reading, end := make(chan struct{}), make(chan struct{})
	for range hookBodies {
		wg.Go(func() {
			r := httptest.NewRequest("POST", "/", &stuckBody{reading: reading, end: end})
			r.Header.Set(headGitea, "00")
			h.ServeHTTP(httptest.NewRecorder(), r)
		})
	}
	for range hookBodies {
		<-reading
	}
	if code := h.send("POST", "{}", headGitea, "00"); code != 429 {
		t.Errorf("one body more: %d", code)
	}
	if code := h.send("POST", "{}"); code != 401 {
		t.Errorf("without a signature: %d", code)
	}
	close(end)
	wg.Wait()
	if code := h.send("POST", "{}", headGitLabToken, hookSecret); code != 202 {
		t.Errorf("after them: %d", code)
	}
}

// stuckBody says that it is read, and ends when it is told.
type stuckBody struct {
	reading chan<- struct{}
	end     <-chan struct{}
}

func (b *stuckBody) Read([]byte) (int, error) {
	b.reading <- struct{}{}
	<-b.end
	return 0, io.EOF
}

func FuzzWebhookPayload(f *testing.F) {
	f.Add("application/json", []byte(`{"repository":{"clone_url":"https://forge.example/team/shop.git"}}`))
	f.Add("application/x-www-form-urlencoded", []byte(`payload=%7B%7D`))
	f.Add("", []byte(`{"project":{"web_url":"\u0000"}}`))
	f.Fuzz(func(t *testing.T, kind string, body []byte) {
		for _, p := range payloadPaths(kind, body) {
			if p == "" || strings.HasPrefix(p, "/") || strings.Contains(p, "..") && strings.Contains("/"+p+"/", "/../") {
				t.Errorf("path %q", p)
			}
		}
	})
}

// A sender that stops in the middle of its body does not keep the connection.
func TestWebhookSlowBody(t *testing.T) {
	t.Parallel()
	h := newHook(t)
	h.readTime = 20 * time.Millisecond
	srv := httptest.NewServer(h)
	defer srv.Close()
	conn, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nX-Gitlab-Token: %s\r\n\r\n{", hookSecret)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 400 || len(h.calls) != 0 {
		t.Errorf("status %d, %d triggers", res.StatusCode, len(h.calls))
	}
}
