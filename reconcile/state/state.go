// Package state holds the replicated facts of a cluster: what was decided, and what nodes reported of it.
//
// The flow: whoever decides makes a [Command] out of whole objects and the versions they replace; the log orders commands; each node calls
// [State.Apply] for each entry, in order, and so holds the same facts; readers take a [View], an immutable snapshot that costs nothing to make.
//
// Apply never judges. It is compare-and-set of whole objects, item by item: an item whose versions are not the current ones is refused and named in
// the [Result], the others go in. Rules live in package reconcile and its siblings, so that a newer version of them never reads an old log differently.
// An entry of an unknown format, table or field stops applying ([ErrHalt]); containers run on.
//
// Words: a table holds objects of one kind by key; the version of an object is the index of the entry that wrote it last; log time is the stamp that
// entries carry, which only moves forward and only while there is a leader.
package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Format is the newest format of commands that this build writes and reads. Released formats never change.
const Format = 1

// MaxEntry is the largest command that may be proposed, in bytes.
const MaxEntry = 256 << 10

// ErrHalt is wrapped by Apply's error when an entry can't be read by this build. Nothing after it may be applied.
var ErrHalt = errors.New("this build can't read the log any further: upgrade gitopsd on this node")

// Command is one entry of the log.
type Command struct {
	Format  int       `json:"format"`
	Term    uint64    `json:"term,omitempty"`    // the term it was decided in; 0 = valid in any (a node's report, a person's word)
	Request string    `json:"request,omitempty"` // a repeated one changes nothing and gets the first answer
	At      time.Time `json:"at"`                // log time of the proposal
	Actor   string    `json:"actor,omitempty"`   // who asked: leader, node/ID, user
	Items   []Item    `json:"items"`
}

// Item is a set of changes that go in together or not at all.
type Item []Change

// Change replaces one object.
type Change struct {
	Table   string          `json:"table"`
	Key     string          `json:"key"`
	Version uint64          `json:"version"`          // the version it replaces; 0 = there must be none
	Object  json.RawMessage `json:"object,omitempty"` // absent = remove
	Force   bool            `json:"force,omitempty"`  // whatever the version: for objects with one writer, such as a node's reports
}

// Result is what became of a command.
type Result struct {
	Index   uint64 `json:"index"`
	Refused []int  `json:"refused,omitempty"` // items whose versions were not current, by position
	Stale   bool   `json:"stale,omitempty"`   // the whole command: it was decided in another term
	Again   bool   `json:"again,omitempty"`   // the request had been applied before; Index is that of the first time
}

// Put makes the change that writes an object, replacing the version given.
func Put[T Object](key string, version uint64, obj T) Change {
	return Change{Table: obj.table(), Key: key, Version: version, Object: manifest.Canonical(obj)}
}

// Set makes the change that writes an object whatever is there.
func Set[T Object](key string, obj T) Change {
	return Change{Table: obj.table(), Key: key, Object: manifest.Canonical(obj), Force: true}
}

// Delete makes the change that removes an object of the version given.
func Delete[T Object](key string, version uint64) Change {
	var obj T
	return Change{Table: obj.table(), Key: key, Version: version}
}

// State applies the log. One goroutine owns it; views may go anywhere.
type State struct {
	view     View
	requests map[string]Result // request id -> its first answer, the last keepRequests ones
	order    []string          // the same, oldest first
}

const keepRequests = 4096

// New is the state before the first entry.
func New() *State {
	return &State{view: View{Format: Format}, requests: map[string]Result{}}
}

// Fork makes a state of its own that begins as the view is: for trying out what commands would do. The view's own state never sees it.
func Fork(v *View) *State {
	s := New()
	s.view = *v
	s.view.log = slices.Clone(v.log)
	return s
}

// View is a snapshot of the facts as of the last entry applied.
func (s *State) View() *View {
	v := s.view
	return &v
}

// Apply takes one entry of the log. index must grow; term is the entry's own. An error wraps ErrHalt: the entry was not applied and no later one may be.
func (s *State) Apply(index, term uint64, data []byte) (Result, error) {
	cmd, err := Decode(data)
	if err != nil {
		return Result{}, fmt.Errorf("apply entry %d: %w: %w", index, ErrHalt, err)
	}
	v := &s.view
	first, repeated := s.requests[cmd.Request]
	switch {
	case cmd.Request != "" && repeated:
		v.Index = index
		first.Again = true
		return first, nil
	case cmd.Term != 0 && cmd.Term != term:
		v.Index = index
		return Result{Index: index, Stale: true}, nil
	}
	res, err := s.commit(index, term, cmd.At, cmd.Items)
	if err != nil {
		return Result{}, fmt.Errorf("apply entry %d: %w: %w", index, ErrHalt, err)
	}
	s.remember(cmd.Request, res)
	return res, nil
}

// commit puts items in at an index. With an error, nothing was put in.
func (s *State) commit(index, term uint64, at time.Time, items []Item) (Result, error) {
	res := Result{Index: index}
	next := s.view
	next.Index, next.Term = index, term
	if at.After(next.At) {
		next.At = at
	}
	for i, item := range items {
		ok, err := next.apply(item)
		if err != nil {
			return Result{}, err
		}
		if !ok {
			res.Refused = append(res.Refused, i)
		}
	}
	s.view = next
	return res, nil
}

// Try puts items into a fork as the next entry would, whatever their size.
func (s *State) Try(at time.Time, items []Item) (Result, error) {
	return s.commit(s.view.Index+1, s.view.Term, at, items)
}

func (s *State) remember(request string, first Result) {
	if request == "" {
		return
	}
	s.requests[request] = first
	s.order = append(s.order, request)
	if len(s.order) > keepRequests {
		delete(s.requests, s.order[0])
		s.order = s.order[1:] // append moves it to a new array now and then
	}
}

// apply puts one item in, or says that its versions are not current.
func (v *View) apply(item Item) (bool, error) {
	for _, c := range item {
		t, ok := tables[c.Table]
		if !ok {
			return false, fmt.Errorf("unknown table %q", c.Table)
		}
		if !c.Force && t.version(v, c.Key) != c.Version {
			return false, nil
		}
	}
	for _, c := range item {
		if err := tables[c.Table].set(v, c.Key, c.Object); err != nil {
			return false, err
		}
		v.note(c.Table, c.Key)
	}
	return true, nil
}

// Encode writes a command as a log entry.
func Encode(c Command) ([]byte, error) {
	c.Format = Format
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode command: %w", err)
	}
	if len(b) > MaxEntry {
		return nil, fmt.Errorf("encode command: %d bytes are more than an entry may have (%d)", len(b), MaxEntry)
	}
	return b, nil
}

// Decode reads a log entry, strictly.
func Decode(data []byte) (Command, error) {
	var c Command
	if err := strict(data, &c); err != nil {
		return c, fmt.Errorf("decode command: %w", err)
	}
	if c.Format < 1 || c.Format > Format {
		return c, fmt.Errorf("decode command: format %d, this build reads 1 to %d", c.Format, Format)
	}
	return c, nil
}

// strict decodes JSON and refuses fields that the type does not have, and anything after the value.
func strict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if rest := data[d.InputOffset():]; len(bytes.TrimSpace(rest)) > 0 {
		return errors.New("more than one value")
	}
	return nil
}

// sum is the contribution of one object to the hash of the state.
func sum(table, key string, version uint64, object []byte) [32]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00%d\x00", table, key, version)
	h.Write(object)
	return [32]byte(h.Sum(nil))
}
