package state

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	iradix "github.com/hashicorp/go-immutable-radix/v2"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// View is an immutable snapshot of the facts. What its tables hand out is shared: nobody may change it.
type View struct {
	Index  uint64    // of the last entry applied
	Term   uint64    // of that entry
	At     time.Time // log time
	Format int

	Clusters Table[Cluster]
	Nodes    Table[Node]
	Sources  Table[Source]
	Stacks   Table[Stack]
	Releases Table[Release]
	Specs    Table[Spec]
	Services Table[Service]
	Retired  Table[Retired]
	Tasks    Table[Task]
	Reports  Table[Report]
	Volumes  Table[Volume]
	Networks Table[Network]
	Images   Table[Image]
	Secrets  Table[Secret]
	Events   Table[Event]

	hash [32]byte
	log  []touched // what changed, oldest first: the last of it
	cut  uint64    // log is complete after this index
}

type touched struct {
	index      uint64
	table, key string
}

const keepTouched = 8192

func (v *View) note(table, key string) {
	if len(v.log) >= keepTouched {
		v.cut = v.log[len(v.log)/2-1].index
		v.log = slices.Clone(v.log[len(v.log)/2:])
	}
	// Only the owner of the State appends, so views share the array: each sees its own length of it.
	v.log = append(v.log, touched{v.Index, table, key})
}

