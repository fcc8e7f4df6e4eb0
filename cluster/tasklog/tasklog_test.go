package tasklog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func create(t testing.TB, dir string, o Options) *Writer {
	t.Helper()
	w, err := Create(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// attempt writes lines as one attempt, a second apart from noon on.
func attempt(t testing.TB, dir string, o Options, lines ...string) {
	t.Helper()
	w := create(t, dir, o)
	for i, line := range lines {
		w.Add(noon.Add(time.Duration(i)*time.Second), Stdout, false, []byte(line))
		w.Flush()
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, dir string, q Query) []string {
	t.Helper()
	var out []string
	err := Read(t.Context(), dir, q, func(e Entry) error {
		out = append(out, fmt.Sprintf("%d %s", e.Attempt, e.Text))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func numbers(from, to int) (lines []string) {
	for i := from; i <= to; i++ {
		lines = append(lines, strconv.Itoa(i))
	}
	return lines
}

func TestWhatGoesInComesOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "tasklog-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		w, err := Create(dir, Options{MaxFiles: 1000})
		if err != nil {
			t.Fatal(err)
		}
		want := map[Stream]*bytes.Buffer{Stdout: {}, Stderr: {}}
		split := map[Stream]*Splitter{Stdout: NewSplitter(w, Stdout), Stderr: NewSplitter(w, Stderr)}
		chunk := rapid.OneOf(rapid.SliceOfN(rapid.SampledFrom([]byte("ab\n \x00\xff")), 0, 200),
			rapid.Map(rapid.IntRange(0, 3*MaxText), func(n int) []byte { return bytes.Repeat([]byte("x"), n) }))
		for range rapid.IntRange(0, 12).Draw(t, "chunks") {
			s := rapid.SampledFrom([]Stream{Stdout, Stderr}).Draw(t, "stream")
			data := chunk.Draw(t, "data")
			want[s].Write(data)
			for len(data) > 0 {
				n := copy(split[s].Space(), data)
				split[s].Take(noon, n)
				data = data[n:]
			}
			w.Flush()
		}
		for s, sp := range split {
			sp.End(noon)
			if b := want[s].Bytes(); len(b) > 0 && b[len(b)-1] != '\n' {
				want[s].WriteByte('\n')
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got := map[Stream]*bytes.Buffer{Stdout: {}, Stderr: {}}
		err = Read(context.Background(), dir, Query{}, func(e Entry) error {
			if len(e.Text) > MaxText || !e.Time.Equal(noon) {
				t.Fatalf("%d bytes at %v", len(e.Text), e.Time)
			}
			got[e.Stream].Write(e.Text)
			if !e.Partial {
				got[e.Stream].WriteByte('\n')
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for s := range want {
			if !bytes.Equal(got[s].Bytes(), want[s].Bytes()) {
				t.Fatalf("%s: got %d bytes, want %d", s, got[s].Len(), want[s].Len())
			}
		}
	})
}

func TestDirectoryStaysWithinItsBoundAndKeepsTheNewest(t *testing.T) {
	dir := t.TempDir()
	o := Options{MaxSize: minSize, MaxFiles: 3}
	line := []byte(strings.Repeat("y", 1000))
	for range 3 {
		w := create(t, dir, o)
		for range 500 {
			w.Add(noon, Stdout, false, line)
			w.Flush()
			list, err := segments(dir)
			if err != nil {
				t.Fatal(err)
			}
			var sum int64
			for _, s := range list {
				sum += s.size
			}
			if sum > o.MaxSize*int64(o.MaxFiles) {
				t.Fatalf("%d bytes in %d segments", sum, len(list))
			}
		}
		w.Add(noon, Stderr, false, []byte("the end"))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	got := read(t, dir, Query{})
	if len(got) < 100 || got[len(got)-1] != "3 the end" {
		t.Errorf("%d records, the last is %.20q", len(got), got[len(got)-1])
	}
}

func TestCrashLoopKeepsItsHistory(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		attempt(t, dir, Options{MaxFiles: 2}, fmt.Sprint("try ", i))
	}
	got := read(t, dir, Query{})
	if len(got) != minFiles || got[len(got)-1] != "50 try 49" {
		t.Errorf("%q", got)
	}
}

func TestSelection(t *testing.T) {
	dir := t.TempDir()
	attempt(t, dir, Options{}, numbers(1, 5)...)
	attempt(t, dir, Options{}, numbers(11, 14)...)
	attempt(t, dir, Options{}, numbers(21, 23)...)
	at := func(second int) time.Time { return noon.Add(time.Duration(second) * time.Second) }
	tests := []struct {
		q    Query
		want string
	}{
		{Query{Attempts: Last}, "3 21,3 22,3 23"},
		{Query{Attempts: Previous}, "2 11,2 12,2 13,2 14"},
		{Query{Attempts: Previous, Tail: 2}, "2 13,2 14"},
		{Query{Tail: 4}, "2 14,3 21,3 22,3 23"},
		{Query{Tail: 3}, "3 21,3 22,3 23"},
		{Query{Tail: 100, Attempts: Last}, "3 21,3 22,3 23"},
		{Query{Since: at(1), Attempts: Last}, "3 22,3 23"},
		{Query{Until: at(1), Attempts: Last}, "3 21,3 22"},
		{Query{Since: at(1), Until: at(2), Attempts: Previous}, "2 12,2 13"},
		{Query{Until: at(2), Tail: 2, Attempts: Previous}, "2 12,2 13"},
	}
	for _, test := range tests {
		if got := strings.Join(read(t, dir, test.q), ","); got != test.want {
			t.Errorf("%+v: %s, want %s", test.q, got, test.want)
		}
	}
	if got := read(t, filepath.Join(dir, "none"), Query{}); len(got) != 0 {
		t.Errorf("an empty log has %q", got)
	}
	one := t.TempDir()
	attempt(t, one, Options{}, "only")
	if got := read(t, one, Query{Attempts: Previous}); len(got) != 0 {
		t.Errorf("before the first attempt there was %q", got)
	}
	stop := errors.New("enough")
	if err := Read(t.Context(), dir, Query{}, func(Entry) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("error %v, want the callback's own", err)
	}
}

// Tail and Since over many segments are what a filter of all records gives.
func TestTailIsTheEndOfAll(t *testing.T) {
	dir := t.TempDir()
	w := create(t, dir, Options{MaxSize: minSize, MaxFiles: 10})
	for i := range 3000 {
		w.Add(noon.Add(time.Duration(i)*time.Second), Stdout, false, []byte(strings.Repeat("z", i%300)+" "+strconv.Itoa(i)))
		w.Flush()
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	all := read(t, dir, Query{})
	for _, n := range []int{1, 2, 100, 499, len(all) - 1, len(all), len(all) + 5} {
		if got := read(t, dir, Query{Tail: n}); !slices.Equal(got, all[max(0, len(all)-n):]) {
			t.Errorf("tail %d: %d records", n, len(got))
		}
	}
	since := noon.Add(2500 * time.Second)
	if got := read(t, dir, Query{Since: since, Tail: 600}); !slices.Equal(got, all[len(all)-500:]) {
		t.Errorf("since: %d records", len(got))
	}
}

func TestFollowSeesEverythingThroughRotationAndRestart(t *testing.T) {
	dir := t.TempDir()
	attempt(t, dir, Options{}, "before")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lines := make(chan string, 10000)
	ended := make(chan error, 1)
	go func() {
		ended <- Read(ctx, dir, Query{Follow: true, Attempts: Last}, func(e Entry) error {
			lines <- fmt.Sprintf("%d %s", e.Attempt, bytes.TrimLeft(e.Text, "."))
			return nil
		})
	}()
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-lines:
			if got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		case err := <-ended:
			t.Fatalf("ended with %v before %q", err, want)
		}
	}
	expect("1 before")
	for a := 2; a < 4; a++ {
		w := create(t, dir, Options{MaxSize: minSize, MaxFiles: 100})
		for i := range 400 {
			w.Add(noon, Stdout, false, []byte(strings.Repeat(".", 500)+strconv.Itoa(i)))
			w.Flush()
		}
		for i := range 400 {
			expect(fmt.Sprint(a, " ", i))
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

func TestFollowWaitsForTheWholeLine(t *testing.T) {
	dir := t.TempDir()
	w := create(t, dir, Options{})
	record := appendRecord(nil, noon, Stdout, false, []byte("whole"))
	if _, err := w.f.Write(record[:20]); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got := make(chan string, 1)
	go func() {
		_ = Read(ctx, dir, Query{Follow: true}, func(e Entry) error {
			got <- string(e.Text)
			return nil
		})
	}()
	if _, err := w.f.Write(record[20:]); err != nil {
		t.Fatal(err)
	}
	if text := <-got; text != "whole" {
		t.Errorf("got %q", text)
	}
}

func TestBrokenFilesAreSkippedOver(t *testing.T) {
	dir := t.TempDir()
	attempt(t, dir, Options{}, "a", "b")
	attempt(t, dir, Options{}, "c")
	first := filepath.Join(dir, "000001.000001.log")
	content, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	junk := slices.Concat([]byte("\x00\x00\n2026-01-02T12:00:00.000000000Z stdout\nno record\n"), content[:len(content)/2],
		[]byte("torn\n"), bytes.Repeat([]byte("j"), 5*maxRecord), []byte("\n"), content, []byte("2026-01-02T12:00:00.00000"))
	for _, err := range []error{os.WriteFile(first, junk, 0o600), os.WriteFile(filepath.Join(dir, "notes.log"), nil, 0o600),
		os.WriteFile(filepath.Join(dir, "1.2.log"), nil, 0o600), os.Mkdir(filepath.Join(dir, "000009.000001.log"), 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	got := strings.Join(read(t, dir, Query{}), ",")
	if !strings.HasSuffix(got, "1 a,1 b,2 c") {
		t.Errorf("%s", got)
	}
}

// With a full disk nothing blocks, and the log tells later what it lost.
func TestFullDiskDropsAndTells(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=256k"); err != nil {
		t.Skip("needs to mount a tmpfs:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	filler := filepath.Join(mount, "filler")
	if err := os.WriteFile(filler, make([]byte, 150<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(mount, "log")
	w := create(t, dir, Options{MaxSize: minSize, MaxFiles: 10})
	line := []byte(strings.Repeat("l", 1000))
	const written = 300
	for range written {
		w.Add(noon, Stdout, false, line)
		w.Flush()
	}
	if w.lost == 0 {
		t.Fatal("nothing was lost on a full disk")
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	w.Add(noon, Stdout, false, []byte("after"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	told, lines := 0, 0
	err := Read(t.Context(), dir, Query{}, func(e Entry) error {
		switch {
		case e.Stream == Keeper:
			count, why, _ := strings.Cut(string(e.Text), " ")
			if why != "lines lost, the log could not be written: no space left on device" {
				t.Errorf("note %q", e.Text)
			}
			n, err := strconv.Atoi(count)
			if err != nil {
				t.Error(err)
			}
			told += n
		case string(e.Text) == "after":
		case len(e.Text) == len(line):
			lines++
		default:
			t.Errorf("a torn record: %.40q", e.Text)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if told != written-lines {
		t.Errorf("%d lines are missing, %d are told of", written-lines, told)
	}
}

// Two keepers that start at once get attempts of their own.
func TestAttemptsNeverShareAFile(t *testing.T) {
	dir := t.TempDir()
	a, b := create(t, dir, Options{}), create(t, dir, Options{})
	if a.now.attempt == b.now.attempt {
		t.Errorf("both are attempt %d", a.now.attempt)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte("2026-01-02T12:00:00.000000000Z stdout F text"))
	f.Add([]byte("2026-01-02T12:00:00.000000000Z stderr P "))
	f.Add([]byte("x y z"))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, ok := parseRecord(line)
		if !ok {
			return
		}
		again, ok := parseRecord(bytes.TrimSuffix(appendRecord(nil, e.Time, e.Stream, e.Partial, e.Text), []byte("\n")))
		if !ok || !again.Time.Equal(e.Time) || again.Stream != e.Stream || again.Partial != e.Partial || !bytes.Equal(again.Text, e.Text) {
			t.Errorf("%q became %+v, then %+v", line, e, again)
		}
	})
}
