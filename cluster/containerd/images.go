package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// An image has a record in containerd for each name it was asked for, tag or not, and one for its repository and digest; the second is
// what containers are made from, so that a moved tag changes nothing that runs.

type imageKey struct{ digest, platform string }

// imageFacts is what creating a container needs to know of an image. It never changes for a digest and a platform, so it is remembered.
type imageFacts struct {
	key    imageKey
	record string // name in containerd: repository@digest
	chain  string // snapshot of all layers
	config worker.ImageConfig

	users *userFiles // nil until the first container needs it
}

// named is a reference in its long form: docker.io/library/nginx:1.27, or with @digest.
func named(ref string) (reference.Named, error) {
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, permanent("image reference %q: %v", ref, err)
	}
	return n, nil
}

// pinned is the record's name for a digest of the repository that ref names.
func pinned(n reference.Named, d digest.Digest) string {
	return reference.TrimNamed(n).Name() + "@" + d.String()
}

func matcher(platform string) (platforms.MatchComparer, error) {
	if platform == "" {
		return platforms.Default(), nil
	}
	p, err := platforms.Parse(platform)
	if err != nil {
		return nil, permanent("platform %q: want a form such as linux/arm64", platform)
	}
	return platforms.Only(p), nil
}

func platformName(platform string) string { return firstOf(platform, platforms.DefaultString()) }

// Resolve implements [worker.Images]. A reference with a digest needs no registry.
func (r *Runtime) Resolve(ctx context.Context, ref, _ string) (string, error) {
	n, err := named(ref)
	if err != nil {
		return "", err
	}
	if d, ok := n.(reference.Digested); ok {
		return d.Digest().String(), nil
	}
	_, desc, err := r.resolver().Resolve(r.in(ctx), n.String())
	if err != nil {
		return "", r.registryError(ctx, err, "resolve image "+reference.FamiliarString(n), n)
	}
	return desc.Digest.String(), nil
}

// Ensure implements [worker.Images]. Several callers of one image share one pull.
func (r *Runtime) Ensure(ctx context.Context, ref, dgst, platform string) (worker.Image, error) {
	n, err := named(ref)
	if err != nil {
		return worker.Image{}, err
	}
	d, err := digest.Parse(dgst)
	if err != nil {
		return worker.Image{}, permanent("image %s: digest %q: %v", ref, dgst, err)
	}
	ctx = r.in(ctx)
	img, err := r.facts(ctx, ref, dgst, platform)
	if errors.Is(err, worker.ErrNotFound) {
		err = r.flights.do(ctx, dgst+" "+platformName(platform), func(ctx context.Context) error { return r.pull(r.in(ctx), n, d, platform) })
		if err == nil {
			img, err = r.facts(ctx, ref, dgst, platform)
		}
	}
	if err != nil {
		return worker.Image{}, err
	}
	if err := r.record(ctx, n, d); err != nil {
		return worker.Image{}, err
	}
	return worker.Image{Ref: ref, Digest: dgst, Config: img.config}, nil
}

