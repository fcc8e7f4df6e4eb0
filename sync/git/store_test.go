package git

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFetchWritesTheCommit(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	files := map[string]string{"shop/compose.yaml": "services: {}\n", "run.sh": "#!/bin/sh\n", "a/b/c": "deep", "link": "-> a/b/c"}
	id := b.push(files)
	s := newStore(t, Limits{})
	c := mustPull(t, s, b.spec())
	if diff := cmp.Diff(files, readCheckout(t, c.Dir)); diff != "" {
		t.Fatal(diff)
	}
	if c.Commit != id || c.Ref != "main" || c.Author != "Ann <ann@example.com>" || c.Subject != "change 1" || len(c.Problems) != 0 {
		t.Errorf("checkout: %+v", c)
	}
	for name, want := range map[string]os.FileMode{"run.sh": 0o555, "a/b/c": 0o444} {
		if st, err := os.Stat(filepath.Join(c.Dir, name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want %v", name, st.Mode(), err, want)
		}
	}
	if h, ok := c.Hash("a/b/c"); !ok || h != gitID("blob", "deep") {
		t.Errorf("hash of a/b/c: %q %v", h, ok)
	}
	if h, ok := c.Hash(""); !ok || h != c.Tree {
		t.Errorf("hash of the root: %q %v, want %q", h, ok, c.Tree)
	}
	if h, ok := c.Hash("shop/"); !ok || len(h) != 40 {
		t.Errorf("hash of shop/: %q %v", h, ok)
	}
	if _, ok := c.Hash("../shop2"); ok {
		t.Error("a path that is not in the commit has a hash")
	}
}

func TestUnchangedFilesAreShared(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"same": "1", "other": "1", "exec": "x"})
	s := newStore(t, Limits{})
	first := mustPull(t, s, b.spec())
	b.push(map[string]string{"same": "1", "other": "2", "exec": "#!x"})
	second := mustPull(t, s, b.spec())
	inode := func(c *Checkout, name string) uint64 {
		st, err := os.Stat(filepath.Join(c.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Ino
	}
	if inode(first, "same") != inode(second, "same") {
		t.Error("the unchanged file was written again")
	}
	if inode(first, "other") == inode(second, "other") {
		t.Error("the changed file is shared")
	}
	if got := readCheckout(t, first.Dir)["other"]; got != "1" {
		t.Errorf("the first checkout changed: %q", got)
	}
}

func TestSameTreeIsOneCheckout(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	s := newStore(t, Limits{})
	first := mustPull(t, s, b.spec())
	b.push(map[string]string{"a": "1"})
	second := mustPull(t, s, b.spec())
	if first.Dir != second.Dir || first.Commit == second.Commit {
		t.Errorf("dirs %s %s, commits %s %s", first.Dir, second.Dir, first.Commit, second.Commit)
	}
}

func TestPruneKeepsWhatIsNamed(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	s := newStore(t, Limits{})
	first := mustPull(t, s, b.spec())
	b.push(map[string]string{"a": "2"})
	second := mustPull(t, s, b.spec())
	if err := s.Prune([]string{second.Tree}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(first.Dir); !os.IsNotExist(err) {
		t.Errorf("the first checkout is still there: %v", err)
	}
	if got := readCheckout(t, second.Dir); got["a"] != "2" {
		t.Errorf("the second checkout: %v", got)
	}
	// What was pruned comes back from the objects that are here.
	if c, err := s.Fetch(testCtx(t), b.spec(), Tip{Ref: "main", Commit: first.Commit}); err != nil || readCheckout(t, c.Dir)["a"] != "1" {
		t.Errorf("fetch of the pruned commit: %v %v", c, err)
	}
}

// A machine that lost power may keep the names of files without their content.
func TestDamagedCheckoutIsMadeAgain(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "content", "b": "more"})
	dir := t.TempDir()
	s, err := Open(dir, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	c := mustPull(t, s, b.spec())
	s.Close()
	for name, damage := range map[string]func(string) error{
		"truncated": func(p string) error { return os.Truncate(p, 0) },
		"changed":   func(p string) error { return errors.Join(os.Remove(p), os.WriteFile(p, []byte("CONTENT"), 0o444)) },
		"removed":   os.Remove,
		"linked":    func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/passwd", p)) },
	} {
		if err := damage(filepath.Join(c.Dir, "a")); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		c := mustPull(t, s, b.spec())
		if got := readCheckout(t, c.Dir); got["a"] != "content" || got["b"] != "more" {
			t.Errorf("%s: %v", name, got)
		}
		s.Close()
	}
}

func TestDamagedObjectsAreFetchedAgain(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	s := newStore(t, Limits{})
	mustPull(t, s, b.spec())
	b.push(map[string]string{"a": "1", "b": "2"})
	packs, err := filepath.Glob(filepath.Join(s.dir, "repos", "*", "objects", "pack", "*.pack"))
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	for _, p := range packs {
		if err := errors.Join(os.Remove(p), os.Remove(strings.TrimSuffix(p, ".pack")+".idx")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Prune(nil); err != nil {
		t.Fatal(err)
	}
	if got := readCheckout(t, mustPull(t, s, b.spec()).Dir); got["a"] != "1" || got["b"] != "2" {
		t.Errorf("got %v", got)
	}
}

func TestRelation(t *testing.T) {
	t.Parallel()
	for _, history := range []int{1, 3, 50} {
		t.Run(fmt.Sprintf("history %d", history), func(t *testing.T) {
			t.Parallel()
			b := newRepo(t)
			var ids []string
			for i := range 8 {
				ids = append(ids, b.push(map[string]string{"n": fmt.Sprint(i)}))
			}
			b.ref("refs/heads/main", ids[5])
			s := newStore(t, Limits{History: history})
			spec := b.spec()
			ctx := testCtx(t)
			relation := func(old, new string) Relation {
				t.Helper()
				r, err := s.Relation(ctx, spec, old, new)
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			mustPull(t, s, spec)
			b.ref("refs/heads/main", ids[7])
			mustPull(t, s, spec)
			if r := relation(ids[7], ids[7]); r != Same {
				t.Errorf("same: %v", r)
			}
			if r := relation(ids[5], ids[7]); r != Forward {
				t.Errorf("forward: %v", r)
			}
			b.ref("refs/heads/main", ids[6])
			mustPull(t, s, spec)
			if r := relation(ids[7], ids[6]); r != Rewind {
				t.Errorf("rewind by one: %v", r)
			}
			b.ref("refs/heads/main", ids[0])
			mustPull(t, s, spec)
			if r := relation(ids[6], ids[0]); r != Rewind {
				t.Errorf("rewind to the first: %v", r)
			}
			other := b.commit(map[string]string{"n": "other"}, ids[3])
			b.ref("refs/heads/main", other)
			mustPull(t, s, spec)
			if r := relation(ids[6], other); r != Diverged {
				t.Errorf("diverged: %v", r)
			}
			orphan := b.commit(map[string]string{"n": "orphan"})
			b.ref("refs/heads/main", orphan)
			mustPull(t, s, spec)
			if r := relation(ids[6], orphan); r != Diverged {
				t.Errorf("orphan: %v", r)
			}
		})
	}
}

func TestRelationOverMerges(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	base := b.commit(map[string]string{"a": "0"})
	left := b.commit(map[string]string{"a": "1"}, base)
	right := b.commit(map[string]string{"b": "1"}, base)
	merge := b.commit(map[string]string{"a": "1", "b": "1"}, left, right)
	s := newStore(t, Limits{})
	b.ref("refs/heads/main", right)
	mustPull(t, s, b.spec())
	b.ref("refs/heads/main", merge)
	mustPull(t, s, b.spec())
	for _, c := range []struct {
		old, new string
		want     Relation
	}{{right, merge, Forward}, {merge, left, Rewind}, {left, right, Diverged}} {
		if r, err := s.Relation(testCtx(t), b.spec(), c.old, c.new); r != c.want || err != nil {
			t.Errorf("%v %v, want %v", r, err, c.want)
		}
	}
}

func TestManyFetchesStaySmall(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("makes a hundred commits")
	}
	b := newRepo(t)
	s := newStore(t, Limits{})
	for i := range maxPacks + 5 {
		b.push(map[string]string{"n": fmt.Sprint(i)})
		if got := readCheckout(t, mustPull(t, s, b.spec()).Dir)["n"]; got != fmt.Sprint(i) {
			t.Fatalf("at %d: %q", i, got)
		}
	}
	packs, _ := filepath.Glob(filepath.Join(s.dir, "repos", "*", "objects", "pack", "*.pack"))
	if len(packs) == 0 || len(packs) > 10 {
		t.Errorf("%d packs are left", len(packs))
	}
	if err := s.Forget(testCtx(t), nil); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(s.dir, "repos")); len(left) != 0 {
		t.Errorf("%d repositories are left", len(left))
	}
}

func TestRefs(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	first := b.push(map[string]string{"v": "1", "deploy/prod/x": "", "deploy/test/x": ""})
	b.run("", "tag", "v1", first)
	b.run("", "tag", "-a", "-m", "annotated", "v2", first)
	b.ref("refs/heads/feature/x", b.commit(map[string]string{"v": "f"}, first))
	b.ref("refs/pull/7/head", b.commit(map[string]string{"v": "pr"}, first))
	for _, packed := range []bool{false, true} {
		if packed {
			b.run("", "pack-refs", "--all")
		}
		s := newStore(t, Limits{})
		for _, c := range []struct {
			spec Spec
			ref  string
			v    string
			err  Reason
			text string
		}{
			{Spec{}, "main", "1", "", ""},
			{Spec{Branch: "main"}, "main", "1", "", ""},
			{Spec{Branch: "feature/x"}, "feature/x", "f", "", ""},
			{Spec{Branch: "refs/pull/7/head"}, "pull/7/head", "pr", "", ""},
			{Spec{Tag: "v1"}, "v1", "1", "", ""},
			{Spec{Tag: "v2"}, "v2", "1", "", ""},
			{Spec{Path: "deploy/prod"}, "main", "1", "", ""},
			{Spec{Branch: "mian"}, "", "", RefNotFound, "there is no branch mian. There are: main, feature/x"},
			{Spec{Branch: "v1"}, "", "", RefNotFound, "there is a tag of that name: set tag instead"},
			{Spec{Tag: "main"}, "", "", RefNotFound, "there is a branch of that name: set branch instead"},
			{Spec{Path: "deploy/prd"}, "", "", PathNotFound, "there are: deploy/prod, deploy/test"},
			{Spec{Path: "v"}, "", "", PathNotFound, "it is a file"},
		} {
			c.spec.Name, c.spec.URL = "shop", b.Dir
			got, err := pull(t, s, c.spec)
			if c.err != "" {
				if !errors.Is(err, c.err) || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.text)) {
					t.Errorf("%v: %v, want %s %q", c.spec, err, c.err, c.text)
				}
				continue
			}
			if err != nil {
				t.Errorf("%v: %v", c.spec, err)
				continue
			}
			if got.Ref != c.ref || readCheckout(t, got.Dir)["v"] != c.v {
				t.Errorf("%v: ref %q, v %q", c.spec, got.Ref, readCheckout(t, got.Dir)["v"])
			}
		}
	}
}

