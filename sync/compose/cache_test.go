package compose

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// bigTree writes a tree of stacks with five services each.
func bigTree(t testing.TB, stacks int) string {
	t.Helper()
	files := map[string]string{}
	for i := range stacks {
		var b strings.Builder
		fmt.Fprintf(&b, "services:\n")
		for j := range 5 {
			fmt.Fprintf(&b, "  s%d:\n    image: example.com/app%d:1.%d\n    environment:\n      A: \"1\"\n      B: ${B:-x}\n    volumes:\n      - data:/data\n"+
				"      - ./conf:/etc/conf:ro\n    deploy:\n      replicas: 2\n      resources:\n        limits: {memory: 64m, cpus: \"0.5\"}\n", j, i, j)
		}
		b.WriteString("volumes:\n  data:\n")
		dir := fmt.Sprintf("group%d/stack%d/", i%10, i)
		files[dir+"compose.yaml"] = b.String()
		files[dir+"conf/app.conf"] = fmt.Sprintf("number = %d\n", i)
	}
	return writeTree(t, files)
}

func writeTree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		put(t, dir, name, text)
	}
	return dir
}

func put(t testing.TB, dir, name, text string) {
	t.Helper()
	file := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// hasher gives object hashes as Git does: of a file by its bytes, of a directory by all that is below.
func hasher(t testing.TB, root string) func(string) (string, bool) {
	t.Helper()
	hashes := map[string]string{}
	var walk func(dir string) string
	walk = func(dir string) string {
		list, err := os.ReadDir(filepath.Join(root, dir))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		for _, e := range list {
			name := filepath.Join(dir, e.Name())
			var h string
			if e.IsDir() {
				h = walk(name)
			} else {
				data, err := os.ReadFile(filepath.Join(root, name))
				if err != nil {
					t.Fatal(err)
				}
				s := sha256.Sum256(data)
				h = hex.EncodeToString(s[:])
			}
			hashes[name] = h
			fmt.Fprintf(sum, "%s %s\n", e.Name(), h)
		}
		return hex.EncodeToString(sum.Sum(nil))
	}
	hashes["."] = walk(".")
	return func(p string) (string, bool) { h, ok := hashes[p]; return h, ok }
}

func TestAChangeOfOneFileRendersOneStack(t *testing.T) {
	t.Parallel()
	stacks := 1000
	if testing.Short() {
		stacks = 50
	}
	root := bigTree(t, stacks)
	cache := &Cache{}
	first := load(t, Options{Root: root, Hash: hasher(t, root), Cache: cache})
	if got := cache.Stats(); got.Rendered != stacks || len(first.Stacks) != stacks || len(first.Problems) != 0 {
		t.Fatalf("first load: %+v, %d stacks, problems %v", got, len(first.Stacks), first.Problems[:min(3, len(first.Problems))])
	}
	steps := []struct {
		name, file, text string
		renders          int
	}{
		{"nothing", "", "", 0},
		{"a Compose file", "group3/stack3/compose.yaml", "services: {web: {image: a:1}}\n", 1},
		{"a mounted file", "group4/stack4/conf/app.conf", "number = 5\n", 1},
		{"one more mounted file", "group4/stack4/conf/more.conf", "x\n", 1},
		{"an .env that was not there", "group5/stack5/.env", "B=2\n", 1},
		{"a file that nothing reads", "group6/README", "hello\n", 0},
	}
	for _, s := range steps {
		before := cache.Stats()
		if s.file != "" {
			put(t, root, s.file, s.text)
		}
		started := time.Now()
		got := load(t, Options{Root: root, Hash: hasher(t, root), Cache: cache})
		took := time.Since(started)
		after := cache.Stats()
		if n := after.Rendered - before.Rendered; n != s.renders {
			t.Errorf("%s: rendered %d stacks, want %d", s.name, n, s.renders)
		}
		t.Logf("%s: %v", s.name, took)
		if s.name == "a mounted file" && len(got.Stacks) != stacks {
			t.Errorf("%s: %d stacks, want %d", s.name, len(got.Stacks), stacks)
		}
	}
}

func TestACachedLoadIsAsAFreshOne(t *testing.T) {
	t.Parallel()
	root := bigTree(t, 20)
	cache := &Cache{}
	for i := range 3 {
		put(t, root, fmt.Sprintf("group%d/stack%d/conf/app.conf", i, i), "changed\n")
		put(t, root, fmt.Sprintf("group%d/stack%d/.env", i+3, i+3), "B=changed\n")
		got := load(t, Options{Root: root, Hash: hasher(t, root), Cache: cache})
		if !slices.Equal(bundleBytes(got), bundleBytes(load(t, Options{Root: root}))) {
			t.Fatalf("round %d: what the cache gives differs from a fresh load", i)
		}
	}
}

func TestTheCacheIsNotChangedThroughABundle(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{"compose.yaml": "services: {web: {image: a, healthcheck: {test: [CMD, x]}}}\n"})
	o := Options{Root: root, Source: "shop", Hash: hasher(t, root), Cache: &Cache{}}
	first := load(t, o)
	want := bundleBytes(first)
	manifest.Resolve(&first.Stacks[0].Services[0])
	if got := bundleBytes(load(t, o)); !slices.Equal(got, want) {
		t.Errorf("after Resolve of a bundle's service, the cache gives\n%s\nwant\n%s", got, want)
	}
}