// pull brings the image from its registry and unpacks it.
func (r *Runtime) pull(ctx context.Context, n reference.Named, d digest.Digest, platform string) error {
	match, err := matcher(platform)
	if err != nil {
		return err
	}
	select {
	case r.pulls <- struct{}{}:
		defer func() { <-r.pulls }()
	case <-ctx.Done():
		return ctx.Err()
	}
	// What a pull that fails has brought must live until it is looked at.
	ctx, done, err := r.client.WithLease(ctx)
	if err != nil {
		return wrap(err, "pull image %s", reference.FamiliarString(n))
	}
	defer r.release(ctx, done)
	start := time.Now()
	var bound bounds
	err = r.withRoom(ctx, "pull image "+reference.FamiliarString(n), func(ctx context.Context) error {
		_, err := r.client.Pull(ctx, pinned(n, d), client.WithPullUnpack, client.WithPullSnapshotter(r.o.Snapshotter),
			client.WithPlatformMatcher(match), client.WithResolver(r.resolver()), client.WithPullLabel(managedLabel, "true"),
			client.WithImageHandlerWrapper(bound.wrap))
		return err
	})
	if err != nil {
		if refused := bound.refused.Load(); refused != nil {
			return fmt.Errorf("pull image %s: %w", reference.FamiliarString(n), *refused)
		}
		var full *fullError
		if errors.As(err, &full) {
			return full
		}
		if full := diskFull(err, "pull image "+reference.FamiliarString(n)); full != nil {
			return full
		}
		if desc, derr := r.descriptor(ctx, d); derr == nil {
			if missing := noPlatform(ctx, r.client.ContentStore(), desc, n, platform, match); missing != nil {
				return missing
			}
		}
		if errdefs.IsFailedPrecondition(err) {
			r.abandon(ctx, err)
			return wrongContent("pull image "+reference.FamiliarString(n), n)
		}
		return r.registryError(ctx, err, "pull image "+reference.FamiliarString(n), n)
	}
	r.o.Logger.Info("pulled an image", "image", reference.FamiliarString(n), "digest", d.String(), "took", time.Since(start))
	return nil
}

// abandon removes the downloads that err names: with their wrong bytes kept, every later pull would fail as this one did.
func (r *Runtime) abandon(ctx context.Context, err error) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	list, listErr := r.client.ContentStore().ListStatuses(ctx)
	if listErr != nil {
		return // the next pull fails the same way and tries this again
	}
	for _, s := range list {
		if strings.Contains(err.Error(), s.Ref) {
			_ = r.client.ContentStore().Abort(ctx, s.Ref)
		}
	}
}

// noPlatform explains why an image can't be had where the cause is that it has no such platform; else nil.
func noPlatform(ctx context.Context, from content.Provider, desc ocispec.Descriptor, n reference.Named, platform string, match platforms.MatchComparer) error {
	if !images.IsIndexType(desc.MediaType) {
		return nil
	}
	raw, err := content.ReadBlob(ctx, from, desc)
	if err != nil {
		return nil
	}
	var index ocispec.Index
	if json.Unmarshal(raw, &index) != nil {
		return nil
	}
	var have []string
	for _, m := range index.Manifests {
		if m.Platform == nil || match.Match(*m.Platform) {
			return nil
		}
		if m.Platform.OS != "unknown" { // attestations call themselves so
			have = append(have, platforms.Format(*m.Platform))
		}
	}
	return permanent("image %s has no platform %s, it has: %s", reference.FamiliarString(n), platformName(platform), strings.Join(have, ", "))
}

// descriptor describes content that is on the node by its digest. The media type is read from the content itself.
func (r *Runtime) descriptor(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	info, err := r.client.ContentStore().Info(ctx, d)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{Digest: d, Size: info.Size}
	raw, err := content.ReadBlob(ctx, r.client.ContentStore(), desc)
	if err != nil {
		return desc, err
	}
	var head struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return desc, err
	}
	desc.MediaType = head.MediaType
	if desc.MediaType == "" {
		desc.MediaType = ocispec.MediaTypeImageManifest
		if head.Manifests != nil {
			desc.MediaType = ocispec.MediaTypeImageIndex
		}
	}
	return desc, nil
}

// Local implements [worker.Images].
func (r *Runtime) Local(ctx context.Context, ref, platform string) (worker.Image, error) {
	ctx = r.in(ctx)
	n, err := named(ref)
	if err != nil {
		return worker.Image{}, err
	}
	var dgst string
	if d, ok := n.(reference.Digested); ok {
		dgst = d.Digest().String()
	} else {
		rec, err := r.client.ImageService().Get(ctx, n.String())
		if err != nil {
			return worker.Image{}, wrap(err, "look for image %s on this node", reference.FamiliarString(n))
		}
		dgst = rec.Target.Digest.String()
	}
	img, err := r.facts(ctx, ref, dgst, platform)
	if err != nil {
		return worker.Image{}, err
	}
	return worker.Image{Ref: ref, Digest: dgst, Config: img.config}, nil
}

