package compose

import (
	"errors"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// volumes converts the top-level volumes.
func (c *converter) volumes() {
	for _, key := range sortedKeys(c.project.Volumes) {
		in := c.project.Volumes[key]
		c.at("volumes."+key, "volumes", key)
		var x volumeExtension
		c.extension(in.Extensions, &x, "", "volumes", key)
		pos, _ := c.locate("volumes", key)
		v := manifest.Volume{Name: in.Name, Key: key, External: bool(in.External), Options: in.DriverOpts, Labels: in.Labels}
		if in.Driver != "" && in.Driver != "local" {
			driver, _ := c.locate("volumes", key, "driver")
			c.add(manifest.Notice, "volume-driver",
				driver, "", "the volume driver %s is not here: the volume %s is kept on its node, so its services stay on that node; "+
					"for shared storage use the local driver with NFS options", in.Driver, key)
			v.Options = nil
		}
		c.driverOptions(key, v.Options)
		if found := swarmTemplate.FindString(v.Name); found != "" {
			name, _ := c.locate("volumes", key, "name")
			if strings.Contains(v.Name, ".Task.") {
				c.add(manifest.Notice, "volume-template", name, "", "%s: each task has a volume of its own, kept with its slot, and no name for it", found)
				c.perTask[key] = true
				continue
			}
			in.Name = c.out.Name + "_" + key
			v.Name, c.project.Volumes[key] = in.Name, in
			c.add(manifest.Notice, "volume-template", name, "", "%s: Swarm's templates are not filled in here, so the volume is called %s", found, v.Name)
		}
		if v.Options["type"] == "none" && strings.Contains(v.Options["o"], "bind") {
			device := v.Options["device"]
			if _, ours := c.tree.rel(device); ours && !c.hosts[device] || !path.IsAbs(device) {
				c.add(manifest.Error,
					"volume", pos, "", "the volume %s binds a path of the repository; mount that path in the services themselves", key)
			}
		}
		if x.Storage == "shared" {
			c.shared[in.Name] = true
		}
		c.out.Volumes = append(c.out.Volumes, v)
	}
	slices.SortFunc(c.out.Volumes, func(a, b manifest.Volume) int { return strings.Compare(a.Name+"\x00"+a.Key, b.Name+"\x00"+b.Key) })
}

// mounts converts volumes, tmpfs and configs of a service.
func (c *converter) mounts(in types.ServiceConfig, x serviceExtension) []manifest.Mount {
	var out []manifest.Mount
	seeds := map[string]bool{}
	for _, s := range x.Seed {
		seeds[path.Clean(s)] = true
	}
	for _, v := range in.Volumes {
		m, ok := c.mount(in, v, seeds)
		if !ok {
			continue
		}
		if x.Storage == "shared" {
			m.Shared = true
		}
		c.at(in.Name+".mounts["+m.Target+"]", "services", in.Name, "volumes", m.Target)
		out = append(out, m)
	}
	for _, s := range sortedKeys(seeds) {
		c.refuse(in.Name, extensionKey+".seed", "no mount of the service has the source %q", s)
	}
	for _, t := range in.Tmpfs {
		if m, ok := c.tmpfs(in.Name, t); ok {
			c.at(in.Name+".mounts["+m.Target+"]", "services", in.Name, "tmpfs", m.Target)
			out = append(out, m)
		}
	}
	for _, use := range in.Configs {
		if m, ok := c.config(in.Name, use); ok {
			c.at(in.Name+".mounts["+m.Target+"]", "services", in.Name, "configs", use.Source)
			out = append(out, m)
		}
	}
	c.tellReadOnly(in, out)
	slices.SortStableFunc(out, func(a, b manifest.Mount) int { return strings.Compare(a.Target, b.Target) })
	return out
}

func (c *converter) mount(in types.ServiceConfig, v types.ServiceVolumeConfig, seeds map[string]bool) (manifest.Mount, bool) {
	var x mountExtension
	c.extension(v.Extensions, &x, in.Name, "services", in.Name, "volumes", v.Target)
	m := manifest.Mount{Target: path.Clean(v.Target), ReadOnly: v.ReadOnly, Shared: x.Storage == "shared"}
	pos, _ := c.locate("services", in.Name, "volumes", v.Target)
	fail := func(format string, args ...any) (manifest.Mount, bool) {
		c.add(manifest.Error, "volume", pos, in.Name, format, args...)
		return m, false
	}
	switch v.Type {
	case types.VolumeTypeVolume:
		if x.Seed {
			return fail("x-gitops: seed is for files of the repository; the mount at %s is a volume", m.Target)
		}
		if v.Volume != nil {
			m.NoCopy, m.Subpath = v.Volume.NoCopy, v.Volume.Subpath
		}
		if v.Source == "" {
			m.Kind = manifest.MountAnonymous
			return m, true
		}
		decl, ok := c.project.Volumes[v.Source]
		if !ok {
			return fail("the volume %q is not declared under the top-level volumes:; declare it, or write ./%s to mean a path",
				v.Source, v.Source)
		}
		if c.perTask[v.Source] {
			m.Kind = manifest.MountAnonymous
			return m, true
		}
		m.Kind, m.Source = manifest.MountVolume, decl.Name
		m.Shared = m.Shared || c.shared[decl.Name]
		return m, true
	case types.VolumeTypeTmpfs:
		m.Kind = manifest.MountTmpfs
		if v.Tmpfs != nil {
			m.Size, m.Mode = manifest.Bytes(v.Tmpfs.Size), v.Tmpfs.Mode
		}
		return m, true
	case types.VolumeTypeBind:
		return c.bind(in, v, m, x.Seed, seeds)
	}
	return fail("a mount of the type %q is not supported here; want volume, bind or tmpfs", v.Type)
}

// bind tells a host's path from one of the repository, and content from data.
func (c *converter) bind(in types.ServiceConfig, v types.ServiceVolumeConfig, m manifest.Mount, seed bool, seeds map[string]bool) (manifest.Mount, bool) {
	pos, _ := c.locate("services", in.Name, "volumes", v.Target)
	source := path.Clean(v.Source)
	if home, ok := c.homes[source]; ok {
		c.add(manifest.Notice, "path-home", pos, in.Name,
			"there is no home directory here: ~ at %s is kept as data below the data root, at %s; "+
				"write an absolute path to use a directory of the host", m.Target, home)
		m.Kind, m.Source = manifest.MountData, home
		return m, true
	}
	if v.Bind != nil {
		if v.Bind.Recursive == "readonly" && !v.ReadOnly {
			c.add(manifest.Error, "volume", pos, in.Name, "bind.recursive: readonly at %s needs read_only: true", m.Target)
		}
		m.Propagation, m.Recursive = v.Bind.Propagation, v.Bind.Recursive
	}
	name, ours := c.tree.rel(source)
	if !ours || c.hosts[source] {
		m.Kind, m.Source = manifest.MountBind, source
		m.MustExist = v.Bind == nil || !bool(v.Bind.CreateHostPath)
		if seed {
			c.add(manifest.Error,
				"volume", pos, in.Name, "x-gitops: seed is for files of the repository; the mount at %s is a path of the host", m.Target)
		}
		return m, true
	}
	fromStack := c.fromStack(name)
	if seeds[fromStack] {
		delete(seeds, fromStack)
		seed = true
	}
	got, err := c.tree.content(name)
	switch {
	case err == nil:
		m.Kind, m.Source, m.Digest, m.Dir, m.Seed = manifest.MountContent, fromStack, got.digest, got.dir, seed
		m.ReadOnly = !seed || v.ReadOnly
		if info, err := c.tree.stat(name); err == nil && !got.dir && info.Mode()&0o100 != 0 {
			m.Mode = 0o755
		}
		m.Propagation, m.Recursive = "", ""
		maps.Copy(c.blobs, got.blobs)
		return m, true
	case errors.Is(err, fs.ErrNotExist):
		return c.data(in, m, fromStack, seed, pos)
	}
	c.unreadable(name, err, pos)
	return m, false
}

// fromStack writes a path of the repository relative to the stack's directory, so that a moved stack mounts the same.
func (c *converter) fromStack(name string) string {
	rel, err := filepath.Rel(filepath.FromSlash(c.plan.dir), filepath.FromSlash(name))
	if err != nil {
		return name // both are relative, so there always is a way
	}
	return filepath.ToSlash(rel)
}

// configEndings are of files that people mount to configure a program. As data they would start as an empty directory.
var configEndings = []string{".conf",
	".cfg", ".cnf", ".ini", ".json", ".yaml", ".yml", ".toml", ".xml", ".properties", ".env", ".sh", ".sql", ".js",
	".pem", ".crt", ".key", ".txt", ".html"}

// data keeps a path that is not in the commit like a volume.
func (c *converter) data(in types.ServiceConfig, m manifest.Mount, name string, seed bool, pos manifest.Pos) (manifest.Mount, bool) {
	if seed {
		c.add(manifest.Error, "volume", pos, in.Name, "x-gitops: seed: %s is not in the repository, so there is nothing to copy", name)
		return m, false
	}
	if slices.Contains(configEndings, path.Ext(name)) || slices.Contains(configEndings, path.Ext(m.Target)) {
		c.add(manifest.Notice, "data-like-file", pos, in.Name,
			"%s looks like a file but is not in the repository: it is kept as a directory that starts empty; "+
				"commit the file if %s is to have it", name, m.Target)
	}
	m.Kind, m.Source = manifest.MountData, name
	if rest, ok := strings.CutPrefix(name, "../"); ok {
		m.Source = path.Join("up", strings.ReplaceAll(rest, "../", "up/"))
		c.add(manifest.Notice, "data-outside", pos, in.Name,
			"%s lies outside of the stack's directory: the stack has data of its own for it; use an external volume to share data between stacks", name)
	}
	return m, true
}

// tellReadOnly says once a service which files of the repository the program can't write although the file does not say :ro.
func (c *converter) tellReadOnly(in types.ServiceConfig, mounts []manifest.Mount) {
	writable := map[string]bool{}
	for _, v := range in.Volumes {
		if !v.ReadOnly {
			writable[path.Clean(v.Target)] = true
		}
	}
	var targets []string
	for _, m := range mounts {
		if m.Kind == manifest.MountContent && !m.Seed && writable[m.Target] {
			targets = append(targets, m.Target)
		}
	}
	if len(targets) == 0 {
		return
	}
	slices.Sort(targets)
	pos, _ := c.locate("services", in.Name, "volumes", targets[0])
	c.add(manifest.Notice,
		"content-read-only", pos, in.Name, "mounted read-only, as files of the repository are: %s; x-gitops: seed makes a writable copy",
		strings.Join(targets, ", "))
}

// tmpfs reads the short form: /run:size=64m,mode=1777.
func (c *converter) tmpfs(service, spec string) (manifest.Mount, bool) {
	target, options, _ := strings.Cut(spec, ":")
	m := manifest.Mount{Kind: manifest.MountTmpfs, Target: path.Clean(target)}
	var rest []string
	for _, o := range strings.Split(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "":
		case "size":
			size, err := parseBytes(value)
			if err != nil || size <= 0 {
				c.refuse(service, "tmpfs", "%q: the size %q is not an amount such as 64m", spec, value)
				return m, false
			}
			m.Size = size
		case "mode":
			mode, err := strconv.ParseUint(value, 8, 32)
			if err != nil || mode > 0o7777 {
				c.refuse(service, "tmpfs", "%q: the mode %q is not an octal number such as 1777", spec, value)
				return m, false
			}
			m.Mode = uint32(mode)
		case "ro":
			m.ReadOnly = true
		case "uid", "gid", "nr_inodes", "nr_blocks", "noexec", "exec", "nosuid", "suid", "nodev", "dev", "noatime", "rw":
			rest = append(rest, o)
		default:
			c.refuse(service, "tmpfs", "%q: the option %q is not known", spec, o)
			return m, false
		}
	}
	m.Options = strings.Join(rest, ",")
	return m, true
}

