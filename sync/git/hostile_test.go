package git

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every class of tree that refuses the whole commit, and the sentence that says so.
func TestHostileTrees(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	file := b.blob("x")
	good := line{modeFile, "good", file}
	inner := b.rawTree(line{modeFile, "config", file})
	deep := inner
	for range 70 {
		deep = b.rawTree(line{modeDir, "d", deep})
	}
	missing := strings.Repeat("ab", 20)
	for name, c := range map[string]struct {
		tree   string
		reason Reason
		text   string
	}{
		"dot dot":           {b.rawTree(line{modeDir, "..", inner}), Hostile, `entry ".." has a name that is . or ..`},
		"dot dot below":     {b.rawTree(line{modeDir, "a", b.rawTree(line{modeFile, "..", file})}), Hostile, `entry "a/.." has a name that is . or ..`},
		"dot":               {b.rawTree(line{modeFile, ".", file}), Hostile, `entry "." has a name that is . or ..`},
		"slash":             {b.rawTree(line{modeFile, "../../etc/passwd", file}), Hostile, "has a slash or a NUL byte in it"},
		"absolute":          {b.rawTree(line{modeFile, "/etc/cron.d/x", file}), Hostile, "has a slash or a NUL byte in it"},
		"empty name":        {b.rawTree(line{modeFile, "", file}), Hostile, "has a name that is empty"},
		".git":              {b.rawTree(line{modeDir, ".git", inner}), Hostile, `entry ".git" has a name that is read as .git`},
		".GIT below":        {b.rawTree(line{modeDir, "a", b.rawTree(line{modeDir, ".GiT", inner})}), Hostile, `entry "a/.GiT" has a name that is read as .git`},
		"git~1":             {b.rawTree(line{modeDir, "GIT~1", inner}), Hostile, "read as .git"},
		".git with dots":    {b.rawTree(line{modeDir, ".git. .", inner}), Hostile, "read as .git"},
		".git with stream":  {b.rawTree(line{modeDir, ".git::$INDEX_ALLOCATION", inner}), Hostile, "read as .git"},
		".git with joiners": {b.rawTree(line{modeDir, ".g\u200cit", inner}), Hostile, "read as .git"},
		"mode":              {b.rawTree(line{"100777", "f", file}), Hostile, `entry "f" has the mode 100777, which Git does not know`},
		"device mode":       {b.rawTree(line{"020000", "f", file}), Hostile, "which Git does not know"},
		"name twice":        {b.rawTree(good, good), Corrupt, `lists the name "good" twice`},
		"wrong order":       {b.rawTree(line{modeFile, "b", file}, line{modeFile, "a", file}), Corrupt, `lists its names in the wrong order at "a"`},
		"malformed":         {b.rawObject("tree", "100644 a\x00short"), Corrupt, "ends in the middle of an entry"},
		"no mode":           {b.rawObject("tree", "nonsense"), Corrupt, "malformed mode"},
		"missing file":      {b.rawTree(line{modeFile, "f", missing}), Corrupt, "object " + missing + " is missing"},
		"missing directory": {b.rawTree(line{modeDir, "d", missing}), Corrupt, "object " + missing + " is missing"},
		"directory is file": {b.rawTree(line{modeDir, "d", file}), Corrupt, "object " + file},
		"too deep":          {deep, TooLarge, "is more than 64 levels deep"},
	} {
		t.Run(name, func(t *testing.T) {
			commit := b.rawObject("commit", "tree "+c.tree+"\nauthor A <a@b> 1700000000 +0000\ncommitter A <a@b> 1700000000 +0000\n\nx\n")
			b.ref("refs/heads/main", commit)
			s := newStore(t, Limits{})
			_, err := pull(t, s, b.spec())
			if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) || !strings.HasPrefix(err.Error(), "fetch shop@HEAD: ") {
				t.Fatalf("got %v\nwant %s … %q", err, c.reason, c.text)
			}
			var e *Error
			if errors.As(err, &e) && e.WayOut == "" {
				t.Errorf("%v: no way out", err)
			}
			if left, _ := os.ReadDir(filepath.Join(s.dir, "checkouts")); len(left) != 0 {
				t.Errorf("left on disk: %v", left)
			}
		})
	}
}

