// Package blob keeps files of repositories by their digest, on one node.
//
// The flow: what a revision needs is put in ([Store.Put], [Store.PutBatch]) before the revision is proposed; it is there, on disk, when the call returns.
// Other nodes ask which they lack ([Store.Missing]) and put in what they fetched. A task's content is laid out from its blobs with [Store.Materialise],
// in a folder that a container mounts. What nobody names any more goes with [Store.GC].
//
// Words: a blob is bytes, found by their digest; a digest is "sha256:" and 64 hex digits, so a damaged blob is one whose bytes have another digest; a
// listing is a blob that names the files of a directory, each by its digest (manifest.ListingEntry, as JSON).
//
// On disk: blobs/ holds the blobs by their hash, trees/ the laid-out directories, files/ the laid-out files, tmp/ what is being written; nothing in tmp/ survives [Open].
package blob

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// Errors that callers branch on.
var (
	// ErrMissing says that there is no such blob here: fetch it from another node.
	ErrMissing = errors.New("no such blob on this node")
	// ErrDamaged says that a blob's bytes are not those of its digest. It is put out of the way, so that Missing names it and it can be fetched again.
	ErrDamaged = errors.New("the blob is damaged")
	// ErrTooLarge says that more bytes came than Options.MaxSize allows.
	ErrTooLarge = errors.New("the blob is too large")
)

const (
	prefix    = "sha256:"
	blobsDir  = "blobs"
	treesDir  = "trees"
	filesDir  = "files"
	tmpDir    = "tmp"
	hexLength = 2 * sha256.Size
)

// Options say how a store is opened.
type Options struct {
	Dir     string           // made when missing
	MaxSize int64            // of one blob; 0 = 16 MiB
	Now     func() time.Time // for the age of blobs in GC; nil = time.Now
}

// Store is a folder of blobs. Its methods may be called from any goroutine.
type Store struct {
	opts Options
	root *os.Root

	// gc is held for writing while GC removes, for reading by whoever relies on what it found: an answer that a blob is here is true until its grace ends.
	gc    sync.RWMutex
	trees sync.Mutex // one layout at a time
}

// Open opens or makes a store, and removes what an interrupted write left.
func Open(opts Options) (*Store, error) {
	if opts.MaxSize == 0 {
		opts.MaxSize = 16 << 20
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	s := &Store{opts: opts}
	err := os.MkdirAll(opts.Dir, 0o755)
	if err == nil {
		s.root, err = os.OpenRoot(opts.Dir)
	}
	if err == nil {
		err = s.prepare()
	}
	if err != nil {
		if s.root != nil {
			s.root.Close()
		}
		return nil, fmt.Errorf("open the blobs in %s: %w", opts.Dir, err)
	}
	return s, nil
}

func (s *Store) prepare() error {
	if err := s.removeAll(tmpDir); err != nil {
		return err
	}
	for _, d := range []string{blobsDir, treesDir, filesDir, tmpDir} {
		if err := s.root.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return s.syncDir(".")
}

// Close lets go of the folder.
func (s *Store) Close() error { return s.root.Close() }

// Digest is the digest of the bytes.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return prefix + hex.EncodeToString(sum[:])
}

// Valid says whether the text is a digest.
func Valid(digest string) bool {
	h, ok := strings.CutPrefix(digest, prefix)
	return ok && len(h) == hexLength && strings.Trim(h, "0123456789abcdef") == ""
}

func place(digest string) (string, error) {
	if !Valid(digest) {
		return "", fmt.Errorf("%q is no digest: want sha256: and 64 hex digits", digest)
	}
	return blobsDir + "/" + digest[len(prefix):], nil
}

// Put keeps the bytes and returns their digest once they are on disk.
func (s *Store) Put(r io.Reader) (string, error) {
	digest, err := s.put(r, "")
	if err != nil {
		return "", fmt.Errorf("put a blob: %w", err)
	}
	return digest, nil
}

// PutAs keeps bytes that should have the digest, as when they come from another node. Other bytes are refused with ErrDamaged.
func (s *Store) PutAs(digest string, r io.Reader) error {
	if _, err := place(digest); err != nil {
		return fmt.Errorf("put a blob: %w", err)
	}
	if _, err := s.put(r, digest); err != nil {
		return fmt.Errorf("put blob %s: %w", digest, err)
	}
	return nil
}

func (s *Store) put(r io.Reader, want string) (string, error) {
	s.gc.RLock()
	defer s.gc.RUnlock()
	w, err := s.write(r)
	if err != nil {
		return "", err
	}
	if want != "" && w.digest != want {
		return "", errors.Join(fmt.Errorf("%w: its bytes have the digest %s", ErrDamaged, w.digest), s.root.Remove(w.tmp))
	}
	if err := s.syncFile(w.tmp); err != nil {
		return "", errors.Join(err, s.root.Remove(w.tmp))
	}
	return w.digest, s.settle([]written{w})
}

// written is a blob that is complete in tmp/.
type written struct{ digest, tmp string }

func (s *Store) write(r io.Reader) (w written, err error) {
	f, err := s.temp()
	if err != nil {
		return w, err
	}
	w.tmp = f.name
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, s.root.Remove(w.tmp))
		}
	}()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, s.opts.MaxSize+1))
	if err != nil {
		return w, err
	}
	if n > s.opts.MaxSize {
		return w, fmt.Errorf("%w: it has more than %d bytes", ErrTooLarge, s.opts.MaxSize)
	}
	w.digest = digestOf(h)
	now := s.opts.Now()
	return w, s.root.Chtimes(w.tmp, now, now)
}