// Since lists the keys of a table that changed after the index, each once, sorted. complete is false when that lies too far back to know.
func (v *View) Since(index uint64, table string) (keys []string, complete bool) {
	from, _ := slices.BinarySearchFunc(v.log, index+1, func(t touched, i uint64) int { return int(int64(t.index) - int64(i)) })
	for _, t := range v.log[from:] {
		if t.table == table {
			keys = append(keys, t.key)
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys), index >= v.cut
}

// Hash identifies the facts: equal on all nodes at the same index. It is kept up to date entry by entry.
func (v *View) Hash() string { return hex.EncodeToString(v.hash[:]) }

// Entry is an object with what the log knows of it.
type Entry[T any] struct {
	Version uint64    // index of the entry that wrote it last; 0 = there is no such object
	At      time.Time // log time of that entry
	Value   T
	sum     [32]byte
}

// Table holds the objects of one kind by key.
type Table[T Object] struct{ tree *iradix.Tree[Entry[T]] }

// Get looks an object up. Where there is none, the entry is zero and ok false.
func (t Table[T]) Get(key string) (e Entry[T], ok bool) {
	if t.tree == nil {
		return e, false
	}
	return t.tree.Get([]byte(key))
}

// Len is the number of objects.
func (t Table[T]) Len() int {
	if t.tree == nil {
		return 0
	}
	return t.tree.Len()
}

// All walks the objects in the order of their keys.
func (t Table[T]) All() iter.Seq2[string, Entry[T]] { return t.Below("") }

// Below walks the objects whose key has the prefix, in order.
func (t Table[T]) Below(prefix string) iter.Seq2[string, Entry[T]] {
	return func(yield func(string, Entry[T]) bool) {
		if t.tree == nil {
			return
		}
		it := t.tree.Root().Iterator()
		it.SeekPrefix([]byte(prefix))
		for k, e, ok := it.Next(); ok; k, e, ok = it.Next() {
			if !yield(string(k), e) {
				return
			}
		}
	}
}

// ops lets Apply and the snapshot codec treat tables alike.
type ops struct {
	version func(v *View, key string) uint64
	set     func(v *View, key string, object json.RawMessage) error
	restore func(v *View, key string, version uint64, at time.Time, object json.RawMessage) error
	records func(v *View) iter.Seq[record]
}

func opsOf[T Object](of func(*View) *Table[T]) ops {
	var zero T
	name := zero.table()
	put := func(v *View, key string, version uint64, at time.Time, object json.RawMessage) error {
		t := of(v)
		if t.tree == nil {
			t.tree = iradix.New[Entry[T]]()
		}
		if old, ok := t.Get(key); ok {
			v.mix(old.sum)
		}
		if len(object) == 0 {
			t.tree, _, _ = t.tree.Delete([]byte(key))
			return nil
		}
		e := Entry[T]{Version: version, At: at}
		if err := strict(object, &e.Value); err != nil {
			return fmt.Errorf("read %s %s: %w", name, key, err)
		}
		e.sum = sum(name, key, version, manifest.Canonical(e.Value))
		v.mix(e.sum)
		t.tree, _, _ = t.tree.Insert([]byte(key), e)
		return nil
	}
	return ops{
		version: func(v *View, key string) uint64 { e, _ := of(v).Get(key); return e.Version },
		set: func(v *View, key string, object json.RawMessage) error {
			return put(v, key, v.Index, v.At, object)
		},
		restore: put,
		records: func(v *View) iter.Seq[record] {
			return func(yield func(record) bool) {
				for k, e := range of(v).All() {
					if !yield(record{Table: name, Key: k, Version: e.Version, At: e.At, Object: manifest.Canonical(e.Value)}) {
						return
					}
				}
			}
		},
	}
}

// mix adds or takes out one object's sum: the state's hash is their exclusive or, so that its upkeep costs the change and not the state.
func (v *View) mix(s [32]byte) {
	for i := range v.hash {
		v.hash[i] ^= s[i]
	}
}

// record is one object in a snapshot.
type record struct {
	Table   string          `json:"table"`
	Key     string          `json:"key"`
	Version uint64          `json:"version"`
	At      time.Time       `json:"at"`
	Object  json.RawMessage `json:"object"`
}

// header opens a snapshot.
type header struct {
	Format   int       `json:"format"`
	Index    uint64    `json:"index"`
	Term     uint64    `json:"term"`
	At       time.Time `json:"at"`
	Hash     string    `json:"hash"`
	Requests []request `json:"requests,omitempty"`
}

// request is one that was answered, with its first answer.
type request struct {
	ID      string `json:"id"`
	Index   uint64 `json:"index"`
	Refused []int  `json:"refused,omitempty"`
}

// Snapshot writes the state as JSON lines: a header, then each object. It reads only what does not change, so Apply may go on after Freeze.
type Snapshot struct {
	view     View
	requests []request
}

// Freeze takes a snapshot of the state as it is.
func (s *State) Freeze() *Snapshot {
	snap := &Snapshot{view: s.view}
	for _, id := range s.order {
		snap.requests = append(snap.requests, request{id, s.requests[id].Index, s.requests[id].Refused})
	}
	return snap
}

// Lines walks the snapshot's lines, without their line ends.
func (s *Snapshot) Lines() iter.Seq[[]byte] {
	v := &s.view
	return func(yield func([]byte) bool) {
		h := header{Format: Format, Index: v.Index, Term: v.Term, At: v.At, Hash: v.Hash(), Requests: s.requests}
		if !yield(manifest.Canonical(h)) {
			return
		}
		for _, name := range tableNames {
			for r := range tables[name].records(v) {
				if !yield(manifest.Canonical(r)) {
					return
				}
			}
		}
	}
}

// Restore reads what Lines wrote and checks that its hash is the one in the header.
func Restore(lines iter.Seq[[]byte]) (*State, error) {
	s := New()
	var h header
	n := 0
	for line := range lines {
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		if n++; n == 1 {
			if err := strict(line, &h); err != nil {
				return nil, fmt.Errorf("restore snapshot: header: %w: %w", ErrHalt, err)
			}
			if h.Format < 1 || h.Format > Format {
				return nil, fmt.Errorf("restore snapshot: format %d, this build reads 1 to %d: %w", h.Format, Format, ErrHalt)
			}
			continue
		}
		var r record
		if err := strict(line, &r); err != nil {
			return nil, fmt.Errorf("restore snapshot: line %d: %w: %w", n, ErrHalt, err)
		}
		t, ok := tables[r.Table]
		if !ok {
			return nil, fmt.Errorf("restore snapshot: line %d: unknown table %q: %w", n, r.Table, ErrHalt)
		}
		if err := t.restore(&s.view, r.Key, r.Version, r.At, r.Object); err != nil {
			return nil, fmt.Errorf("restore snapshot: line %d: %w: %w", n, ErrHalt, err)
		}
	}
	if n == 0 {
		return nil, fmt.Errorf("restore snapshot: it is empty: %w", ErrHalt)
	}
	v := &s.view
	v.Index, v.Term, v.At, v.cut = h.Index, h.Term, h.At, h.Index
	for _, r := range h.Requests {
		s.remember(r.ID, Result{Index: r.Index, Refused: r.Refused})
	}
	if got := v.Hash(); !strings.EqualFold(got, h.Hash) {
		return nil, fmt.Errorf("restore snapshot: its hash is %s, its content gives %s: the file is damaged", h.Hash, got)
	}
	return s, nil
}
