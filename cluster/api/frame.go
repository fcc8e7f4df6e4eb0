package api

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// FrameKind says what a frame of an exec session carries.
type FrameKind byte

// The kinds of frames.
const (
	FrameStdin  FrameKind = 1 // client to server: bytes; none = the end of the input
	FrameResize FrameKind = 2 // client to server: columns and rows, 16 bits each
	FrameStdout FrameKind = 3
	FrameStderr FrameKind = 4
	FrameExit   FrameKind = 5 // the last one: the exit code, 32 bits
	FrameError  FrameKind = 6 // the last one: an Error as JSON
)

// MaxFrame is the longest payload of a frame, in bytes.
const MaxFrame = 64 << 10

const frameHeader = 5

// Frame is one message of an exec session: a byte for its kind, four for the length of its payload (big-endian), the payload. Either side
// may end the session by closing the connection; the server then kills the command.
type Frame struct {
	Kind    FrameKind
	Payload []byte
}

// WriteTo writes the frame in one call, so that frames of several goroutines never mix on a connection.
func (f Frame) WriteTo(w io.Writer) (int64, error) {
	if len(f.Payload) > MaxFrame {
		return 0, fmt.Errorf("write a frame: %d bytes are more than %d", len(f.Payload), MaxFrame)
	}
	b := make([]byte, frameHeader, frameHeader+len(f.Payload))
	b[0] = byte(f.Kind)
	binary.BigEndian.PutUint32(b[1:], uint32(len(f.Payload)))
	n, err := w.Write(append(b, f.Payload...))
	return int64(n), err
}

// ReadFrame reads one frame. At a clean end it returns io.EOF; in the middle of a frame io.ErrUnexpectedEOF.
func ReadFrame(r io.Reader) (Frame, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Frame{}, err
	}
	f := Frame{Kind: FrameKind(h[0])}
	if f.Kind < FrameStdin || f.Kind > FrameError {
		return Frame{}, fmt.Errorf("read a frame: kind %d is not known", f.Kind)
	}
	n := binary.BigEndian.Uint32(h[1:])
	if n > MaxFrame {
		return Frame{}, fmt.Errorf("read a frame: %d bytes are more than %d", n, MaxFrame)
	}
	f.Payload = make([]byte, n)
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	return f, nil
}

func resizeFrame(s Size) Frame {
	p := binary.BigEndian.AppendUint16(nil, s.Columns)
	return Frame{FrameResize, binary.BigEndian.AppendUint16(p, s.Rows)}
}

func (f Frame) size() (Size, bool) {
	if f.Kind != FrameResize || len(f.Payload) != 4 {
		return Size{}, false
	}
	return Size{Columns: binary.BigEndian.Uint16(f.Payload), Rows: binary.BigEndian.Uint16(f.Payload[2:])}, true
}

func exitFrame(code int) Frame {
	return Frame{FrameExit, binary.BigEndian.AppendUint32(nil, uint32(int32(code)))}
}

func (f Frame) exitCode() (int, error) {
	if len(f.Payload) != 4 {
		return 0, fmt.Errorf("read an exit code: %d bytes, want 4", len(f.Payload))
	}
	return int(int32(binary.BigEndian.Uint32(f.Payload))), nil
}

func errorFrame(err error) Frame {
	var e *Error
	if !errors.As(err, &e) {
		e = newError(Internal, err.Error())
	}
	e.Message = clip(e.Message, MaxFrame/2)
	b, _ := json.Marshal(&Error{Message: e.Message, Reason: e.Reason}) // two strings: it can't fail
	return Frame{FrameError, b}
}

func (f Frame) err() error {
	e := &Error{Kind: Internal}
	if err := json.Unmarshal(f.Payload, e); err != nil {
		return fmt.Errorf("read an error: %w", err)
	}
	return e
}

// frameWriter turns what is written into frames of one kind. All writers of a connection share its lock.
type frameWriter struct {
	kind FrameKind
	mu   *sync.Mutex
	w    io.Writer
}

func (w frameWriter) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		part := p[n:min(len(p), n+MaxFrame/2)]
		if err := w.send(Frame{w.kind, part}); err != nil {
			return n, err
		}
		n += len(part)
	}
	return len(p), nil
}

func (w frameWriter) send(f Frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := f.WriteTo(w.w)
	return err
}