func TestNothingThere(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	s := newStore(t, Limits{})
	if _, err := pull(t, s, b.spec()); !errors.Is(err, EmptyRepository) {
		t.Errorf("empty repository: %v", err)
	}
	b.ref("refs/heads/other", b.commit(map[string]string{"a": ""}))
	if _, err := pull(t, s, b.spec()); !errors.Is(err, RefNotFound) || !strings.Contains(err.Error(), "(other)") {
		t.Errorf("unborn HEAD: %v", err)
	}
	if _, err := pull(t, s, Spec{Name: "x", URL: b.Dir + "-no"}); !errors.Is(err, RepositoryNotFound) {
		t.Errorf("missing repository: %v", err)
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "objects", "info", "alternates"), []byte("/root/secret/.git/objects\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := pull(t, s, b.spec()); !errors.Is(err, InvalidSource) || !strings.Contains(err.Error(), "borrows objects") {
		t.Errorf("alternates: %v", err)
	}
}

// Listing a commit with the help of the one before gives what listing it alone gives.
func TestTakenOverDirectoriesChangeNothing(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	s := newStore(t, Limits{})
	for i, files := range []map[string]string{
		{"a/x": "1", "a/sub/y": "2", "b/l": "-> ../a/x", "c/bad": "-> nowhere", "d/l": "-> ../b/l", "a-b/z": "3"},
		{"a/x": "1", "a/sub/y": "2", "b/l": "-> ../a/x", "c/bad": "-> nowhere", "d/l": "-> ../b/l", "a-b/z": "4"},
		{"a/sub/y": "2", "b/l": "-> ../a/x", "c/bad": "-> nowhere", "d/l": "-> ../b/l", "a-b/z": "4"},
		{"a/x": "1", "a/sub/y": "2", "b/l": "-> ../a/x", "c/bad": "-> nowhere", "c/nowhere": "5", "d/l": "-> ../b/l"},
	} {
		b.push(files)
		got := mustPull(t, s, b.spec())
		alone := mustPull(t, newStore(t, Limits{}), b.spec())
		if diff := cmp.Diff(alone.list.Entries, got.list.Entries); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
		if diff := cmp.Diff(alone.Problems, got.Problems); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
		if diff := cmp.Diff(readCheckout(t, alone.Dir), readCheckout(t, got.Dir)); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
	}
}

// A commit without any file is a commit; whether it may remove everything is for others to judge.
func TestEmptyTree(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	url, ca := tlsServer(t, gitHTTP(b, nil))
	web := Spec{Name: "shop", URL: url + "/repo.git", Auth: Auth{Token: canary, CA: ca}}
	b.ref("refs/heads/main", b.commitTree(emptyTree.String()))
	for _, spec := range []Spec{b.spec(), web} {
		if c := mustPull(t, newStore(t, Limits{}), spec); len(readCheckout(t, c.Dir)) != 0 || c.Tree != emptyTree.String() {
			t.Errorf("%s: %+v", spec.Location(), c)
		}
	}
}
