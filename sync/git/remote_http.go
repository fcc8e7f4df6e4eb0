package git

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// httpRemote speaks the smart HTTP protocol.
type httpRemote struct {
	base           *url.URL
	user, password string
	client         *http.Client
	transport      *http.Transport
	limits         Limits
	advert         *advert
}

func openHTTP(spec Spec, l location, limits Limits) (*httpRemote, error) {
	base, err := url.Parse(l.String())
	if err != nil {
		return nil, fail(InvalidSource, "the URL can't be parsed", urlForms)
	}
	r := &httpRemote{base: base, user: l.user, password: l.password, limits: limits}
	if spec.Auth.Token != "" {
		r.user, r.password = spec.Auth.Username, spec.Auth.Token
	}
	if r.user == "" && r.password != "" {
		r.user = "git"
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if spec.Auth.CA != "" {
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			conf.RootCAs = x509.NewCertPool()
		}
		if !conf.RootCAs.AppendCertsFromPEM([]byte(spec.Auth.CA)) {
			return nil, fail(InvalidSource, "the CA setting holds no certificate in PEM form", "give the text between and including the BEGIN and END CERTIFICATE lines")
		}
	}
	// One transport per conversation: a poll every 30 seconds gains little from a kept connection,
	// and nothing stays open between polls.
	r.transport = &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 15 * time.Second}).DialContext,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    15 * time.Second,
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: 256 << 10,
	}
	r.client = &http.Client{Transport: r.transport, CheckRedirect: r.checkRedirect}
	return r, nil
}

func (r *httpRemote) close() { r.transport.CloseIdleConnections() }

// checkRedirect follows redirects of the first request inside the same origin only. A renamed
// repository is such a one. Following further would send credentials, or trust, where nobody pointed.
func (r *httpRemote) checkRedirect(req *http.Request, via []*http.Request) error {
	to := (&url.URL{Scheme: req.URL.Scheme, Host: req.URL.Host, Path: strings.TrimSuffix(req.URL.Path, "/info/refs")}).String()
	switch {
	case via[0].Method != http.MethodGet:
		return fail(Unreachable, "the server sends the fetch elsewhere, to "+printable(to, 200), "set the source's URL to the right place")
	case req.URL.Scheme != r.base.Scheme || !strings.EqualFold(req.URL.Host, r.base.Host):
		return fail(Unreachable, "the server sends us to another place, "+printable(to, 200), "if that is right, set the source's URL to it")
	case len(via) >= 5:
		return fail(Unreachable, "the server redirects in circles", "check the URL")
	}
	return nil
}

func (r *httpRemote) request(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	var rd io.Reader
	if body != nil {
		rd = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, r.base.String()+path, rd)
	if err != nil {
		return nil, fail(InvalidSource, "the URL can't be used for a request", urlForms)
	}
	req.Header.Set("User-Agent", agentName)
	if body != nil {
		req.Header.Set("Content-Type", "application/x-git-upload-pack-request")
		req.Header.Set("Accept", "application/x-git-upload-pack-result")
	}
	if r.user != "" || r.password != "" {
		req.SetBasicAuth(r.user, r.password)
	}
	res, err := r.client.Do(req)
	if err != nil {
		return nil, httpError(err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	return nil, r.statusError(res.StatusCode)
}

func (r *httpRemote) statusError(code int) error {
	given := r.user != "" || r.password != ""
	switch code {
	case http.StatusUnauthorized, http.StatusForbidden:
		if !given {
			return fail(AuthFailed, fmt.Sprintf("the server wants credentials (status %d) and none are set", code), "set a token that may read the repository")
		}
		return fail(AuthFailed, fmt.Sprintf("the server did not accept the user and token (status %d)", code),
			"check that the token has not expired and may read this repository, and whether the server wants a certain user name beside it")
	case http.StatusNotFound, http.StatusGone:
		return fail(RepositoryNotFound, fmt.Sprintf("the server has no repository at this URL (status %d)", code),
			"check the path; many servers also answer so when the credentials may not read it")
	case http.StatusTooManyRequests:
		return fail(Unreachable, "the server limits how often it may be asked (status 429)", "poll less often, or use a webhook")
	}
	return fail(Unreachable, fmt.Sprintf("the server answered with status %d", code), "")
}

// httpError puts what net/http says into words. The error's own text holds the URL, so only its cause is used.
func httpError(err error) error {
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	var uerr *url.Error
	if errors.As(err, &uerr) {
		err = uerr.Err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fail(Unreachable, "the server's certificate is signed by nobody we know", "put the certificate of your own authority in the source's ca setting")
	case errors.As(err, &host):
		return fail(Unreachable, "the server's certificate is for another name", "use the name that the certificate is for")
	case errors.As(err, &invalid):
		return fail(Unreachable, "the server's certificate is not valid: "+printable(invalid.Error(), 200), "renew it, or check this machine's clock")
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return fail(Unreachable, "the name "+printable(dns.Name, 100)+" can't be looked up", "check the URL and this machine's DNS")
	}
	return fail(Unreachable, printable(err.Error(), 300), "")
}

func (r *httpRemote) refs(ctx context.Context) (*advert, error) {
	res, err := r.request(ctx, http.MethodGet, "/info/refs?service=git-upload-pack", nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if ct := res.Header.Get("Content-Type"); ct != "application/x-git-upload-pack-advertisement" {
		return nil, fail(Unreachable, "the server answers with "+printable(ct, 60)+", not with the smart Git protocol",
			"check that the URL is the one that git clone takes, and not a web page")
	}
	a, _, err := readAdvert(limited(ctx, res.Body, maxAdvert, "the list of refs"), true)
	if err != nil {
		return nil, streamError(err)
	}
	if u := res.Request.URL; strings.HasSuffix(u.Path, "/info/refs") {
		r.base.Path = strings.TrimSuffix(u.Path, "/info/refs") // where a redirect inside the origin led
		r.base.RawPath = ""
	}
	r.advert = a
	return a, nil
}

func (r *httpRemote) fetch(ctx context.Context, req fetchRequest, sink func(io.Reader) error) ([]string, error) {
	if r.advert == nil {
		if _, err := r.refs(ctx); err != nil {
			return nil, err
		}
	}
	body, err := req.encode(r.advert)
	if err != nil {
		return nil, err
	}
	res, err := r.request(ctx, http.MethodPost, "/git-upload-pack", body)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	shallow, err := readPack(newPktReader(limited(ctx, res.Body, r.limits.Pack, "the pack")), r.advert, sink)
	if err != nil {
		return nil, streamError(err)
	}
	return shallow, nil
}

// streamError puts a connection that broke into words, and leaves what has words already.
func streamError(err error) error {
	var own *Error
	switch {
	case errors.As(err, &own), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fail(Unreachable, "the connection ended in the middle of the answer", "")
	}
	return fail(Unreachable, "the connection broke: "+printable(err.Error(), 200), "")
}
