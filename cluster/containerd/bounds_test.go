package containerd

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/image"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// hostile is an image with one layer, of which a test says what is in it.
type hostile struct {
	layer   []byte // tar
	padding int    // bytes of space in front of the manifest
	config  int    // and of the configuration
	zeros   int64  // the layer is one file of so many zeros instead
	blobs   map[digest.Digest][]byte
}

func (h *hostile) put(data []byte, mediaType string) map[string]any {
	d := digest.FromBytes(data)
	h.blobs[d] = data
	return map[string]any{"mediaType": mediaType, "digest": d, "size": len(data)}
}

// manifest makes all blobs.
func (h *hostile) manifest(t *testing.T) map[string]any {
	t.Helper()
	h.blobs = map[digest.Digest][]byte{}
	document := func(padding int, v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return append(bytes.Repeat([]byte(" "), padding), data...)
	}
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	sum := digest.SHA256.Hash()
	both := io.MultiWriter(w, sum)
	_, _ = both.Write(h.layer)
	if h.zeros > 0 {
		files := tar.NewWriter(both)
		_ = files.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: h.zeros})
		for n, chunk := int64(0), make([]byte, 1<<20); n < h.zeros; n += int64(len(chunk)) {
			_, _ = files.Write(chunk)
		}
		_ = files.Close()
	}
	_ = w.Close()
	config := h.put(document(h.config, map[string]any{"os": "linux", "architecture": runtime.GOARCH,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []digest.Digest{digest.NewDigest(digest.SHA256, sum)}}}), "application/vnd.oci.image.config.v1+json")
	layer := h.put(zipped.Bytes(), "application/vnd.oci.image.layer.v1.tar+gzip")
	return h.put(document(h.padding, map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
		"layers": []any{layer}}), "application/vnd.oci.image.manifest.v1+json")
}

// archive is the image as an OCI archive.
func (h *hostile) archive(t *testing.T, name string) *bytes.Buffer {
	t.Helper()
	m := h.manifest(t)
	m["annotations"] = map[string]string{"io.containerd.image.name": name}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{m}})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for d, data := range h.blobs {
		files["blobs/sha256/"+d.Encoded()] = data
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &out
}

// registry serves the image and nothing else, and returns its reference and digest.
func (h *hostile) registry(t *testing.T) (ref, dgst string) {
	t.Helper()
	m := h.manifest(t)
	d := m["digest"].(digest.Digest)
	host := serve(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		data, ok := h.blobs[digest.Digest(filepath.Base(req.URL.Path))]
		if strings.HasSuffix(req.URL.Path, "/manifests/1") {
			data, ok = h.blobs[d], true
		}
		switch {
		case req.URL.Path == "/v2/":
		case !ok:
			http.NotFound(w, req)
		default:
			if strings.Contains(req.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", m["mediaType"].(string))
			}
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(data).String())
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
		}
	})})
	return host + "/hostile/image:1", d.String()
}

