package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

func entry(index, term uint64, data string) *raft.Log {
	e := &raft.Log{Index: index, Term: term, Type: raft.LogCommand, AppendedAt: time.Unix(1700000000, int64(index))}
	if data != "" {
		e.Data = []byte(data)
	}
	return e
}

func openTestLog(t testing.TB, path string) *logStore {
	t.Helper()
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// What raft asks of a log store, call by call.
func TestLogStoreKeepsWhatRaftStores(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	var got raft.Log
	if err := l.GetLog(1, &got); !errors.Is(err, raft.ErrLogNotFound) {
		t.Fatalf("an empty log answers %v", err)
	}
	if first, last := l.bounds(); first != 0 || last != 0 {
		t.Fatalf("an empty log has bounds %d, %d", first, last)
	}
	want := []*raft.Log{
		entry(1, 1, "one"),
		{Index: 2, Term: 1, Type: raft.LogNoop},
		{Index: 3, Term: 2, Type: raft.LogConfiguration, Data: []byte{0, 1}, Extensions: []byte("ext")},
	}
	if err := l.StoreLogs(want); err != nil {
		t.Fatal(err)
	}
	for range 2 { // as written, and after reopening
		for _, w := range want {
			if err := l.GetLog(w.Index, &got); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(*w, got); d != "" {
				t.Errorf("entry %d (-want +got):\n%s", w.Index, d)
			}
		}
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
		l = openTestLog(t, path)
	}
	defer l.close()
	if err := l.StoreLog(entry(3, 3, "another")); err != nil {
		t.Fatal(err)
	}
	if err := l.GetLog(3, &got); err != nil || got.Term != 3 {
		t.Fatalf("a replaced entry reads as %v, %v", got, err)
	}
}

func TestLogStoreCommitIndexIsWrittenWithTheNextEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	if err := l.StoreLogs([]*raft.Log{entry(1, 1, "a"), entry(2, 1, "b")}); err != nil {
		t.Fatal(err)
	}
	if err := l.StageCommitIndex(2); err != nil {
		t.Fatal(err)
	}
	if c := l.committed(); c != 0 {
		t.Errorf("a staged index counts at once: %d", c)
	}
	if err := l.StoreLog(entry(3, 1, "c")); err != nil {
		t.Fatal(err)
	}
	l.close()
	l = openTestLog(t, path)
	defer l.close()
	if c := l.committed(); c != 2 {
		t.Errorf("committed = %d after reopening, want 2", c)
	}
	if err := l.DeleteRange(2, 3); err != nil {
		t.Fatal(err)
	}
	if c := l.committed(); c != 1 {
		t.Errorf("committed = %d, above the last entry", c)
	}
}

// The log store does what a map does, also across reopening and across a crash, which is a copy of the file taken while it is open.
func TestLogStoreIsAMap(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "log.db")
		l, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		l.db.NoSync = true // the test is about content
		defer func() { l.close() }()
		model := map[uint64]string{}
		bounds := func() (first, last uint64) {
			for i := range model {
				if first == 0 || i < first {
					first = i
				}
				last = max(last, i)
			}
			return first, last
		}
		reopen := func(p string) {
			l.close()
			path = p
			if l, err = openLog(path); err != nil {
				t.Fatal(err)
			}
			l.db.NoSync = true
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				_, last := bounds()
				var batch []*raft.Log
				for range rapid.IntRange(1, 200).Draw(t, "n") {
					last++
					data := rapid.StringN(0, 40, -1).Draw(t, "data")
					batch = append(batch, entry(last, 1, data))
					model[last] = data
				}
				if err := l.StoreLogs(batch); err != nil {
					t.Fatal(err)
				}
			},
			"head": func(t *rapid.T) {
				first, last := bounds()
				to := rapid.Uint64Range(first, last).Draw(t, "to")
				if err := l.DeleteRange(first, to); err != nil {
					t.Fatal(err)
				}
				for i := range model {
					if i <= to {
						delete(model, i)
					}
				}
			},
			"tail": func(t *rapid.T) {
				first, last := bounds()
				from := rapid.Uint64Range(first, last).Draw(t, "from")
				if err := l.DeleteRange(from, last); err != nil {
					t.Fatal(err)
				}
				for i := range model {
					if i >= from {
						delete(model, i)
					}
				}
			},
			"reopen": func(*rapid.T) { reopen(path) },
			"crash": func(t *rapid.T) {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				next := path + "x"
				if err := os.WriteFile(next, b, 0o600); err != nil {
					t.Fatal(err)
				}
				reopen(next)
			},
			"": func(t *rapid.T) {
				first, last := bounds()
				if f, n := l.bounds(); f != first || n != last {
					t.Fatalf("bounds %d, %d, want %d, %d", f, n, first, last)
				}
				for i, data := range model {
					var got raft.Log
					if err := l.GetLog(i, &got); err != nil || string(got.Data) != data {
						t.Fatalf("entry %d is %q, %v, want %q", i, got.Data, err, data)
					}
				}
				var got raft.Log
				if err := l.GetLog(last+1, &got); !errors.Is(err, raft.ErrLogNotFound) {
					t.Fatalf("an entry after the last: %v", err)
				}
			},
		})
	})
}

