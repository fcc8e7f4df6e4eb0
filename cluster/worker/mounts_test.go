package worker

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// mounter is a job whose directories are those of the test.
func mounter(t *testing.T, spec manifest.Service) *job {
	dir := t.TempDir()
	j := &job{Worker: &Worker{cfg: Config{DataRoot: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Domain: "svc.internal"}}}
	j.task = converge.Assignment{Spec: spec}
	j.task.ID, j.task.Stack, j.task.Service, j.task.Slot = "shop/web.1.1", "shop", "web", 1
	j.task.Addrs = map[string]string{"shop_default": "10.5.0.9"}
	j.nets = map[string]network.Network{"shop_default": {ID: "shop_default", Subnet: netip.MustParsePrefix("10.5.0.0/24"), Gateway: netip.MustParseAddr("10.5.0.1")}}
	return j
}

func attached(s manifest.Service) manifest.Service {
	s.Networks = []manifest.Attachment{{Network: "shop_default"}}
	return s
}

func TestResolverOfATask(t *testing.T) {
	host, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Skip("needs the host's resolv.conf: ", err)
	}
	has := func(text, line string) bool { return slices.Contains(strings.Split(text, "\n"), line) }

	own := mounter(t, attached(manifest.Service{DNS: manifest.DNS{Servers: []string{"9.9.9.9"}, Search: []string{".", "example.com"}}})).resolvConf()
	if want := "nameserver 10.5.0.1\nsearch example.com svc.internal\noptions ndots:1 timeout:2 attempts:2\n"; own != want {
		t.Errorf("on a network of ours: got\n%swant\n%s", own, want)
	}
	// extra_hosts says nothing of the resolver: the host's stays.
	plain := mounter(t, manifest.Service{NetworkMode: "host", ExtraHosts: []string{"db=10.0.0.1"}}).resolvConf()
	for line := range strings.Lines(string(host)) {
		if strings.HasPrefix(line, "nameserver") && !has(plain, strings.TrimSpace(line)) {
			t.Errorf("on the host's network the host's %q is missing in\n%s", line, plain)
		}
	}
	said := mounter(t, manifest.Service{NetworkMode: "host", DNS: manifest.DNS{Servers: []string{"192.0.2.53"}, Options: []string{"ndots:3"}}}).resolvConf()
	if strings.Count(said, "nameserver ") != 1 || !has(said, "nameserver 192.0.2.53") || !has(said, "options ndots:3") {
		t.Errorf("the service's own words do not replace the host's:\n%s", said)
	}
}

func TestHostsOfATask(t *testing.T) {
	host, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Skip("needs the host's hosts: ", err)
	}
	if got := mounter(t, manifest.Service{NetworkMode: "host"}).hosts(); got != string(host) {
		t.Errorf("on the host's network: got\n%swant\n%s", got, host)
	}
	got := mounter(t, attached(manifest.Service{Hostname: "box", Domainname: "example.com", ExtraHosts: []string{"db=10.0.0.1", "node=host-gateway"}})).hosts()
	for _, line := range []string{"10.5.0.9\tbox.example.com box", "10.0.0.1\tdb", "10.5.0.1\tnode"} {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("%q is missing in\n%s", line, got)
		}
	}
}

func TestMountsOfATask(t *testing.T) {
	j := mounter(t, manifest.Service{})
	source := t.TempDir()
	tests := []struct {
		name string
		m    manifest.Mount
		want string
	}{
		{"writable", manifest.Mount{}, "rbind rw"},
		{"read-only", manifest.Mount{ReadOnly: true, Propagation: "rslave"}, "rbind ro rslave"},
		{"without what is mounted below", manifest.Mount{ReadOnly: true, Recursive: "disabled"}, "bind ro"},
		{"what is mounted below stays writable", manifest.Mount{ReadOnly: true, Recursive: "writable"}, "rbind ro"},
		{"read-only with what is mounted below", manifest.Mount{ReadOnly: true, Recursive: "readonly"}, "rbind rro"},
	}
	for _, test := range tests {
		test.m.Kind, test.m.Source, test.m.Target = manifest.MountBind, source, "/x"
		h, err := j.mount(&manifest.Container{}, test.m)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(h.Options, " "); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
	for _, m := range []struct{ mount, want string }{{"", "nosuid nodev noexec"}, {"uid=5", "nosuid nodev noexec uid=5"}} {
		if got := strings.Join(tmpfs(manifest.Mount{Options: m.mount}).Options, " "); got != m.want {
			t.Errorf("tmpfs with %q: got %q, want %q: without mode=, the directory of the image says which", m.mount, got, m.want)
		}
	}
}

// Data and seeds of a stack with a data root of its own are both in there.
func TestTheDataRootOfAStack(t *testing.T) {
	j := mounter(t, manifest.Service{})
	j.stack.DataRoot = filepath.Join(t.TempDir(), "srv")
	h, err := j.mount(&manifest.Container{}, manifest.Mount{Kind: manifest.MountData, Source: "db", Target: "/db"})
	if err != nil || h.Source != filepath.Join(j.stack.DataRoot, "db") {
		t.Errorf("data: %v %v", h, err)
	}
	src := filepath.Join(t.TempDir(), "seed.txt")
	if err := os.WriteFile(src, []byte("seed"), 0o600); err != nil {
		t.Fatal(err)
	}
	j.cfg.Content = oneFile(src)
	h, err = j.mount(&manifest.Container{}, manifest.Mount{Kind: manifest.MountContent, Source: "seed.txt", Target: "/seed", Seed: true})
	if err != nil || h.Source != filepath.Join(j.stack.DataRoot, "seed.txt") {
		t.Errorf("seed: %v %v", h, err)
	}
}

// oneFile is the content of a repository with one file.
type oneFile string

func (f oneFile) Materialise(context.Context, string, bool, bool) (string, error) {
	return string(f), nil
}

func TestAFileServerIsGivenByAddress(t *testing.T) {
	got, err := resolved([]string{"rw", "addr=localhost", "nfsvers=4"})
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netip.ParseAddr(strings.TrimPrefix(got[1], "addr="))
	if err != nil || !addr.IsLoopback() || got[0] != "rw" || got[2] != "nfsvers=4" {
		t.Errorf("got %q", got)
	}
}

// A volume with a type of its own is for the host to mount; the container binds it as writable as its mount says.
func TestVolumeOfAFileServer(t *testing.T) {
	j := mounter(t, manifest.Service{})
	j.stack.Volumes = []manifest.Volume{{Name: "films", Options: map[string]string{"type": "nfs", "device": ":/films", "o": "addr=localhost,nfsvers=4,rw"}}}
	h, err := j.mount(&manifest.Container{}, manifest.Mount{Kind: manifest.MountVolume, Source: "films", Target: "/films", Subpath: "new", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	from := h.From
	if from == nil || from.Type != "nfs" || from.Device != ":/films" || len(from.Options) != 3 || from.Options[0] == "addr=localhost" {
		t.Errorf("mounts %+v", from)
	}
	if h.Type != "bind" || h.Source != "new" || !slices.Equal(h.Options, []string{"rbind", "ro"}) {
		t.Errorf("binds %+v", h)
	}
}