// Import implements [worker.Images]. The references are in their long form.
func (r *Runtime) Import(ctx context.Context, from io.Reader) ([]string, error) {
	ctx = r.in(ctx)
	// The content must live until it is unpacked and recorded, whatever happens to images of the same name meanwhile.
	ctx, done, err := r.client.WithLease(ctx)
	if err != nil {
		return nil, wrap(err, "import images")
	}
	defer r.release(ctx, done)
	loaded, err := r.client.Import(ctx, from, client.WithImageLabels(map[string]string{managedLabel: "true", importedLabel: "true"}), client.WithAllPlatforms(true),
		client.WithSkipMissing(), client.WithImageRefTranslator(longName))
	if err != nil {
		if full := diskFull(err, "import images"); full != nil {
			return nil, full
		}
		if isKind(err) {
			return nil, fmt.Errorf("import images: %w", err)
		}
		return nil, fmt.Errorf("import images: the archive cannot be read: %s", plain(err))
	}
	var refs []string
	for _, rec := range loaded {
		n, err := named(rec.Name)
		if err != nil {
			return refs, err
		}
		tried := fmt.Sprintf("import image %s: unpack it", reference.FamiliarString(n))
		if err := r.withRoom(ctx, tried, func(ctx context.Context) error { return wrap(r.unpack(ctx, rec), "%s", tried) }); err != nil {
			return refs, err
		}
		if err := r.record(ctx, n, rec.Target.Digest); err != nil {
			return refs, err
		}
		refs = append(refs, n.String())
	}
	if len(refs) == 0 {
		return nil, permanent("import images: the archive names no image: give it a name and tag when it is saved")
	}
	slices.Sort(refs)
	return slices.Compact(refs), nil
}

// release ends a lease on content.
func (r *Runtime) release(ctx context.Context, done func(context.Context) error) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if err := done(ctx); err != nil {
		r.o.Logger.Warn("a lease on images was left behind; it expires within a day", "error", err)
	}
}

// unpack makes the snapshots of an image's layers, for this node's platform where the image has it, else for what it has.
func (r *Runtime) unpack(ctx context.Context, rec images.Image) error {
	match := platforms.Default()
	has, err := images.Platforms(ctx, r.client.ContentStore(), rec.Target)
	if err == nil && len(has) > 0 && !slices.ContainsFunc(has, match.Match) {
		match = platforms.Only(has[0])
	}
	return client.NewImageWithPlatform(r.client, rec, match).Unpack(ctx, r.o.Snapshotter)
}

// longName is the name of an image whose archive has only its tag or short name; "" where there is nothing to make a name of.
func longName(name string) string {
	if !strings.ContainsAny(name, "/:") {
		return "" // a bare tag, as `v1`
	}
	n, err := reference.ParseDockerRef(name)
	if err != nil {
		return ""
	}
	return n.String()
}

// record names the content: by its repository and digest, and by the tag it was asked for.
func (r *Runtime) record(ctx context.Context, n reference.Named, d digest.Digest) error {
	names := []string{pinned(n, d)}
	if tagged, ok := n.(reference.Tagged); ok {
		names = append(names, reference.TrimNamed(n).Name()+":"+tagged.Tag())
	}
	var target ocispec.Descriptor
	for _, name := range names {
		have, err := r.client.ImageService().Get(ctx, name)
		if err == nil && have.Target.Digest == d {
			target = have.Target
			continue
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "record image %s", name)
		}
		if target.Digest == "" {
			if target, err = r.descriptor(ctx, d); err != nil {
				return wrap(err, "record image %s", name)
			}
		}
		rec := images.Image{Name: name, Target: target, Labels: map[string]string{managedLabel: "true"}}
		if _, err := r.client.ImageService().Create(ctx, rec); err != nil {
			if !errdefs.IsAlreadyExists(err) {
				return wrap(err, "record image %s", name)
			}
			if _, err := r.client.ImageService().Update(ctx, rec, "target"); err != nil {
				return wrap(err, "record image %s", name)
			}
		}
	}
	return nil
}

