package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// logStore keeps raft's entries in one bbolt file: keys are indexes, so that appending fills pages in order. Each value has a checksum.
//
// It also keeps the index up to which entries were known to be committed when the last batch was stored, for Store.replay.
type logStore struct {
	db *bbolt.DB

	mu          sync.RWMutex
	first, last uint64 // 0 = no entries
	commit      uint64 // on disk
	staged      uint64 // goes to disk with the next batch

	fault atomic.Pointer[error] // why the last batch could not be stored
}

var (
	logBucket  = []byte("log")
	metaBucket = []byte("meta")
	commitKey  = []byte("commit")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// deleteBatch bounds the entries that one transaction removes, so that appending does not wait for long.
const deleteBatch = 1024

// openBolt opens a file of our own, with its buckets. A second process on it is told of, not waited for.
func openBolt(path string, buckets ...[]byte) (db *bbolt.DB, err error) {
	err = guard(path, func() error {
		// The list of free pages is kept in the file: without, bbolt makes it at start in a goroutine of its own, where a panic over a damaged page
		// can't be caught.
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, FreelistType: bbolt.FreelistMapType, NoStatistics: true})
		switch {
		case errors.Is(err, bolterrors.ErrTimeout):
			return fmt.Errorf("%s is in use: another gitopsd runs on this directory", path)
		case errors.As(err, new(syscall.Errno)):
			return err
		case err != nil: // bbolt has no one error for content that it does not understand
			return damaged(fmt.Errorf("%s: %w", path, err))
		}
		return db.Update(func(tx *bbolt.Tx) error {
			for _, name := range buckets {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil && db != nil {
		err = errors.Join(err, guard(path, db.Close))
	}
	return db, err
}

// guard runs what reads a file that may be damaged: bbolt maps files into memory and panics, or faults, where their pages make no sense.
func guard(path string, read func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = damaged(fmt.Errorf("%s: %v", path, p))
		}
	}()
	return read()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openLog opens the log and reads all of it once, so that damage is found before anything relies on it.
func openLog(path string) (*logStore, error) {
	db, err := openBolt(path, logBucket, metaBucket)
	if err != nil {
		return nil, err
	}
	l := &logStore{db: db}
	err = guard(path, func() error { return db.View(l.load) })
	if err != nil {
		return nil, errors.Join(err, guard(path, db.Close))
	}
	return l, nil
}

func (l *logStore) load(tx *bbolt.Tx) error {
	var entry raft.Log
	err := tx.Bucket(logBucket).ForEach(func(k, v []byte) error {
		if err := decodeEntry(k, v, &entry); err != nil {
			return damaged(err)
		}
		if l.first == 0 {
			l.first = entry.Index
		}
		l.last = entry.Index
		return nil
	})
	if v := tx.Bucket(metaBucket).Get(commitKey); len(v) == 8 {
		l.commit = binary.BigEndian.Uint64(v)
	}
	return err
}

func (l *logStore) close() error { return l.db.Close() }

// bounds is the first and the last index, 0 where there are no entries.
func (l *logStore) bounds() (first, last uint64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.first, l.last
}

// committed is the highest index that is known to be committed and is in the log.
func (l *logStore) committed() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return min(l.commit, l.last)
}

// FirstIndex is the index of the oldest entry, 0 where there is none.
func (l *logStore) FirstIndex() (uint64, error) { first, _ := l.bounds(); return first, nil }

// LastIndex is the index of the newest entry, 0 where there is none.
func (l *logStore) LastIndex() (uint64, error) { _, last := l.bounds(); return last, nil }

// GetLog reads one entry, or returns raft.ErrLogNotFound.
func (l *logStore) GetLog(index uint64, entry *raft.Log) error {
	return l.db.View(func(tx *bbolt.Tx) error {
		k := indexKey(index)
		v := tx.Bucket(logBucket).Get(k)
		if v == nil {
			return raft.ErrLogNotFound
		}
		return decodeEntry(k, v, entry)
	})
}

// StoreLog appends one entry.
func (l *logStore) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// StoreLogs appends entries, all or none, and returns when they are on disk. An entry that is there already is replaced.
func (l *logStore) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	l.mu.RLock()
	commit, staged := l.commit, l.staged
	l.mu.RUnlock()
	err := l.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(logBucket)
		b.FillPercent = 1 // keys only grow
		for _, e := range entries {
			if err := b.Put(indexKey(e.Index), encodeEntry(e)); err != nil {
				return err
			}
		}
		if staged <= commit {
			return nil
		}
		return tx.Bucket(metaBucket).Put(commitKey, binary.BigEndian.AppendUint64(nil, staged))
	})
	if err != nil {
		err = fmt.Errorf("write %s: %w", l.db.Path(), err)
		l.fault.Store(&err)
		return err
	}
	l.fault.Store(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.commit = max(l.commit, staged)
	for _, e := range entries {
		if l.first == 0 || e.Index < l.first {
			l.first = e.Index
		}
		l.last = max(l.last, e.Index)
	}
	return nil
}

// DeleteRange removes the entries from lo to hi, both included. Entries of a tail go newest first and those of a head oldest first, in several
// transactions: a crash in between leaves no hole.
func (l *logStore) DeleteRange(lo, hi uint64) error {
	first, last := l.bounds()
	tail := lo > first && hi >= last
	for {
		var n int
		err := l.db.Update(func(tx *bbolt.Tx) error {
			n = 0
			c := tx.Bucket(logBucket).Cursor()
			seek := func() []byte { k, _ := c.Seek(indexKey(lo)); return k }
			if tail {
				seek = func() []byte { k, _ := c.Last(); return k }
			}
			for k := seek(); k != nil && n < deleteBatch; k = seek() {
				if i := binary.BigEndian.Uint64(k); i < lo || i > hi {
					break
				}
				if err := c.Delete(); err != nil {
					return err
				}
				n++
			}
			return nil
		})
		if err == nil {
			err = l.refreshBounds()
		}
		if err != nil {
			return fmt.Errorf("remove entries %d to %d from %s: %w", lo, hi, l.db.Path(), err)
		}
		if n < deleteBatch {
			return nil
		}
	}
}

