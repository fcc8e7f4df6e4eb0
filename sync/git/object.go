package git

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

const (
	maxCommit = 4 << 20  // bytes of a commit or tag object
	maxTree   = 32 << 20 // bytes of one tree object
)

// commit is a commit object, read strictly: what two readers could understand differently is refused.
type commit struct {
	tree       plumbing.Hash
	parents    []plumbing.Hash
	author     string
	when       time.Time
	subject    string
	signatures []string // the armored text of each signature header
	payload    []byte   // what a signature signs: the object without its signature headers
}

// emptyTree is the id of a tree without entries. Git knows it without having it as an object.
var emptyTree = plumbing.NewHash("4b825dc642cb6eb9a060e54bf8d69288fbee4904")

// readObject reads a whole object of the wanted kind.
func readObject(objects storer.EncodedObjectStorer, kind plumbing.ObjectType, id plumbing.Hash, max int64) ([]byte, error) {
	if kind == plumbing.TreeObject && id == emptyTree {
		return nil, nil
	}
	o, err := objects.EncodedObject(kind, id)
	if err != nil {
		return nil, missing(id, err)
	}
	if o.Size() > max {
		return nil, fail(TooLarge, fmt.Sprintf("the %s %s is larger than %s", kind, id, sizeText(max)), "")
	}
	r, err := o.Reader()
	if err != nil {
		return nil, missing(id, err)
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, max+1))
	if err != nil {
		return nil, missing(id, err)
	}
	if int64(len(raw)) != o.Size() {
		return nil, fail(Corrupt, "object "+id.String()+" is not as long as it says", "run git fsck on the repository")
	}
	return raw, nil
}

func readCommit(objects storer.EncodedObjectStorer, id plumbing.Hash) (*commit, error) {
	raw, err := readObject(objects, plumbing.CommitObject, id, maxCommit)
	if err != nil {
		return nil, err
	}
	c, err := parseCommit(raw)
	if err != nil {
		return nil, fail(Corrupt, "commit "+id.String()+" "+err.Error(), "run git fsck on the repository")
	}
	return c, nil
}

// parseCommit reads the headers in Git's order: tree, parents, author, committer, then others.
func parseCommit(raw []byte) (*commit, error) {
	head, body, ok := bytes.Cut(raw, []byte("\n\n"))
	if !ok {
		head, body = bytes.TrimSuffix(raw, []byte("\n")), nil
	}
	if bytes.IndexByte(head, 0) >= 0 {
		return nil, fmt.Errorf("has a NUL byte in its headers")
	}
	c := &commit{}
	stage := 0 // 0 tree, 1 parents or author, 2 committer, 3 the rest
	var payload bytes.Buffer
	lines := strings.SplitAfter(string(head)+"\n", "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		if line == "" {
			continue
		}
		text := line
		// A header goes on in lines that begin with a space.
		for i+1 < len(lines) && strings.HasPrefix(lines[i+1], " ") {
			i++
			text += lines[i]
		}
		key, value, _ := strings.Cut(strings.TrimSuffix(text, "\n"), " ")
		switch {
		case stage == 0 && key == "tree" && isHexID(value):
			c.tree, stage = plumbing.NewHash(value), 1
		case stage == 1 && key == "parent" && isHexID(value):
			c.parents = append(c.parents, plumbing.NewHash(value))
		case stage == 1 && key == "author":
			c.author, stage = value, 2
		case stage == 2 && key == "committer":
			// Old tools wrote dates that can't be parsed. Such a commit has no date; no signature is
			// judged by it.
			_, c.when, _ = parsePerson(value)
			stage = 3
		case stage < 3 || key == "tree" || key == "parent" || key == "author" || key == "committer":
			return nil, fmt.Errorf("has its header %q missing, malformed, twice or out of order", printable(key, 20))
		case key == "gpgsig" || key == "gpgsig-sha256":
			if key == "gpgsig" {
				c.signatures = append(c.signatures, strings.ReplaceAll(value, "\n ", "\n")+"\n")
			}
			continue
		}
		payload.WriteString(text)
	}
	if stage != 3 {
		return nil, fmt.Errorf("has no complete header")
	}
	if ok {
		payload.WriteByte('\n')
		payload.Write(body)
	}
	c.payload = payload.Bytes()
	if name, _, err := parsePerson(c.author); err == nil {
		c.author = name
	}
	c.author = printable(c.author, 200)
	subject, _, _ := strings.Cut(strings.TrimLeft(string(body), "\n"), "\n")
	c.subject = printable(subject, 200)
	return c, nil
}

// parsePerson splits "Name <mail> 1700000000 +0100".
func parsePerson(s string) (person string, when time.Time, err error) {
	end := strings.LastIndexByte(s, '>')
	fields := strings.Fields(s[end+1:])
	if end < 0 || len(fields) != 2 {
		return "", time.Time{}, fmt.Errorf("has a person without mail or date")
	}
	sec, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil || sec < 0 || sec > 1<<40 {
		return "", time.Time{}, fmt.Errorf("has an impossible date")
	}
	return s[:end+1], time.Unix(sec, 0).UTC(), nil
}

// tag is an annotated tag object.
type tag struct {
	object     plumbing.Hash
	kind       string
	name       string
	when       time.Time
	signatures []string
	payload    []byte
}

var signatureStarts = []string{"-----BEGIN PGP SIGNATURE-----", "-----BEGIN PGP MESSAGE-----", "-----BEGIN SSH SIGNATURE-----", "-----BEGIN SIGNED MESSAGE-----"}