// facts tells of an image whose content and snapshot are on this node; ErrNotFound where something is missing.
func (r *Runtime) facts(ctx context.Context, ref, dgst, platform string) (*imageFacts, error) {
	n, err := named(ref)
	if err != nil {
		return nil, err
	}
	d, err := digest.Parse(dgst)
	if err != nil {
		return nil, permanent("image %s: digest %q: %v", ref, dgst, err)
	}
	key := imageKey{dgst, platformName(platform)}
	r.mu.Lock()
	known := r.images[key]
	r.mu.Unlock()
	record := pinned(n, d)
	if known != nil && known.record == record {
		return known, nil
	}
	match, err := matcher(platform)
	if err != nil {
		return nil, err
	}
	missing := func(err error) error {
		if errdefs.IsNotFound(err) {
			return withKind(worker.ErrNotFound, "image %s (%s, %s) is not on this node", reference.FamiliarString(n), dgst, platformName(platform))
		}
		return wrap(err, "look into image %s", reference.FamiliarString(n))
	}
	desc, err := r.descriptor(ctx, d)
	if err != nil {
		return nil, missing(err)
	}
	store := r.client.ContentStore()
	img, chain, err := readConfig(ctx, store, desc, match)
	if err != nil {
		if no := noPlatform(ctx, store, desc, n, platform, match); no != nil {
			return nil, no
		}
		return nil, missing(err)
	}
	if err := img.isFor(n, platform, match); err != nil {
		return nil, err
	}
	if _, err := r.client.SnapshotService(r.o.Snapshotter).Stat(ctx, chain); err != nil {
		return nil, missing(err)
	}
	if err := r.record(ctx, n, d); err != nil {
		return nil, err
	}
	f := &imageFacts{key: key, record: record, chain: chain, config: img.facts()}
	r.mu.Lock()
	r.images[key] = f
	r.mu.Unlock()
	return f, nil
}

// forget drops what is remembered of an image whose snapshot has gone.
func (r *Runtime) forget(img *imageFacts) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.images[img.key] == img {
		delete(r.images, img.key)
	}
}

