package blob

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// ErrListing says that a listing makes no sense, or names what lies outside its directory.
var ErrListing = errors.New("the listing of the directory is not valid")

// ReadListing reads a listing and checks it: paths are relative, clean, unique and inside; links end inside too; none passes through another entry that
// is no directory.
func (s *Store) ReadListing(digest string) ([]manifest.ListingEntry, error) {
	data, err := s.Read(digest)
	if err != nil {
		return nil, err
	}
	list, err := ParseListing(data)
	if err != nil {
		return nil, fmt.Errorf("read listing %s: %w", digest, err)
	}
	return list, nil
}

// ParseListing reads and checks the bytes of a listing, as ReadListing does.
func ParseListing(data []byte) ([]manifest.ListingEntry, error) {
	var list []manifest.ListingEntry
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&list); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListing, err)
	}
	leaves := map[string]bool{}
	for _, e := range list {
		if err := checkEntry(e); err != nil {
			return nil, fmt.Errorf("%w: %q %w", ErrListing, e.Path, err)
		}
		if leaves[e.Path] {
			return nil, fmt.Errorf("%w: %q is named twice", ErrListing, e.Path)
		}
		leaves[e.Path] = true
	}
	for _, e := range list {
		for dir := path.Dir(e.Path); dir != "."; dir = path.Dir(dir) {
			if leaves[dir] {
				return nil, fmt.Errorf("%w: %q lies below %q, which is no directory", ErrListing, e.Path, dir)
			}
		}
	}
	return list, nil
}

func checkEntry(e manifest.ListingEntry) error {
	switch {
	case e.Path == "." || !filepath.IsLocal(e.Path) || path.Clean(e.Path) != e.Path || strings.ContainsRune(e.Path, 0):
		return errors.New("is no clean path inside the directory")
	case e.Link == "" && !Valid(e.Digest):
		return errors.New("has no digest")
	case e.Link == "":
		return nil
	case e.Digest != "":
		return errors.New("is a file and a link at once")
	case path.IsAbs(e.Link) || !filepath.IsLocal(path.Join("x", path.Dir(e.Path), e.Link)) || escapes(path.Dir(e.Path), e.Link):
		return fmt.Errorf("is a link to %q, outside the directory", e.Link)
	}
	return nil
}

// escapes says whether a link in dir leads out of the top at any of its steps.
func escapes(dir, link string) bool {
	depth := 0
	if dir != "." {
		depth = strings.Count(dir, "/") + 1
	}
	for step := range strings.SplitSeq(link, "/") {
		switch step {
		case "", ".":
		case "..":
			if depth--; depth < 0 {
				return true
			}
		default:
			depth++
		}
	}
	return strings.ContainsRune(link, 0)
}

// Materialise lays out a content directory from its listing and returns its path, for read-only mounting. It is complete or not there: what is there
// already is used again. The files are read-only, executable where the listing says so. A blob that is missing or damaged is told of by its path.
func (s *Store) Materialise(listing string) (string, error) {
	list, err := s.ReadListing(listing)
	if err != nil {
		return "", fmt.Errorf("lay out content: %w", err)
	}
	dir, err := s.layout(treesDir, listing, func(root *os.Root) error {
		for _, e := range list {
			if err := s.place(root, e); err != nil {
				return fmt.Errorf("%s: %w", e.Path, err)
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("lay out content %s: %w", listing, err)
	}
	return dir, nil
}

// MaterialiseFile lays out one file and returns its path, for read-only mounting.
func (s *Store) MaterialiseFile(digest string, exec bool) (string, error) {
	if _, err := place(digest); err != nil {
		return "", fmt.Errorf("lay out content: %w", err)
	}
	name := "file"
	if exec {
		name = "program" // beside the other: the same bytes may be mounted both ways
	}
	dir, err := s.layout(filesDir, digest, func(root *os.Root) error {
		for _, e := range []manifest.ListingEntry{{Path: "file", Digest: digest}, {Path: "program", Digest: digest, Exec: true}} {
			if err := s.place(root, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("lay out content %s: %w", digest, err)
	}
	return filepath.Join(dir, name), nil
}

// layout fills a folder in tmp/ and moves it to its place.
func (s *Store) layout(kind, digest string, fill func(*os.Root) error) (string, error) {
	s.trees.Lock()
	defer s.trees.Unlock()
	at := kind + "/" + strings.TrimPrefix(digest, prefix)
	full := filepath.Join(s.opts.Dir, at)
	now := s.opts.Now()
	if info, err := s.root.Lstat(at); err == nil && info.IsDir() {
		return full, s.root.Chtimes(at, now, now)
	}
	tmp := tmpDir + "/" + tempName()
	if err := s.root.Mkdir(tmp, 0o755); err != nil {
		return "", err
	}
	err := s.fill(tmp, fill)
	if err == nil {
		err = s.root.Rename(tmp, at)
	}
	if err != nil {
		return "", errors.Join(err, s.removeAll(tmp))
	}
	return full, errors.Join(s.syncDir(kind), s.root.Chtimes(at, now, now))
}

func (s *Store) fill(tmp string, fill func(*os.Root) error) error {
	root, err := s.root.OpenRoot(tmp)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := fill(root); err != nil {
		return err
	}
	// A folder whose name is on disk but whose files are not would pass for complete after a power cut.
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		f, err := root.Open(p)
		if err != nil {
			return err
		}
		if d.IsDir() { // whatever the umask: containers run as other users
			err = f.Chmod(0o755)
		}
		return errors.Join(err, f.Sync(), f.Close())
	})
}

// place writes one entry of a listing.
func (s *Store) place(root *os.Root, e manifest.ListingEntry) error {
	if dir := path.Dir(e.Path); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if e.Link != "" {
		return root.Symlink(e.Link, e.Path)
	}
	r, err := s.Open(e.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	mode := fs.FileMode(0o444)
	if e.Exec {
		mode = 0o555
	}
	f, err := root.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.ReadFrom(r)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

// Listing writes a listing in the one form that ParseListing reads and that gives equal directories equal digests: sorted by path.
func Listing(entries []manifest.ListingEntry) []byte {
	sorted := slices.Clone(entries)
	slices.SortFunc(sorted, func(a, b manifest.ListingEntry) int { return strings.Compare(a.Path, b.Path) })
	if sorted == nil {
		sorted = []manifest.ListingEntry{}
	}
	return manifest.Canonical(sorted)
}

func tempName() string { return rand.Text() }

func (s *Store) removeAll(p string) error {
	if err := s.root.RemoveAll(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
