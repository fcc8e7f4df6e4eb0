package git

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// remote is one conversation with one repository: refs first, then at most one fetch.
type remote interface {
	// refs lists what the repository advertises.
	refs(ctx context.Context) (*advert, error)
	// fetch asks for the objects of req and gives the pack to sink, which reads all of it.
	// It returns the commits whose parents the remote left out.
	fetch(ctx context.Context, req fetchRequest, sink func(io.Reader) error) (shallow []string, err error)
	close()
}

// fetchRequest asks for one object and what it needs. All ids are hex.
type fetchRequest struct {
	want    string
	have    []string          // commits that are here with all their content
	shallow []string          // commits that are here without their parents
	depth   int               // commits to send, counted from want; fullDepth for all
	has     func(string) bool // whether an object is here; a local repository asks this instead of have
}

// fullDepth is what git sends for fetch --unshallow.
const fullDepth = 2147483647

// advert is what a repository says it has.
type advert struct {
	refs   map[string]string // full name -> object id
	peeled map[string]string // annotated tags -> the object they name in the end
	head   string            // the branch that HEAD names, full name; "" if it was not told
	caps   map[string]string
}

const (
	maxAdvert = 64 << 20 // bytes of a ref advertisement
	maxRefs   = 500_000
	agentName = "git/gitopsd"
)

// openRemote picks the way to speak to l. Nothing is connected yet.
func openRemote(spec Spec, l location, limits Limits) (remote, error) {
	switch l.scheme {
	case schemeLocal:
		return openLocal(l, limits)
	case schemeSSH:
		return openSSH(spec, l, limits)
	}
	return openHTTP(spec, l, limits)
}

// tip finds what spec follows among the advertised refs.
func (a *advert) tip(spec Spec) (Tip, error) {
	name := spec.refName()
	if len(a.refs) == 0 {
		return Tip{}, fail(EmptyRepository, "the repository has no commit yet", "push one")
	}
	if name == "" {
		if name = a.headBranch(); name == "" {
			return Tip{}, fail(RefNotFound, "the repository's HEAD names a branch that has no commit", "set a branch ("+a.some("refs/heads/", "")+")")
		}
	}
	id, ok := a.refs[name]
	if !ok {
		kind, prefix, other, otherPrefix := "branch", "refs/heads/", "tag", "refs/tags/"
		short := spec.Branch
		if spec.Tag != "" {
			kind, prefix, other, otherPrefix = other, otherPrefix, kind, prefix
			short = strings.TrimPrefix(spec.Tag, "refs/tags/")
		}
		e := fail(RefNotFound, fmt.Sprintf("there is no %s %s", kind, printable(short, 100)), "")
		if _, ok := a.refs[otherPrefix+short]; ok {
			e.WayOut = "there is a " + other + " of that name: set " + other + " instead"
		} else if have := a.some(prefix, short); have != "" {
			e.WayOut = "there are: " + have
		} else {
			e.WayOut = "there is none at all of that kind"
		}
		return Tip{}, e
	}
	t := Tip{Ref: shortRef(name), Commit: id, Object: id}
	if p := a.peeled[name]; p != "" {
		t.Commit = p
	}
	return t, nil
}

func (a *advert) headBranch() string {
	if a.head != "" {
		if _, ok := a.refs[a.head]; ok {
			return a.head
		}
		return ""
	}
	// An old server tells HEAD's commit but not its branch. Take the branch that points there too.
	id, ok := a.refs["HEAD"]
	if !ok {
		return ""
	}
	found := ""
	for name, at := range a.refs {
		if at != id || !strings.HasPrefix(name, "refs/heads/") {
			continue
		}
		if name == "refs/heads/main" || name == "refs/heads/master" && found != "refs/heads/main" || found == "" ||
			found != "refs/heads/main" && found != "refs/heads/master" && name < found {
			found = name
		}
	}
	if found == "" {
		return "HEAD"
	}
	return found
}

// some names up to five refs below prefix, those that begin like near first.
func (a *advert) some(prefix, near string) string {
	var names []string
	for name := range a.refs {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			names = append(names, rest)
		}
	}
	common := func(s string) (n int) {
		for n < len(s) && n < len(near) && s[n]|0x20 == near[n]|0x20 {
			n++
		}
		return n
	}
	sort.Slice(names, func(i, j int) bool {
		if a, b := common(names[i]), common(names[j]); a != b {
			return a > b
		}
		return names[i] < names[j]
	})
	more := ""
	if len(names) > 5 {
		more = fmt.Sprintf(" and %d more", len(names)-5)
		names = names[:5]
	}
	for i := range names {
		names[i] = printable(names[i], 60)
	}
	return strings.Join(names, ", ") + more
}

func shortRef(name string) string {
	for _, prefix := range []string{"refs/heads/", "refs/tags/", "refs/"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return rest
		}
	}
	return name
}