// users reads the image's user lists, once.
func (r *Runtime) users(ctx context.Context, img *imageFacts) (*userFiles, error) {
	r.mu.Lock()
	u := img.users
	r.mu.Unlock()
	if u != nil {
		return u, nil
	}
	err := r.withImage(ctx, img.chain, func(root string) (err error) {
		u, err = imageUsers(root)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the users of image %s: %w", img.record, err)
	}
	r.mu.Lock()
	img.users = u
	r.mu.Unlock()
	return u, nil
}

// imageFile is the configuration file of an image. OCI's own type lacks the health check.
type imageFile struct {
	ocispec.Platform
	RootFS ocispec.RootFS `json:"rootfs"`
	Config struct {
		ocispec.ImageConfig
		Healthcheck *struct {
			Test          []string
			Interval      time.Duration // nanoseconds in the file
			Timeout       time.Duration
			StartPeriod   time.Duration
			StartInterval time.Duration
			Retries       int
		}
	} `json:"config"`
}

// readConfig reads the configuration of the image that the descriptor leads to, for the platform, and names the snapshot of its layers.
func readConfig(ctx context.Context, from content.Provider, desc ocispec.Descriptor, match platforms.MatchComparer) (*imageFile, string, error) {
	config, err := images.Config(ctx, from, desc, match)
	if err != nil {
		return nil, "", err
	}
	raw, err := content.ReadBlob(ctx, from, config)
	if err != nil {
		return nil, "", err
	}
	var f imageFile
	if err := json.Unmarshal(raw, &f); err != nil {
		return nil, "", permanent("the image's configuration cannot be read: %v", err)
	}
	if len(f.RootFS.DiffIDs) == 0 {
		return nil, "", permanent("the image has no layers")
	}
	return &f, identity.ChainID(f.RootFS.DiffIDs).String(), nil
}

// isFor says that the image is for another platform; nil where it is for this one.
func (f *imageFile) isFor(n reference.Named, platform string, match platforms.MatchComparer) error {
	if match.Match(f.Platform) {
		return nil
	}
	return permanent("image %s is for %s, not for %s", reference.FamiliarString(n), platforms.Format(f.Platform), platformName(platform))
}

func (f *imageFile) facts() worker.ImageConfig {
	c := worker.ImageConfig{
		User: f.Config.User, Entrypoint: f.Config.Entrypoint, Cmd: f.Config.Cmd, Env: f.Config.Env, WorkingDir: f.Config.WorkingDir,
		StopSignal: f.Config.StopSignal,
		Volumes:    slices.Sorted(maps.Keys(f.Config.Volumes)),
		Ports:      slices.Sorted(maps.Keys(f.Config.ExposedPorts)),
	}
	for i, p := range c.Ports {
		if !strings.Contains(p, "/") {
			c.Ports[i] = p + "/tcp"
		}
	}
	if h := f.Config.Healthcheck; h != nil && len(h.Test) > 0 && h.Test[0] != "NONE" {
		c.Health = &manifest.Health{
			Test: h.Test, Interval: manifest.Duration(h.Interval), Timeout: manifest.Duration(h.Timeout),
			StartPeriod: manifest.Duration(h.StartPeriod), StartInterval: manifest.Duration(h.StartInterval), Retries: h.Retries,
		}
	}
	return c
}

// Prune implements [worker.Images].
func (r *Runtime) Prune(ctx context.Context, keep []string, before time.Time) ([]string, error) {
	ctx = r.in(ctx)
	records, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, wrap(err, "list containers")
	}
	used := map[string]bool{}
	for _, d := range keep {
		used[d] = true
	}
	for _, rec := range records {
		used[rec.Labels[digestLabel]] = true
	}
	list, err := r.client.ImageService().List(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}
	for _, i := range list { // one name that is to stay keeps all names of the content
		if i.Labels[importedLabel] != "" || !i.UpdatedAt.Before(before) {
			used[i.Target.Digest.String()] = true
		}
	}
	list = slices.DeleteFunc(list, func(i images.Image) bool { return used[i.Target.Digest.String()] })
	var gone []string
	for _, i := range list {
		gone = append(gone, i.Name)
	}
	return gone, r.removeImages(ctx, list)
}

// removeImages removes the records of images, then what only they held: the last removal waits for that.
func (r *Runtime) removeImages(ctx context.Context, list []images.Image) error {
	slices.SortFunc(list, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	for i, rec := range list {
		var opts []images.DeleteOpt
		if i == len(list)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := r.client.ImageService().Delete(ctx, rec.Name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "remove image %s", rec.Name)
		}
		r.mu.Lock()
		maps.DeleteFunc(r.images, func(k imageKey, _ *imageFacts) bool { return k.digest == rec.Target.Digest.String() })
		r.mu.Unlock()
	}
	return nil
}

// removeContent removes all content of our namespace.
func (r *Runtime) removeContent(ctx context.Context) error {
	store := r.client.ContentStore()
	var all []digest.Digest
	err := store.Walk(ctx, func(info content.Info) error {
		all = append(all, info.Digest)
		return nil
	})
	if err != nil {
		return wrap(err, "list content")
	}
	for _, d := range all {
		if err := store.Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "remove content %s", d)
		}
	}
	partial, err := store.ListStatuses(ctx)
	if err != nil {
		return wrap(err, "list unfinished content")
	}
	for _, s := range partial {
		if err := store.Abort(ctx, s.Ref); err != nil && !errdefs.IsNotFound(err) {
			return wrap(err, "remove unfinished content %s", s.Ref)
		}
	}
	return nil
}