func TestSettingsReachTheCache(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{"a/compose.yaml": "services: {web: {image: \"a:${TAG:-1}\"}}\n"})
	o := Options{Root: root, Hash: hasher(t, root), Cache: &Cache{}}
	load(t, o)
	o.Vars = map[string]string{"TAG": "2"}
	if got := load(t, o).Stacks[0].Services[0].Main().Image; got != "docker.io/library/a:2" {
		t.Errorf("image is %s after --var TAG=2", got)
	}
	put(t, root, "gitops.yaml", "vars: {TAG: 3}\n")
	o.Hash, o.Vars = hasher(t, root), nil
	if got := load(t, o).Stacks[0].Services[0].Main().Image; got != "docker.io/library/a:3" {
		t.Errorf("image is %s after gitops.yaml came", got)
	}
}

// bundleBytes is all of a bundle, with what its canonical form leaves out.
func bundleBytes(b *manifest.Bundle) []byte {
	out := manifest.Canonical(b)
	for i := range b.Stacks {
		s := &b.Stacks[i]
		out = append(out, manifest.Canonical(s.Origins)...)
		out = append(out, manifest.Canonical(s.SecretValues)...)
		out = append(out, manifest.Canonical(s.Files)...)
	}
	return append(out, manifest.Canonical(b.Blobs)...)
}

// BenchmarkLoad renders 1,000 stacks of 5 services: all of them, and after a change of one.
func BenchmarkLoad(b *testing.B) {
	root := bigTree(b, 1000)
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			load(b, Options{Root: root})
		}
	})
	b.Run("one", func(b *testing.B) {
		cache := &Cache{}
		load(b, Options{Root: root, Hash: hasher(b, root), Cache: cache})
		n := 0
		for b.Loop() {
			b.StopTimer()
			n++
			put(b, root, "group0/stack0/conf/app.conf", fmt.Sprint("number = ", n))
			hash := hasher(b, root)
			b.StartTimer()
			if _, err := Load(context.Background(), Options{Root: root, Hash: hash, Cache: cache}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A push and a person may ask for the same commit at the same moment.
func TestTwoLoadsAtOnceRenderOnce(t *testing.T) {
	t.Parallel()
	const stacks = 200
	root := bigTree(t, stacks)
	cache, hash := &Cache{}, hasher(t, root)
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() { load(t, Options{Root: root, Hash: hash, Cache: cache}) })
	}
	group.Wait()
	if got := cache.Stats(); got.Rendered != stacks {
		t.Errorf("%+v, want %d rendered", got, stacks)
	}
}