func (l *logStore) refreshBounds() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.db.View(func(tx *bbolt.Tx) error {
		l.first, l.last = 0, 0
		c := tx.Bucket(logBucket).Cursor()
		if k, _ := c.First(); k != nil {
			l.first = binary.BigEndian.Uint64(k)
		}
		if k, _ := c.Last(); k != nil {
			l.last = binary.BigEndian.Uint64(k)
		}
		return nil
	})
}

// StageCommitIndex notes the commit index that goes to disk with the next batch.
func (l *logStore) StageCommitIndex(index uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.staged = max(l.staged, index)
	return nil
}

// GetCommitIndex tells raft nothing, so that it leaves the replay to Store.replay, which says why.
func (l *logStore) GetCommitIndex() (uint64, error) { return 0, nil }

func indexKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

// An entry is: format, type, term, time of appending, length of the extensions, extensions, data, and the CRC-32C of the key and all that.
const (
	entryFormat = 1
	entryHead   = 1 + 1 + 8 + 8 + 4
)

func encodeEntry(e *raft.Log) []byte {
	b := make([]byte, 0, entryHead+len(e.Extensions)+len(e.Data)+4)
	b = append(b, entryFormat, byte(e.Type))
	b = binary.BigEndian.AppendUint64(b, e.Term)
	var at int64
	if !e.AppendedAt.IsZero() {
		at = e.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Extensions)))
	b = append(b, e.Extensions...)
	b = append(b, e.Data...)
	return binary.BigEndian.AppendUint32(b, checksum(indexKey(e.Index), b))
}

func checksum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}

// decodeEntry reads an entry. It copies what it keeps: bbolt's memory is only valid within the transaction.
func decodeEntry(key, value []byte, e *raft.Log) error {
	if len(key) != 8 || len(value) < entryHead+4 {
		return fmt.Errorf("log entry %x is %d bytes long", key, len(value))
	}
	index := binary.BigEndian.Uint64(key)
	body := value[:len(value)-4]
	if checksum(key, body) != binary.BigEndian.Uint32(value[len(body):]) {
		return fmt.Errorf("log entry %d has a wrong checksum", index)
	}
	if body[0] != entryFormat {
		return fmt.Errorf("log entry %d has the format %d, this build reads %d", index, body[0], entryFormat)
	}
	ext := int64(binary.BigEndian.Uint32(body[18:]))
	rest := body[entryHead:]
	if ext > int64(len(rest)) {
		return fmt.Errorf("log entry %d is cut short", index)
	}
	*e = raft.Log{Index: index, Type: raft.LogType(body[1]), Term: binary.BigEndian.Uint64(body[2:])}
	if at := int64(binary.BigEndian.Uint64(body[10:])); at != 0 {
		e.AppendedAt = time.Unix(0, at)
	}
	if ext > 0 {
		e.Extensions = append([]byte(nil), rest[:ext]...)
	}
	if int64(len(rest)) > ext {
		e.Data = append([]byte(nil), rest[ext:]...)
	}
	return nil
}

// voteStore keeps raft's term and vote. It has a file of its own, which reaches its full size when it is made: raft panics where it can't write its term,
// and so a disk that the log has filled must not matter here.
type voteStore struct{ db *bbolt.DB }

var voteBucket = []byte("vote")

// settle is the number of writes after which a vote file has grown to the size it stays at: bbolt needs a few free pages to write the next version to.
const settle = 8

func openVotes(path string) (*voteStore, error) {
	_, missing := os.Stat(path)
	db, err := openBolt(path, voteBucket)
	if err != nil {
		return nil, err
	}
	v := &voteStore{db}
	check := func() error {
		return db.View(func(tx *bbolt.Tx) error { return tx.Bucket(voteBucket).ForEach(func(_, _ []byte) error { return nil }) })
	}
	if errors.Is(missing, fs.ErrNotExist) {
		check = func() error {
			for n := range settle {
				if err := v.SetUint64([]byte("Settle"), uint64(n)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if err := guard(path, check); err != nil {
		return nil, errors.Join(err, guard(path, db.Close))
	}
	return v, nil
}

func (v *voteStore) close() error { return v.db.Close() }

// Set writes a value and returns when it is on disk.
func (v *voteStore) Set(key, val []byte) error {
	err := v.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(voteBucket).Put(key, val) })
	if err != nil {
		return fmt.Errorf("write %s: %w", v.db.Path(), err)
	}
	return nil
}

// Get reads a value, nil where there is none.
func (v *voteStore) Get(key []byte) (val []byte, err error) {
	err = v.db.View(func(tx *bbolt.Tx) error {
		val = append(val, tx.Bucket(voteBucket).Get(key)...)
		return nil
	})
	return val, err
}

// SetUint64 writes a number.
func (v *voteStore) SetUint64(key []byte, val uint64) error {
	return v.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

// GetUint64 reads a number, 0 where there is none.
func (v *voteStore) GetUint64(key []byte) (uint64, error) {
	b, err := v.Get(key)
	switch {
	case err != nil || b == nil:
		return 0, err
	case len(b) != 8:
		return 0, fmt.Errorf("read %s from %s: %d bytes are no number", key, v.db.Path(), len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}
