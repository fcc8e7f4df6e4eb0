package compose

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// errOutside says that a path, after its symbolic links, leaves the repository.
var errOutside = errors.New("the path leaves the repository")

// tooBig is a file or a set of files over a limit.
type tooBig struct{ what string }

func (e tooBig) Error() string { return e.what }

// checkout reads a tree and nothing else. All its paths are relative to the root, with slashes. Each path that was read or probed is
// noted, so that a cache knows what a rendering depends on.
type checkout struct {
	root   string // absolute, without symbolic links
	limits Limits
	hash   func(string) (string, bool)
	noted  map[string]bool
}

func newCheckout(root string, limits Limits, hash func(string) (string, bool)) (*checkout, error) {
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, fmt.Errorf("open the tree: %w", err)
	}
	if real, err = filepath.Abs(real); err != nil {
		return nil, fmt.Errorf("open the tree: %w", err)
	}
	return &checkout{root: real, limits: limits, hash: hash, noted: map[string]bool{}}, nil
}

// note remembers that the result depends on the path.
func (t *checkout) note(rel string) { t.noted[rel] = true }

// abs is the path as the operating system and compose-go know it.
func (t *checkout) abs(rel string) string { return filepath.Join(t.root, filepath.FromSlash(rel)) }

// rel turns an absolute path below the root back. Others are not of the tree.
func (t *checkout) rel(abs string) (string, bool) {
	abs = filepath.Clean(abs)
	if abs == t.root {
		return ".", true
	}
	rest, ok := strings.CutPrefix(abs, strings.TrimSuffix(t.root, string(filepath.Separator))+string(filepath.Separator))
	return filepath.ToSlash(rest), ok
}

// resolve follows the symbolic links of a path. The error is errOutside, or wraps fs.ErrNotExist when the path is inside but not there.
func (t *checkout) resolve(rel string) (string, error) {
	rel = path.Clean(rel)
	if strings.ContainsRune(rel, 0) {
		return "", errOutside
	}
	if path.IsAbs(rel) || rel == ".." || strings.HasPrefix(rel, "../") || slices.Contains(strings.Split(rel, "/"), ".git") {
		return "", errOutside
	}
	t.note(rel)
	real, err := filepath.EvalSymlinks(t.abs(rel))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("follow %s: %w", rel, bare(err))
		}
		// The part that does exist must not lead out either.
		if parent := path.Dir(rel); rel != "." {
			if _, perr := t.resolve(parent); errors.Is(perr, errOutside) {
				return "", errOutside
			}
		}
		if target, lerr := os.Readlink(t.abs(rel)); lerr == nil && (filepath.IsAbs(target) || !t.inside(path.Join(path.Dir(rel), target))) {
			return "", errOutside
		}
		return "", fmt.Errorf("%s: %w", rel, fs.ErrNotExist)
	}
	out, ok := t.rel(real)
	if !ok || slices.Contains(strings.Split(out, "/"), ".git") {
		return "", errOutside
	}
	if out != rel {
		// A changed link on the way changes the result as well.
		t.note(out)
		for p := path.Dir(rel); p != "."; p = path.Dir(p) {
			t.note(p)
		}
	}
	return out, nil
}

func (t *checkout) inside(rel string) bool { return rel != ".." && !strings.HasPrefix(rel, "../") }

// bare drops the path from a file system error: it would name the checkout's place on this machine.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// stat describes what a path of the tree leads to.
func (t *checkout) stat(rel string) (fs.FileInfo, error) {
	real, err := t.resolve(rel)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(t.abs(real))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rel, bare(err))
	}
	return info, nil
}

// read returns the bytes of a regular file of at most Limits.FileSize.
func (t *checkout) read(rel string) ([]byte, error) {
	info, err := t.stat(rel)
	if err != nil {
		return nil, err
	}
	switch {
	case info.IsDir():
		return nil, fmt.Errorf("%s is a directory, not a file", rel)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", rel)
	case info.Size() > t.limits.FileSize:
		return nil, tooBig{fmt.Sprintf("%s has %d bytes; a file may have %s", rel, info.Size(), manifest.Bytes(t.limits.FileSize))}
	}
	f, err := os.Open(t.abs(rel))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rel, bare(err))
	}
	defer f.Close()
	// A file of a work tree can grow while it is read.
	data, err := io.ReadAll(io.LimitReader(f, t.limits.FileSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rel, bare(err))
	}
	if int64(len(data)) > t.limits.FileSize {
		return nil, tooBig{fmt.Sprintf("%s has more than %s; a file may have no more", rel, manifest.Bytes(t.limits.FileSize))}
	}
	return data, nil
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// content is what a content mount ships: a file, or a directory as a listing of files.
type content struct {
	digest string
	dir    bool
	blobs  map[string]manifest.BlobRef
}

