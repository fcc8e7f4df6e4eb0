package git

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

// Limits bound what one repository may cost. Zero fields take the defaults.
type Limits struct {
	Pack    int64         // bytes read from the remote in one fetch; 1 GiB. Unpacked, it may be four times that
	Object  int64         // inflated size of one object of a pack; 128 MiB
	File    int64         // size of one file of a checkout; 64 MiB. A larger one is a Problem
	Tree    int64         // size of all files of a checkout together; 512 MiB
	Entries int           // files and directories of a checkout; 100,000
	Depth   int           // directories below each other; 64
	History int           // commits before a tip that are fetched with it; 50
	Time    time.Duration // one operation; 2 minutes
}

func (l Limits) withDefaults() Limits {
	for _, f := range []struct {
		v   *int64
		def int64
	}{{&l.Pack, 1 << 30}, {&l.Object, 128 << 20}, {&l.File, 64 << 20}, {&l.Tree, 512 << 20}} {
		if *f.v <= 0 {
			*f.v = f.def
		}
	}
	for _, f := range []struct {
		v   *int
		def int
	}{{&l.Entries, 100_000}, {&l.Depth, 64}, {&l.History, 50}} {
		if *f.v <= 0 {
			*f.v = f.def
		}
	}
	if l.Time <= 0 {
		l.Time = 2 * time.Minute
	}
	return l
}

// Store keeps the objects and checkouts of all sources below one directory:
//
//	repos/<key>/          a bare repository for each URL, with the last commits of what was followed
//	checkouts/<tree>/     the files of one tree, shared by all sources that have it
//
// All of it can be deleted while no process uses it: the next Fetch brings it again. It is safe for
// concurrent use by one process; operations on one repository wait for each other.
type Store struct {
	dir    string
	limits Limits

	mu    sync.Mutex // guards locks
	locks map[string]chan struct{}

	shelfMu sync.Mutex // guards shelf
	shelf   *shelf
}

// maxPacks is the number of packs after which a repository is fetched afresh. Each fetch adds one.
const maxPacks = 64

// Open makes dir if it is missing and returns a Store on it. Zero fields of limits take the defaults.
func Open(dir string, limits Limits) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open the source store: %w", err)
	}
	checkouts := filepath.Join(dir, "checkouts")
	for _, d := range []string{filepath.Join(dir, "repos"), checkouts} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open the source store: %w", err)
		}
	}
	root, err := os.OpenRoot(checkouts)
	if err != nil {
		return nil, fmt.Errorf("open the source store: %w", err)
	}
	limits = limits.withDefaults()
	// Only the limits that judge a tree belong to what was judged.
	judged := Limits{File: limits.File, Tree: limits.Tree, Entries: limits.Entries, Depth: limits.Depth}
	return &Store{
		dir: dir, limits: limits, locks: map[string]chan struct{}{},
		shelf: &shelf{root: root, dir: checkouts, limits: judged, known: map[string]bool{}},
	}, nil
}

// Close releases the Store's directory handle.
func (s *Store) Close() error { return s.shelf.root.Close() }

// Tip is what a branch or tag points to.
type Tip struct {
	Ref    string // short name, "main" or "v1.2"
	Commit string // the commit's id, hex
	Object string // the annotated tag's id for an annotated tag, else the same as Commit; may be left empty for the latter
}

// Resolve asks the remote once what the source's ref points to, without fetching anything.
func (s *Store) Resolve(ctx context.Context, spec Spec) (tip Tip, err error) {
	ctx, done, loc, err := s.begin(ctx, "look at", spec, &err)
	if err != nil {
		return Tip{}, err
	}
	defer done()
	a, err := lookup(ctx, spec, loc, s.limits)
	if err != nil {
		return Tip{}, err
	}
	return a.tip(spec)
}

// lookup is one ls-remote.
func lookup(ctx context.Context, spec Spec, loc location, limits Limits) (*advert, error) {
	r, err := openRemote(spec, loc, limits)
	if err != nil {
		return nil, err
	}
	defer r.close()
	return r.refs(ctx)
}