func layerOf(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		text := ""
		if e.Typeflag == tar.TypeReg {
			text = cmp.Or(e.PAXRecords["TEST.content"], "hostile")
			e.PAXRecords, e.Size = nil, int64(len(text))
		}
		if e.Mode == 0 {
			e.Mode = 0o755
		}
		if err := w.WriteHeader(&e); err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write([]byte(text))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// A manifest or configuration of 100 MiB is refused by its size, on a pull or a look before it is fetched, and read into no memory.
func TestHugeManifestIsRefused(t *testing.T) {
	n := newNode(t)
	layer := layerOf(t, tar.Header{Name: "file", Typeflag: tar.TypeReg})
	for _, h := range []*hostile{{layer: layer, padding: 100 << 20}, {layer: layer, config: 100 << 20}} {
		_, err := n.Import(n.ctx, h.archive(t, "docker.io/hostile/image:1"))
		if !errors.Is(err, worker.ErrPermanent) || !strings.Contains(fmt.Sprint(err), "100MiB; 4MiB are the limit") {
			t.Errorf("import: %v", err)
		}
		h.padding, h.config = 2*h.padding, 2*h.config // content of its own, not what the import brought
		ref, d := h.registry(t)
		if _, err = n.Describe(n.ctx, ref, ""); !errors.Is(err, worker.ErrPermanent) || !strings.Contains(fmt.Sprint(err), "4MiB are the limit") {
			t.Errorf("describe: %v", err)
		}
		_, err = n.Ensure(n.ctx, ref, d, "")
		if !errors.Is(err, worker.ErrPermanent) || !strings.Contains(fmt.Sprint(err), "4MiB are the limit") {
			t.Errorf("pull: %v", err)
		}
	}
}

// What a layer names with .. or an absolute path, or through a link that leads out, lands in the image or is refused; nothing of the host is touched.
func TestLayerThatLeadsOut(t *testing.T) {
	n := newNode(t)
	mark, kept := filepath.Join(t.TempDir(), "mark"), filepath.Join(t.TempDir(), "kept") // on the host; layers try to write one and to remove the other
	n.must(os.WriteFile(kept, nil, 0o600))
	up := strings.Repeat("../", 30)
	for name, entries := range map[string][]tar.Header{
		"up":       {{Name: up + mark, Typeflag: tar.TypeReg}},
		"absolute": {{Name: mark, Typeflag: tar.TypeReg}},
		"link":     {{Name: "way", Linkname: "/", Typeflag: tar.TypeSymlink}, {Name: "way" + mark, Typeflag: tar.TypeReg}},
		"up link":  {{Name: "way", Linkname: up, Typeflag: tar.TypeSymlink}, {Name: "way" + mark, Typeflag: tar.TypeReg}},
		"hardlink": {{Name: "way", Linkname: up + "etc/passwd", Typeflag: tar.TypeLink}},
		"whiteout": {{Name: up + filepath.Dir(kept) + "/.wh." + filepath.Base(kept), Typeflag: tar.TypeReg}},
	} {
		h := hostile{layer: layerOf(t, entries...)}
		_, err := n.Import(n.ctx, h.archive(t, "docker.io/hostile/"+strings.ReplaceAll(name, " ", "")+":1"))
		if _, gone := os.Lstat(kept); gone != nil {
			t.Errorf("%s: a file of the host was removed", name)
		}
		if _, there := os.Lstat(mark); there == nil {
			t.Errorf("%s: a file was written on the host", name)
		}
		if name == "hardlink" && err == nil {
			t.Error("a hard link to a file of the host was made")
		}
	}
}

// A device node that a layer brings opens nothing: the container's own rules are about all of them.
func TestDeviceNodeOfALayerOpensNothing(t *testing.T) {
	n := newNode(t)
	file, err := image.Workload(n.ctx, runtime.GOARCH)
	n.must(err)
	program, err := os.ReadFile(file)
	n.must(err)
	h := hostile{layer: layerOf(t, tar.Header{Name: "mem", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1, Mode: 0o666},
		tar.Header{Name: "cat", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"TEST.content": string(program)}})}
	refs, err := n.Import(n.ctx, h.archive(t, "docker.io/hostile/device:1"))
	n.must(err)
	img, err := n.Local(n.ctx, refs[0], "")
	n.must(err)
	s := worker.ContainerSpec{ID: "app", Image: refs[0], Digest: img.Digest, LogDir: filepath.Join(n.logs, "app"),
		Spec: manifest.Container{Name: "app", Image: refs[0], Entrypoint: &[]string{"/cat", "/mem"}}}
	if out := n.output(s); !strings.Contains(out, "operation not permitted") {
		t.Errorf("reading /dev/mem says %.200q", out)
	}
}

// A layer of some MiB that expands to fill the disk is stopped before it has, on import and on pull, and what it wrote goes.
func TestLayerThatFillsTheDisk(t *testing.T) {
	n := newNode(t)
	if n.root == "" {
		t.Fatal("containerd does not say where it unpacks images")
	}
	left := func() uint64 {
		_, left, err := room(n.root)
		n.must(err)
		return left
	}
	h := hostile{zeros: 1 << 30}
	bomb := h.archive(t, "docker.io/hostile/bomb:1")
	ref, d := h.registry(t)
	n.reserve = left() - 128<<20
	for what, bring := range map[string]func() error{
		"import": func() error { _, err := n.Import(n.ctx, bomb); return err },
		"pull":   func() error { _, err := n.Ensure(n.ctx, ref, d, ""); return err },
	} {
		if err := bring(); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(fmt.Sprint(err), "it was stopped because the disk") {
			t.Errorf("%s: %v", what, err)
		}
		n.until("what it wrote to go", func() bool { return left() > n.reserve })
	}
}

// A full disk is told as that, also where containerd tells it in words only: the worker has a reason of its own for it.
func TestFullDiskIsToldAsSuch(t *testing.T) {
	err := wrap(errors.New("rpc error: code = Unknown desc = failed to extract layer: write /x/y: no space left on device"), "pull image big")
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "pull image big: the disk of containerd is full") || !strings.Contains(err.Error(), "make room") {
		t.Errorf("got %v", err)
	}
	if err := wrap(errors.New("no such space"), "pull"); errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
}
