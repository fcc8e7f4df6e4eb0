package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

var errNoSpace = syscall.ENOSPC

// prepareDirs makes the node's directories. Secrets get a tmpfs of their own, so that no value ever reaches a disk, whatever RunDir is on.
func (w *Worker) prepareDirs() error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{w.cfg.DataRoot, 0o711}, {w.cfg.RunDir, 0o711}, {w.cfg.LogDir, 0o700}, {w.secretsDir(), 0o711}, {filepath.Join(w.cfg.RunDir, "tasks"), 0o711}} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("prepare the node's directories: %w", err)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(w.secretsDir(), &fs); err == nil && fs.Type == unix.TMPFS_MAGIC {
		return nil
	}
	if err := unix.Mount("gitops-secrets", w.secretsDir(), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0711,size=64m"); err != nil {
		return fmt.Errorf("mount a tmpfs for secrets: %w", err)
	}
	return nil
}

func (w *Worker) secretsDir() string { return filepath.Join(w.cfg.RunDir, "secrets") }

func (j *job) secretDir() string { return filepath.Join(j.secretsDir(), fileName(j.task.ID)) }
func (j *job) taskDir() string   { return filepath.Join(j.cfg.RunDir, "tasks", fileName(j.task.ID)) }

// mounts resolves everything that a container mounts to places on this node, making what has to be made. They are in the order of their targets, so that
// a mount below another one comes after it.
func (j *job) mounts(c *manifest.Container, img Image) ([]HostMount, error) {
	out, err := j.etc(c.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("write its /etc files: %w", err)
	}
	taken := map[string]bool{}
	for _, m := range c.Mounts {
		taken[m.Target] = true
		h, err := j.mount(c, m)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Target, err)
		}
		out = append(out, h)
	}
	for _, target := range img.Config.Volumes {
		if target = filepath.Clean(target); taken[target] || !filepath.IsAbs(target) {
			continue
		}
		m := manifest.Mount{Kind: manifest.MountAnonymous, Target: target}
		h, err := j.mount(c, m)
		if err != nil {
			return nil, fmt.Errorf("mount the image's volume %s: %w", target, err)
		}
		j.found = append(j.found, state.Volume{Name: reconcile.VolumeName(j.task.Stack, c.Name, j.task.Slot, m), Kind: m.Kind, Stack: j.task.Stack,
			Service: j.task.Service, Slot: j.task.Slot, Node: j.cfg.Node, Own: true})
		out = append(out, h)
	}
	for _, s := range c.Secrets {
		h, err := j.secretMount(c, s)
		if err != nil {
			return nil, fmt.Errorf("secret %s: %w", s.Secret, err)
		}
		out = append(out, h)
	}
	slices.SortStableFunc(out, func(a, b HostMount) int { return strings.Compare(a.Target, b.Target) })
	return out, nil
}

func access(readOnly bool) string {
	if readOnly {
		return "ro"
	}
	return "rw"
}

func (j *job) mount(c *manifest.Container, m manifest.Mount) (HostMount, error) {
	h := HostMount{Type: "bind", Target: m.Target, Options: []string{"rbind", access(m.ReadOnly)}}
	switch m.Recursive {
	case "disabled":
		h.Options[0] = "bind"
	case "readonly":
		h.Options[1] = "rro"
	}
	if m.Propagation != "" {
		h.Options = append(h.Options, m.Propagation)
	}
	switch m.Kind {
	case manifest.MountTmpfs:
		return tmpfs(m), nil
	case manifest.MountVolume:
		return j.volume(m, h)
	case manifest.MountAnonymous:
		h.Source = filepath.Join(j.cfg.DataRoot, anonymousDir(reconcile.VolumeName(j.task.Stack, c.Name, j.task.Slot, m)))
		h.CopyUp = !m.NoCopy
		return h, os.MkdirAll(h.Source, 0o755)
	case manifest.MountData:
		h.Source = filepath.Join(j.dataRoot(), m.Source)
		return h, os.MkdirAll(h.Source, 0o755)
	case manifest.MountBind:
		h.Source = m.Source
		_, err := os.Stat(m.Source)
		if errors.Is(err, os.ErrNotExist) {
			if m.MustExist {
				return h, &toldError{ReasonVolume, true, fmt.Errorf("%s is not on this node: make it, or write the volume in its short form, which does", m.Source)}
			}
			err = os.MkdirAll(m.Source, 0o755)
		}
		return h, err
	case manifest.MountContent:
		return j.content(m, h)
	}
	return h, fmt.Errorf("unknown kind of mount %q", m.Kind)
}