// begin checks spec and sets the deadline; done must be deferred, it explains *err.
func (s *Store) begin(parent context.Context, verb string, spec Spec, err *error) (context.Context, func(), location, error) {
	loc, specErr := spec.location()
	if specErr != nil {
		return nil, nil, loc, explainSpec(spec, specErr)
	}
	ctx, cancel := context.WithTimeout(parent, s.limits.Time)
	return ctx, func() {
		*err = explain(ctx, verb+" "+spec.String(), StoreFailed, *err, spec.secrets())
		cancel()
	}, loc, nil
}

// Fetch brings the commit of tip, verifies its signature as spec wants it, judges its tree and writes
// its files. Nothing of the commit is written before its signature was verified. A commit that is here
// already costs no network; a tree that is here already costs no writing. What refuses the commit as a
// whole is an error; what concerns one path is among the Problems of the Checkout.
func (s *Store) Fetch(ctx context.Context, spec Spec, tip Tip) (c *Checkout, err error) {
	if tip.Object == "" {
		tip.Object = tip.Commit
	}
	if !isHexID(tip.Commit) || !isHexID(tip.Object) {
		return nil, fail(RefNotFound, fmt.Sprintf("fetch %s: %q is not a full commit id", spec, printable(tip.Commit, 60)), "")
	}
	ctx, done, loc, err := s.begin(ctx, "fetch", spec, &err)
	if err != nil {
		return nil, err
	}
	defer done()
	repo, unlock, err := s.lock(ctx, loc)
	if err != nil {
		return nil, err
	}
	defer unlock()
	remote := &lazyRemote{open: func() (remote, error) { return openRemote(spec, loc, s.limits) }}
	defer remote.close()

	reused, err := repo.ensure(ctx, remote, tip, s.limits)
	if err != nil {
		return nil, err
	}
	c, err = s.check(ctx, repo, spec, tip)
	if errors.Is(err, Corrupt) && reused {
		// What was here may be damaged on our side. Fetch it afresh before the repository is blamed.
		if err := repo.reset(); err != nil {
			return nil, err
		}
		remote.close()
		if _, err := repo.ensure(ctx, remote, tip, s.limits); err != nil {
			return nil, err
		}
		c, err = s.check(ctx, repo, spec, tip)
	}
	return c, err
}

// check verifies the tip and makes the checkout of its tree.
func (s *Store) check(ctx context.Context, repo *repository, spec Spec, tip Tip) (*Checkout, error) {
	objects := repo.objects()
	if _, end, err := peel(objects, plumbing.NewHash(tip.Object)); err != nil {
		return nil, err
	} else if end.String() != tip.Commit {
		return nil, fail(Corrupt, "the tag object "+tip.Object+" does not name commit "+tip.Commit, "")
	}
	commit, err := readCommit(objects, plumbing.NewHash(tip.Commit))
	if err != nil {
		return nil, err
	}
	signer, err := verifyTip(objects, spec, tip, commit)
	if err != nil {
		return nil, err
	}
	list, err := s.materialise(ctx, repo, objects, commit.tree)
	if err != nil {
		return nil, err
	}
	tree := commit.tree.String()
	if p := cleanSubPath(spec.Path); p != "" {
		if e, ok := list.find(p); !ok || e.Mode != modeDir {
			return nil, failPath(PathNotFound, p, fmt.Sprintf("the commit has no directory %q", printable(p, 200)), list.nearDirs(p))
		}
	}
	repo.lastTree = tree
	return &Checkout{
		Dir: s.shelf.path(tree), Ref: tip.Ref, Commit: tip.Commit, Tree: tree,
		Author: commit.author, Subject: commit.subject, When: commit.when, Signer: signer,
		Problems: slices.Clone(list.Problems), list: list,
	}, nil
}

func (s *Store) materialise(ctx context.Context, repo *repository, objects *filesystem.Storage, tree plumbing.Hash) (*listing, error) {
	s.shelfMu.Lock()
	defer s.shelfMu.Unlock()
	if list, ok := s.shelf.open(tree.String()); ok {
		return list, nil
	}
	var prev *previous
	if repo.lastTree != "" {
		if old, ok := s.shelf.open(repo.lastTree); ok {
			prev = &previous{tree: repo.lastTree, list: old}
		}
	}
	list, err := listTree(objects, tree, s.limits, prev)
	if err != nil {
		return nil, err
	}
	if err := s.shelf.write(ctx, objects, tree.String(), list, prev); err != nil {
		return nil, err
	}
	return list, nil
}