// pktReader reads pkt-lines: four hex digits of length, then that many bytes less four.
type pktReader struct {
	r   *bufio.Reader
	buf [65520]byte
}

func newPktReader(r io.Reader) *pktReader { return &pktReader{r: bufio.NewReaderSize(r, 1<<16)} }

// next returns the payload of the next line, valid until the next call, or flush.
func (p *pktReader) next() (line []byte, flush bool, err error) {
	var head [4]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return nil, false, err
	}
	n, err := strconv.ParseUint(string(head[:]), 16, 16)
	switch {
	case err != nil:
		return nil, false, fail(Unreachable, "the server's answer is not of the Git protocol", "check that the URL is that of a repository")
	case n == 0:
		return nil, true, nil
	case n < 4 || n > uint64(len(p.buf)):
		return nil, false, fail(Corrupt, "the server's answer has a line of an impossible length", "")
	}
	line = p.buf[:n-4]
	if _, err := io.ReadFull(p.r, line); err != nil {
		return nil, false, unexpected(err)
	}
	if msg, ok := bytes.CutPrefix(line, []byte("ERR ")); ok {
		return nil, false, serverSaid(string(msg))
	}
	return line, false, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// serverSaid classifies the message of a server.
func serverSaid(msg string) *Error {
	text := "the server answered: " + printable(msg, 300)
	low := strings.ToLower(msg)
	for _, s := range []string{"not found", "does not exist", "does not appear to be a git repository", "no such repository", "could not be found", "not a git repository"} {
		if strings.Contains(low, s) {
			return fail(RepositoryNotFound, text, "check the URL, and that the credentials may read it: many servers hide what they may not show")
		}
	}
	for _, s := range []string{"access denied", "permission", "denied", "unauthorized", "authentication", "not authorized"} {
		if strings.Contains(low, s) {
			return fail(AuthFailed, text, "give the credentials read access to the repository")
		}
	}
	if strings.Contains(low, "not our ref") || strings.Contains(low, "not valid") {
		return fail(RefNotFound, text, "the ref has moved on or the server gives only the tips of branches; the next look takes the new tip")
	}
	return fail(Unreachable, text, "")
}

// readAdvert parses a ref advertisement of protocol version 0 (or 1). service is the announced line
// that comes first over HTTP.
func readAdvert(r io.Reader, service bool) (*advert, *pktReader, error) {
	p := newPktReader(r)
	if service {
		line, flush, err := p.next()
		if err != nil {
			return nil, nil, err
		}
		if flush || !bytes.HasPrefix(line, []byte("# service=git-upload-pack")) {
			return nil, nil, fail(Unreachable, "the server's answer is not of the Git protocol", "check that the URL is that of a repository")
		}
		if _, flush, err = p.next(); err != nil || !flush {
			return nil, nil, fail(Unreachable, "the server's answer is not of the Git protocol", "check that the URL is that of a repository")
		}
	}
	a := &advert{refs: map[string]string{}, peeled: map[string]string{}, caps: map[string]string{}}
	for first := true; ; {
		line, flush, err := p.next()
		if err != nil {
			return nil, nil, err
		}
		if flush {
			return a, p, nil
		}
		text := strings.TrimSuffix(string(line), "\n")
		if first && text == "version 1" {
			continue
		}
		if first {
			var caps string
			text, caps, _ = strings.Cut(text, "\x00")
			a.readCaps(caps)
			first = false
		}
		if strings.HasPrefix(text, "shallow ") {
			continue // the remote is shallow itself; what it lacks shows when it is asked
		}
		id, name, ok := strings.Cut(text, " ")
		if !ok || !isHexID(id) {
			if len(id) == 64 {
				return nil, nil, fail(InvalidSource, "the repository uses SHA-256 object names, which gitopsd does not read", "use a repository with SHA-1 object names, Git's default")
			}
			return nil, nil, fail(Corrupt, "the server's list of refs has a malformed line", "")
		}
		if name == "capabilities^{}" {
			continue // what a server without refs says
		}
		if len(a.refs) >= maxRefs {
			return nil, nil, fail(TooLarge, fmt.Sprintf("the repository has more than %d refs", maxRefs), "use a repository with fewer branches and tags")
		}
		if base, ok := strings.CutSuffix(name, "^{}"); ok {
			a.peeled[base] = id
			continue
		}
		if name != "HEAD" && (!strings.HasPrefix(name, "refs/") || badRefName(name) != "") {
			continue // never used as a file's name here, but nobody can have meant it either
		}
		a.refs[name] = id
	}
}

func (a *advert) readCaps(list string) {
	for _, c := range strings.Fields(list) {
		key, value, _ := strings.Cut(c, "=")
		if target, ok := strings.CutPrefix(value, "HEAD:"); ok && key == "symref" {
			a.head = target
			continue
		}
		a.caps[key] = value
	}
}

