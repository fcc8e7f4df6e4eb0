package git

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

// maxPackObjects bounds the objects of one pack. The index of that many is about 60 MB.
const maxPackObjects = 2_000_000

// addPack writes the pack that r holds into dir (a repository's objects/pack) together with its index.
// The pack is read twice: first by checkPack, which holds it against the limits while it arrives and
// touches no more memory than a window, then by go-git's parser, which resolves deltas in memory and
// is given only what passed. An empty pack is fine and adds nothing.
func addPack(ctx context.Context, dir string, r io.Reader, limits Limits) (err error) {
	f, err := os.CreateTemp(dir, "incoming-")
	if err != nil {
		return fail(StoreFailed, "the pack can't be stored: "+err.Error(), "")
	}
	defer func() {
		_ = f.Close()
		_ = os.Remove(f.Name())
	}()
	count, err := checkPack(io.TeeReader(r, f), limits)
	if err != nil {
		return packError(err)
	}
	if count == 0 {
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fail(StoreFailed, "the pack can't be read back: "+err.Error(), "")
	}
	index := &idxfile.Writer{}
	parser, err := packfile.NewParser(packfile.NewScanner(&ctxFile{ctx: ctx, File: f}), index)
	if err != nil {
		return packError(err)
	}
	sum, err := parser.Parse()
	if err != nil {
		return packError(err)
	}
	idx, err := index.Index()
	if err != nil {
		return packError(err)
	}
	var text bytes.Buffer
	if _, err := idxfile.NewEncoder(&text).Encode(idx); err != nil {
		return packError(err)
	}
	if err := f.Sync(); err != nil {
		return fail(StoreFailed, "the pack can't be stored: "+err.Error(), "check the free space of the disk")
	}
	// The index comes first: a pack without one would be an error for whoever opens the repository.
	base := filepath.Join(dir, "pack-"+sum.String())
	if err := writeFile(base+".idx", text.Bytes()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), base+".pack"); err != nil {
		return fail(StoreFailed, "the pack can't be stored: "+err.Error(), "")
	}
	return syncDir(dir)
}

func packError(err error) error {
	var own *Error
	switch {
	case errors.As(err, &own):
		return own
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fail(Corrupt, "the pack ends in the middle", "if it happens again, run git fsck on the repository")
	}
	return fail(Corrupt, "the pack is damaged: "+printable(err.Error(), 200), "if it happens again, run git fsck on the repository")
}

// checkPack reads a pack from start to end and holds every size it declares against the limits: the
// number of objects, the inflated size of each and of what each delta makes, and their sum. A pack is
// small on the wire and can be a thousand times that in memory.
func checkPack(r io.Reader, limits Limits) (count uint32, err error) {
	p := &packScan{r: bufio.NewReaderSize(r, 1<<16), sum: sha1.New()}
	var head [12]byte
	if err := p.full(head[:]); err != nil {
		return 0, err
	}
	if string(head[:4]) != "PACK" || binary.BigEndian.Uint32(head[4:]) != 2 {
		return 0, fail(Corrupt, "what the repository sent is not a pack of version 2", "")
	}
	count = binary.BigEndian.Uint32(head[8:])
	if count > maxPackObjects {
		return 0, fail(TooLarge, fmt.Sprintf("the pack declares %d objects, and the limit is %d", count, maxPackObjects), "use a smaller repository")
	}
	left := 4 * limits.Pack
	for i := uint32(0); i < count; i++ {
		n, err := p.object(limits.Object)
		if err != nil {
			return 0, err
		}
		if left -= n; left < 0 {
			return 0, fail(TooLarge, "the objects of the pack are larger than "+sizeText(4*limits.Pack)+" when unpacked", "keep large files out of the repository")
		}
	}
	want := p.sum.Sum(nil)
	var got [sha1.Size]byte
	if _, err := io.ReadFull(p.r, got[:]); err != nil {
		return 0, unexpected(err)
	}
	if !bytes.Equal(got[:], want) {
		return 0, fail(Corrupt, "the pack's checksum does not match its content", "if it happens again, run git fsck on the repository")
	}
	if _, err := p.r.ReadByte(); !errors.Is(err, io.EOF) {
		if err != nil {
			return 0, err
		}
		return 0, fail(Corrupt, "the pack goes on after its end", "")
	}
	return count, nil
}

// packScan reads the entries of a pack and sums what it read.
type packScan struct {
	r   *bufio.Reader
	sum hash.Hash
	zr  io.ReadCloser
	one [1]byte
}

// ReadByte and Read are the view of the zlib reader, which with a ByteReader takes no byte too many.
func (p *packScan) ReadByte() (byte, error) {
	b, err := p.r.ReadByte()
	if err == nil {
		p.one[0] = b
		p.sum.Write(p.one[:])
	}
	return b, err
}

func (p *packScan) Read(buf []byte) (int, error) {
	n, err := p.r.Read(buf)
	p.sum.Write(buf[:n])
	return n, err
}