// nearDirs names directories that the person may have meant.
func (l *listing) nearDirs(p string) string {
	if e, ok := l.find(p); ok && e.Mode != modeDir {
		return "it is a file; give the directory it is in"
	}
	parent := p
	for parent != "" {
		if i := strings.LastIndexByte(parent, '/'); i >= 0 {
			parent = parent[:i]
		} else {
			parent = ""
		}
		if e, ok := l.find(parent); ok && e.Mode == modeDir {
			break
		}
	}
	var names []string
	for _, e := range l.Entries {
		rest, ok := strings.CutPrefix(e.Path, parent)
		if rest = strings.TrimPrefix(rest, "/"); ok && e.Mode == modeDir && rest != "" && !strings.Contains(rest, "/") {
			names = append(names, printable(e.Path, 60))
		}
	}
	if len(names) == 0 {
		return "there is no directory at that level"
	}
	more := ""
	if len(names) > 5 {
		more = fmt.Sprintf(" and %d more", len(names)-5)
		names = names[:5]
	}
	return "there are: " + strings.Join(names, ", ") + more
}

// Prune removes the checkouts whose tree is not in keep. The caller names the trees (Checkout.Tree) of
// every revision it may still read files of.
func (s *Store) Prune(keep []string) error {
	s.shelfMu.Lock()
	defer s.shelfMu.Unlock()
	kept := map[string]bool{}
	for _, t := range keep {
		kept[t] = true
	}
	if err := s.shelf.prune(kept); err != nil {
		return fmt.Errorf("prune checkouts: %w", err)
	}
	return nil
}

// Forget removes the repositories that none of specs reads.
func (s *Store) Forget(ctx context.Context, specs []Spec) error {
	kept := map[string]bool{}
	for _, spec := range specs {
		if loc, err := spec.location(); err == nil {
			kept[loc.repoKey()] = true
		}
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, "repos"))
	if err != nil {
		return fmt.Errorf("forget repositories: %w", err)
	}
	var errs []error
	for _, e := range entries {
		key, _, _ := strings.Cut(e.Name(), ".")
		if kept[key] {
			continue
		}
		_, unlock, err := s.lockKey(ctx, key)
		if err != nil {
			return err
		}
		errs = append(errs, os.RemoveAll(filepath.Join(s.dir, "repos", e.Name())))
		unlock()
	}
	return errors.Join(errs...)
}

// lock waits for the repository of loc and opens it.
func (s *Store) lock(ctx context.Context, loc location) (*repository, func(), error) {
	dir, unlock, err := s.lockKey(ctx, loc.repoKey())
	if err != nil {
		return nil, nil, err
	}
	repo, err := openRepository(dir)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return repo, func() {
		repo.changed()
		repo.save()
		unlock()
	}, nil
}

func (s *Store) lockKey(ctx context.Context, key string) (dir string, unlock func(), err error) {
	s.mu.Lock()
	l, ok := s.locks[key]
	if !ok {
		l = make(chan struct{}, 1)
		s.locks[key] = l
	}
	s.mu.Unlock()
	select {
	case l <- struct{}{}:
		return filepath.Join(s.dir, "repos", key), func() { <-l }, nil
	case <-ctx.Done():
		return "", nil, ctx.Err()
	}
}

// lazyRemote opens a remote when it is first asked: a commit that is here needs none.
type lazyRemote struct {
	open func() (remote, error)
	r    remote
}

func (l *lazyRemote) get() (remote, error) {
	if l.r == nil {
		r, err := l.open()
		if err != nil {
			return nil, err
		}
		l.r = r
	}
	return l.r, nil
}

func (l *lazyRemote) close() {
	if l.r != nil {
		l.r.close()
		l.r = nil
	}
}