// Every class of entry that is a Problem of its own path; the rest of the commit is used.
func TestProblemEntries(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	file := b.blob("x")
	link := func(target string) string { return b.blob(target) }
	lfs := b.blob("version https://git-lfs.github.com/spec/v1\noid sha256:" + strings.Repeat("0", 64) + "\nsize 12345\n")
	dir := b.rawTree(
		line{modeLink, "circle", link("circle2")},
		line{modeLink, "circle2", link("circle")},
		line{modeFile, "f", file},
		line{modeLink, "ok", link("../good")},
		line{modeLink, "okchain", link("ok")},
		line{modeLink, "out", link("../../x")},
		line{modeLink, "up", link("..")},
	)
	tree := b.rawTree(
		line{modeFile, "README", file},
		line{modeLink, "abs", link("/etc/passwd")},
		line{modeFile, "back\\slash", file},
		line{modeFile, "bad\xffutf8", file},
		line{modeFile, "bell\a", file},
		line{modeLink, "chain", link("dir/out")},
		line{modeLink, "dangling", link("nowhere")},
		line{modeDir, "dir", dir},
		line{modeFile, "good", file},
		line{modeLink, "intogit", link(".git/config")},
		line{modeFile, "lfs.bin", lfs},
		line{modeFile, "readme", file},
		line{modeLink, "self", link("self")},
		line{modeSubmodule, "sub", strings.Repeat("1", 40)},
		line{modeLink, "through", link("good/x")},
		line{modeLink, "tosub", link("sub/x")},
		line{modeLink, "zero", link("a\x00b")},
		line{modeFile, "ÄB", file},
		line{modeFile, "äb", file},
	)
	b.ref("refs/heads/main", b.commitTree(tree))
	c := mustPull(t, newStore(t, Limits{}), b.spec())
	want := map[string]struct {
		kind ProblemKind
		text string
	}{
		"README":      {ProblemCollision, `the names "README" and "readme" differ only by case`},
		"readme":      {ProblemCollision, `rename one`},
		"ÄB":          {ProblemCollision, "differ only by case"},
		"äb":          {ProblemCollision, "differ only by case"},
		"back\\slash": {ProblemName, "has a backslash in it"},
		"bad?utf8":    {ProblemName, "is not valid UTF-8"},
		"bell?":       {ProblemName, "has a control character in it"},
		"abs":         {ProblemSymlink, `the symbolic link to "/etc/passwd" is absolute`},
		"chain":       {ProblemSymlink, "leads out of the repository"},
		"dangling":    {ProblemSymlink, `leads to "nowhere", which is not in the commit`},
		"intogit":     {ProblemSymlink, `leads to ".git", which is not in the commit`},
		"self":        {ProblemSymlink, "leads in a circle"},
		"dir/circle":  {ProblemSymlink, "leads in a circle"},
		"dir/circle2": {ProblemSymlink, "leads in a circle"},
		"dir/out":     {ProblemSymlink, "leads out of the repository"},
		"dir/up":      {ProblemSymlink, "holds the link itself"},
		"through":     {ProblemSymlink, `goes on below "good", which is a file`},
		"tosub":       {ProblemSymlink, "which is not in the commit"},
		"zero":        {ProblemSymlink, "control character"},
		"sub":         {ProblemSubmodule, "add that repository as a source of its own"},
		"lfs.bin":     {ProblemLFS, "commit the file, or put it in an image"},
	}
	for _, p := range c.Problems {
		w, ok := want[p.Path]
		if !ok || p.Kind != w.kind || !strings.Contains(p.Text, w.text) {
			t.Errorf("problem %+v, want %+v", p, w)
		}
		delete(want, p.Path)
	}
	for path := range want {
		t.Errorf("no problem at %q", path)
	}
	got := readCheckout(t, c.Dir)
	if len(got) != 5 || got["good"] != "x" || got["dir/f"] != "x" || got["dir/ok"] != "-> ../good" || got["dir/okchain"] != "-> ok" || got["lfs.bin"] == "" {
		t.Errorf("on disk: %v", got)
	}
	// The same tree again, from the index, has the same problems; so has a next commit that shares the files.
	again := mustPull(t, newStore(t, Limits{}), b.spec())
	if len(again.Problems) != len(c.Problems) {
		t.Errorf("%d problems the second time", len(again.Problems))
	}
}