// content reads a path of the commit to be mounted.
func (t *checkout) content(rel string) (content, error) {
	info, err := t.stat(rel)
	if err != nil {
		return content{}, err
	}
	if !info.IsDir() {
		data, err := t.read(rel)
		if err != nil {
			return content{}, err
		}
		d := digest(data)
		return content{digest: d, blobs: map[string]manifest.BlobRef{d: {Path: rel, Size: int64(len(data))}}}, nil
	}
	real, err := t.resolve(rel)
	if err != nil {
		return content{}, err
	}
	w := listing{tree: t, top: real, blobs: map[string]manifest.BlobRef{}}
	if err := w.walk(real); err != nil {
		return content{}, err
	}
	data := manifest.Canonical(w.entries)
	d := digest(data)
	w.blobs[d] = manifest.BlobRef{Data: data, Size: int64(len(data))}
	return content{digest: d, dir: true, blobs: w.blobs}, nil
}

// listing collects the files of one directory, in the order of their names.
type listing struct {
	tree    *checkout
	top     string
	entries []manifest.ListingEntry
	blobs   map[string]manifest.BlobRef
	bytes   int64
}

func (w *listing) walk(dir string) error {
	list, err := os.ReadDir(w.tree.abs(dir))
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, bare(err))
	}
	for _, e := range list {
		name := path.Join(dir, e.Name())
		switch {
		case e.Name() == ".git":
			continue
		case e.IsDir():
			if err := w.walk(name); err != nil {
				return err
			}
		case e.Type()&fs.ModeSymlink != 0:
			if err := w.link(name); err != nil {
				return err
			}
		default:
			if err := w.file(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *listing) relative(name string) string {
	return strings.TrimPrefix(strings.TrimPrefix(name, w.top), "/")
}

func (w *listing) add(e manifest.ListingEntry) error {
	if len(w.entries) == w.tree.limits.ContentFiles {
		return tooBig{fmt.Sprintf("the directory %s has more than %d files; mount a smaller one, or put the files into an image",
			w.top, len(w.entries))}
	}
	w.entries = append(w.entries, e)
	return nil
}

func (w *listing) file(name string) error {
	data, err := w.tree.read(name)
	if err != nil {
		return err
	}
	info, err := w.tree.stat(name)
	if err != nil {
		return err
	}
	if w.bytes += int64(len(data)); w.bytes > w.tree.limits.ContentSize {
		return tooBig{fmt.Sprintf("the directory %s has more than %s; mount a smaller one, or put the files into an image",
			w.top, manifest.Bytes(w.tree.limits.ContentSize))}
	}
	d := digest(data)
	w.blobs[d] = manifest.BlobRef{Path: name, Size: int64(len(data))}
	return w.add(manifest.ListingEntry{Path: w.relative(name), Digest: d, Exec: info.Mode()&0o100 != 0, Size: int64(len(data))})
}

// link keeps a symbolic link that stays inside the mounted directory, and takes a copy of what one elsewhere in the repository leads to.
func (w *listing) link(name string) error {
	real, err := w.tree.resolve(name)
	if err != nil {
		return err
	}
	if real == w.top || strings.HasPrefix(real, w.top+"/") || w.top == "." {
		target, err := os.Readlink(w.tree.abs(name))
		if err != nil {
			return fmt.Errorf("read the link %s: %w", name, bare(err))
		}
		if filepath.IsAbs(target) {
			return fmt.Errorf("the link %s is absolute and leads nowhere inside a container; make it relative: %w", name, errOutside)
		}
		return w.add(manifest.ListingEntry{Path: w.relative(name), Link: filepath.ToSlash(target)})
	}
	if info, err := w.tree.stat(name); err != nil {
		return err
	} else if info.IsDir() {
		return fmt.Errorf("the link %s leads to a directory outside of the mounted one; mount that directory by itself", name)
	}
	return w.file(name)
}
