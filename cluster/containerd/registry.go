package containerd

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	units "github.com/docker/go-units"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// registryTransport gives up on a registry that does not answer; a blob itself may take as long as it takes.
var registryTransport = &http.Transport{
	Proxy:                 http.ProxyFromEnvironment,
	DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
	TLSHandshakeTimeout:   10 * time.Second,
	ResponseHeaderTimeout: 30 * time.Second,
	ExpectContinueTimeout: 5 * time.Second,
	MaxIdleConns:          10,
	IdleConnTimeout:       30 * time.Second,
}

// resolver asks registries with our credentials. It is made for each use, so that changed credentials count at once.
func (r *Runtime) resolver() remotes.Resolver {
	httpClient := &http.Client{Transport: registryTransport}
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(
		docker.WithClient(httpClient),
		docker.WithPlainHTTP(func(host string) (bool, error) {
			if slices.Contains(r.o.PlainHTTP, host) {
				return true, nil
			}
			return docker.MatchLocalhost(host)
		}),
		docker.WithAuthorizer(docker.NewDockerAuthorizer(docker.WithAuthClient(httpClient), docker.WithAuthCreds(r.creds.get))),
	)})
}

// credentials looks logins up in files of docker's form. Helpers that such a file names are run: the file is the administrator's.
type credentials struct {
	files []string

	mu      sync.Mutex
	secrets []string // what was handed out, to be kept out of errors
}

type configFile struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
	} `json:"auths"`
	CredHelpers map[string]string `json:"credHelpers"`
	CredsStore  string            `json:"credsStore"`
}

// get returns the user and password for a registry; an empty user and a password is an identity token. Both empty: nobody is logged in.
func (c *credentials) get(host string) (string, string, error) {
	for _, file := range c.files {
		raw, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", "", fmt.Errorf("read registry credentials: %w", err)
		}
		user, password, err := lookupLogin(raw, host)
		if err != nil {
			return "", "", fmt.Errorf("read registry credentials from %s: %w", file, err)
		}
		if password != "" {
			c.mu.Lock()
			if !slices.Contains(c.secrets, password) {
				c.secrets = append(c.secrets, password)
			}
			c.mu.Unlock()
			return user, password, nil
		}
	}
	return "", "", nil
}

// hidden takes every password that was handed out, in all its written forms, out of a text.
func (c *credentials) hidden(text string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.secrets {
		text = strings.ReplaceAll(text, s, "[hidden]")
	}
	return text
}

// registryKeys are the names under which a file may hold the login of a registry.
func registryKeys(host string) []string {
	switch host {
	case "docker.io", "registry-1.docker.io", "index.docker.io":
		return []string{"https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"}
	}
	return []string{host, "https://" + host, "http://" + host}
}

func lookupLogin(raw []byte, host string) (user, password string, err error) {
	var f configFile
	if err := json.Unmarshal(raw, &f); err != nil {
		return "", "", errors.New("it is not JSON in the form of docker's config.json") // the parser's words could quote a secret
	}
	for _, key := range registryKeys(host) {
		if helper := f.CredHelpers[key]; helper != "" {
			return askHelper(helper, key)
		}
	}
	for key, a := range f.Auths {
		if !slices.Contains(registryKeys(host), key) && !slices.Contains(registryKeys(host), hostOf(key)) {
			continue
		}
		if a.IdentityToken != "" {
			return "", a.IdentityToken, nil
		}
		if a.Auth == "" {
			if a.Password != "" {
				return a.Username, a.Password, nil
			}
			continue
		}
		decoded, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return "", "", fmt.Errorf("the login of %s is not base64: log in again", host)
		}
		user, password, ok := strings.Cut(strings.TrimRight(string(decoded), "\x00"), ":")
		if !ok {
			return "", "", fmt.Errorf("the login of %s has no password: log in again", host)
		}
		return user, password, nil
	}
	if f.CredsStore != "" {
		return askHelper(f.CredsStore, registryKeys(host)[0])
	}
	return "", "", nil
}

// hostOf takes the scheme and the path off a key such as https://registry.example.com/v2/.
func hostOf(key string) string {
	_, rest, found := strings.Cut(key, "://")
	if !found {
		rest = key
	}
	host, _, _ := strings.Cut(rest, "/")
	return host
}

var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// askHelper runs docker-credential-NAME, as docker does.
func askHelper(name, host string) (string, string, error) {
	if !helperName.MatchString(name) {
		return "", "", fmt.Errorf("credential helper %q is not a name", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker-credential-"+name, "get")
	cmd.Stdin = strings.NewReader(host)
	out, err := cmd.Output()
	if err != nil {
		if strings.Contains(string(out), "credentials not found") {
			return "", "", nil
		}
		return "", "", fmt.Errorf("credential helper docker-credential-%s failed for %s: %w", name, host, err)
	}
	var login struct{ Username, Secret string }
	if json.Unmarshal(out, &login) != nil {
		return "", "", fmt.Errorf("credential helper docker-credential-%s gave no login for %s", name, host)
	}
	if login.Username == "<token>" {
		login.Username = ""
	}
	return login.Username, login.Secret, nil
}

// wrongContent says that a registry can't be believed.
func wrongContent(tried string, n reference.Named) error {
	return withKind(worker.ErrUnavailable, "%s: registry %s sends content that does not have its digest", tried, reference.Domain(n))
}

// registryError says in words, and with a kind, why a registry did not give what was asked for.
func (r *Runtime) registryError(ctx context.Context, err error, tried string, n reference.Named) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", tried, ctx.Err())
	}
	if isKind(err) {
		return fmt.Errorf("%s: %w", tried, err)
	}
	host := reference.Domain(n)
	if strings.Contains(err.Error(), "byte manifest for ") { // the library calls it not found
		return permanent("%s: the image's manifest is too large: %s are the limit", tried, units.BytesSize(maxDocument))
	}
	var status remoteerrors.ErrUnexpectedStatus
	code := 0
	if errors.As(err, &status) {
		code = status.StatusCode
	}
	var timeout net.Error
	var broken *net.OpError
	var name *net.DNSError
	switch {
	case code == http.StatusUnauthorized || code == http.StatusForbidden || errors.Is(err, docker.ErrInvalidAuthorization) ||
		strings.Contains(err.Error(), "authorization failed"):
		return withKind(worker.ErrImageDenied,
			"%s: registry %s does not let us: the image does not exist or needs a login (or another one): docker login %s", tried, host, host)
	case errdefs.IsNotFound(err) || code == http.StatusNotFound:
		return withKind(worker.ErrImageMissing, "%s: manifest unknown: registry %s has no such image or tag", tried, host)
	case code == http.StatusTooManyRequests:
		return withKind(worker.ErrUnavailable, "%s: registry %s says that we ask too often", tried, host)
	case code >= 500:
		return withKind(worker.ErrUnavailable, "%s: registry %s answers with status %d", tried, host, code)
	case errors.As(err, &name):
		return withKind(worker.ErrUnavailable, "%s: registry %s: its name cannot be resolved: %s", tried, host, name.Err)
	case errors.As(err, &broken):
		return withKind(worker.ErrUnavailable, "%s: registry %s does not answer: %s", tried, host, broken.Err)
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return withKind(worker.ErrUnavailable, "%s: registry %s does not answer in time or broke off", tried, host)
	}
	return fmt.Errorf("%s: %s", tried, r.creds.hidden(plain(err)))
}
