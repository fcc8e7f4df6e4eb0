package containerd

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/image"
	"github.com/gitopsd/gitopsd/fixtures/registry"
)

const password = "canary-secret-7f3a"

func writeFile(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.json")
	writeTo(t, file, content)
	return file
}

func writeTo(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (n *node) push(host string, spec image.Spec) (ref string, img *image.Image) {
	n.t.Helper()
	img, err := image.Build(n.ctx, spec)
	n.must(err)
	ref, err = img.Push(n.ctx, host, &image.Login{Username: "robot", Password: password})
	n.must(err)
	return ref, img
}

func TestPullIsByDigestWithCredentialsAndOnce(t *testing.T) {
	n := newNode(t)
	reg, host := registry.Start(t, registry.Options{Username: "robot", Password: password})
	ref, img := n.push(host, image.Spec{Name: "team/web:1", Bare: true})
	reg.ResetCounts()

	_, err := n.Resolve(n.ctx, ref, "")
	if !errors.Is(err, worker.ErrImageDenied) || !strings.Contains(err.Error(), "docker login "+host) {
		t.Errorf("without a login: %v", err)
	}
	n.creds.files = []string{"/no/such/file", writeFile(t, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host,
		base64.StdEncoding.EncodeToString([]byte("robot:"+password))))}
	digest, err := n.Resolve(n.ctx, ref, "")
	n.must(err)
	if digest != img.Digest() {
		t.Errorf("resolved to %s, want %s", digest, img.Digest())
	}
	if _, err := n.Local(n.ctx, ref, ""); !errors.Is(err, worker.ErrNotFound) {
		t.Errorf("before the pull: %v", err)
	}
	reg.ResetCounts()
	n.all(8, func(int) error {
		_, err := n.Ensure(n.ctx, ref, digest, "")
		return err
	})
	for _, asked := range reg.Counts().ManifestRefs {
		if strings.HasSuffix(asked, ":1") {
			t.Errorf("pulled %s: by tag", asked)
		}
	}
	first := reg.Counts()
	if first.Blobs > 4 { // configuration and layer, each with a request that is refused first
		t.Errorf("8 callers made %d requests for blobs", first.Blobs)
	}
	// What is here needs no registry, neither by tag nor by digest.
	reg.Fail(registry.Unavailable)
	for _, r := range []string{ref, ref + "@" + digest} {
		local, err := n.Local(n.ctx, r, "")
		n.must(err)
		if local.Digest != digest {
			t.Errorf("%s is %s", r, local.Digest)
		}
	}
	if _, err := n.Resolve(n.ctx, ref+"@"+digest, ""); err != nil {
		t.Error("a digest was looked up:", err)
	}
	if _, err := n.Ensure(n.ctx, ref, digest, ""); err != nil {
		t.Error(err)
	}
	if now := reg.Counts(); now.Total != first.Total {
		t.Errorf("%d requests more", now.Total-first.Total)
	}
	s := n.spec("app", "echo", "pulled")
	s.Image, s.Digest = ref, digest
	if out := n.output(s); out != "pulled\n" {
		t.Errorf("output %q", out)
	}
}