func digestOf(h hash.Hash) string { return prefix + hex.EncodeToString(h.Sum(nil)) }

// settle moves blobs whose bytes are on disk to their places, and returns when their names are there too. A blob that is there already is replaced by the
// same bytes: should the old ones be damaged, that mends them.
func (s *Store) settle(list []written) error {
	for i, w := range list {
		to, err := place(w.digest)
		if err == nil {
			err = s.root.Rename(w.tmp, to)
		}
		if err != nil {
			for _, left := range list[i:] {
				err = errors.Join(err, s.root.Remove(left.tmp))
			}
			return err
		}
	}
	return s.syncDir(blobsDir)
}

// parallel is the number of fsyncs that go on at once: a disk takes many for the time of one.
const parallel = 16

// PutBatch keeps many blobs and returns their digests in order, once all are on disk. What is here already costs nothing but its hash.
func (s *Store) PutBatch(blobs [][]byte) ([]string, error) {
	s.gc.RLock()
	defer s.gc.RUnlock()
	digests := make([]string, len(blobs))
	var (
		todo []written
		mu   sync.Mutex
		work errgroup.Group
	)
	work.SetLimit(parallel)
	seen := map[string]bool{}
	for i, data := range blobs {
		digests[i] = Digest(data)
		if seen[digests[i]] || s.touch(digests[i], int64(len(data))) {
			continue
		}
		seen[digests[i]] = true
		work.Go(func() error {
			w, err := s.write(bytes.NewReader(data))
			if err == nil {
				mu.Lock()
				todo = append(todo, w)
				mu.Unlock()
				err = s.syncFile(w.tmp)
			}
			return err
		})
	}
	if err := work.Wait(); err != nil {
		for _, w := range todo {
			err = errors.Join(err, s.root.Remove(w.tmp))
		}
		return nil, fmt.Errorf("put %d blobs: %w", len(blobs), err)
	}
	if err := s.settle(todo); err != nil {
		return nil, fmt.Errorf("put %d blobs: %w", len(blobs), err)
	}
	return digests, nil
}

// touch says whether a blob of that size is here, and if so begins its grace anew.
func (s *Store) touch(digest string, size int64) bool {
	p, err := place(digest)
	if err != nil {
		return false
	}
	info, err := s.root.Stat(p)
	if err != nil || !info.Mode().IsRegular() || size >= 0 && info.Size() != size {
		return false
	}
	now := s.opts.Now()
	return s.root.Chtimes(p, now, now) == nil
}