// A head of many entries goes in several transactions; a tail too, newest first.
func TestLogStoreDeletesLongRanges(t *testing.T) {
	l := openTestLog(t, filepath.Join(t.TempDir(), "log.db"))
	defer l.close()
	var batch []*raft.Log
	for i := range uint64(3*deleteBatch + 10) {
		batch = append(batch, entry(i+1, 1, "x"))
	}
	if err := l.StoreLogs(batch); err != nil {
		t.Fatal(err)
	}
	if err := l.DeleteRange(1, deleteBatch+5); err != nil {
		t.Fatal(err)
	}
	if err := l.DeleteRange(2*deleteBatch, 3*deleteBatch+10); err != nil {
		t.Fatal(err)
	}
	if first, last := l.bounds(); first != deleteBatch+6 || last != 2*deleteBatch-1 {
		t.Errorf("bounds %d, %d", first, last)
	}
}

func TestVotesSurvive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vote.db")
	v, err := openVotes(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := v.Get([]byte("k")); err != nil || len(got) != 0 {
		t.Errorf("a missing value is %q, %v", got, err)
	}
	if got, err := v.GetUint64([]byte("n")); err != nil || got != 0 {
		t.Errorf("a missing number is %d, %v", got, err)
	}
	if err := errors.Join(v.Set([]byte("k"), []byte("val")), v.SetUint64([]byte("n"), 1<<63)); err != nil {
		t.Fatal(err)
	}
	v.close()
	if v, err = openVotes(path); err != nil {
		t.Fatal(err)
	}
	defer v.close()
	if got, _ := v.Get([]byte("k")); string(got) != "val" {
		t.Errorf("k = %q", got)
	}
	if got, _ := v.GetUint64([]byte("n")); got != 1<<63 {
		t.Errorf("n = %d", got)
	}
	if _, err := v.GetUint64([]byte("k")); err == nil {
		t.Error("three bytes read as a number")
	}
}

// The vote file has its full size from the start: writing goes on when a full disk gives it no more.
func TestVoteFileDoesNotGrow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vote.db")
	v, err := openVotes(path)
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(300) {
		if err := errors.Join(v.SetUint64([]byte("CurrentTerm"), i), v.SetUint64([]byte("LastVoteTerm"), i), v.Set([]byte("LastVoteCand"), []byte("some-server"))); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if after.Size() != before.Size() {
		t.Errorf("it grew from %d to %d bytes", before.Size(), after.Size())
	}
}

// Whatever byte of the file is wrong or missing, opening it ends in an error in words or in the right entries: never in a crash.
func TestDamagedLogIsToldOf(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "good.db")
	l := openTestLog(t, path)
	for i := range uint64(60) {
		if err := l.StoreLog(entry(i+1, 1, fmt.Sprintf("entry %d %0200d", i+1, i))); err != nil {
			t.Fatal(err)
		}
	}
	l.close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	told, tries := 0, 0
	try := func(t *rapid.T, data []byte) {
		tries++ // a file of its own: bbolt keeps hold of one that it panics over
		bad := filepath.Join(dir, fmt.Sprintf("bad%d.db", tries))
		if err := os.WriteFile(bad, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := openLog(bad)
		if err != nil {
			told++
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("error is not ErrDamaged: %v", err)
			}
			return
		}
		defer l.close()
		for i := uint64(1); i <= l.last; i++ {
			var got raft.Log
			if err := l.GetLog(i, &got); err != nil || string(got.Data) != fmt.Sprintf("entry %d %0200d", i, i-1) {
				t.Fatalf("entry %d of %d reads as %q, %v", i, l.last, got.Data, err)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		data := append([]byte(nil), good...)
		if rapid.Bool().Draw(t, "cut") {
			data = data[:rapid.IntRange(1, len(data)-1).Draw(t, "at")]
		} else {
			at := rapid.IntRange(0, len(data)-1).Draw(t, "byte")
			data[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "xor"))
		}
		try(t, data)
	})
	if told == 0 {
		t.Error("no damage was found in any run")
	}
}