func TestSharedPointerFileKeepsItsProblem(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	pointer := "version https://git-lfs.github.com/spec/v1\n"
	b.push(map[string]string{"p": pointer})
	s := newStore(t, Limits{})
	mustPull(t, s, b.spec())
	b.push(map[string]string{"p": pointer, "q": ""})
	if c := mustPull(t, s, b.spec()); len(c.Problems) != 1 || c.Problems[0].Kind != ProblemLFS {
		t.Errorf("problems: %+v", c.Problems)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": strings.Repeat("a", 5000), "b": strings.Repeat("b", 3000), "c": "c"})
	for name, c := range map[string]struct {
		limits Limits
		text   string
	}{
		"tree":    {Limits{Tree: 6000}, "the files of the commit are larger than 5 KiB together"},
		"entries": {Limits{Entries: 3}, "more than 3 files and directories"},
		"object":  {Limits{Object: 4000}, "has an object of 4 KiB"},
		"pack":    {Limits{Pack: 100}, "the pack is larger than 100 bytes"},
	} {
		if _, err := pull(t, newStore(t, c.limits), b.spec()); !errors.Is(err, TooLarge) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := mustPull(t, newStore(t, Limits{File: 4000}), b.spec())
	if got := readCheckout(t, c.Dir); len(c.Problems) != 1 || c.Problems[0].Path != "a" || c.Problems[0].Kind != ProblemTooLarge || len(got) != 2 {
		t.Errorf("file: %+v, %d on disk", c.Problems, len(got))
	}
}

func TestCancelled(t *testing.T) {
	t.Parallel()
	b := newRepo(t)
	b.push(map[string]string{"a": "1"})
	s := newStore(t, Limits{})
	tip, err := s.Resolve(testCtx(t), b.spec())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.Fetch(ctx, b.spec(), tip); !errors.Is(err, context.Canceled) || !errors.Is(err, TimedOut) {
		t.Errorf("got %v", err)
	}
	mustPull(t, s, b.spec())
}

// packOf writes a pack by hand.
func packOf(count uint32, entries ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte("PACK"), 2), count)
	for _, e := range entries {
		b = append(b, e...)
	}
	sum := sha1.Sum(b)
	return append(b, sum[:]...)
}

// packEntry writes an entry that declares size and holds content.
func packEntry(kind byte, size int, between, content []byte) []byte {
	head := []byte{kind<<4 | byte(size&15)}
	for size >>= 4; size > 0; size >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(size&0x7f))
	}
	var z bytes.Buffer
	w := zlib.NewWriter(&z)
	_, _ = w.Write(content)
	_ = w.Close()
	return append(append(head, between...), z.Bytes()...)
}

