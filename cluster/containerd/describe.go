package containerd

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// Describe implements [worker.Images]. Nothing of the image is kept on the node.
func (r *Runtime) Describe(ctx context.Context, ref, platform string) (worker.Image, error) {
	n, err := named(ref)
	if err != nil {
		return worker.Image{}, err
	}
	match, err := matcher(platform)
	if err != nil {
		return worker.Image{}, err
	}
	ctx = r.in(ctx)
	tried := "look up image " + reference.FamiliarString(n)
	resolver := r.resolver()
	name, desc, err := resolver.Resolve(ctx, n.String())
	if err != nil {
		return worker.Image{}, r.registryError(ctx, err, tried, n)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return worker.Image{}, r.registryError(ctx, err, tried, n)
	}
	far := remoteDocuments{fetcher}
	img, _, err := readConfig(ctx, far, desc, match)
	switch {
	case errdefs.IsFailedPrecondition(err):
		return worker.Image{}, wrongContent(tried, n)
	case errdefs.IsNotFound(err):
		if no := noPlatform(ctx, far, desc, n, platform, match); no != nil {
			return worker.Image{}, no
		}
	}
	if err != nil {
		return worker.Image{}, r.registryError(ctx, err, tried, n)
	}
	if err := img.isFor(n, platform, match); err != nil {
		return worker.Image{}, err
	}
	return worker.Image{Ref: ref, Digest: desc.Digest.String(), Config: img.facts()}, nil
}

// remoteDocuments reads manifests, indexes and configurations from a registry into memory, none that is too large.
type remoteDocuments struct{ from remotes.Fetcher }

func (d remoteDocuments) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := checkDocument(desc.Digest.String(), desc.Size); err != nil {
		return nil, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	desc.URLs = nil // the image's registry is asked, nobody else
	body, err := d.from.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if desc.Digest.Algorithm().FromBytes(raw) != desc.Digest {
		return nil, fmt.Errorf("content of %s: %w", desc.Digest, errdefs.ErrFailedPrecondition)
	}
	return document{bytes.NewReader(raw)}, nil
}

// document is a blob in memory.
type document struct{ *bytes.Reader }

func (document) Close() error { return nil }