// repository is a bare repository of ours. Packs and their indexes are the whole of it, beside two
// small files: tips, what was fetched, newest first; and shallow, in Git's own form, the commits that
// are here without their parents.
type repository struct {
	dir      string
	tips     []storedTip
	shallow  []string
	lastTree string // of the checkout made last, whose files the next one may share
	dirty    bool

	open *filesystem.Storage // with its indexes and files open; nil after the packs changed
}

// storedTip is a commit that is here with its whole tree, and the object by which a server knows it.
type storedTip struct{ commit, object string }

const (
	maxTips    = 64 // remembered
	maxHaves   = 16 // told to a server
	maxShallow = 4096
)

func openRepository(dir string) (*repository, error) {
	r := &repository{dir: dir}
	if err := r.create(dir); err != nil {
		return nil, err
	}
	for _, line := range readLines(filepath.Join(dir, "tips")) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "tree" {
			r.lastTree = f[1]
		} else if len(f) == 2 && isHexID(f[0]) && isHexID(f[1]) {
			r.tips = append(r.tips, storedTip{f[0], f[1]})
		}
	}
	for _, line := range readLines(filepath.Join(dir, "shallow")) {
		if isHexID(line) {
			r.shallow = append(r.shallow, line)
		}
	}
	return r, nil
}

func readLines(name string) []string {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(raw)), "\n")
}

// create makes the directories that make a bare repository, for go-git as for the git program.
func (r *repository) create(dir string) error {
	for _, d := range []string{"objects/pack", "objects/info", "refs/heads"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.FromSlash(d)), 0o700); err != nil {
			return fail(StoreFailed, "the repository can't be made: "+err.Error(), "")
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "HEAD")); err == nil {
		return nil
	}
	if err := writeFile(filepath.Join(dir, "config"), []byte("[core]\n\trepositoryformatversion = 0\n\tbare = true\n")); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "HEAD"), []byte("ref: refs/heads/none\n"))
}

func (r *repository) packDir() string { return filepath.Join(r.dir, "objects", "pack") }

// objects reads the objects that are here now. What it returned before must not be used after changed.
func (r *repository) objects() *filesystem.Storage {
	if r.open == nil {
		r.open = openObjects(r.dir)
	}
	return r.open
}

// changed closes the packs: go-git lists them once, and does not see those that come later.
func (r *repository) changed() {
	if r.open != nil {
		_ = r.open.Close() // only read from
		r.open = nil
	}
}

// openObjects reads the objects of a repository with go-git. Files stay open until Close: opening a
// pack again for each object is most of the cost otherwise.
func openObjects(dir string) *filesystem.Storage {
	return filesystem.NewStorageWithOptions(osfs.New(dir, osfs.WithBoundOS()), cache.NewObjectLRU(16*cache.MiByte),
		filesystem.Options{KeepDescriptors: true, LargeObjectThreshold: 1 << 20})
}

// ensure makes sure that tip is here with its tree and some history. It tells whether that rests on
// what was here before.
func (r *repository) ensure(ctx context.Context, remote *lazyRemote, tip Tip, limits Limits) (reused bool, err error) {
	objects := r.objects()
	if objects.HasEncodedObject(plumbing.NewHash(tip.Commit)) == nil && objects.HasEncodedObject(plumbing.NewHash(tip.Object)) == nil {
		return true, nil
	}
	if r.packs() >= maxPacks {
		if err := r.renew(ctx, remote, tip, limits); err == nil || ctx.Err() != nil {
			return false, err
		}
		remote.close()
	}
	return len(r.tips) > 0, r.fetch(ctx, remote, tip, limits, limits.History)
}

// fetch brings tip and depth commits of its history.
func (r *repository) fetch(ctx context.Context, remote *lazyRemote, tip Tip, limits Limits, depth int) error {
	rem, err := remote.get()
	if err != nil {
		return err
	}
	req := fetchRequest{
		want: tip.Object, shallow: r.shallow, depth: depth,
		has: func(id string) bool { return r.objects().HasEncodedObject(plumbing.NewHash(id)) == nil },
	}
	for i, t := range r.tips {
		if i == maxHaves {
			break
		}
		req.have = append(req.have, t.commit)
	}
	shallow, err := rem.fetch(ctx, req, func(pack io.Reader) error { return addPack(ctx, r.packDir(), pack, limits) })
	r.changed()
	if err != nil {
		return err
	}
	r.setShallow(shallow)
	r.addTip(tip)
	return nil
}