// dataRoot is where the stack's data paths and seeds live.
func (j *job) dataRoot() string {
	if j.stack.DataRoot != "" {
		return j.stack.DataRoot
	}
	return filepath.Join(j.cfg.DataRoot, "data", j.task.Stack)
}

func tmpfs(m manifest.Mount) HostMount {
	h := HostMount{Type: "tmpfs", Source: "tmpfs", Target: m.Target, Options: []string{"nosuid", "nodev", "noexec"}}
	if m.ReadOnly {
		h.Options = append(h.Options, "ro")
	}
	if m.Mode != 0 { // else that of the image's directory, or 1777 where it has none: runc sees to that
		h.Options = append(h.Options, fmt.Sprintf("mode=%o", m.Mode))
	}
	if m.Size > 0 {
		h.Options = append(h.Options, fmt.Sprintf("size=%d", int64(m.Size)))
	}
	if m.Options != "" {
		h.Options = append(h.Options, strings.Split(m.Options, ",")...)
	}
	return h
}

// volume resolves a named volume: a directory of ours, or what its driver options name.
func (j *job) volume(m manifest.Mount, h HostMount) (HostMount, error) {
	at := slices.IndexFunc(j.stack.Volumes, func(v manifest.Volume) bool { return v.Name == m.Source })
	var v manifest.Volume
	if at >= 0 {
		v = j.stack.Volumes[at]
	}
	opts := strings.Split(v.Options["o"], ",")
	switch kind := v.Options["type"]; {
	case kind == "none" && (slices.Contains(opts, "bind") || slices.Contains(opts, "rbind")):
		h.Source = v.Options["device"]
		if _, err := os.Stat(h.Source); err != nil {
			return h, &toldError{ReasonVolume, true, fmt.Errorf("volume %s: its device: %w; make the directory on this node", v.Name, err)}
		}
	case kind == "tmpfs":
		h = HostMount{Type: "tmpfs", Source: "tmpfs", Target: m.Target, Options: append([]string{access(m.ReadOnly)}, nonEmpty(opts)...)}
	case kind != "" && kind != "none":
		opts, err := resolved(nonEmpty(opts))
		if err != nil {
			return h, fmt.Errorf("volume %s: %w", v.Name, err)
		}
		h.From, h.Source = &FileSystem{Type: kind, Device: v.Options["device"], Options: opts}, m.Subpath
	default:
		if !volumeName(m.Source) { // the log's words are not the last line of defence for the host's files
			return h, &toldError{ReasonVolume, true, fmt.Errorf("volume %q: its name leads out of the volumes' directory", m.Source)}
		}
		h.Source = filepath.Join(j.cfg.DataRoot, "volumes", m.Source)
		if _, err := os.Stat(h.Source); v.External && errors.Is(err, os.ErrNotExist) {
			return h, &toldError{ReasonVolume, true, fmt.Errorf("external volume %s is not on this node: `mkdir -p %s` makes an empty one; or take `external: true` away", v.Name, h.Source)}
		}
		if err := j.makeVolume(m.Source); err != nil {
			return h, err
		}
		h.CopyUp = !m.NoCopy && m.Subpath == ""
		if m.Subpath != "" {
			root, err := os.OpenRoot(h.Source)
			if err != nil {
				return h, err
			}
			defer root.Close()
			if err := root.MkdirAll(m.Subpath, 0o755); err != nil {
				return h, fmt.Errorf("subpath %s: %w", m.Subpath, err)
			}
			h.Source = filepath.Join(h.Source, m.Subpath)
		}
	}
	return h, nil
}

