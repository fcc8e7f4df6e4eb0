package git

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// WebhookConfig configures a webhook handler.
type WebhookConfig struct {
	// Secret is shared with the forge; it must have 16 characters or more. For GitLab it is either
	// the secret token or the signing token (whsec_…); for the others it is the webhook's secret.
	Secret string
	// Trigger asks for an early look at the sources that match: Watcher.Trigger.
	Trigger func(match func(Spec) bool) int
	Now     func() time.Time // nil: time.Now
	Logger  *slog.Logger     // nil: silent
}

const (
	maxHookBody   = 1 << 20
	hookReadTime  = 10 * time.Second
	hookBodies    = 64              // that are read at once: they are the memory that strangers can take
	hookPerSecond = 5.0             // requests that are accepted, on average
	hookBurst     = 50.0            // and at once
	hookClockSkew = 5 * time.Minute // of the time stamp in a signed GitLab request, as Standard Webhooks asks
)

// Webhook answers POST requests of a forge: it checks that the request comes from whoever holds the
// secret, and asks for an early look at the sources whose repository the request names. Nothing of
// the request is used for more than that: what is fetched comes from the source's own URL. A replayed
// request therefore costs one look, and the number of looks is bounded.
//
// It answers 202 when the signature holds, whether or not a source matched, because what sources there
// are is no business of the sender; 401 for a missing or wrong signature, 405 for another method, 413
// for a body over 1 MiB, 429 when asked too often, 400 when the body can't be read in time. Only what is
// signed counts for how often: nobody else can use that up.
type Webhook struct {
	conf     WebhookConfig
	readTime time.Duration
	bodies   chan struct{} // holds one for each body that is being read

	mu       sync.Mutex
	accepted bucket
	warnings bucket // of refused requests
}

// bucket holds tokens, and fills at a steady rate.
type bucket struct {
	tokens float64
	last   time.Time
}

// NewWebhook returns a handler. It fails when the secret is too short to be one.
func NewWebhook(c WebhookConfig) (*Webhook, error) {
	if len(c.Secret) < 16 {
		return nil, fail(InvalidSource, "the webhook's secret has fewer than 16 characters", "make one with: openssl rand -hex 32")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	full := bucket{hookBurst, c.Now()}
	return &Webhook{conf: c, readTime: hookReadTime, bodies: make(chan struct{}, hookBodies), accepted: full, warnings: full}, nil
}

// ServeHTTP implements http.Handler.
func (h *Webhook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(code int, text string) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, text+"\n")
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		answer(http.StatusMethodNotAllowed, "use POST")
		return
	}
	tooMany := func() {
		w.Header().Set("Retry-After", "1")
		answer(http.StatusTooManyRequests, "too many requests")
	}
	refuse := func() {
		if h.take(&h.warnings) {
			h.conf.Logger.Warn("webhook refused: no valid signature", "remote", r.RemoteAddr)
		}
		answer(http.StatusUnauthorized, "the signature is missing or wrong")
	}
	if !slices.ContainsFunc(signatures, func(name string) bool { return r.Header.Get(name) != "" }) {
		w.Header().Set("Connection", "close") // whatever its body is
		refuse()
		return
	}
	if r.ContentLength > maxHookBody {
		w.Header().Set("Connection", "close")
		answer(http.StatusRequestEntityTooLarge, "the body is larger than 1 MiB")
		return
	}
	select {
	case h.bodies <- struct{}{}:
		defer func() { <-h.bodies }()
	default:
		w.Header().Set("Connection", "close")
		tooMany()
		return
	}
	// A sender that dribbles holds a connection for ten seconds and no longer. Test recorders and
	// some wrappers have no deadlines; the server's own limits hold then.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(h.readTime))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxHookBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		answer(http.StatusRequestEntityTooLarge, "the body is larger than 1 MiB")
		return
	case err != nil:
		answer(http.StatusBadRequest, "the body could not be read")
		return
	}
	sender, ok := h.authentic(r.Header, body)
	if !ok {
		refuse()
		return
	}
	if !h.take(&h.accepted) {
		tooMany()
		return
	}
	paths := payloadPaths(r.Header.Get("Content-Type"), body)
	match := func(s Spec) bool { return matchesAny(s, paths) }
	if len(paths) == 0 {
		match = nil // signed, but of a form that we can't read: look at everything
	}
	n := h.conf.Trigger(match)
	h.conf.Logger.Info("webhook accepted", "sender", sender, "sources", n)
	answer(http.StatusAccepted, "accepted")
}

