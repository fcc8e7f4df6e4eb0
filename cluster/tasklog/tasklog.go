// Package tasklog is the log of a container on disk: the writer that the keeper runs beside each container, and the reader behind `logs`.
//
// Words: a record is one line of output, or a piece of a line that is too long. An attempt is one start of a container; a task that is
// restarted has several, and they share a directory. A segment is one file of an attempt; when it is full the next one begins and the
// oldest of the directory goes.
//
// The flow: the keeper calls [Create] when its container is created, feeds the output through a [Splitter] for each stream, and calls
// [Writer.Flush] after each read. The agent calls [Read] on the same directory; the two share nothing but the files.
//
// A segment is named ATTEMPT.SEGMENT.log, both with six digits, and holds one record per line:
//
//	2026-01-02T15:04:05.000000000Z stdout F text
//
// The time is in UTC with nine digits, so that lines sort as text. F ends a line; P says that the line goes on in the next record of
// its stream. Tools that read the log files of Kubernetes read this form.
//
// What happens when things break: a record is written whole in one call, so a killed keeper leaves whole records; a torn last line, as
// a power cut leaves it, is skipped by the reader. When the disk is full, records are dropped and counted, never waited for: a
// container must not stop because of its log. The first record after that, of the stream [Keeper], tells how many lines are missing.
package tasklog

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Stream says where a record came from.
type Stream string

// The streams of a container. A container with a terminal has only Stdout. Keeper is the writer itself, telling of lost lines.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
	Keeper Stream = "keeper"
)

// Entry is one record of a log.
type Entry struct {
	Time    time.Time // in UTC, when the keeper read it
	Stream  Stream
	Partial bool   // the line goes on in the next entry of this stream
	Text    []byte // without a newline at its end
	Attempt int    // from 1, counting the starts of the container
}

// The limits of a log where the user sets none, and the longest text of one record, in bytes.
const (
	DefaultMaxSize  = 10 << 20
	DefaultMaxFiles = 5
	MaxText         = 16 << 10
)

// minFiles is how many segments may stay however small they are, so that a crash loop of short attempts keeps its history.
const minFiles = 20

const timeLayout = "2006-01-02T15:04:05.000000000Z"

// maxRecord bounds a line of a segment: time, stream, flag, three spaces, text and newline.
const maxRecord = len(timeLayout) + 16 + MaxText

func appendRecord(b []byte, t time.Time, s Stream, partial bool, text []byte) []byte {
	b = t.UTC().AppendFormat(b, timeLayout)
	b = append(b, ' ')
	b = append(b, s...)
	if partial {
		b = append(b, " P "...)
	} else {
		b = append(b, " F "...)
	}
	b = append(b, text...)
	return append(b, '\n')
}

// parseRecord reads one line of a segment, without its newline. The text of the result shares line's memory.
func parseRecord(line []byte) (Entry, bool) {
	stamp, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok || len(stamp) != len(timeLayout) {
		return Entry{}, false
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if !ok || len(rest) < 2 || rest[1] != ' ' || rest[0] != 'F' && rest[0] != 'P' {
		return Entry{}, false
	}
	t, err := time.Parse(timeLayout, string(stamp))
	if err != nil {
		return Entry{}, false
	}
	e := Entry{Time: t, Partial: rest[0] == 'P', Text: rest[2:]}
	switch string(stream) {
	case string(Stdout):
		e.Stream = Stdout
	case string(Stderr):
		e.Stream = Stderr
	case string(Keeper):
		e.Stream = Keeper
	default:
		return Entry{}, false
	}
	return e, true
}

// segment is one file of a log directory.
type segment struct {
	attempt, number int
	size            int64
	modified        time.Time
}

func (s segment) path(dir string) string {
	return filepath.Join(dir, fmt.Sprintf("%06d.%06d.log", s.attempt, s.number))
}

func compareSegments(a, b segment) int {
	return cmp.Or(cmp.Compare(a.attempt, b.attempt), cmp.Compare(a.number, b.number))
}

// segments lists the segments of dir, oldest first. A directory that is not there has none. Other files are not ours and are left alone.
func segments(dir string) ([]segment, error) {
	names, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the log: %w", err)
	}
	var list []segment
	for _, e := range names {
		name, ok := strings.CutSuffix(e.Name(), ".log")
		a, n, dot := strings.Cut(name, ".")
		if !ok || !dot || !e.Type().IsRegular() {
			continue
		}
		s := segment{}
		var errA, errN error
		s.attempt, errA = strconv.Atoi(a)
		s.number, errN = strconv.Atoi(n)
		info, errI := e.Info()
		if errA != nil || errN != nil || errI != nil || s.attempt < 1 || s.number < 1 || filepath.Base(s.path("")) != e.Name() {
			continue
		}
		s.size, s.modified = info.Size(), info.ModTime()
		list = append(list, s)
	}
	slices.SortFunc(list, compareSegments)
	return list, nil
}

const fileMode fs.FileMode = 0o640