// Has says whether the blob is here. Its bytes are not read. GC leaves it alone for its grace from now on.
func (s *Store) Has(digest string) bool {
	s.gc.RLock()
	defer s.gc.RUnlock()
	return s.touch(digest, -1)
}

// Missing lists those of the digests that are not here, in their order, each once.
func (s *Store) Missing(digests []string) []string {
	var missing []string
	asked := map[string]bool{}
	for _, d := range digests {
		if !asked[d] && !s.Has(d) {
			missing = append(missing, d)
		}
		asked[d] = true
	}
	return missing
}

// Open reads a blob as it is on disk. The reader gives ErrDamaged in the place of io.EOF where the bytes are not those of the digest: nothing read may be
// relied on before. The caller closes it.
func (s *Store) Open(digest string) (io.ReadCloser, error) {
	p, err := place(digest)
	if err != nil {
		return nil, fmt.Errorf("open a blob: %w", err)
	}
	f, err := s.root.Open(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open blob %s: %w", digest, ErrMissing)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", digest, err)
	}
	return &reader{file: f, store: s, digest: digest, hash: sha256.New()}, nil
}

type reader struct {
	file   *os.File
	store  *Store
	digest string
	hash   hash.Hash
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.file.Read(p)
	r.hash.Write(p[:n])
	if errors.Is(err, io.EOF) && digestOf(r.hash) != r.digest {
		return n, r.store.reject(r.digest)
	}
	return n, err
}

func (r *reader) Close() error { return r.file.Close() }

// reject takes a damaged blob out of the store.
func (s *Store) reject(digest string) error {
	err := fmt.Errorf("read blob %s: %w: its bytes have another digest: it must be fetched again", digest, ErrDamaged)
	p, placeErr := place(digest)
	if placeErr != nil {
		return placeErr
	}
	if rmErr := s.root.Remove(p); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return err
}

// Read returns a whole blob, checked.
func (s *Store) Read(digest string) ([]byte, error) {
	r, err := s.Open(digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// GC removes the blobs and laid-out folders that keep does not name and that nobody has put in or asked for within the grace: a revision's files are put
// in before the revision is known. It returns the number of blobs and folders removed. Folders that a container mounts must be named in keep.
func (s *Store) GC(keep map[string]bool, grace time.Duration) (int, error) {
	s.trees.Lock()
	defer s.trees.Unlock()
	before := s.opts.Now().Add(-grace)
	removed := 0
	var errs error
	for _, dir := range []string{treesDir, filesDir, blobsDir} {
		names, err := s.kept(dir)
		errs = errors.Join(errs, err)
		for digest, p := range names {
			if keep[digest] {
				continue
			}
			gone, err := s.expire(p, before)
			if gone {
				removed++
			}
			errs = errors.Join(errs, err)
		}
	}
	if errs != nil {
		return removed, fmt.Errorf("remove blobs that nobody needs: %w", errs)
	}
	return removed, nil
}

// kept lists blobs, or what was laid out, by digest.
func (s *Store) kept(dir string) (map[string]string, error) {
	list, err := fs.ReadDir(s.root.FS(), dir)
	found := map[string]string{}
	for _, d := range list {
		if digest := prefix + d.Name(); Valid(digest) {
			found[digest] = dir + "/" + d.Name()
		}
	}
	return found, err
}

// expire removes a path that was last asked for before the time given. Lock and look go together: whoever was told that it is here keeps it.
func (s *Store) expire(p string, before time.Time) (bool, error) {
	s.gc.Lock()
	defer s.gc.Unlock()
	info, err := s.root.Lstat(p)
	if err != nil || !info.ModTime().Before(before) {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return false, err
	}
	return true, s.removeAll(p)
}

// file is a file in tmp/ with its name there.
type file struct {
	*os.File
	name string
}

func (s *Store) temp() (file, error) {
	name := tmpDir + "/" + tempName()
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	return file{f, name}, err
}

func (s *Store) syncFile(name string) error {
	f, err := s.root.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (s *Store) syncDir(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	err = errors.Join(d.Sync(), d.Close())
	if errors.Is(err, syscall.EINVAL) { // a file system that has no such thing
		return nil
	}
	return err
}