// config mounts a config as a file of content.
func (c *converter) config(service string, use types.ServiceConfigObjConfig) (manifest.Mount, bool) {
	pos, _ := c.locate("services", service, "configs", use.Source)
	target := use.Target
	if target == "" {
		target = "/" + use.Source
	}
	if !path.IsAbs(target) {
		target = "/" + target
	}
	c.numbers(service, "configs."+use.Source, "the config "+use.Source, use.UID, use.GID)
	m := manifest.Mount{Kind: manifest.MountContent, Target: path.Clean(target), ReadOnly: true, UID: use.UID, GID: use.GID, Mode: 0o444}
	if use.Mode != nil {
		m.Mode = uint32(*use.Mode) & 0o7777
	}
	decl, ok := c.project.Configs[use.Source]
	if !ok {
		c.add(manifest.Error, "config-unknown", pos, service, "the config %q is not declared under the top-level configs:", use.Source)
		return m, false
	}
	at, _ := c.locate("configs", use.Source)
	switch {
	case bool(decl.External):
		c.add(manifest.Error, "config-external", at, service,
			"the config %s is external, and there is no store of configs here; keep the file in the repository: file: ./%s",
			use.Source, use.Source)
		return m, false
	case decl.File != "":
		name, inside := c.tree.rel(decl.File)
		if !inside {
			c.add(manifest.Error, "path-outside", at, service, "the file of the config %s is outside of the repository", use.Source)
			return m, false
		}
		data, err := c.tree.read(name)
		if err != nil {
			c.unreadable(name, err, at)
			return m, false
		}
		m.Source, m.Digest = c.fromStack(name), digest(data)
		c.blobs[m.Digest] = manifest.BlobRef{Path: name, Size: int64(len(data))}
		return m, true
	}
	if decl.Environment != "" {
		if _, set := c.vars.lookup(decl.Environment); !set {
			c.add(manifest.Error, "variable-required",
				at, service, "the config %s takes its text from the variable %s, which is not set; set it in .env, gitops.yaml or with --var",
				use.Source, decl.Environment)
			return m, false
		}
	} else if decl.Content == "" && !c.written("configs", use.Source, "content") {
		c.add(manifest.Error, "config", at, service, "the config %s has no content; give it file:, content: or environment:", use.Source)
		return m, false
	}
	data := []byte(decl.Content)
	m.Digest = digest(data)
	c.blobs[m.Digest] = manifest.BlobRef{Data: data, Size: int64(len(data))}
	return m, true
}

