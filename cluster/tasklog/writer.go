package tasklog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"
)

// Options bound a log directory. Zero fields mean the defaults.
type Options struct {
	MaxSize  int64 // bytes of one segment; less than 64 KiB is taken as 64 KiB
	MaxFiles int   // full segments that a directory may hold, over all its attempts
}

// minSize is more than the buffer ever holds, so that one write never makes a segment too large.
const minSize = 64 << 10

func (o Options) withDefaults() Options {
	if o.MaxSize <= 0 {
		o.MaxSize = DefaultMaxSize
	}
	o.MaxSize = max(o.MaxSize, minSize)
	if o.MaxFiles <= 0 {
		o.MaxFiles = DefaultMaxFiles
	}
	return o
}

// Writer appends the records of one attempt. It is not safe for concurrent use.
type Writer struct {
	dir   string
	o     Options
	now   segment // the open one; its size is what was written
	f     *os.File
	buf   []byte
	lines int // in buf
	lost  int // lines dropped since the last successful write
	why   error
}

// flushAt is the fill of the buffer at which records are written out without waiting for Flush. It is small because there is a writer
// for each container of a node.
const flushAt = 32 << 10

// Create begins a new attempt in dir, which is made where it is missing. The directory never holds more than MaxFiles times MaxSize
// bytes; the oldest segments go first, those of earlier attempts too.
func Create(dir string, o Options) (*Writer, error) {
	w := &Writer{dir: dir, o: o.withDefaults()}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("make the log directory: %w", err)
	}
	list, err := segments(dir)
	if err != nil {
		return nil, err
	}
	w.now = segment{attempt: 1, number: 1}
	if len(list) > 0 {
		w.now.attempt = list[len(list)-1].attempt + 1
	}
	for {
		err = w.open()
		if !errors.Is(err, fs.ErrExist) {
			break
		}
		w.now.attempt++ // the keeper of another attempt was quicker
	}
	if err != nil {
		return nil, err
	}
	return w, nil
}

// open makes room and creates the segment w.now.
func (w *Writer) open() error {
	if err := w.prune(); err != nil {
		return err
	}
	f, err := os.OpenFile(w.now.path(w.dir), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, fileMode)
	if err != nil {
		return fmt.Errorf("create a log segment: %w", err)
	}
	w.f, w.now.size = f, 0
	return nil
}

// prune removes the oldest segments until there is room for one more full one.
func (w *Writer) prune() error {
	list, err := segments(w.dir)
	if err != nil {
		return err
	}
	var sum int64
	for _, s := range list {
		sum += s.size
	}
	for _, s := range list {
		if sum <= w.o.MaxSize*int64(w.o.MaxFiles-1) && len(list) < max(w.o.MaxFiles, minFiles) {
			return nil
		}
		if err := os.Remove(s.path(w.dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove an old log segment: %w", err)
		}
		sum -= s.size
		list = list[1:]
	}
	return nil
}

// Add takes one record; text must not hold a newline nor be longer than [MaxText]. It is on disk after the next Flush.
func (w *Writer) Add(t time.Time, s Stream, partial bool, text []byte) {
	w.buf = appendRecord(w.buf, t, s, partial, text)
	w.lines++
	if len(w.buf) >= flushAt {
		w.Flush()
	}
}

// Flush writes what Add took. It does not fail: what the disk does not take is dropped and counted, and a later record tells of it.
func (w *Writer) Flush() {
	if w.lines == 0 {
		return
	}
	if err := w.write(); err != nil {
		w.lost += w.lines
		w.why = err
	}
	w.buf, w.lines = w.buf[:0], 0
}

func (w *Writer) write() error {
	if w.lost > 0 {
		note := "lines lost, the log could not be written: " + reason(w.why)
		head := appendRecord(nil, time.Now(), Keeper, false, append(strconv.AppendInt(nil, int64(w.lost), 10), " "+note...))
		if err := w.append(head); err != nil {
			return err
		}
		w.lost, w.why = 0, nil
	}
	return w.append(w.buf)
}

// append writes whole records, in the next segment where this one would grow too large.
func (w *Writer) append(b []byte) error {
	if w.f == nil || w.now.size > 0 && w.now.size+int64(len(b)) > w.o.MaxSize {
		if w.f != nil {
			w.f.Close()
			w.f = nil
			w.now.number++
		}
		if err := os.MkdirAll(w.dir, 0o750); err != nil {
			return err
		}
		if err := w.open(); err != nil {
			return err
		}
	}
	if n, err := w.f.Write(b); err != nil {
		if n > 0 {
			// Take the torn record away. Where even that fails, the reader skips it.
			if w.f.Truncate(w.now.size) != nil {
				w.now.size += int64(n)
			}
		}
		return err
	}
	w.now.size += int64(len(b))
	return nil
}

func reason(err error) string {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

// Close writes what is left and ends the attempt.
func (w *Writer) Close() error {
	w.Flush()
	if w.f == nil {
		return nil
	}
	return w.f.Close()
}

// Splitter cuts one stream of output into records. Read bytes into Space, then tell Take how many came.
type Splitter struct {
	w      *Writer
	stream Stream
	buf    []byte
	fill   int
	cut    bool // the last record was a piece of a line
}

// NewSplitter makes the splitter of a stream. Its memory is one record's.
func NewSplitter(w *Writer, s Stream) *Splitter {
	return &Splitter{w: w, stream: s, buf: make([]byte, MaxText)}
}

// Space is where the next bytes go. It is never empty.
func (s *Splitter) Space() []byte { return s.buf[s.fill:] }

// Take adds the lines that ended within the n bytes just put into Space, all with the time t. A line longer than [MaxText] is added in
// pieces.
func (s *Splitter) Take(t time.Time, n int) {
	s.fill += n
	rest := s.buf[:s.fill]
	for {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			break
		}
		s.w.Add(t, s.stream, false, rest[:i])
		rest, s.cut = rest[i+1:], false
	}
	if len(rest) == len(s.buf) {
		s.w.Add(t, s.stream, true, rest)
		rest, s.cut = nil, true
	}
	s.fill = copy(s.buf, rest)
}

// End adds what is left when the stream ends without a newline, so that its last line is a whole one too.
func (s *Splitter) End(t time.Time) {
	if s.fill > 0 || s.cut {
		s.w.Add(t, s.stream, false, s.buf[:s.fill])
		s.fill, s.cut = 0, false
	}
}
