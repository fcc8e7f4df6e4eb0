package tasklog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"
)

// Attempts says which starts of a container to read.
type Attempts string

// The selections of attempts.
const (
	AllAttempts Attempts = ""
	Last        Attempts = "last"     // the newest, and those that begin while following
	Previous    Attempts = "previous" // the one before the newest
)

// Query selects entries. The zero Query is everything that is on disk now.
type Query struct {
	Since    time.Time // not older than this; zero = no bound
	Until    time.Time // not newer than this; zero = no bound
	Tail     int       // only the newest so many records of the selection; 0 = all
	Follow   bool      // go on with what comes later
	Attempts Attempts
}

// followEvery is how often a follower looks at the files. Nobody looks while nobody follows.
const followEvery = 100 * time.Millisecond

// Read calls fn for each selected entry of the log in dir, oldest first. The entry's text is valid during the call only. A directory that is
// not there is an empty log. With Follow it goes on until ctx ends, whose error it returns, or Until is past. An error of fn ends it
// and is returned as it is.
func Read(ctx context.Context, dir string, q Query, fn func(Entry) error) error {
	list, err := segments(dir)
	if err != nil {
		return err
	}
	r := &reader{dir: dir, q: q, fn: fn}
	defer r.close()
	list = r.selected(list)
	if q.Tail > 0 && !q.Until.IsZero() {
		// The end of the selection is not the end of the files: remember the last records seen, then deliver those.
		last := &tail{n: q.Tail}
		r.fn = last.add
		if err := r.all(ctx, list); err != nil {
			return err
		}
		return last.deliver(fn)
	}
	if q.Tail > 0 {
		if list, err = r.skipToTail(list); err != nil {
			return err
		}
	}
	if err := r.all(ctx, list); err != nil || !q.Follow || q.Attempts == Previous {
		return err
	}
	return r.follow(ctx)
}

type reader struct {
	dir string
	q   Query
	fn  func(Entry) error

	at    segment // the segment that is open, or was last
	f     *os.File
	skip  int64 // where to begin in the first segment
	lines lineBuffer
}

var errUntil = errors.New("past the end of the selection")

func (r *reader) selected(list []segment) []segment {
	if r.q.Attempts != AllAttempts && len(list) > 0 {
		attempt := list[len(list)-1].attempt
		if r.q.Attempts == Previous {
			older := slices.IndexFunc(list, func(s segment) bool { return s.attempt == attempt })
			if older == 0 {
				return nil
			}
			list, attempt = list[:older], list[older-1].attempt
		}
		list = slices.DeleteFunc(list, func(s segment) bool { return s.attempt != attempt })
	}
	// A segment that was last written before Since holds nothing of interest; the newest is opened all the same, for following.
	for len(list) > 1 && !r.q.Since.IsZero() && list[0].modified.Before(r.q.Since) {
		list = list[1:]
	}
	return list
}

// all delivers what the listed segments hold now.
func (r *reader) all(ctx context.Context, list []segment) error {
	for _, s := range list {
		if err := r.open(s); err != nil {
			return err
		}
		if err := r.drain(ctx); err != nil {
			if errors.Is(err, errUntil) {
				return nil
			}
			return err
		}
	}
	return nil
}

func (r *reader) open(s segment) error {
	r.close()
	r.at = s
	r.lines.reset()
	f, err := os.Open(s.path(r.dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // rotated away since it was listed
	}
	if err != nil {
		return fmt.Errorf("open a log segment: %w", err)
	}
	r.f = f
	if r.skip > 0 {
		_, err = f.Seek(r.skip, io.SeekStart)
		r.skip = 0
	}
	return err
}

func (r *reader) close() {
	if r.f != nil {
		r.f.Close()
		r.f = nil
	}
}

// drain delivers the whole lines from where the open segment was left to its present end.
func (r *reader) drain(ctx context.Context) error {
	if r.f == nil {
		return nil
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		line, err := r.lines.next(r.f)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a log segment: %w", err)
		}
		e, ok := parseRecord(line)
		if !ok || e.Time.Before(r.q.Since) {
			continue
		}
		if !r.q.Until.IsZero() && e.Time.After(r.q.Until) {
			return errUntil
		}
		e.Attempt = r.at.attempt
		if err := r.fn(e); err != nil {
			return err
		}
	}
}