// resolveTime bounds the look-up of a file server's name.
const resolveTime = 5 * time.Second

// resolved replaces the name of a file server by its address: the kernel, which is given the options, knows no names.
func resolved(opts []string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), resolveTime)
	defer cancel()
	for i, o := range opts {
		name, ok := strings.CutPrefix(o, "addr=")
		if !ok {
			continue
		}
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		if err != nil {
			return nil, fmt.Errorf("find its server: %w", err)
		}
		opts[i] = "addr=" + addrs[0].Unmap().String()
	}
	return opts, nil
}

func nonEmpty(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == "" })
}

// content mounts files of the commit: as they are, or copied once into a writable directory (x-gitops: seed).
func (j *job) content(m manifest.Mount, h HostMount) (HostMount, error) {
	src, err := j.cfg.Content.Materialise(context.Background(), m.Digest, m.Dir, m.Mode&0o111 != 0)
	if err != nil {
		return h, err
	}
	if !m.Seed {
		h.Source, h.Options = src, []string{"rbind", "ro"}
		if m.Mode != 0 || m.UID != "" || m.GID != "" {
			h.Source, err = j.owned(src, m)
		}
		return h, err
	}
	h.Source = filepath.Join(j.dataRoot(), m.Source)
	if _, err := os.Lstat(h.Source); err == nil {
		return h, nil
	}
	return h, seed(src, h.Source, m.Dir)
}

// seed copies content to a new place, whole or not at all.
func seed(src, dst string, dir bool) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	tmp := dst + ".seed"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if dir {
		if err := os.CopyFS(tmp, os.DirFS(src)); err != nil {
			return fmt.Errorf("seed %s: %w", dst, err)
		}
		return os.Rename(tmp, dst)
	}
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, dst)
}

// owned copies a config file to a place of the task's own, with the owner and mode that the config asks for.
func (j *job) owned(src string, m manifest.Mount) (string, error) {
	b, err := os.ReadFile(src)
	if err != nil {
		return "", err
	}
	dst := filepath.Join(j.taskDir(), "configs", strings.ReplaceAll(strings.Trim(m.Target, "/"), "/", "_"))
	return dst, writeOwned(dst, b, m.UID, m.GID, m.Mode)
}

func writeOwned(path string, data []byte, uid, gid string, mode uint32) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o400); err != nil {
		return err
	}
	id := func(s string) (int, error) {
		if s == "" {
			return 0, nil
		}
		return strconv.Atoi(s)
	}
	u, err := id(uid)
	if err != nil {
		return fmt.Errorf("uid %q is not a number", uid)
	}
	g, err := id(gid)
	if err != nil {
		return fmt.Errorf("gid %q is not a number", gid)
	}
	if mode == 0 {
		mode = 0o444
	}
	if err := os.Chown(path, u, g); err != nil {
		return err
	}
	return os.Chmod(path, os.FileMode(mode&0o777))
}

// secretMount opens a secret into the node's tmpfs.
func (j *job) secretMount(c *manifest.Container, s manifest.SecretUse) (HostMount, error) {
	sec, ok := j.secret(s.Secret)
	if !ok {
		return HostMount{}, fmt.Errorf("it is not set: `gitopsctl secret set %s` reads its value from standard input", s.Secret)
	}
	value, err := j.cfg.OpenSecret(sec)
	if err != nil {
		return HostMount{}, err
	}
	defer clear(value)
	path := filepath.Join(j.secretDir(), c.Name, strings.ReplaceAll(strings.Trim(s.Target, "/"), "/", "_"))
	if err := writeOwned(path, value, s.UID, s.GID, s.Mode); err != nil {
		return HostMount{}, err
	}
	return HostMount{Type: "bind", Source: path, Target: s.Target, Options: []string{"rbind", "ro"}}, nil
}

