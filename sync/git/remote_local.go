package git

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

// localRemote reads a repository on this machine: its refs as files, its objects with go-git. It may
// belong to a user with fewer rights than ours, so nothing outside its directory is read on its word:
// every path is resolved inside an os.Root (or go-git's own bounded file system), and objects that are
// borrowed from elsewhere are refused. Its configuration is never used, its hooks never run.
type localRemote struct {
	root   *os.Root // the directory with HEAD, refs and objects
	store  *filesystem.Storage
	limits Limits
}

// gitDir finds the directory that holds HEAD, refs and objects for the repository at dir.
func gitDir(dir string) (string, error) {
	notFound := func(text string) (string, error) {
		return "", fail(RepositoryNotFound, text, "give the directory that holds .git, or a bare repository")
	}
	st, err := os.Stat(dir)
	if err != nil || !st.IsDir() {
		return notFound("there is no directory " + printable(dir, 200))
	}
	dot := filepath.Join(dir, ".git")
	switch st, err := os.Lstat(dot); {
	case err == nil && st.IsDir():
		dir = dot
	case err == nil && st.Mode()&fs.ModeSymlink != 0:
		return notFound(printable(dot, 200) + " is a symbolic link")
	case err == nil:
		return notFound(printable(dir, 200) + " is a linked work tree or a submodule, whose objects lie elsewhere")
	}
	for _, name := range []string{"HEAD", "objects"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return notFound(printable(dir, 200) + " is not a Git repository")
		}
	}
	return dir, nil
}

func openLocal(l location, limits Limits) (*localRemote, error) {
	dir, err := gitDir(l.path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fail(RepositoryNotFound, "the repository can't be opened: "+err.Error(), "")
	}
	r := &localRemote{root: root, store: openObjects(dir), limits: limits}
	if err := r.supported(); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// supported refuses in words what would be read wrong.
func (r *localRemote) supported() error {
	for _, name := range []string{"objects/info/alternates", "objects/info/http-alternates"} {
		if _, err := r.root.Lstat(name); err == nil {
			return fail(InvalidSource, "the repository borrows objects from another one ("+name+"), and gitopsd reads nothing outside of it",
				"run git repack -a -d in it, then remove "+name)
		}
	}
	if _, err := r.root.Lstat("reftable"); err == nil {
		return fail(InvalidSource, "the repository keeps its refs as a reftable, which gitopsd does not read", "run git refs migrate --ref-format=files in it")
	}
	if conf, err := r.small("config", 1<<20); err == nil {
		for _, line := range strings.Split(strings.ToLower(string(conf)), "\n") {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			if strings.TrimSpace(key) == "objectformat" && strings.TrimSpace(value) != "sha1" {
				return fail(InvalidSource, "the repository uses SHA-256 object names, which gitopsd does not read", "use a repository with SHA-1 object names, Git's default")
			}
		}
	}
	return nil
}

func (r *localRemote) close() {
	_ = r.store.Close()
	_ = r.root.Close()
}

// small reads a regular file of at most max bytes.
func (r *localRemote) small(name string, max int64) ([]byte, error) {
	f, err := r.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > max {
		return nil, fail(Corrupt, printable(name, 100)+" is not a file of at most "+sizeText(max), "run git fsck on the repository")
	}
	return io.ReadAll(io.LimitReader(f, max))
}

// refs reads packed-refs and the loose refs, which win. An annotated tag is peeled with its object.
func (r *localRemote) refs(ctx context.Context) (*advert, error) {
	a := &advert{refs: map[string]string{}, peeled: map[string]string{}, caps: map[string]string{}}
	packed, err := r.small("packed-refs", maxAdvert)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, localError(err)
	}
	last := ""
	for sc := bufio.NewScanner(bytes.NewReader(packed)); sc.Scan(); {
		line := strings.TrimSpace(sc.Text())
		if id, ok := strings.CutPrefix(line, "^"); ok && isHexID(id) && last != "" {
			a.peeled[last] = id
			continue
		}
		id, name, ok := strings.Cut(line, " ")
		last = ""
		if ok && isHexID(id) && strings.HasPrefix(name, "refs/") && badRefName(name) == "" {
			a.refs[name], last = id, name
		}
	}
	err = fs.WalkDir(r.root.FS(), "refs", func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // deleted while we look
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case len(a.refs) > maxRefs:
			return fail(TooLarge, "the repository has too many refs", "use a repository with fewer branches and tags")
		case !d.Type().IsRegular() || badRefName(name) != "":
			return nil
		}
		text, err := r.small(name, 4096)
		if err != nil {
			return nil // deleted while we look, or not a ref
		}
		if id := strings.TrimSpace(string(text)); isHexID(id) {
			a.refs[name] = id
			delete(a.peeled, name)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, localError(err)
	}
	head, err := r.small("HEAD", 4096)
	if err != nil {
		return nil, localError(err)
	}
	if target, ok := strings.CutPrefix(strings.TrimSpace(string(head)), "ref: "); ok {
		a.head = strings.TrimSpace(target)
	} else if id := strings.TrimSpace(string(head)); isHexID(id) && len(a.refs) > 0 {
		a.refs["HEAD"] = id
	}
	for name, id := range a.refs {
		if strings.HasPrefix(name, "refs/tags/") && a.peeled[name] == "" {
			if _, end, err := peel(r.store, plumbing.NewHash(id)); err == nil && end.String() != id {
				a.peeled[name] = end.String()
			}
		}
	}
	return a, nil
}