func TestRegistryFailuresAreToldApart(t *testing.T) {
	n := newNode(t)
	reg, host := registry.Start(t, registry.Options{Username: "robot", Password: password})
	ref, img := n.push(host, image.Spec{Name: "team/web:1", Bare: true})
	n.creds.files = []string{writeFile(t, fmt.Sprintf(`{"auths":{"http://%s/v2/":{"username":"robot","password":%q}}}`, host, password))}
	missing := host + "/team/web:2"
	tests := []struct {
		name string
		how  registry.Failure
		ref  string
		kind error
		want string
	}{
		{"no such tag", registry.Healthy, missing, worker.ErrImageMissing, "manifest unknown"},
		{"no such repository", registry.Healthy, host + "/nobody/nothing:1", worker.ErrImageMissing, "manifest unknown"},
		{"503", registry.Unavailable, ref, worker.ErrUnavailable, "503"},
		{"429", registry.TooMany, ref, worker.ErrUnavailable, "too often"},
		{"reset", registry.Reset, ref, worker.ErrUnavailable, "does not answer"},
		{"nobody listens", registry.Healthy, "127.0.0.1:1/team/web:1", worker.ErrUnavailable, "does not answer"},
		{"no such host", registry.Healthy, "registry.invalid/team/web:1", worker.ErrUnavailable, "registry.invalid"},
	}
	for _, test := range tests {
		reg.Fail(test.how)
		_, err := n.Resolve(n.ctx, test.ref, "")
		if !errors.Is(err, test.kind) || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("resolve, %s: %v, want %q and kind %q", test.name, err, test.want, test.kind)
		}
		digest := img.Digest()
		if test.how == registry.Healthy {
			digest = "sha256:" + strings.Repeat("a", 64)
		}
		_, err = n.Ensure(n.ctx, test.ref, digest, "")
		if !errors.Is(err, test.kind) {
			t.Errorf("pull, %s: %v, want kind %q", test.name, err, test.kind)
		}
		if strings.Contains(fmt.Sprint(err), password) {
			t.Errorf("%s: the error holds the password: %v", test.name, err)
		}
	}
	reg.Fail(registry.Corrupt)
	if _, err := n.Ensure(n.ctx, ref, img.Digest(), ""); err == nil || strings.Contains(err.Error(), password) {
		t.Errorf("a corrupt layer: %v", err)
	}
	reg.Fail(registry.Healthy)
	if _, err := n.Ensure(n.ctx, ref, img.Digest(), ""); err != nil {
		t.Error("after all that:", err)
	}
}

func TestPlatformThatAnImageLacks(t *testing.T) {
	n := newNode(t)
	_, host := registry.Start(t, registry.Options{})
	ref, img := n.push(host, image.Spec{Name: "team/many:1", Bare: true, Platforms: []string{"linux/amd64", "linux/arm64"}})
	_, other := n.image(workload)
	n.collect(digest.Digest(other)) // as the end of another test does
	for range 5 {
		if _, err := n.Ensure(n.ctx, ref, img.Digest(), "linux/s390x"); !errors.Is(err, worker.ErrPermanent) ||
			!strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
			t.Fatalf("an index without the platform: %v", err)
		}
	}
	if _, err := n.Ensure(n.ctx, ref, img.Digest(), ""); err != nil {
		t.Error(err)
	}
	ref, img = n.push(host, image.Spec{Name: "team/one:1", Bare: true, Platforms: []string{"linux/arm64"}})
	if _, err := n.Ensure(n.ctx, ref, img.Digest(), "linux/amd64"); !errors.Is(err, worker.ErrPermanent) ||
		!strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("a single image for another platform: %v", err)
	}
}

func TestPullEndsWithItsContext(t *testing.T) {
	n := newNode(t)
	stuck := make(chan struct{})
	silent := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-stuck:
		case <-r.Context().Done():
		}
	})}
	host := serve(t, silent)
	defer close(stuck)
	ctx, cancel := context.WithCancel(n.ctx)
	done := make(chan error, 1)
	go func() {
		_, err := n.Ensure(ctx, host+"/team/web:1", "sha256:"+strings.Repeat("a", 64), "")
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want canceled", err)
	}
}

func TestImportRefusesWhatIsNoImage(t *testing.T) {
	n := newNode(t)
	for name, r := range map[string]io.Reader{"empty": strings.NewReader(""), "text": strings.NewReader(strings.Repeat("no tar ", 500))} {
		if refs, err := n.Import(n.ctx, r); err == nil {
			t.Errorf("%s: imported %q", name, refs)
		}
	}
}