// take takes one token of a bucket, if it has one.
func (h *Webhook) take(b *bucket) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.conf.Now()
	if passed := now.Sub(b.last); passed > 0 {
		b.tokens = min(hookBurst, b.tokens+passed.Seconds()*hookPerSecond)
		b.last = now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// The headers in which forges sign.
const (
	headGitHub      = "X-Hub-Signature-256"
	headGitea       = "X-Gitea-Signature"
	headForgejo     = "X-Forgejo-Signature"
	headGitLabToken = "X-Gitlab-Token"
	headStandard    = "Webhook-Signature"
)

var signatures = []string{headGitHub, headGitea, headForgejo, headGitLabToken, headStandard}

// authentic checks the one header that the sender uses. A request with several signatures must have
// each of them right: a proxy that adds headers must not be a way around.
func (h *Webhook) authentic(head http.Header, body []byte) (sender string, ok bool) {
	mac := hmac.New(sha256.New, []byte(h.conf.Secret))
	mac.Write(body)
	sum := mac.Sum(nil)
	for _, form := range []struct {
		header, sender string
		check          func(value string) bool
	}{
		// docs.github.com: validating webhook deliveries. Gitea and Forgejo send it too.
		{headGitHub, "github", func(v string) bool {
			v, ok := strings.CutPrefix(v, "sha256=")
			return ok && sameHex(v, sum)
		}},
		// The Gitea and Forgejo documentation of webhooks: the plain hex digest.
		{headGitea, "gitea", func(v string) bool { return sameHex(v, sum) }},
		{headForgejo, "forgejo", func(v string) bool { return sameHex(v, sum) }},
		// GitLab's secret token is sent as it is. The digests make the comparison independent of its length.
		{headGitLabToken, "gitlab", func(v string) bool {
			a, b := sha256.Sum256([]byte(v)), sha256.Sum256([]byte(h.conf.Secret))
			return subtle.ConstantTimeCompare(a[:], b[:]) == 1
		}},
		// GitLab's signing token follows Standard Webhooks: HMAC over id.timestamp.body.
		{headStandard, "gitlab", func(v string) bool { return h.standard(head, v, body) }},
	} {
		values := head.Values(form.header)
		if len(values) == 0 {
			continue
		}
		if len(values) > 1 || !form.check(values[0]) {
			return "", false
		}
		if !ok {
			sender = form.sender
		}
		ok = true
	}
	return sender, ok
}

func sameHex(v string, sum []byte) bool {
	got, err := hex.DecodeString(strings.TrimSpace(v))
	return err == nil && hmac.Equal(got, sum)
}

// standard checks a signature of the Standard Webhooks form. The header can list several, for a key
// that is being replaced; one of them must fit.
func (h *Webhook) standard(head http.Header, value string, body []byte) bool {
	key := []byte(h.conf.Secret)
	if enc, ok := strings.CutPrefix(h.conf.Secret, "whsec_"); ok {
		dec, err := base64.StdEncoding.DecodeString(enc)
		if err != nil {
			return false
		}
		key = dec
	}
	id, stamp := head.Get("Webhook-Id"), head.Get("Webhook-Timestamp")
	sec, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || id == "" || h.conf.Now().Sub(time.Unix(sec, 0)).Abs() > hookClockSkew {
		return false
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + stamp + "."))
	mac.Write(body)
	sum := mac.Sum(nil)
	good := false
	for _, part := range strings.Fields(value) {
		if enc, ok := strings.CutPrefix(part, "v1,"); ok {
			got, err := base64.StdEncoding.DecodeString(enc)
			good = err == nil && hmac.Equal(got, sum) || good
		}
	}
	return good
}

// payloadPaths returns the paths by which a push payload names its repository, in the fields of
// GitHub, GitLab, Gitea and Forgejo. An empty result means that it could not be told.
func payloadPaths(contentType string, body []byte) []string {
	if strings.HasPrefix(contentType, "application/x-www-form-urlencoded") {
		form, err := url.ParseQuery(string(body)) // GitHub's other form: the JSON in a field
		if err != nil {
			return nil
		}
		body = []byte(form.Get("payload"))
	}
	if tooDeep(body, 64) {
		return nil
	}
	type addresses struct {
		CloneURL   string `json:"clone_url"`
		SSHURL     string `json:"ssh_url"`
		HTMLURL    string `json:"html_url"`
		GitURL     string `json:"git_url"`
		URL        string `json:"url"`
		GitHTTPURL string `json:"git_http_url"`
		GitSSHURL  string `json:"git_ssh_url"`
		WebURL     string `json:"web_url"`
		HTTPURL    string `json:"http_url"`
		Homepage   string `json:"homepage"`
	}
	var payload struct {
		Repository addresses `json:"repository"`
		Project    addresses `json:"project"`
	}
	if err := json.Unmarshal(body, &payload); err != nil {
		return nil
	}
	var paths []string
	for _, a := range []addresses{payload.Repository, payload.Project} {
		for _, u := range []string{a.CloneURL, a.SSHURL, a.HTMLURL, a.GitURL, a.URL, a.GitHTTPURL, a.GitSSHURL, a.WebURL, a.HTTPURL, a.Homepage} {
			if p := repoPath(u); p != "" {
				paths = append(paths, p)
			}
		}
	}
	return paths
}

// tooDeep says whether JSON nests deeper than max. The decoder recurses.
func tooDeep(b []byte, max int) bool {
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > max {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// repoPath reduces the address of a repository to its path, so that its https and ssh forms are the
// same; "" if it is not such an address.
func repoPath(raw string) string {
	l, err := parseURL(raw)
	if err != nil || l.scheme == schemeLocal {
		return ""
	}
	return strings.ToLower(strings.Trim(strings.TrimSuffix(l.path, ".git"), "/"))
}

// matchesAny compares the paths and not the hosts: a forge can be known by another name inside a
// network. The price of a match too many is one look.
func matchesAny(s Spec, paths []string) bool {
	return slices.Contains(paths, repoPath(s.URL))
}