func (r *reader) follow(ctx context.Context) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		// List before reading: a segment that has a successor gets no more lines, so what is read after is all of it.
		list, err := segments(r.dir)
		if err != nil {
			return err
		}
		err = r.drain(ctx)
		for _, s := range list {
			if err == nil && compareSegments(s, r.at) > 0 {
				if err = r.open(s); err == nil {
					err = r.drain(ctx)
				}
			}
		}
		if errors.Is(err, errUntil) {
			return nil
		}
		if err != nil {
			return err
		}
		if !r.q.Until.IsZero() && time.Now().After(r.q.Until) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// skipToTail drops the segments before the newest q.Tail lines and notes where the first one left begins.
func (r *reader) skipToTail(list []segment) ([]segment, error) {
	want := r.q.Tail
	for i, s := range slices.Backward(list) {
		f, err := os.Open(s.path(r.dir))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open a log segment: %w", err)
		}
		at, left, err := lastLines(f, want)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read a log segment: %w", err)
		}
		if left == 0 {
			r.skip = at
			return list[i:], nil
		}
		want = left
	}
	return list, nil
}

// lastLines finds where the last n whole lines of f begin. left is how many fewer lines the file has.
func lastLines(f *os.File, n int) (at int64, left int, err error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, 0, err
	}
	buf := make([]byte, 32<<10)
	for n++; end > 0; { // the newline before the first of the lines counts too
		block := buf[:min(int64(len(buf)), end)]
		end -= int64(len(block))
		if _, err := f.ReadAt(block, end); err != nil {
			return 0, 0, err
		}
		for i := len(block); ; {
			if i = bytes.LastIndexByte(block[:i], '\n'); i < 0 {
				break
			}
			if n--; n == 0 {
				return end + int64(i) + 1, 0, nil
			}
		}
	}
	return 0, n - 1, nil
}

// lineBuffer cuts a growing file into lines. At the end of the file it keeps an unfinished line until the rest is there.
type lineBuffer struct {
	buf        []byte
	start, end int
	overlong   bool // within a line that no writer made: left out up to its newline
}

func (b *lineBuffer) reset() { b.start, b.end, b.overlong = 0, 0, false }

// next returns a line without its newline, valid until the next call, or io.EOF where there is no whole one yet.
func (b *lineBuffer) next(f *os.File) ([]byte, error) {
	if b.buf == nil {
		b.buf = make([]byte, 2*maxRecord)
	}
	for searched := b.start; ; {
		if i := bytes.IndexByte(b.buf[searched:b.end], '\n'); i >= 0 {
			line := b.buf[b.start : searched+i]
			b.start = searched + i + 1
			if b.overlong {
				b.overlong, searched = false, b.start
				continue
			}
			return line, nil
		}
		if b.start > 0 {
			b.end = copy(b.buf, b.buf[b.start:b.end])
			b.start = 0
		}
		if b.end == len(b.buf) {
			b.overlong, b.end = true, 0
		}
		searched = b.end
		n, err := f.Read(b.buf[b.end:])
		b.end += n
		if n == 0 {
			if err == nil {
				err = io.EOF
			}
			return nil, err
		}
	}
}

// tail remembers the last n entries.
type tail struct {
	n    int
	last []Entry
	next int
}

func (t *tail) add(e Entry) error {
	e.Text = bytes.Clone(e.Text)
	if len(t.last) < t.n {
		t.last = append(t.last, e)
		return nil
	}
	t.last[t.next] = e
	t.next = (t.next + 1) % t.n
	return nil
}

func (t *tail) deliver(fn func(Entry) error) error {
	for i := range t.last {
		if err := fn(t.last[(t.next+i)%len(t.last)]); err != nil {
			return err
		}
	}
	return nil
}