// etc writes the files that tell a container its name and its resolver, and returns their mounts. As in Docker, they are as writable as the root file
// system is: some images change them.
func (j *job) etc(readOnly bool) ([]HostMount, error) {
	files := map[string]string{"hostname": j.hostname() + "\n", "hosts": j.hosts(), "resolv.conf": j.resolvConf()}
	var out []HostMount
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		path := filepath.Join(j.taskDir(), "etc", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(files[name]), 0o644); err != nil {
			return nil, err
		}
		out = append(out, HostMount{Type: "bind", Source: path, Target: "/etc/" + name, Options: []string{"rbind", access(readOnly)}})
	}
	return out, nil
}

func (j *job) hosts() string {
	t := &j.task
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if t.Spec.NetworkMode == "host" && len(t.Spec.ExtraHosts) == 0 { // with them, Docker makes a file of its own
		if host, err := os.ReadFile(filepath.Join(hostEtc, "hosts")); err == nil {
			return string(host)
		}
	}
	for _, at := range t.Spec.Networks {
		if a := t.Addrs[at.Network]; a != "" {
			name := j.hostname()
			if t.Spec.Domainname != "" {
				name = name + "." + t.Spec.Domainname + " " + name
			}
			fmt.Fprintf(&b, "%s\t%s\n", a, name)
			break
		}
	}
	for _, e := range t.Spec.ExtraHosts {
		name, addr, ok := strings.Cut(e, "=")
		if !ok {
			continue
		}
		if addr == "host-gateway" {
			addr = j.gateway()
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, name)
	}
	return b.String()
}

// gateway is the address at which the task reaches the node.
func (j *job) gateway() string {
	for _, at := range j.task.Spec.Networks {
		if n, ok := j.nets[at.Network]; ok {
			return n.Gateway.String()
		}
	}
	return "127.0.0.1"
}

func (j *job) resolvConf() string {
	var b strings.Builder
	dns := j.task.Spec.DNS
	var servers []string
	for _, at := range j.task.Spec.Networks {
		if n, ok := j.nets[at.Network]; ok {
			servers = append(servers, n.Gateway.String())
			break
		}
	}
	search := slices.DeleteFunc(slices.Clone(dns.Search), func(s string) bool { return s == "." }) // Docker's word for none of the host's
	options := dns.Options
	if j.task.Spec.NetworkMode == "" {
		search = append(search, j.cfg.Domain)
		if len(options) == 0 {
			options = []string{"ndots:1", "timeout:2", "attempts:2"}
		}
	}
	if len(servers) == 0 { // host or none: no DNS of ours is reachable there
		servers = dns.Servers
		b.WriteString(hostResolver(len(servers) > 0, len(dns.Search) > 0, len(options) > 0))
	}
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.String()
}

// hostEtc is where the host's own hosts and resolv.conf are.
const hostEtc = "/etc"

// hostResolver is the host's resolv.conf without the lines that the service has words of its own for.
func hostResolver(servers, search, options bool) string {
	file, err := os.ReadFile(filepath.Join(hostEtc, "resolv.conf"))
	if err != nil {
		return ""
	}
	var b strings.Builder
	for line := range strings.Lines(string(file)) {
		switch f := strings.Fields(line); {
		case len(f) == 0, servers && f[0] == "nameserver", search && (f[0] == "search" || f[0] == "domain"), options && f[0] == "options":
		default:
			b.WriteString(strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String()
}

// netSysctls are those that belong to the network namespace; the others are the runtime's.
func netSysctls(all map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range all {
		if strings.HasPrefix(k, "net.") {
			out[k] = v
		}
	}
	return out
}

// parseNetwork reads a network's place on this node; ok is false when it has none.
func parseNetwork(id, subnet, gateway string, internal bool) (network.Network, bool) {
	p, err := netip.ParsePrefix(subnet)
	if err != nil {
		return network.Network{}, false
	}
	n := network.Network{ID: id, Subnet: p.Masked(), Internal: internal, Gateway: p.Masked().Addr().Next()}
	if g, err := netip.ParseAddr(gateway); err == nil {
		n.Gateway = g
	}
	return n, true
}
