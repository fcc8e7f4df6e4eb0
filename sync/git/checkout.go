package git

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

// Checkout is one commit as a directory of plain files. It is immutable: the files are read-only and
// are never changed, and it stays until Prune is called without its Tree.
type Checkout struct {
	Dir     string    // absolute path of the root of the tree (not of Spec.Path)
	Ref     string    // the branch or tag it was found under, "main"
	Commit  string    // the commit's id, hex
	Tree    string    // the root tree's id, hex; it names Dir
	Author  string    // "Name <mail>", fit to be shown
	Subject string    // first line of the message, fit to be shown
	When    time.Time // the committer's date
	Signer  string    // who signed, as the list of signers names it; "" when nothing was verified
	// Problems are the entries that were not written, or not as they are meant, sorted by path.
	Problems []Problem

	list *listing
}

// Problem is an entry of a commit that is not in the checkout, or not as the commit has it.
type Problem struct {
	Path string      // relative to the root of the tree, fit to be shown
	Kind ProblemKind // the class, for callers that branch
	Text string      // a sentence: what is the matter, and the way out
}

// ProblemKind is the class of a Problem. The text is an id that may be shown and documented.
type ProblemKind string

// The classes of Problem.
const (
	ProblemSymlink   ProblemKind = "symlink"   // absolute, leaving the tree, dangling or looping; not written
	ProblemSubmodule ProblemKind = "submodule" // mode 160000; not written
	ProblemCollision ProblemKind = "collision" // differs from another name only by case; neither is written
	ProblemLFS       ProblemKind = "lfs"       // a Git LFS pointer stands where the file should be; written as it is
	ProblemTooLarge  ProblemKind = "too-large" // over Limits.File; not written
	ProblemName      ProblemKind = "name"      // control characters, a backslash, not UTF-8, too long; not written
)

// Hash is the id of a file or directory as the commit has it, "" being the root; false if the commit
// has no such path. Two paths with the same hash have the same content, names, links and executable
// bits below them, so what was rendered from one holds for the other. (The executable bit of a file
// itself belongs to its directory.) It costs one binary search.
func (c *Checkout) Hash(p string) (string, bool) {
	if p = strings.TrimPrefix(path.Clean("/"+p), "/"); c.list == nil {
		return "", false
	}
	e, ok := c.list.find(p)
	if !ok {
		return "", false
	}
	return e.ID, true
}

// The files of one tree lie in checkouts/<tree>/files, and beside them, in index, what the tree holds.
// Both arrive by one rename, so a tree is there whole or not at all.
const (
	filesName   = "files"
	indexName   = "index"
	checkoutTmp = ".incoming-"
	indexFormat = 1
)

// checkoutIndex is the content of an index file.
type checkoutIndex struct {
	Format   int
	Limits   Limits // what a listing was judged by; under other limits it is made again
	Entries  []entry
	Problems []Problem
}

// shelf is the directory of checkouts.
type shelf struct {
	root   *os.Root
	dir    string
	limits Limits
	known  map[string]bool // trees that this process has written, or has read and found whole
}

// open returns the listing of a tree that is on the shelf and whole. A tree that was written by an
// earlier process is read once and compared with the ids in its index: a machine that lost power may
// have kept the names of files without their content. What is damaged is removed.
func (s *shelf) open(tree string) (*listing, bool) {
	raw, err := s.root.ReadFile(path.Join(tree, indexName))
	if err != nil {
		s.remove(tree)
		return nil, false
	}
	var idx checkoutIndex
	if err := json.Unmarshal(raw, &idx); err != nil || idx.Format != indexFormat || idx.Limits != s.limits {
		s.remove(tree)
		return nil, false
	}
	l := &listing{Entries: idx.Entries, Problems: idx.Problems}
	if !s.known[tree] {
		if !s.whole(tree, l) {
			s.remove(tree)
			return nil, false
		}
		s.known[tree] = true
	}
	return l, true
}

// whole compares every file of a tree on the shelf with its id.
func (s *shelf) whole(tree string, l *listing) bool {
	for _, e := range l.Entries {
		if e.Absent {
			continue
		}
		name := path.Join(tree, filesName, e.Path)
		switch e.Mode {
		case modeDir:
			if st, err := s.root.Lstat(name); err != nil || !st.IsDir() {
				return false
			}
		case modeLink:
			if to, err := s.root.Readlink(name); err != nil || to != e.Target {
				return false
			}
		default:
			if !s.sameFile(name, e) {
				return false
			}
		}
	}
	return true
}

func (s *shelf) sameFile(name string, e entry) bool {
	st, err := s.root.Lstat(name)
	if err != nil || !st.Mode().IsRegular() || st.Size() != e.Size {
		return false
	}
	f, err := s.root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	h := blobHash(e.Size)
	_, err = io.Copy(h, f)
	return err == nil && hex.EncodeToString(h.Sum(nil)) == e.ID
}

// blobHash computes the id that Git gives a file of this size.
func blobHash(size int64) hash.Hash {
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", size)
	return h
}

func (s *shelf) remove(tree string) {
	delete(s.known, tree)
	_ = s.root.RemoveAll(tree)
}

