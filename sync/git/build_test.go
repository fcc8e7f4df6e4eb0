package git

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// builder makes repositories with git's plumbing commands, and writes by hand the objects that git
// refuses to write. Tests only: the package itself starts no program.
type builder struct {
	t    testing.TB
	Dir  string // a bare repository
	env  []string
	tick int64
}

func newRepo(t testing.TB) *builder {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("the git program is not installed")
	}
	b := &builder{t: t, Dir: filepath.Join(t.TempDir(), "repo.git"), tick: 1_700_000_000}
	b.env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "HOME="+t.TempDir(),
		"GIT_AUTHOR_NAME=Ann", "GIT_AUTHOR_EMAIL=ann@example.com", "GIT_COMMITTER_NAME=Ann", "GIT_COMMITTER_EMAIL=ann@example.com")
	b.run("", "init", "-q", "--bare", "-b", "main", b.Dir)
	return b
}

func (b *builder) run(stdin string, args ...string) string {
	b.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = filepath.Dir(b.Dir)
	cmd.Env = append(b.env, "GIT_DIR="+b.Dir, fmt.Sprintf("GIT_AUTHOR_DATE=%d +0000", b.tick), fmt.Sprintf("GIT_COMMITTER_DATE=%d +0000", b.tick))
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	if err != nil {
		var stderr []byte
		var x *exec.ExitError
		if errors.As(err, &x) {
			stderr = x.Stderr
		}
		b.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return strings.TrimSpace(string(out))
}

func (b *builder) blob(content string) string {
	return b.run(content, "hash-object", "-w", "--stdin")
}

// line is an entry of a tree.
type line struct{ mode, name, id string }

// rawTree writes a tree object with whatever entries, in the order given.
func (b *builder) rawTree(lines ...line) string {
	b.t.Helper()
	var buf bytes.Buffer
	for _, l := range lines {
		id, err := hex.DecodeString(l.id)
		if err != nil {
			b.t.Fatal(err)
		}
		fmt.Fprintf(&buf, "%s %s\x00%s", l.mode, l.name, id)
	}
	return b.rawObject("tree", buf.String())
}

func (b *builder) rawObject(kind, content string) string {
	b.t.Helper()
	return b.run(content, "hash-object", "-w", "-t", kind, "--literally", "--stdin")
}

// tree writes files given as path -> content. A content that begins with "-> " is a symbolic link,
// one that begins with "#!" is executable.
func (b *builder) tree(files map[string]string) string {
	b.t.Helper()
	index := filepath.Join(b.t.TempDir(), "index")
	env := b.env
	b.env = append(append([]string{}, env...), "GIT_INDEX_FILE="+index)
	defer func() { b.env = env }()
	var in strings.Builder
	for name, content := range files {
		mode := modeFile
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			mode, content = modeLink, target
		} else if strings.HasPrefix(content, "#!") {
			mode = modeExec
		}
		fmt.Fprintf(&in, "%s %s\t%s\x00", mode, b.blob(content), name)
	}
	b.run(in.String(), "update-index", "-z", "--index-info")
	return b.run("", "write-tree")
}

// commitTree writes a commit of a tree, one second after the one before.
func (b *builder) commitTree(tree string, parents ...string) string {
	b.t.Helper()
	b.tick++
	args := []string{"commit-tree", tree, "-m", fmt.Sprintf("change %d", b.tick-1_700_000_000)}
	for _, p := range parents {
		args = append(args, "-p", p)
	}
	return b.run("", args...)
}

func (b *builder) commit(files map[string]string, parents ...string) string {
	b.t.Helper()
	return b.commitTree(b.tree(files), parents...)
}

func (b *builder) ref(name, id string) string {
	b.t.Helper()
	b.run("", "update-ref", name, id)
	return id
}

// push commits files on top of main.
func (b *builder) push(files map[string]string) string {
	b.t.Helper()
	var parents []string
	if head, err := os.ReadFile(filepath.Join(b.Dir, "refs", "heads", "main")); err == nil {
		parents = append(parents, strings.TrimSpace(string(head)))
	}
	return b.ref("refs/heads/main", b.commit(files, parents...))
}

func (b *builder) spec() Spec { return Spec{Name: "shop", URL: b.Dir} }

func newStore(t testing.TB, limits Limits) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"), limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// pull resolves and fetches.
func pull(t testing.TB, s *Store, spec Spec) (*Checkout, error) {
	t.Helper()
	ctx := testCtx(t)
	tip, err := s.Resolve(ctx, spec)
	if err != nil {
		return nil, err
	}
	return s.Fetch(ctx, spec, tip)
}

func mustPull(t testing.TB, s *Store, spec Spec) *Checkout {
	t.Helper()
	c, err := pull(t, s, spec)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// readCheckout gives path -> content of what is on disk, links as "-> target".
func readCheckout(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.Type()&os.ModeSymlink != 0 {
			to, err := os.Readlink(p)
			got[rel] = "-> " + to
			return err
		}
		raw, err := os.ReadFile(p)
		got[rel] = string(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func gitID(kind, content string) string {
	h := sha1.Sum([]byte(fmt.Sprintf("%s %d\x00%s", kind, len(content), content)))
	return hex.EncodeToString(h[:])
}