func (c *converter) written(parts ...string) bool {
	_, whole := c.locate(parts...)
	return whole
}

// maxSecret is the most that a secret may have, as in Swarm.
const maxSecret = 500 << 10

// secrets converts the top-level secrets. Their values go where no log, diff or hash sees them.
func (c *converter) secrets() {
	for _, key := range sortedKeys(c.project.Secrets) {
		in := c.project.Secrets[key]
		pos, _ := c.locate("secrets", key)
		c.at("secrets."+key, "secrets", key)
		if in.External {
			c.out.Secrets = append(c.out.Secrets, manifest.Secret{Name: in.Name, Key: key, External: true})
			continue
		}
		s := manifest.Secret{Name: c.out.Name + "/" + key, Key: key}
		value, elsewhere := c.secretValue(key, in, pos)
		if elsewhere != "" {
			// People keep such files out of Git on purpose: the value then comes the way of external secrets.
			s.External = true
			c.add(manifest.Notice, "secret-elsewhere",
				pos, "", "the value of the secret %s is not with this revision (%s); set it with: gitopsctl secret set %s",
				key, elsewhere, s.Name)
		} else if value != nil {
			c.out.SecretValues[s.Name] = value
		}
		c.out.Secrets = append(c.out.Secrets, s)
	}
	slices.SortFunc(c.out.Secrets, func(a, b manifest.Secret) int { return strings.Compare(a.Name+"\x00"+a.Key, b.Name+"\x00"+b.Key) })
}