func TestPruneKeepsWhatIsUsed(t *testing.T) {
	n := newNode(t)
	_, host := registry.Start(t, registry.Options{Username: "robot", Password: password})
	n.creds.files = []string{writeFile(t, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("robot:"+password))))}
	var digests, refs []string
	for _, name := range []string{"kept", "used", "idle"} {
		ref, img := n.push(host, image.Spec{Name: "team/" + name + ":1", Env: map[string]string{"NAME": name}})
		_, err := n.Ensure(n.ctx, ref, img.Digest(), "")
		n.must(err)
		refs, digests = append(refs, ref), append(digests, img.Digest())
	}
	imported, _ := n.image(image.Spec{Name: "lab/imported:1"})
	refs = append(refs, imported)
	s := n.spec("app", "sleep", "600")
	s.Image, s.Digest = refs[1], digests[1]
	n.start(s)
	here := func(want ...bool) {
		t.Helper()
		for i, ref := range refs {
			if _, err := n.Local(n.ctx, ref, ""); (err == nil) != want[i] {
				t.Errorf("%s: %v, want it here: %v", ref, err, want[i])
			}
		}
	}
	if gone, err := n.Prune(n.ctx, digests[:1], time.Now().Add(-time.Hour)); err != nil || len(gone) > 0 {
		t.Errorf("what is young was removed: %q, %v", gone, err)
	}
	here(true, true, true, true)
	gone, err := n.Prune(n.ctx, digests[:1], time.Now())
	n.must(err)
	if len(gone) != 2 { // its tag and its digest
		t.Errorf("removed %q", gone)
	}
	here(true, true, false, true)
	n.must(n.Remove(n.ctx, "app"))
	n.start(func() worker.ContainerSpec { s.ID = "again"; return s }())
}

func TestLogins(t *testing.T) {
	auth := base64.StdEncoding.EncodeToString([]byte("u:p:with:colons"))
	tests := []struct{ name, file, host, user, password, fails string }{
		{"by host", `{"auths":{"r.example":{"auth":"` + auth + `"}}}`, "r.example", "u", "p:with:colons", ""},
		{"by url", `{"auths":{"https://r.example/v1/":{"auth":"` + auth + `"}}}`, "r.example", "u", "p:with:colons", ""},
		{"with a port", `{"auths":{"r.example:5000":{"auth":"` + auth + `"}}}`, "r.example:5000", "u", "p:with:colons", ""},
		{"another port", `{"auths":{"r.example:5000":{"auth":"` + auth + `"}}}`, "r.example", "", "", ""},
		{"docker hub", `{"auths":{"https://index.docker.io/v1/":{"auth":"` + auth + `"}}}`, "registry-1.docker.io", "u", "p:with:colons", ""},
		{"token", `{"auths":{"r.example":{"identitytoken":"t"}}}`, "r.example", "", "t", ""},
		{"another host", `{"auths":{"r.example.evil":{"auth":"` + auth + `"}}}`, "r.example", "", "", ""},
		{"no base64", `{"auths":{"r.example":{"auth":"` + password + `"}}}`, "r.example", "", "", "log in again"},
		{"no JSON", `{"auths": "` + password, "r.example", "", "", "config.json"},
		{"evil helper", `{"credHelpers":{"r.example":"../../bin/sh"}}`, "r.example", "", "", "is not a name"},
		{"missing helper", `{"credsStore":"no-such-helper"}`, "r.example", "", "", "docker-credential-no-such-helper"},
	}
	for _, test := range tests {
		c := &credentials{files: []string{writeFile(t, test.file)}}
		user, secret, err := c.get(test.host)
		if user != test.user || secret != test.password || test.fails == "" && err != nil {
			t.Errorf("%s: %q %q %v", test.name, user, secret, err)
		}
		if test.fails != "" && (err == nil || !strings.Contains(err.Error(), test.fails) || strings.Contains(err.Error(), password)) {
			t.Errorf("%s: error %v", test.name, err)
		}
	}
}