func readTag(objects storer.EncodedObjectStorer, id plumbing.Hash) (*tag, error) {
	raw, err := readObject(objects, plumbing.TagObject, id, maxCommit)
	if err != nil {
		return nil, err
	}
	t, err := parseTag(raw)
	if err != nil {
		return nil, fail(Corrupt, "tag object "+id.String()+" "+err.Error(), "run git fsck on the repository")
	}
	return t, nil
}

// parseTag reads a tag object. Its signature, unlike a commit's, is the end of the message.
func parseTag(raw []byte) (*tag, error) {
	head, body, _ := bytes.Cut(raw, []byte("\n\n"))
	t := &tag{}
	lines := strings.Split(string(head), "\n")
	if len(lines) < 3 {
		return nil, fmt.Errorf("has no complete header")
	}
	for i, key := range []string{"object", "type", "tag"} {
		value, ok := strings.CutPrefix(lines[i], key+" ")
		if !ok {
			return nil, fmt.Errorf("has its header %q missing or out of order", key)
		}
		switch key {
		case "object":
			if !isHexID(value) {
				return nil, fmt.Errorf("names no object")
			}
			t.object = plumbing.NewHash(value)
		case "type":
			t.kind = value
		case "tag":
			t.name = value
		}
	}
	for _, line := range lines[3:] {
		switch key, value, _ := strings.Cut(line, " "); key {
		case "tagger":
			if _, when, err := parsePerson(value); err == nil {
				t.when = when
			}
		case "object", "type", "tag":
			return nil, fmt.Errorf("has its header %q twice", key)
		}
	}
	offset := len(raw) - len(body)
	var starts []int
	for at := offset; at < len(raw); {
		for _, s := range signatureStarts {
			if bytes.HasPrefix(raw[at:], []byte(s)) {
				starts = append(starts, at)
			}
		}
		next := bytes.IndexByte(raw[at:], '\n')
		if next < 0 {
			break
		}
		at += next + 1
	}
	for i, at := range starts {
		end := len(raw)
		if i+1 < len(starts) {
			end = starts[i+1]
		}
		t.signatures = append(t.signatures, string(raw[at:end]))
	}
	if len(starts) > 0 {
		t.payload = raw[:starts[0]]
	}
	return t, nil
}

// treeEntry is one line of a tree object.
type treeEntry struct {
	mode string
	name string
	id   plumbing.Hash
}

// parseTree splits a tree object. Order and uniqueness are checked as git fsck does: a tree that lists
// a name twice means different things to different readers.
func parseTree(raw []byte) ([]treeEntry, error) {
	var entries []treeEntry
	seen := map[string]bool{}
	last := ""
	for len(raw) > 0 {
		space := bytes.IndexByte(raw, ' ')
		if space < 5 || space > 6 {
			return nil, fmt.Errorf("has an entry with a malformed mode")
		}
		mode := string(raw[:space])
		nul := bytes.IndexByte(raw, 0)
		if nul < space || len(raw) < nul+21 {
			return nil, fmt.Errorf("ends in the middle of an entry")
		}
		e := treeEntry{mode: mode, name: string(raw[space+1 : nul])}
		copy(e.id[:], raw[nul+1:nul+21])
		raw = raw[nul+21:]
		if seen[e.name] {
			return nil, fmt.Errorf("lists the name %q twice", printable(e.name, 100))
		}
		seen[e.name] = true
		key := e.name
		if mode == modeDir {
			key += "/"
		}
		if key < last {
			return nil, fmt.Errorf("lists its names in the wrong order at %q", printable(e.name, 100))
		}
		last = key
		entries = append(entries, e)
	}
	return entries, nil
}

// The modes of tree entries. 100664 is what early versions of Git wrote for a file.
const (
	modeFile      = "100644"
	modeFileOld   = "100664"
	modeExec      = "100755"
	modeLink      = "120000"
	modeDir       = "40000"
	modeSubmodule = "160000"
)

type nameKind int

const (
	nameFine    nameKind = iota
	nameOdd              // a person may have meant it: a Problem
	nameHostile          // nobody can have meant it: the commit is refused
)

// judgeName judges one part of a path.
func judgeName(s string) (nameKind, string) {
	switch {
	case s == "":
		return nameHostile, "is empty"
	case s == "." || s == "..":
		return nameHostile, "is . or .."
	case strings.ContainsAny(s, "/\x00"):
		return nameHostile, "has a slash or a NUL byte in it"
	case isDotGit(s):
		return nameHostile, "is read as .git, the repository itself, by some file system"
	case len(s) > 255:
		return nameOdd, "is longer than 255 bytes"
	case !utf8.ValidString(s):
		return nameOdd, "is not valid UTF-8"
	case strings.ContainsRune(s, '\\'):
		return nameOdd, "has a backslash in it"
	case strings.IndexFunc(s, unicode.IsControl) >= 0:
		return nameOdd, "has a control character in it"
	}
	return nameFine, ""
}

// isDotGit reports whether some file system takes s for ".git": in another case (FAT, APFS), with dots
// or spaces behind, as the short name git~1 or with a stream behind a colon (NTFS), or with invisible
// characters inside (HFS+).
func isDotGit(s string) bool {
	s = strings.ToLower(s)
	s, _, _ = strings.Cut(s, ":")
	s = strings.TrimRight(s, ". ")
	if s == "git~1" {
		return true
	}
	s = strings.Map(func(r rune) rune {
		if r >= 0x200c && r <= 0x200f || r >= 0x202a && r <= 0x202e || r >= 0x206a && r <= 0x206f || r == 0xfeff {
			return -1
		}
		return r
	}, s)
	return s == ".git"
}

// foldName maps names that differ only by case to the same string.
func foldName(s string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
			least = min(least, f)
		}
		return least
	}, s)
}
