package blob

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

func open(t testing.TB, opts Options) *Store {
	t.Helper()
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	s, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t testing.TB, s *Store, data string) string {
	t.Helper()
	d, err := s.Put(strings.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func leftovers(t *testing.T, s *Store) []os.DirEntry {
	t.Helper()
	list, err := os.ReadDir(filepath.Join(s.opts.Dir, tmpDir))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func blobPath(s *Store, digest string) string {
	p, _ := place(digest)
	return filepath.Join(s.opts.Dir, p)
}

func TestPutAndRead(t *testing.T) {
	s := open(t, Options{MaxSize: 10})
	if d := put(t, s, ""); d != "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("empty blob: %s", d)
	}
	d := put(t, s, "0123456789")
	if got, err := s.Read(d); err != nil || string(got) != "0123456789" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := s.Put(strings.NewReader("0123456789a")); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one byte too many: %v", err)
	}
	if _, err := s.Put(io.MultiReader(strings.NewReader("ab"), broken{})); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a reader that breaks: %v", err)
	}
	if err := s.PutAs(Digest([]byte("a")), strings.NewReader("b")); !errors.Is(err, ErrDamaged) {
		t.Errorf("other bytes than the digest's: %v", err)
	}
	if err := s.PutAs(Digest([]byte("a")), strings.NewReader("a")); err != nil || !s.Has(Digest([]byte("a"))) {
		t.Errorf("the digest's bytes: %v", err)
	}
	if _, err := s.Read(Digest([]byte("b"))); !errors.Is(err, ErrMissing) {
		t.Errorf("a missing blob: %v", err)
	}
	for _, bad := range []string{
		"", "sha256:", "sha256:" + strings.Repeat("g", 64), "sha256:" + strings.Repeat("A", 64), "sha256:../../" + strings.Repeat("a", 58),
		"md5:" + strings.Repeat("0", 64),
	} {
		if _, err := s.Open(bad); err == nil || s.Has(bad) || s.PutAs(bad, strings.NewReader("")) == nil {
			t.Errorf("%q passes for a digest", bad)
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// The store does what a map does, across reopening too.
func TestStoreIsAMap(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		now := time.Unix(1e9, 0)
		opts := Options{Dir: dir, Now: func() time.Time { return now }}
		s, err := Open(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { s.Close(); os.RemoveAll(dir) }()
		model, used := map[string]string{}, map[string]time.Time{}
		text := rapid.StringMatching(`[a-e]{0,2}`)
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				data := text.Draw(t, "data")
				d, err := s.Put(strings.NewReader(data))
				if err != nil {
					t.Fatal(err)
				}
				model[d], used[d] = data, now
			},
			"batch": func(t *rapid.T) {
				var batch [][]byte
				for _, data := range rapid.SliceOfN(text, 0, 8).Draw(t, "batch") {
					batch = append(batch, []byte(data))
				}
				digests, err := s.PutBatch(batch)
				if err != nil {
					t.Fatal(err)
				}
				for i, d := range digests {
					if d != Digest(batch[i]) {
						t.Fatalf("digest %d is %s", i, d)
					}
					model[d], used[d] = string(batch[i]), now
				}
			},
			"reopen": func(t *rapid.T) {
				s.Close()
				if s, err = Open(opts); err != nil {
					t.Fatal(err)
				}
			},
			"gc": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(0, 90).Draw(t, "seconds")) * time.Second)
				keep := map[string]bool{}
				for d := range model {
					if rapid.Bool().Draw(t, "keep") {
						keep[d] = true
					}
				}
				gone := 0
				for d := range maps.Clone(model) {
					if !keep[d] && used[d].Before(now.Add(-time.Minute)) {
						delete(model, d)
						gone++
					}
				}
				if got, err := s.GC(keep, time.Minute); err != nil || got != gone {
					t.Fatalf("removed %d, %v, want %d", got, err, gone)
				}
			},
			"": func(t *rapid.T) {
				for d, data := range model {
					if got, err := s.Read(d); err != nil || string(got) != data {
						t.Fatalf("%q, %v, want %q", got, err, data)
					}
				}
			},
		})
	})
}