func TestFlightsAreShared(t *testing.T) {
	var f flights
	var runs atomic.Int32
	release := make(chan struct{})
	joined := make(chan struct{}, 4)
	work := func(context.Context) error {
		runs.Add(1)
		<-release
		return errors.New("done")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			joined <- struct{}{}
			if err := f.do(t.Context(), "k", work); err == nil || err.Error() != "done" {
				t.Error(err)
			}
		})
	}
	for range 4 {
		<-joined
	}
	close(release)
	wg.Wait()
	if runs.Load() > 4 || runs.Load() < 1 {
		t.Errorf("%d runs", runs.Load())
	}
	// One that leaves does not end the work of another; the last one does.
	started, ended := make(chan struct{}), make(chan struct{})
	slow := func(ctx context.Context) error {
		close(started)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}
	one, leaveOne := context.WithCancel(t.Context())
	two, leaveTwo := context.WithCancel(t.Context())
	left := make(chan error, 2)
	go func() { left <- f.do(one, "s", slow) }()
	<-started
	go func() { left <- f.do(two, "s", slow) }()
	for waiting := 0; waiting < 2; {
		f.mu.Lock()
		waiting = f.active["s"].waiting
		f.mu.Unlock()
	}
	leaveOne()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	select {
	case <-ended:
		t.Fatal("the work ended although somebody waits")
	default:
	}
	leaveTwo()
	<-ended
	<-left
}

// What an image is can be asked of its registry. Nothing of it comes to the node, and no layer is read.
func TestDescribeAsksForDocumentsOnly(t *testing.T) {
	n := newNode(t)
	reg, host := registry.Start(t, registry.Options{Username: "robot", Password: password})
	ref, img := n.push(host, image.Spec{Name: "team/far:1", Bare: true, User: "1000:1000", Platforms: []string{"linux/amd64", "linux/arm64"}})
	if _, err := n.Describe(n.ctx, ref, ""); !errors.Is(err, worker.ErrImageDenied) || !strings.Contains(err.Error(), "docker login "+host) {
		t.Errorf("without a login: %v", err)
	}
	n.creds.files = []string{writeFile(t, fmt.Sprintf(`{"auths":{%q:{"username":"robot","password":%q}}}`, host, password))}
	for _, ref := range []string{ref, ref + "@" + img.Digest()} {
		reg.ResetCounts()
		got, err := n.Describe(n.ctx, ref, "linux/arm64")
		n.must(err)
		if got.Digest != img.Digest() || got.Config.User != "1000:1000" {
			t.Errorf("%s is described as %+v, want the digest %s", ref, got, img.Digest())
		}
		if c := reg.Counts(); c.Blobs-c.Unauthorized > 1 {
			t.Errorf("%d blobs were asked for, want the configuration alone", c.Blobs)
		}
	}
	if _, err := n.Local(n.ctx, ref, ""); !errors.Is(err, worker.ErrNotFound) {
		t.Errorf("after it was described: %v", err)
	}
	if _, err := n.descriptor(n.in(n.ctx), digest.Digest(img.Digest())); err == nil {
		t.Error("its index is on the node")
	}
	if _, err := n.Describe(n.ctx, ref, "linux/s390x"); !errors.Is(err, worker.ErrPermanent) || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
		t.Errorf("a platform that it lacks: %v", err)
	}
	reg.Fail(registry.Corrupt)
	if _, err := n.Describe(n.ctx, ref, ""); !errors.Is(err, worker.ErrUnavailable) || !strings.Contains(err.Error(), "does not have its digest") {
		t.Errorf("a configuration that is not what its digest says: %v", err)
	}
	reg.Fail(registry.Unavailable)
	if _, err := n.Describe(n.ctx, ref, ""); !errors.Is(err, worker.ErrUnavailable) || !strings.Contains(err.Error(), "look up image "+ref+": registry "+host) {
		t.Errorf("a registry that is down: %v", err)
	}
	if _, err := n.Describe(n.ctx, host+"/team/nothing:1", ""); !errors.Is(err, worker.ErrUnavailable) {
		t.Errorf("a registry that is down: %v", err)
	}
	reg.Fail(registry.Healthy)
	if _, err := n.Describe(n.ctx, host+"/team/nothing:1", ""); !errors.Is(err, worker.ErrImageMissing) || strings.Contains(err.Error(), password) {
		t.Errorf("no such image: %v", err)
	}
	ref, _ = n.push(host, image.Spec{Name: "team/arm:1", Bare: true, Platforms: []string{"linux/arm64"}})
	if _, err := n.Describe(n.ctx, ref, "linux/amd64"); !errors.Is(err, worker.ErrPermanent) || !strings.Contains(err.Error(), "is for linux/arm64") {
		t.Errorf("a single image for another platform: %v", err)
	}
}
