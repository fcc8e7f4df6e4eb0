package git

import (
	"fmt"
	"path"
	"sort"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

// entry is one file, directory or link of a commit.
type entry struct {
	Path   string `json:"p"`
	Mode   string `json:"m"`
	ID     string `json:"i"`
	Size   int64  `json:"s,omitempty"` // of a file
	Target string `json:"t,omitempty"` // of a link
	LFS    bool   `json:"l,omitempty"` // a Git LFS pointer; known once the file was read
	Absent bool   `json:"a,omitempty"` // not written, for a reason that is among the problems
}

// listing is all of a commit's tree, sorted by path, with the root as "".
type listing struct {
	Entries  []entry
	Problems []Problem
}

// find returns the entry at a clean relative path.
func (l *listing) find(p string) (*entry, bool) {
	i := sort.Search(len(l.Entries), func(i int) bool { return l.Entries[i].Path >= p })
	if i < len(l.Entries) && l.Entries[i].Path == p {
		return &l.Entries[i], true
	}
	return nil, false
}

func (l *listing) problem(p string, kind ProblemKind, text string) {
	l.Problems = append(l.Problems, Problem{Path: printable(p, 300), Kind: kind, Text: text})
}

// listTree reads the trees of a commit and judges every entry, before anything is written. An error
// refuses the commit; what concerns one path only becomes a Problem. A directory that prev has at the
// same path with the same id was judged then and is taken over, so that a commit costs what it changes.
func listTree(objects storer.EncodedObjectStorer, root plumbing.Hash, limits Limits, prev *previous) (*listing, error) {
	t := &treeLister{objects: objects, limits: limits, out: &listing{}}
	if prev != nil {
		t.old = prev.list
	}
	if err := t.dir(root, "", 0); err != nil {
		return nil, err
	}
	sort.Slice(t.out.Entries, func(i, j int) bool { return t.out.Entries[i].Path < t.out.Entries[j].Path })
	t.out.resolveLinks()
	sort.SliceStable(t.out.Problems, func(i, j int) bool { return t.out.Problems[i].Path < t.out.Problems[j].Path })
	return t.out, nil
}

type treeLister struct {
	objects storer.EncodedObjectStorer
	limits  Limits
	old     *listing // may be nil
	out     *listing
	total   int64
}

// takeOver copies a directory of the old listing and reports whether it did. One with a problem below
// is read again, which makes its problems again. Links are followed afresh in any case: where they
// lead may have changed.
func (t *treeLister) takeOver(id plumbing.Hash, dir string) (bool, error) {
	if t.old == nil || dir == "" {
		return false, nil
	}
	if e, ok := t.old.find(dir); !ok || e.Mode != modeDir || e.ID != id.String() {
		return false, nil
	}
	shown := printable(dir, 250)
	for _, p := range t.old.Problems {
		if strings.HasPrefix(p.Path, shown) {
			return false, nil
		}
	}
	if err := t.add(entry{Path: dir, Mode: modeDir, ID: id.String()}); err != nil {
		return false, err
	}
	prefix := dir + "/"
	for i := sort.Search(len(t.old.Entries), func(i int) bool { return t.old.Entries[i].Path >= prefix }); i < len(t.old.Entries); i++ {
		e := t.old.Entries[i]
		if !strings.HasPrefix(e.Path, prefix) {
			break
		}
		if e.Mode != modeDir && e.Mode != modeLink {
			if err := t.count(e.Path, e.Size); err != nil {
				return false, err
			}
		}
		if err := t.add(e); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (t *treeLister) dir(id plumbing.Hash, dir string, depth int) error {
	if done, err := t.takeOver(id, dir); done || err != nil {
		return err
	}
	if depth > t.limits.Depth {
		return failPath(TooLarge, dir, fmt.Sprintf("directory %q is more than %d levels deep", printable(dir, 200), t.limits.Depth), "flatten the repository")
	}
	raw, err := readObject(t.objects, plumbing.TreeObject, id, maxTree)
	if err != nil {
		return err
	}
	list, err := parseTree(raw)
	if err != nil {
		where := "the root directory"
		if dir != "" {
			where = fmt.Sprintf("directory %q", printable(dir, 200))
		}
		return failPath(Corrupt, dir, where+" "+err.Error(), "run git fsck on the repository")
	}
	if err := t.add(entry{Path: dir, Mode: modeDir, ID: id.String()}); err != nil {
		return err
	}
	folded := map[string][]string{}
	for _, e := range list {
		key := foldName(e.name)
		folded[key] = append(folded[key], e.name)
	}
	for _, e := range list {
		full := path.Join(dir, e.name)
		if kind, why := judgeName(e.name); kind == nameHostile {
			full = strings.TrimPrefix(dir+"/"+e.name, "/") // Join would take .. at its word
			return failPath(Hostile, printable(full, 200), fmt.Sprintf("entry %q has a name that %s; no honest tool writes such a tree", printable(full, 200), why),
				"find out who pushed this commit, and remove the entry from it")
		} else if kind == nameOdd {
			t.out.problem(full, ProblemName, "the name "+why+"; rename it")
			continue
		}
		if same := folded[foldName(e.name)]; len(same) > 1 {
			t.out.problem(full, ProblemCollision, fmt.Sprintf("the names %s differ only by case, so which one is meant depends on the machine; rename one", quoteList(same)))
			continue
		}
		if err := t.entry(e, full, depth); err != nil {
			return err
		}
	}
	return nil
}

func (t *treeLister) entry(e treeEntry, full string, depth int) error {
	switch e.mode {
	case modeDir:
		return t.dir(e.id, full, depth+1)
	case modeSubmodule:
		t.out.problem(full, ProblemSubmodule, "this is a submodule, and its content is in another repository; add that repository as a source of its own, or copy the files in (git subtree)")
		return nil
	case modeLink:
		raw, err := readObject(t.objects, plumbing.BlobObject, e.id, 4096)
		if err != nil {
			return err
		}
		return t.add(entry{Path: full, Mode: modeLink, ID: e.id.String(), Target: string(raw)})
	case modeFile, modeFileOld, modeExec:
	default:
		return failPath(Hostile, full, fmt.Sprintf("entry %q has the mode %s, which Git does not know", printable(full, 200), printable(e.mode, 10)), "run git fsck on the repository")
	}
	mode := e.mode
	if mode == modeFileOld {
		mode = modeFile
	}
	size, err := t.objects.EncodedObjectSize(e.id)
	if err != nil {
		return missing(e.id, err)
	}
	out := entry{Path: full, Mode: mode, ID: e.id.String(), Size: size}
	if size > t.limits.File {
		out.Absent = true
		t.out.problem(full, ProblemTooLarge, fmt.Sprintf("the file has %s, and the limit is %s; keep it in a volume or an image", sizeText(size), sizeText(t.limits.File)))
	} else if err := t.count(full, size); err != nil {
		return err
	}
	return t.add(out)
}

// count adds the size of a file that will be written.
func (t *treeLister) count(p string, size int64) error {
	if t.total += size; t.total > t.limits.Tree {
		return failPath(TooLarge, p, "the files of the commit are larger than "+sizeText(t.limits.Tree)+" together", "use a repository of its own for what is deployed, or raise the limit")
	}
	return nil
}

func (t *treeLister) add(e entry) error {
	if len(t.out.Entries) >= t.limits.Entries {
		return fail(TooLarge, fmt.Sprintf("the commit has more than %d files and directories", t.limits.Entries), "use a repository of its own for what is deployed, or raise the limit")
	}
	if len(e.Path) > 4000 {
		return failPath(TooLarge, printable(e.Path, 200), "a path of the commit is longer than 4000 bytes", "shorten it")
	}
	t.out.Entries = append(t.out.Entries, e)
	return nil
}

func quoteList(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = fmt.Sprintf("%q", printable(n, 100))
	}
	return strings.Join(quoted, " and ")
}

// resolveLinks follows each symbolic link inside the listing, never on disk. A link is kept when it is
// relative and ends, over however many other links, at a file or directory of this commit that is
// written and is not a directory above the link itself.
func (l *listing) resolveLinks() {
	for i := range l.Entries {
		e := &l.Entries[i]
		if e.Mode != modeLink {
			continue
		}
		if why := l.follow(e.Path, e.Target); why != "" {
			e.Absent = true
			l.problem(e.Path, ProblemSymlink, fmt.Sprintf("the symbolic link to %q %s; put the file itself there", printable(e.Target, 200), why))
		}
	}
	// A link over a link that was refused is refused by the same walk: it meets the same end.
}

// follow says why the link at p to target can't be kept; "" means that it can.
func (l *listing) follow(p, target string) string {
	switch {
	case target == "":
		return "is empty"
	case strings.HasPrefix(target, "/"):
		return "is absolute, so it leads out of the repository"
	case strings.ContainsAny(target, "\x00\\") || strings.IndexFunc(target, func(r rune) bool { return r < 0x20 || r == 0x7f }) >= 0:
		return "has a control character or a backslash in it"
	}
	var at []string // where we are, as parts of a path without links
	if d := path.Dir(p); d != "." {
		at = strings.Split(d, "/")
	}
	todo := strings.Split(target, "/")
	for hops := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(at) == 0 {
				return "leads out of the repository"
			}
			at = at[:len(at)-1]
			continue
		}
		at = append(at[:len(at):len(at)], part)
		here := strings.Join(at, "/")
		e, ok := l.find(here)
		switch {
		case !ok:
			return "leads to " + fmt.Sprintf("%q", printable(here, 200)) + ", which is not in the commit"
		case e.Absent && e.Mode != modeLink:
			return "leads to " + fmt.Sprintf("%q", printable(here, 200)) + ", which is not written"
		case e.Mode == modeLink:
			if hops++; hops > 40 {
				return "leads in a circle"
			}
			if strings.HasPrefix(e.Target, "/") {
				return "leads over " + fmt.Sprintf("%q", printable(here, 200)) + " out of the repository"
			}
			at = at[:len(at)-1]
			todo = append(strings.Split(e.Target, "/"), todo...)
		case e.Mode != modeDir && len(todo) > 0:
			return "goes on below " + fmt.Sprintf("%q", printable(here, 200)) + ", which is a file"
		}
	}
	end := strings.Join(at, "/")
	if e, ok := l.find(end); !ok || e.Mode == modeDir && (end == "" || p == end || strings.HasPrefix(p, end+"/")) {
		return "leads to a directory that holds the link itself, so whoever follows it walks in circles"
	}
	return ""
}
