package containerd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	units "github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Images come from strangers. containerd checks each digest, and applies layers inside of their snapshot: a name with `..` or a slash in front, or a link that leads out,
// stays in it, and device nodes are on a file system that allows none. What it does not bound is what is read into memory.

// maxDocument is the most that a manifest, index or configuration may have, in bytes: what the distribution specification has registries take.
const maxDocument = 4 << 20

// documents is a content store that reads no document into memory that is too large. Layers are read by containerd itself.
type documents struct{ content.Store }

func (d *documents) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := d.Store.ReaderAt(ctx, desc)
	if err != nil || desc.MediaType != "" && !isDocument(desc.MediaType) {
		return r, err
	}
	if err := checkDocument(desc.Digest.String(), r.Size()); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func isDocument(mediaType string) bool {
	return images.IsManifestType(mediaType) || images.IsIndexType(mediaType) || images.IsConfigType(mediaType)
}

func checkDocument(digest string, size int64) error {
	if size <= maxDocument {
		return nil
	}
	return permanent("the image's manifest or configuration %s has %s; %s are the limit", digest, units.BytesSize(float64(size)), units.BytesSize(maxDocument))
}

// bounds refuses the documents of a pull that are too large before they are fetched. Those who wait for one may be the first to fail, with another
// error, so it keeps its own.
type bounds struct{ refused atomic.Pointer[error] }

func (b *bounds) wrap(next images.Handler) images.Handler {
	return images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if isDocument(desc.MediaType) {
			if err := checkDocument(desc.Digest.String(), desc.Size); err != nil {
				b.refused.CompareAndSwap(nil, &err)
				return nil, err
			}
		}
		return next.Handle(ctx, desc)
	})
}

// Of the disk that holds the images this much stays free while one is unpacked, in bytes: a layer may expand without end, and a full disk harms the whole machine.
const maxReserve = 256 << 20

// roomCheck is the pause between looks at the disk. A fast disk takes some hundred MiB in it.
const roomCheck = 100 * time.Millisecond

// findRoom learns where containerd keeps unpacked images, and how much of the disk there is to stay free: a hundredth, or maxReserve.
func (r *Runtime) findRoom(ctx context.Context) {
	got, err := r.client.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1,id=="+r.o.Snapshotter)
	if err != nil || len(got.Plugins) == 0 {
		return
	}
	r.root = got.Plugins[0].Exports["root"]
	if size, _, err := room(r.root); err == nil {
		r.reserve = min(size/100, maxReserve)
	}
}

// room is how large the disk with a directory is, and what is left of it, in bytes.
func room(dir string) (size, left uint64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, 0, err
	}
	return fs.Blocks * uint64(fs.Bsize), fs.Bavail * uint64(fs.Bsize), nil
}

// withRoom does what fills the disk, and ends it when the disk is about to be full.
func (r *Runtime) withRoom(ctx context.Context, tried string, do func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() { ended <- do(ctx) }()
	tick := time.NewTicker(roomCheck)
	defer tick.Stop()
	for {
		if _, left, err := room(r.root); err == nil && left < r.reserve {
			cancel(&fullError{fmt.Sprintf("%s: it was stopped because the disk with %s has only %s left: make room there, or use a smaller image",
				tried, r.root, units.BytesSize(float64(left)))})
		}
		select {
		case err := <-ended:
			var full *fullError
			if err != nil && errors.As(context.Cause(ctx), &full) {
				return full
			}
			return err
		case <-tick.C:
		}
	}
}

// diskFull is an error that says so; nil where err says nothing of it. containerd tells it in words only.
func diskFull(err error, tried string) error {
	if !strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		return nil
	}
	return &fullError{tried + ": the disk of containerd is full: " + plain(err) + "; make room there, or use a smaller image"}
}

type fullError struct{ text string }

func (e *fullError) Error() string { return e.text }
func (e *fullError) Unwrap() error { return syscall.ENOSPC }