// secretValue reads the value of a secret. When the revision does not hold it, elsewhere says why; nil without that is an error told.
func (c *converter) secretValue(key string, in types.SecretConfig, pos manifest.Pos) (value []byte, elsewhere string) {
	switch {
	case in.Environment != "" && in.File != "":
		c.errorf("secret", pos, "the secret %s has both file: and environment:; keep one of them", key)
		return nil, ""
	case in.Environment != "":
		v, set := c.vars.lookup(in.Environment)
		if !set {
			return nil, "the variable " + in.Environment + " is not set"
		}
		value = []byte(v)
	case in.File != "":
		name, inside := c.tree.rel(in.File)
		if !inside {
			return nil, "its file is one of a machine"
		}
		data, err := c.tree.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, "the file " + name + " is not in the repository"
		}
		if err != nil {
			c.unreadable(name, err, pos)
			return nil, ""
		}
		value = data
	default:
		c.errorf("secret", pos, "the secret %s has no value; give it file: or environment:, or external: true", key)
		return nil, ""
	}
	if len(value) > maxSecret {
		c.errorf("limit", pos, "the secret %s has %d bytes; a secret may have %s", key, len(value), manifest.Bytes(maxSecret))
		return nil, ""
	}
	return slices.Concat([]byte{}, value), ""
}

func (c *converter) secretUses(in types.ServiceConfig) []manifest.SecretUse {
	var out []manifest.SecretUse
	for _, use := range in.Secrets {
		decl, ok := c.project.Secrets[use.Source]
		if !ok {
			pos, _ := c.locate("services", in.Name, "secrets", use.Source)
			c.add(manifest.Error, "secret-unknown", pos, in.Name, "the secret %q is not declared under the top-level secrets:", use.Source)
			continue
		}
		u := manifest.SecretUse{Secret: c.out.Name + "/" + use.Source, Target: use.Target, UID: use.UID, GID: use.GID}
		if decl.External {
			u.Secret = decl.Name
		}
		if u.Target == "" {
			u.Target = use.Source
		}
		if !path.IsAbs(u.Target) {
			u.Target = "/run/secrets/" + u.Target
		}
		u.Target = path.Clean(u.Target)
		if use.Mode != nil {
			u.Mode = uint32(*use.Mode) & 0o7777
		}
		c.numbers(in.Name, "secrets."+use.Source, "the secret "+use.Source, use.UID, use.GID)
		c.at(in.Name+".secrets["+u.Target+"]", "services", in.Name, "secrets", use.Source)
		out = append(out, u)
	}
	slices.SortStableFunc(out, func(a, b manifest.SecretUse) int { return strings.Compare(a.Target, b.Target) })
	return out
}