func TestHostilePacks(t *testing.T) {
	t.Parallel()
	limits := Limits{Object: 1 << 20, Pack: 1 << 20}.withDefaults()
	good := packOf(1, packEntry(3, 5, nil, []byte("hello")))
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	blob := packEntry(3, 5, nil, []byte("hello"))
	bigDelta := binary.AppendUvarint(binary.AppendUvarint(nil, 5), 1<<40)
	var bomb [][]byte
	for range 6 {
		bomb = append(bomb, packEntry(3, 1<<20, nil, make([]byte, 1<<20)))
	}
	for name, c := range map[string]struct {
		pack   []byte
		reason Reason
		text   string
	}{
		"empty stream":    {nil, Corrupt, "the pack ends in the middle"},
		"truncated":       {good[:len(good)-25], Corrupt, "the pack ends in the middle"},
		"no trailer":      {good[:len(good)-3], Corrupt, "the pack ends in the middle"},
		"checksum":        {flipped, Corrupt, "checksum does not match"},
		"trailing bytes":  {append(bytes.Clone(good), 'x'), Corrupt, "goes on after its end"},
		"not a pack":      {[]byte("HTTP/1.1 200 OK\r\n\r\n"), Corrupt, "is not a pack of version 2"},
		"version 3":       {append([]byte("PACK\x00\x00\x00\x03"), good[8:]...), Corrupt, "is not a pack of version 2"},
		"many objects":    {packOf(1<<31, blob), TooLarge, "declares 2147483648 objects"},
		"too few objects": {packOf(9, blob), Corrupt, "the pack"},
		"huge object":     {packOf(1, packEntry(3, 1<<40, nil, []byte("hello"))), TooLarge, "has an object of 1024 GiB"},
		"impossible size": {packOf(1, []byte{0xb0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}), TooLarge, "impossible size"},
		"bomb":            {packOf(1, packEntry(3, 5, nil, make([]byte, 8<<20))), Corrupt, "not as long as it says"},
		"sum of objects":  {packOf(6, bomb...), TooLarge, "larger than 4 MiB when unpacked"},
		"short object":    {packOf(1, packEntry(3, 50, nil, []byte("hello"))), Corrupt, "not as long as it says"},
		"unknown kind":    {packOf(1, packEntry(5, 5, nil, []byte("hello"))), Corrupt, "of unknown kind 5"},
		"delta result":    {packOf(2, blob, packEntry(7, len(bigDelta), make([]byte, 20), bigDelta)), TooLarge, "has an object of 1024 GiB"},
		"delta base":      {packOf(1, packEntry(7, 3, make([]byte, 20), []byte{5, 5, 0x85})), Corrupt, "the pack is damaged"},
		"bad zlib":        {packOf(1, []byte{0x35, 1, 2, 3, 4, 5, 6}), Corrupt, "the pack is damaged"},
	} {
		dir := t.TempDir()
		err := addPack(context.Background(), dir, bytes.NewReader(c.pack), limits)
		if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %s %q", name, err, c.reason, c.text)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s: %d files are left", name, len(left))
		}
	}
	dir := t.TempDir()
	if err := addPack(context.Background(), dir, bytes.NewReader(good), limits); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("a good pack leaves %d files", len(left))
	}
}

func FuzzPack(f *testing.F) {
	f.Add(packOf(1, packEntry(3, 5, nil, []byte("hello"))))
	f.Add(packOf(2, packEntry(3, 5, nil, []byte("hello")), packEntry(6, 4, []byte{20}, []byte{5, 5, 0x90, 5})))
	limits := Limits{Object: 1 << 16, Pack: 1 << 16}.withDefaults()
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		err := addPack(context.Background(), dir, bytes.NewReader(raw), limits)
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Errorf("an error without a reason: %v", err)
		}
	})
}

func FuzzObjects(f *testing.F) {
	f.Add([]byte("100644 a\x00aaaaaaaaaaaaaaaaaaaa"))
	f.Add([]byte("tree " + strings.Repeat("a", 40) + "\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\ngpgsig x\n y\n\nhi"))
	f.Add([]byte("object " + strings.Repeat("a", 40) + "\ntype commit\ntag v1\n\nm\n-----BEGIN SSH SIGNATURE-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if entries, err := parseTree(raw); err == nil {
			var back bytes.Buffer
			for _, e := range entries {
				fmt.Fprintf(&back, "%s %s\x00%s", e.mode, e.name, e.id[:])
			}
			if !bytes.Equal(back.Bytes(), raw) {
				t.Errorf("a tree was read as something else: %q", raw)
			}
		}
		if c, err := parseCommit(raw); err == nil && len(c.signatures) == 0 && bytes.Contains(raw, []byte("\n\n")) && !bytes.Contains(raw, []byte("gpgsig")) {
			if !bytes.Equal(c.payload, raw) {
				t.Errorf("payload %q of %q", c.payload, raw)
			}
		}
		if tg, err := parseTag(raw); err == nil && len(tg.signatures) > 0 {
			if !bytes.Equal(append(bytes.Clone(tg.payload), strings.Join(tg.signatures, "")...), raw) {
				t.Errorf("a tag's parts are not the whole: %q", raw)
			}
		}
	})
}