// previous is a tree on the shelf whose files may be shared.
type previous struct {
	tree string
	list *listing
}

// write puts the files of l on the shelf as tree. A file that prev has too, at the same path with the
// same content, becomes a second name of the same file (a hard link): nothing ever writes to either.
func (s *shelf) write(ctx context.Context, objects storer.EncodedObjectStorer, tree string, l *listing, prev *previous) (err error) {
	tmp := checkoutTmp + tree
	_ = s.root.RemoveAll(tmp)
	defer func() {
		if err != nil {
			_ = s.root.RemoveAll(tmp)
			var own *Error
			if !errors.As(err, &own) && ctx.Err() == nil {
				err = fail(StoreFailed, "the checkout can't be written: "+err.Error(), "check the free space and the inodes of the disk")
			}
		}
	}()
	if err := s.root.MkdirAll(path.Join(tmp, filesName), 0o755); err != nil {
		return err
	}
	files, err := s.root.OpenRoot(path.Join(tmp, filesName))
	if err != nil {
		return err
	}
	defer files.Close()
	// Entries are sorted by path, so a directory comes before what it holds. Links come last: until
	// then no name in this directory can lead anywhere else.
	for i := range l.Entries {
		e := &l.Entries[i]
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case e.Absent || e.Path == "" || e.Mode == modeLink:
		case e.Mode == modeDir:
			if err := files.Mkdir(e.Path, 0o755); err != nil {
				return err
			}
		default:
			if s.share(tmp, e, prev) {
				break
			}
			if err := writeBlob(files, objects, e); err != nil {
				return err
			}
		}
		if e.LFS {
			l.problem(e.Path, ProblemLFS, "this is a pointer of Git LFS, not the file itself, and gitopsd does not fetch from LFS; commit the file, or put it in an image")
		}
	}
	for _, e := range l.Entries {
		if e.Mode == modeLink && !e.Absent {
			if err := files.Symlink(e.Target, e.Path); err != nil {
				return err
			}
		}
	}
	raw, err := json.Marshal(checkoutIndex{Format: indexFormat, Limits: s.limits, Entries: l.Entries, Problems: l.Problems})
	if err != nil {
		return err
	}
	if err := s.root.WriteFile(path.Join(tmp, indexName), raw, 0o444); err != nil {
		return err
	}
	s.remove(tree)
	if err := s.root.Rename(tmp, tree); err != nil {
		return err
	}
	s.known[tree] = true
	return nil
}

// share links e to the same file of prev and reports whether it did. Links can fail for many reasons
// (their number per file is bounded); the content is written then.
func (s *shelf) share(tmp string, e *entry, prev *previous) bool {
	if prev == nil {
		return false
	}
	old, ok := prev.list.find(e.Path)
	if !ok || old.ID != e.ID || old.Mode != e.Mode || old.Absent {
		return false
	}
	if s.root.Link(path.Join(prev.tree, filesName, e.Path), path.Join(tmp, filesName, e.Path)) != nil {
		return false
	}
	e.LFS = old.LFS
	return true
}

var lfsStart = []byte("version https://git-lfs.github.com/spec/")

// writeBlob writes one file and checks on the way that its content has the id it goes by.
func writeBlob(files *os.Root, objects storer.EncodedObjectStorer, e *entry) error {
	id := plumbing.NewHash(e.ID)
	o, err := objects.EncodedObject(plumbing.BlobObject, id)
	if err != nil {
		return missing(id, err)
	}
	r, err := o.Reader()
	if err != nil {
		return missing(id, err)
	}
	defer r.Close()
	perm := fs.FileMode(0o444)
	if e.Mode == modeExec {
		perm = 0o555
	}
	f, err := files.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	h := blobHash(e.Size)
	start := &prefixWriter{}
	n, err := io.Copy(io.MultiWriter(f, h, start), io.LimitReader(r, e.Size+1))
	if err = errors.Join(err, f.Chmod(perm), f.Close()); err != nil {
		return err
	}
	if n != e.Size || hex.EncodeToString(h.Sum(nil)) != e.ID {
		return failPath(Corrupt, e.Path, fmt.Sprintf("file %q does not have the content that its id promises", printable(e.Path, 200)), "run git fsck on the repository")
	}
	e.LFS = e.Size < 1024 && bytes.HasPrefix(start.buf, lfsStart)
	return nil
}

// prefixWriter keeps the first bytes written.
type prefixWriter struct{ buf []byte }

func (p *prefixWriter) Write(b []byte) (int, error) {
	if room := len(lfsStart) - len(p.buf); room > 0 {
		p.buf = append(p.buf, b[:min(room, len(b))]...)
	}
	return len(b), nil
}

// prune removes every tree that is not kept, and what a process that ended left half written.
func (s *shelf) prune(keep map[string]bool) error {
	dir, err := s.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if !keep[name] {
			delete(s.known, name)
			errs = append(errs, s.root.RemoveAll(name))
		}
	}
	return errors.Join(errs...)
}

// path is the directory of a tree's files.
func (s *shelf) path(tree string) string { return filepath.Join(s.dir, tree, filesName) }