// fetch walks the objects itself and hands them over as a pack, so that they pass the same checks as
// a pack of a stranger's server: each object's name is computed again from its content.
func (r *localRemote) fetch(ctx context.Context, req fetchRequest, sink func(io.Reader) error) ([]string, error) {
	w := &localWalk{ctx: ctx, objects: r.store, has: req.has, seen: map[plumbing.Hash]bool{}, max: r.limits.Object}
	tags, tip, err := peel(w.objects, plumbing.NewHash(req.want))
	if err != nil {
		return nil, err
	}
	w.ids = append(w.ids, tags...)
	shallow, err := w.commits(tip, req.depth)
	if err != nil {
		return nil, err
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(writePack(pw, w.objects, w.ids, r.limits.Object))
	}()
	err = sink(limited(ctx, pr, r.limits.Pack, "the pack"))
	pr.Close() // the writer's next write fails, if it is not done yet
	<-done
	return shallow, err
}

// peel follows annotated tags to what they name in the end, and lists the tag objects on the way.
func peel(objects *filesystem.Storage, id plumbing.Hash) (tags []plumbing.Hash, end plumbing.Hash, err error) {
	for range 5 {
		o, err := objects.EncodedObject(plumbing.AnyObject, id)
		if err != nil {
			return nil, id, missing(id, err)
		}
		if o.Type() != plumbing.TagObject {
			return tags, id, nil
		}
		t, err := readTag(objects, id)
		if err != nil {
			return nil, id, err
		}
		tags = append(tags, id)
		id = t.object
	}
	return nil, id, fail(Corrupt, "a tag names a tag names a tag, more than five deep", "")
}

// localWalk collects the ids of objects that are not here yet.
type localWalk struct {
	ctx     context.Context
	objects *filesystem.Storage
	has     func(string) bool
	seen    map[plumbing.Hash]bool
	ids     []plumbing.Hash
	max     int64
}

// add reports whether id is new to us.
func (w *localWalk) add(id plumbing.Hash) bool {
	if w.seen[id] || id == emptyTree || w.has(id.String()) {
		return false
	}
	w.seen[id] = true
	w.ids = append(w.ids, id)
	return true
}

// commits goes back depth commits from tip, level by level, and returns those whose parents it left out.
func (w *localWalk) commits(tip plumbing.Hash, depth int) (shallow []string, err error) {
	visited := map[plumbing.Hash]bool{tip: true}
	for level, d := []plumbing.Hash{tip}, 1; len(level) > 0; d++ {
		var next []plumbing.Hash
		for _, id := range level {
			if err := w.ctx.Err(); err != nil {
				return nil, err
			}
			c, err := readCommit(w.objects, id)
			if err != nil {
				return nil, err
			}
			if w.add(id) {
				if err := w.tree(c.tree, 0); err != nil {
					return nil, err
				}
			}
			// A parent can be missing: the repository may be a shallow clone itself.
			cut := d >= depth && len(c.parents) > 0
			for _, p := range c.parents {
				cut = cut || w.objects.HasEncodedObject(p) != nil
			}
			if cut {
				shallow = append(shallow, id.String())
			}
			for _, p := range c.parents {
				if !cut && !visited[p] {
					visited[p] = true
					next = append(next, p)
				}
			}
		}
		level = next
	}
	return shallow, nil
}

// tree collects a tree and all below it. Names are judged later, when the tree is used.
func (w *localWalk) tree(id plumbing.Hash, depth int) error {
	if !w.add(id) {
		return nil
	}
	if len(w.ids) > maxPackObjects || depth > 1000 {
		return fail(TooLarge, "the repository has too many objects, or directories too deep", "use a smaller repository")
	}
	raw, err := readObject(w.objects, plumbing.TreeObject, id, maxTree)
	if err != nil {
		return err
	}
	entries, err := parseTree(raw)
	if err != nil {
		return fail(Corrupt, "tree "+id.String()+" "+err.Error(), "run git fsck on the repository")
	}
	for _, e := range entries {
		switch e.mode {
		case modeSubmodule:
		case modeDir:
			if err := w.tree(e.id, depth+1); err != nil {
				return err
			}
		default:
			w.add(e.id)
		}
	}
	return nil
}

func localError(err error) error {
	var own *Error
	if errors.As(err, &own) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fail(Corrupt, "the repository's refs can't be read: "+printable(err.Error(), 200), "run git fsck on the repository")
}

// refDirs are the directories in which a change of one of the refs shows, for a watcher: HEAD and
// packed-refs lie in the first.
func refDirs(gitdir string, refs []string) []string {
	dirs := []string{gitdir}
	seen := map[string]bool{gitdir: true}
	for _, ref := range append([]string{"refs/heads/x"}, refs...) {
		for p := path.Dir(ref); p != "." && p != "/"; p = path.Dir(p) {
			if d := filepath.Join(gitdir, filepath.FromSlash(p)); !seen[d] {
				seen[d] = true
				dirs = append(dirs, d)
			}
		}
	}
	return dirs
}