// setShallow keeps the commits, of those known and those told, whose parents are not all here.
func (r *repository) setShallow(told []string) {
	objects := r.objects()
	var keep []string
	seen := map[string]bool{}
	for _, id := range append(told, r.shallow...) {
		if seen[id] || len(keep) >= maxShallow {
			continue
		}
		seen[id] = true
		c, err := readCommit(objects, plumbing.NewHash(id))
		if err != nil {
			continue
		}
		for _, p := range c.parents {
			if objects.HasEncodedObject(p) != nil {
				keep = append(keep, id)
				break
			}
		}
	}
	r.shallow, r.dirty = keep, true
}

func (r *repository) addTip(tip Tip) {
	t := storedTip{tip.Commit, tip.Object}
	r.tips = slices.DeleteFunc(r.tips, func(o storedTip) bool { return o == t })
	r.tips = append([]storedTip{t}, r.tips...)
	if len(r.tips) > maxTips {
		r.tips = r.tips[:maxTips]
	}
	r.dirty = true
}

func (r *repository) packs() (n int) {
	entries, _ := os.ReadDir(r.packDir())
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".pack") {
			n++
		}
	}
	return n
}

// renew replaces many small packs by fetching the tip afresh. It is refused when the fresh repository
// lacks the tip that was followed last: then the old one knows history that the remote may not have
// any more, and that history is what tells a rewind from another branch.
func (r *repository) renew(ctx context.Context, remote *lazyRemote, tip Tip, limits Limits) error {
	fresh := r.dir + ".fresh"
	if err := os.RemoveAll(fresh); err != nil {
		return fail(StoreFailed, err.Error(), "")
	}
	defer os.RemoveAll(fresh)
	n, err := openRepository(fresh)
	if err != nil {
		return err
	}
	defer n.changed()
	if err := n.fetch(ctx, remote, tip, limits, limits.History); err != nil {
		return err
	}
	if len(r.tips) > 0 && n.objects().HasEncodedObject(plumbing.NewHash(r.tips[0].commit)) != nil {
		return fail(StoreFailed, "the last tip is not in the fresh history", "")
	}
	n.lastTree = r.lastTree
	n.changed()
	n.save()
	r.changed()
	old := r.dir + ".old"
	if err := errors.Join(os.RemoveAll(old), os.Rename(r.dir, old), os.Rename(fresh, r.dir), os.RemoveAll(old)); err != nil {
		return fail(StoreFailed, err.Error(), "")
	}
	r.tips, r.shallow, r.dirty = n.tips, n.shallow, true
	return nil
}

// reset empties the repository.
func (r *repository) reset() error {
	r.changed()
	if err := os.RemoveAll(r.dir); err != nil {
		return fail(StoreFailed, err.Error(), "")
	}
	r.tips, r.shallow, r.dirty = nil, nil, true
	return r.create(r.dir)
}

// save writes tips and shallow. What can't be written costs the next fetch some bytes, nothing else.
func (r *repository) save() {
	var b strings.Builder
	for _, t := range r.tips {
		fmt.Fprintf(&b, "%s %s\n", t.commit, t.object)
	}
	if r.lastTree != "" {
		fmt.Fprintf(&b, "tree %s\n", r.lastTree)
	}
	_ = writeFile(filepath.Join(r.dir, "tips"), []byte(b.String()))
	if r.dirty {
		_ = writeFile(filepath.Join(r.dir, "shallow"), []byte(strings.Join(append(r.shallow, ""), "\n")))
	}
}

// writeFile replaces a file as a whole.
func writeFile(name string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".write-")
	if err != nil {
		return fail(StoreFailed, "a file can't be made: "+err.Error(), "check the free space of the disk")
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fail(StoreFailed, "a file can't be written: "+err.Error(), "check the free space of the disk")
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fail(StoreFailed, err.Error(), "")
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fail(StoreFailed, err.Error(), "")
	}
	return nil
}