// encode writes the request as upload-pack wants it, all of it at once: we never wait for the server's
// opinion on what we have, so that one round trip does over HTTP as over SSH.
func (req fetchRequest) encode(a *advert) ([]byte, error) {
	if f, ok := a.caps["object-format"]; ok && f != "sha1" {
		return nil, fail(InvalidSource, "the repository uses "+printable(f, 20)+" object names, which gitopsd does not read", "use a repository with SHA-1 object names, Git's default")
	}
	_, canDeepen := a.caps["shallow"]
	caps := []string{}
	for _, c := range []string{"side-band-64k", "ofs-delta", "no-progress"} {
		if _, ok := a.caps[c]; ok {
			caps = append(caps, c)
		}
	}
	if _, ok := a.caps["agent"]; ok {
		caps = append(caps, "agent="+agentName)
	}
	var b bytes.Buffer
	line := func(s string) { fmt.Fprintf(&b, "%04x%s\n", len(s)+5, s) }
	line("want " + req.want + " " + strings.Join(caps, " "))
	if canDeepen {
		for _, id := range req.shallow {
			line("shallow " + id)
		}
		line("deepen " + strconv.Itoa(req.depth))
	}
	b.WriteString("0000")
	// A server that knows nothing of shallow repositories would take "have" as the whole history.
	if canDeepen || len(req.shallow) == 0 {
		for _, id := range req.have {
			line("have " + id)
		}
	}
	line("done")
	return b.Bytes(), nil
}

// readPack reads the answer to an encoded request: what is shallow now, the acknowledgement, the pack.
func readPack(r *pktReader, a *advert, sink func(io.Reader) error) (shallow []string, err error) {
	if _, ok := a.caps["shallow"]; ok {
		for {
			line, flush, err := r.next()
			if err != nil {
				return nil, unexpected(err)
			}
			if flush {
				break
			}
			text := strings.TrimSpace(string(line))
			if id, ok := strings.CutPrefix(text, "shallow "); ok && isHexID(id) {
				shallow = append(shallow, id)
			} else if !strings.HasPrefix(text, "unshallow ") {
				return nil, fail(Corrupt, "the server's answer has a malformed line where shallow commits are listed", "")
			}
		}
	}
	_, banded := a.caps["side-band-64k"]
	for {
		if head, err := r.r.Peek(4); err == nil && !banded && string(head) == "PACK" {
			return shallow, sink(r.r)
		}
		line, flush, err := r.next()
		if err != nil {
			return nil, unexpected(err)
		}
		switch {
		case flush:
		case bytes.HasPrefix(line, []byte("ACK ")), bytes.HasPrefix(line, []byte("NAK")):
		case banded && len(line) > 0 && line[0] <= 3:
			return shallow, sink(&bandReader{p: r, rest: nil, line: slices.Clone(line)})
		default:
			return nil, fail(Corrupt, "the server's answer has a malformed line before the pack", "")
		}
	}
}

// bandReader takes the pack out of the side-band: band 1 is the pack, 2 progress, 3 an error.
type bandReader struct {
	p    *pktReader
	line []byte // a line that was read already
	rest []byte
	done bool
}

func (b *bandReader) Read(buf []byte) (int, error) {
	for len(b.rest) == 0 {
		if b.done {
			return 0, io.EOF
		}
		line := b.line
		b.line = nil
		if line == nil {
			var flush bool
			var err error
			if line, flush, err = b.p.next(); err != nil {
				return 0, unexpected(err)
			} else if flush {
				b.done = true
				continue
			}
		}
		if len(line) == 0 {
			return 0, fail(Corrupt, "the server's answer has an empty line inside the pack", "")
		}
		switch line[0] {
		case 1:
			b.rest = line[1:]
		case 2:
		case 3:
			return 0, serverSaid(string(line[1:]))
		default:
			return 0, fail(Corrupt, "the server's answer has a malformed line inside the pack", "")
		}
	}
	n := copy(buf, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func isHexID(s string) bool {
	if len(s) != 40 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// limitReader fails with TooLarge when more than n bytes are read, and with the context's error when it ended.
type limitReader struct {
	ctx  context.Context
	r    io.Reader
	left int64
	what string
	max  int64
}

func limited(ctx context.Context, r io.Reader, max int64, what string) *limitReader {
	return &limitReader{ctx: ctx, r: r, left: max, max: max, what: what}
}

func (l *limitReader) Read(p []byte) (int, error) {
	if err := l.ctx.Err(); err != nil {
		return 0, err
	}
	if l.left < 0 {
		return 0, l.over()
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	if l.left < 0 {
		return 0, l.over()
	}
	return n, err
}

func (l *limitReader) over() error {
	return fail(TooLarge, l.what+" is larger than "+sizeText(l.max), "keep large files out of the repository, or raise the limit")
}

// sizeText writes a size as people do.
func sizeText(n int64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