// A blob with other bytes is told of, taken out, and mended by putting it in again.
func TestDamageIsToldOfAndMended(t *testing.T) {
	s := open(t, Options{})
	for what, bad := range map[string]string{"cut": "hel", "changed": "hellO", "longer": "hello!", "empty": ""} {
		d := put(t, s, "hello")
		if err := os.WriteFile(blobPath(s, d), []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Read(d); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		if m := s.Missing([]string{d, d}); !slices.Equal(m, []string{d}) {
			t.Errorf("%s: missing %v", what, m)
		}
		if err := s.PutAs(d, strings.NewReader("hello")); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Read(d); err != nil || string(got) != "hello" {
			t.Errorf("%s, mended: %q, %v", what, got, err)
		}
	}
}

func TestAnInterruptedWriteLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	if err := os.MkdirAll(filepath.Join(dir, tmpDir, "half", "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	d := put(t, s, "kept")
	s.Close()
	s = open(t, Options{Dir: dir})
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left in tmp: %v", left)
	}
	if !s.Has(d) {
		t.Error("a blob is gone")
	}
}

func TestGraceBeginsAnewForWhoeverAsks(t *testing.T) {
	now := time.Now()
	s := open(t, Options{Now: func() time.Time { return now }})
	a, b := put(t, s, "a"), put(t, s, "b")
	now = now.Add(2 * time.Hour)
	if !s.Has(a) {
		t.Fatal("a is missing")
	}
	if n, err := s.GC(nil, time.Hour); n != 1 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	if !s.Has(a) || s.Has(b) {
		t.Errorf("a: %v, b: %v", s.Has(a), s.Has(b))
	}
}

func TestManyAtOnce(t *testing.T) {
	s := open(t, Options{})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 20 {
				data := fmt.Sprint("blob ", i)
				if w%2 == 0 {
					if _, err := s.GC(nil, time.Hour); err != nil {
						t.Error(err)
					}
				}
				d, err := s.Put(strings.NewReader(data))
				if err != nil {
					t.Error(err)
				}
				if got, err := s.Read(d); err != nil || string(got) != data {
					t.Errorf("%q, %v", got, err)
				}
				if _, err := s.MaterialiseFile(d, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestMaterialise(t *testing.T) {
	s := open(t, Options{})
	conf, run := put(t, s, "conf"), put(t, s, "#!/bin/sh\n")
	l := put(t, s, string(Listing([]manifest.ListingEntry{
		{Path: "run.sh", Digest: run, Exec: true},
		{Path: "conf.d/site.conf", Digest: conf},
		{Path: "conf.d/default", Link: "../current/x"},
		{Path: "current", Link: "conf.d"},
	})))
	dir, err := s.Materialise(l)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct {
		text string
		mode os.FileMode
	}{"run.sh": {"#!/bin/sh\n", 0o555}, "conf.d/site.conf": {"conf", 0o444}, "current/site.conf": {"conf", 0o444}} {
		got, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil || string(got) != want.text {
			t.Errorf("%s: %q, %v", path, got, err)
		}
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode().Perm() != want.mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if link, err := os.Readlink(filepath.Join(dir, "conf.d/default")); link != "../current/x" || err != nil {
		t.Errorf("link: %q, %v", link, err)
	}
	before, _ := os.Stat(filepath.Join(dir, "run.sh"))
	again, err := s.Materialise(l)
	after, _ := os.Stat(filepath.Join(again, "run.sh"))
	if err != nil || again != dir || !os.SameFile(before, after) {
		t.Errorf("the second time: %s, %v", again, err)
	}
	file, err := s.MaterialiseFile(run, true)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if plain, err := s.MaterialiseFile(run, false); err != nil || plain == file {
		t.Errorf("the same file without the bit: %s, %v", plain, err)
	}
	if dir2, err := s.Materialise(put(t, s, "[]")); err != nil || dir2 == dir {
		t.Errorf("an empty directory: %s, %v", dir2, err)
	}
	// The bytes of a listing may be a file's too.
	if _, err := s.MaterialiseFile(l, false); err != nil {
		t.Error(err)
	}
}

func TestMaterialiseTellsWhatIsMissing(t *testing.T) {
	s := open(t, Options{})
	gone, bad := Digest([]byte("gone")), put(t, s, "bad")
	if err := os.WriteFile(blobPath(s, bad), []byte("BAD"), 0o644); err != nil {
		t.Fatal(err)
	}
	for digest, want := range map[string]error{gone: ErrMissing, bad: ErrDamaged} {
		l := put(t, s, string(Listing([]manifest.ListingEntry{{Path: "a/b", Digest: digest}})))
		if _, err := s.Materialise(l); !errors.Is(err, want) || !strings.Contains(err.Error(), "a/b") {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if _, err := s.Materialise(gone); !errors.Is(err, ErrMissing) {
		t.Error(err)
	}
	if _, err := s.MaterialiseFile(gone, false); !errors.Is(err, ErrMissing) {
		t.Error(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left in tmp: %v", left)
	}
	if trees, err := os.ReadDir(filepath.Join(s.opts.Dir, treesDir)); err != nil || len(trees) != 0 {
		t.Errorf("half laid out: %v, %v", trees, err)
	}
}

func TestHostileListings(t *testing.T) {
	d := Digest(nil)
	for name, text := range map[string]string{
		"no JSON":             `{`,
		"no list":             `{"path":"a"}`,
		"unknown field":       `[{"path":"a","digest":"` + d + `","mode":4095}]`,
		"empty path":          `[{"path":"","digest":"` + d + `"}]`,
		"the top":             `[{"path":".","digest":"` + d + `"}]`,
		"absolute":            `[{"path":"/etc/passwd","digest":"` + d + `"}]`,
		"parent":              `[{"path":"../a","digest":"` + d + `"}]`,
		"parent in between":   `[{"path":"a/../../b","digest":"` + d + `"}]`,
		"not clean":           `[{"path":"a//b","digest":"` + d + `"}]`,
		"zero byte":           `[{"path":"a\u0000b","digest":"` + d + `"}]`,
		"twice":               `[{"path":"a","digest":"` + d + `"},{"path":"a","digest":"` + d + `"}]`,
		"below a file":        `[{"path":"a","digest":"` + d + `"},{"path":"a/b","digest":"` + d + `"}]`,
		"below a link":        `[{"path":"a","link":"b"},{"path":"a/c","digest":"` + d + `"}]`,
		"no digest":           `[{"path":"a"}]`,
		"bad digest":          `[{"path":"a","digest":"sha256:../../x"}]`,
		"file and link":       `[{"path":"a","digest":"` + d + `","link":"b"}]`,
		"link to the root":    `[{"path":"a","link":"/etc"}]`,
		"link out":            `[{"path":"a","link":".."}]`,
		"link out from below": `[{"path":"x/a","link":"../../etc"}]`,
		"link out and back":   `[{"path":"a","link":"../x/b"}]`,
	} {
		if list, err := ParseListing([]byte(text)); !errors.Is(err, ErrListing) {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
}

// No listing, however made, lays out anything outside its folder.
func FuzzListing(f *testing.F) {
	d := Digest(nil)
	f.Add([]byte(`[{"path":"a/b","digest":"` + d + `","exec":true},{"path":"l","link":"a"}]`))
	f.Add([]byte(`[{"path":"../a","link":"../../b"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := ParseListing(data)
		if err != nil {
			return
		}
		for _, e := range list {
			if !filepath.IsLocal(e.Path) || e.Link != "" && !filepath.IsLocal(filepath.Join(filepath.Dir(e.Path), e.Link)) {
				t.Errorf("%+v passes", e)
			}
		}
		again, err := ParseListing(Listing(list))
		if err != nil || !bytes.Equal(Listing(again), Listing(list)) {
			t.Errorf("written and read again: %v", err)
		}
	})
}

func BenchmarkPutBatch(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := open(b, Options{})
			for i := range b.N {
				var batch [][]byte
				for j := range n {
					batch = append(batch, fmt.Appendf(nil, "%d %d %01000d", i, j, 0))
				}
				if _, err := s.PutBatch(batch); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