func (p *packScan) full(buf []byte) error {
	_, err := io.ReadFull(p, buf)
	return unexpected(err)
}

// object reads one entry and returns the bytes it takes unpacked (of a delta: with what it makes).
func (p *packScan) object(max int64) (int64, error) {
	b, err := p.ReadByte()
	if err != nil {
		return 0, unexpected(err)
	}
	kind, size := b>>4&7, int64(b&15)
	for shift := uint(4); b&0x80 != 0; shift += 7 {
		if b, err = p.ReadByte(); err != nil {
			return 0, unexpected(err)
		}
		if shift > 50 {
			return 0, fail(TooLarge, "the pack declares an object of an impossible size", "")
		}
		size |= int64(b&0x7f) << shift
	}
	delta := false
	switch plumbing.ObjectType(kind) {
	case plumbing.CommitObject, plumbing.TreeObject, plumbing.BlobObject, plumbing.TagObject:
	case plumbing.OFSDeltaObject:
		delta = true
		for more := true; more; {
			if b, err = p.ReadByte(); err != nil {
				return 0, unexpected(err)
			}
			more = b&0x80 != 0
		}
	case plumbing.REFDeltaObject:
		delta = true
		var base [20]byte
		if err := p.full(base[:]); err != nil {
			return 0, err
		}
	default:
		return 0, fail(Corrupt, fmt.Sprintf("the pack has an object of unknown kind %d", kind), "")
	}
	tooLarge := func(n int64) error {
		return fail(TooLarge, "the pack has an object of "+sizeText(n)+", and the limit is "+sizeText(max), "keep large files out of the repository")
	}
	if size > max {
		return 0, tooLarge(size)
	}
	if p.zr == nil {
		p.zr, err = zlib.NewReader(p)
	} else {
		err = p.zr.(zlib.Resetter).Reset(p, nil)
	}
	if err != nil {
		return 0, unexpected(err)
	}
	total := size
	left := size
	if delta {
		// A delta begins with the sizes of its base and of its result.
		body := &countReader{r: p.zr}
		for i := range 2 {
			n, err := binary.ReadUvarint(body)
			if err != nil {
				return 0, unexpected(err)
			}
			if n > uint64(max) {
				return 0, tooLarge(int64(min(n, 1<<62)))
			}
			if i == 1 {
				total += int64(n)
			}
		}
		left -= body.n
	}
	n, err := io.Copy(io.Discard, io.LimitReader(p.zr, max+1))
	if err != nil {
		return 0, unexpected(err)
	}
	if n != left {
		return 0, fail(Corrupt, "the pack has an object that is not as long as it says", "")
	}
	return total, nil
}

type countReader struct {
	r io.Reader
	n int64
	b [1]byte
}

func (c *countReader) ReadByte() (byte, error) {
	if _, err := io.ReadFull(c.r, c.b[:]); err != nil {
		return 0, err
	}
	c.n++
	return c.b[0], nil
}

// ctxFile is a file whose reads fail when the context has ended, so that a parser which knows no
// context stops.
type ctxFile struct {
	ctx context.Context
	*os.File
}

func (f *ctxFile) Read(p []byte) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	return f.File.Read(p)
}

// writePack writes the objects as a pack without deltas, one at a time.
func writePack(w io.Writer, objects storer.EncodedObjectStorer, ids []plumbing.Hash, max int64) error {
	sum := sha1.New()
	out := io.MultiWriter(w, sum)
	head := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte("PACK"), 2), uint32(len(ids)))
	if _, err := out.Write(head); err != nil {
		return err
	}
	zw := zlib.NewWriter(out)
	for _, id := range ids {
		if err := writePackEntry(out, zw, objects, id, max); err != nil {
			return err
		}
	}
	_, err := w.Write(sum.Sum(nil))
	return err
}

func writePackEntry(out io.Writer, zw *zlib.Writer, objects storer.EncodedObjectStorer, id plumbing.Hash, max int64) error {
	o, err := objects.EncodedObject(plumbing.AnyObject, id)
	if err != nil {
		return missing(id, err)
	}
	size := o.Size()
	if size > max {
		return fail(TooLarge, "the repository has an object of "+sizeText(size)+", and the limit is "+sizeText(max), "keep large files out of the repository")
	}
	head := []byte{byte(o.Type())<<4 | byte(size&15)}
	for size >>= 4; size > 0; size >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(size&0x7f))
	}
	if _, err := out.Write(head); err != nil {
		return err
	}
	r, err := o.Reader()
	if err != nil {
		return missing(id, err)
	}
	defer r.Close()
	zw.Reset(out)
	if _, err := io.Copy(zw, io.LimitReader(r, o.Size()+1)); err != nil {
		return err
	}
	return zw.Close()
}

func missing(id plumbing.Hash, err error) error {
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return fail(Corrupt, "object "+id.String()+" is missing", "run git fsck on the repository")
	}
	return fail(Corrupt, "object "+id.String()+" can't be read: "+printable(err.Error(), 200), "run git fsck on the repository")
}
