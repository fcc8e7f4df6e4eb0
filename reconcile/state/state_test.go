package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func encode(t interface{ Fatal(...any) }, c Command) []byte {
	b, err := Encode(c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func apply(t interface{ Fatal(...any) }, s *State, index, term uint64, data []byte) Result {
	res, err := s.Apply(index, term, data)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// objects makes a change of one of three tables, so that keys of several tables meet in one item.
func objects(key string, n int, version uint64, force bool) map[string]Change {
	at := epoch.Add(time.Duration(n) * time.Second)
	changes := map[string]Change{
		"events":  Put(key, version, Event{Time: at, Kind: "k", Reason: Reason{ID: fmt.Sprint(n)}}),
		"volumes": Put(key, version, Volume{Name: key, Node: fmt.Sprint(n)}),
		"reports": Put(key, version, Report{Attempt: n, Drift: []Drift{{Kind: "missing", Time: at}}}),
	}
	for table, c := range changes {
		c.Force = force
		changes[table] = c
	}
	return changes
}

// entries draws commands: writes and removals with right, wrong and no versions, repeated requests, other terms.
func entries(t *rapid.T) []Command {
	keys := rapid.SampledFrom([]string{"a", "b", "shop/web.1.1", "shop/web.1.10", "ü"})
	tables := rapid.SampledFrom([]string{"events", "volumes", "reports"})
	change := rapid.Custom(func(t *rapid.T) Change {
		version := rapid.Uint64Range(0, 40).Draw(t, "version")
		if rapid.Bool().Draw(t, "new") {
			version = 0
		}
		c := objects(keys.Draw(t, "key"), rapid.IntRange(0, 99).Draw(t, "n"), version, rapid.Bool().Draw(t, "force"))[tables.Draw(t, "table")]
		if rapid.IntRange(0, 4).Draw(t, "remove") == 0 {
			c.Object = nil
		}
		return c
	})
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Command {
		c := Command{
			At:   epoch.Add(time.Duration(rapid.IntRange(-5, 1000).Draw(t, "at")) * time.Second),
			Term: rapid.SampledFrom([]uint64{0, 0, 0, 1, 2}).Draw(t, "term"),
		}
		if rapid.Bool().Draw(t, "named") {
			c.Request = fmt.Sprint("r", rapid.IntRange(0, 9).Draw(t, "request"))
		}
		for range rapid.IntRange(0, 3).Draw(t, "items") {
			c.Items = append(c.Items, rapid.SliceOfN(change, 1, 3).Draw(t, "item"))
		}
		return c
	}), 0, 40).Draw(t, "entries")
}

func snapshot(s *State) [][]byte { return slices.Collect(s.Freeze().Lines()) }

// The same entries give the same facts, also where a snapshot was taken and restored on the way.
func TestEntriesDecideTheFacts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		log := entries(t)
		cut := rapid.IntRange(0, len(log)).Draw(t, "snapshot after")
		one, two := New(), New()
		for i, c := range log {
			if i == cut {
				restored, err := Restore(slices.Values(snapshot(two)))
				if err != nil {
					t.Fatal(err)
				}
				two = restored
			}
			data := encode(t, c)
			a, b := apply(t, one, uint64(i+1), 1, data), apply(t, two, uint64(i+1), 1, data)
			if d := cmp.Diff(a, b); d != "" {
				t.Fatalf("entry %d has two results:\n%s", i+1, d)
			}
			if v, w := one.View(), two.View(); v.Hash() != w.Hash() || !v.At.Equal(w.At) || v.Index != w.Index || v.Term != w.Term {
				t.Fatalf("entry %d: %s at %d %s, %s at %d %s", i+1, v.Hash(), v.Index, v.At, w.Hash(), w.Index, w.At)
			}
		}
		if d := cmp.Diff(text(snapshot(one)), text(snapshot(two))); d != "" {
			t.Fatalf("two snapshots of the same facts:\n%s", d)
		}
	})
}

func text(lines [][]byte) (s []string) {
	for _, l := range lines {
		s = append(s, string(l))
	}
	return s
}

// The hash that is kept up to date entry by entry is the one of all objects, reckoned anew.
func TestHashIsThatOfTheObjects(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := New()
		for i, c := range entries(t) {
			apply(t, s, uint64(i+1), 1, encode(t, c))
			var anew View
			for _, line := range snapshot(s)[1:] {
				var r record
				if err := json.Unmarshal(line, &r); err != nil {
					t.Fatal(err)
				}
				anew.mix(sum(r.Table, r.Key, r.Version, r.Object))
			}
			if got := s.View().Hash(); got != anew.Hash() {
				t.Fatalf("entry %d: hash %s, from scratch %s", i+1, got, anew.Hash())
			}
		}
	})
}

// model is what Apply is to do, written as plainly as can be.
type model struct {
	objects  map[[2]string]string
	versions map[[2]string]uint64
	requests map[string]Result
	touched  map[uint64][][2]string
}

func (m *model) apply(index, term uint64, c Command) Result {
	if first, ok := m.requests[c.Request]; ok && c.Request != "" {
		first.Again = true
		return first
	}
	res := Result{Index: index}
	if c.Term != 0 && c.Term != term {
		res.Stale = true
		return res
	}
	for i, item := range c.Items {
		current := !slices.ContainsFunc(item, func(c Change) bool {
			return !c.Force && m.versions[[2]string{c.Table, c.Key}] != c.Version
		})
		if !current {
			res.Refused = append(res.Refused, i)
			continue
		}
		for _, c := range item {
			k := [2]string{c.Table, c.Key}
			m.touched[index] = append(m.touched[index], k)
			if len(c.Object) == 0 {
				delete(m.objects, k)
				delete(m.versions, k)
			} else {
				m.objects[k], m.versions[k] = string(c.Object), index
			}
		}
	}
	if c.Request != "" {
		m.requests[c.Request] = res
	}
	return res
}

// An item goes in when all its versions are current, whole, and not otherwise. A repeated request gets its first answer. Since names exactly what changed.
func TestApplyIsCompareAndSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := model{map[[2]string]string{}, map[[2]string]uint64{}, map[string]Result{}, map[uint64][][2]string{}}
		s := New()
		old := s.View()
		oldText := ""
		for i, c := range entries(t) {
			index := uint64(i + 1)
			want := m.apply(index, 1, c)
			if d := cmp.Diff(want, apply(t, s, index, 1, encode(t, c))); d != "" {
				t.Fatalf("entry %d (-want +got):\n%s", index, d)
			}
			v := s.View()
			got := map[[2]string]string{}
			for _, table := range tableNames {
				for r := range tables[table].records(v) {
					k := [2]string{table, r.Key}
					got[k] = string(r.Object)
					if r.Version != m.versions[k] {
						t.Fatalf("entry %d: %v has version %d, want %d", index, k, r.Version, m.versions[k])
					}
				}
			}
			if d := cmp.Diff(m.objects, got); d != "" {
				t.Fatalf("entry %d (-want +got):\n%s", index, d)
			}
			for since := range index + 1 {
				for _, table := range tableNames {
					keys := map[string]bool{}
					for i := since + 1; i <= index; i++ {
						for _, k := range m.touched[i] {
							if k[0] == table {
								keys[k[1]] = true
							}
						}
					}
					got, complete := v.Since(since, table)
					if want := slices.Sorted(maps.Keys(keys)); !complete || !slices.Equal(got, want) {
						t.Fatalf("entry %d: since %d in %s: %v, %v, want %v", index, since, table, got, complete, want)
					}
				}
			}
			if old != nil && i%5 == 0 {
				if now := viewText(old); now != oldText && oldText != "" {
					t.Fatalf("a view of entry %d has changed", old.Index)
				}
				old = v
				oldText = viewText(v)
			}
		}
	})
}

func viewText(v *View) string {
	snap := Snapshot{view: *v}
	return strings.Join(text(slices.Collect(snap.Lines())), "\n")
}

// Since says so when it no longer knows, and is right about what it does know.
func TestSinceForgets(t *testing.T) {
	s := New()
	for i := range uint64(3 * keepTouched / 2) {
		c := Command{At: epoch, Items: []Item{{Set(fmt.Sprintf("%06d", i), Volume{})}, {Set("x", Volume{})}}}
		apply(t, s, i+1, 1, encode(t, c))
	}
	v := s.View()
	complete := 0
	for since := uint64(0); since <= v.Index; since += 97 {
		keys, ok := v.Since(since, "volumes")
		if !ok {
			continue
		}
		complete++
		want := int(v.Index-since) + 1 // and x
		if since == v.Index {
			want = 0
		}
		if len(keys) != want {
			t.Fatalf("since %d: %d keys, want %d", since, len(keys), want)
		}
	}
	if _, ok := v.Since(0, "volumes"); ok || complete == 0 {
		t.Errorf("since 0 is complete: %v; %d later ones are", ok, complete)
	}
	restored, err := Restore(slices.Values(snapshot(s)))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := restored.View().Since(v.Index-1, "volumes"); ok {
		t.Error("a restored state knows what changed before")
	}
	if _, ok := restored.View().Since(v.Index, "volumes"); !ok {
		t.Error("a restored state does not know that nothing changed after")
	}
}

func TestOldRequestsAreForgotten(t *testing.T) {
	s := New()
	cmd := func(n int) []byte { return encode(t, Command{At: epoch, Request: fmt.Sprint(n)}) }
	index := uint64(0)
	next := func(n int) Result { index++; return apply(t, s, index, 1, cmd(n)) }
	for n := range keepRequests + 1 {
		next(n)
	}
	if res := next(1); !res.Again || res.Index != 2 {
		t.Errorf("the oldest one kept: %+v", res)
	}
	if res := next(0); res.Again {
		t.Errorf("one too old: %+v", res)
	}
	if len(s.requests) != keepRequests || len(s.order) != keepRequests {
		t.Errorf("%d and %d requests are kept", len(s.requests), len(s.order))
	}
}

func TestLogTimeOnlyMovesForward(t *testing.T) {
	s := New()
	for i, at := range []int{10, 5, 20, 0} {
		apply(t, s, uint64(i+1), 1, encode(t, Command{At: epoch.Add(time.Duration(at) * time.Second), Items: []Item{{Set("k", Volume{})}}}))
	}
	e, _ := s.View().Volumes.Get("k")
	if want := epoch.Add(20 * time.Second); !s.View().At.Equal(want) || !e.At.Equal(want) {
		t.Errorf("log time %s, of the object %s", s.View().At, e.At)
	}
}

func TestPrefixes(t *testing.T) {
	s := New()
	var item Item
	for _, k := range []string{"a/b.1", "a/b.2", "a/bc.1", "b"} {
		item = append(item, Put(k, 0, Volume{Name: k}))
	}
	apply(t, s, 1, 1, encode(t, Command{At: epoch, Items: []Item{item}}))
	for prefix, want := range map[string]int{"": 4, "a/b.": 2, "a/b": 3, "c": 0, "a/b.1": 1} {
		n := 0
		for k, e := range s.View().Volumes.Below(prefix) {
			if n++; !strings.HasPrefix(k, prefix) || e.Value.Name != k {
				t.Errorf("below %q: %q", prefix, k)
			}
		}
		if n != want {
			t.Errorf("below %q: %d, want %d", prefix, n, want)
		}
	}
	for range s.View().Volumes.All() {
		break // stopping early is fine
	}
}

// What this build can't read stops it, in words, and leaves the facts as they were.
func TestUnknownEntriesHalt(t *testing.T) {
	for name, entry := range map[string]string{
		"newer format":      `{"format":2,"at":"2030-01-01T00:00:00Z","items":[]}`,
		"no format":         `{"at":"2030-01-01T00:00:00Z","items":[]}`,
		"unknown field":     `{"format":1,"at":"2030-01-01T00:00:00Z","items":[],"urgent":true}`,
		"unknown table":     `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"pods","key":"a","version":0,"object":{}}]]}`,
		"unknown removal":   `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"pods","key":"a","version":0}]]}`,
		"field of object":   `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":0,"object":{"shade":"red"}}]]}`,
		"type of field":     `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":0,"object":{"kind":7}}]]}`,
		"good, then bad":    `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"b","version":0,"object":{}}],[{"table":"pods","key":"a","version":0}]]}`,
		"no JSON":           `hello`,
		"empty":             ``,
		"closing bracket":   `{"format":1,"at":"2030-01-01T00:00:00Z","items":[]}]`,
		"second value":      `{"format":1,"at":"2030-01-01T00:00:00Z","items":[]}{}`,
		"object then text":  `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":0,"object":[]}]]}`,
		"version below 0":   `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":-1,"object":{}}]]}`,
		"version with dots": `{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":1.5,"object":{}}]]}`,
	} {
		s := New()
		apply(t, s, 1, 1, encode(t, Command{At: epoch, Items: []Item{{Set("k", Volume{})}}}))
		before := s.View()
		_, err := s.Apply(2, 1, []byte(entry))
		if !errors.Is(err, ErrHalt) || !strings.Contains(err.Error(), "entry 2") || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("%s: %v", name, err)
		}
		if v := s.View(); v.Hash() != before.Hash() || v.Index != before.Index || viewText(v) != viewText(before) {
			t.Errorf("%s: the facts changed", name)
		}
	}
}

func TestDamagedSnapshots(t *testing.T) {
	s := New()
	for i := range 5 {
		apply(t, s, uint64(i+1), 1, encode(t, Command{At: epoch, Request: fmt.Sprint(i), Items: []Item{{Set(fmt.Sprint(i), Volume{Name: "v"})}}}))
	}
	good := text(snapshot(s))
	lines := func(change func([]string) []string) func(func([]byte) bool) {
		return func(yield func([]byte) bool) {
			for _, l := range change(slices.Clone(good)) {
				if !yield([]byte(l)) {
					return
				}
			}
		}
	}
	if _, err := Restore(lines(func(l []string) []string { return append(l, "", "  ") })); err != nil {
		t.Errorf("empty lines at the end: %v", err)
	}
	for name, bad := range map[string]struct {
		change func([]string) []string
		want   string
	}{
		"empty":         {func([]string) []string { return nil }, "empty"},
		"no header":     {func(l []string) []string { return l[1:] }, "header"},
		"line missing":  {func(l []string) []string { return l[:len(l)-1] }, "damaged"},
		"value changed": {func(l []string) []string { l[2] = strings.Replace(l[2], `"name":"v"`, `"name":"w"`, 1); return l }, "damaged"},
		"key changed":   {func(l []string) []string { l[2] = strings.Replace(l[2], `"key":"1"`, `"key":"9"`, 1); return l }, "damaged"},
		"cut":           {func(l []string) []string { l[5] = l[5][:10]; return l }, "line 6"},
		"newer":         {func(l []string) []string { l[0] = strings.Replace(l[0], `"format":1`, `"format":2`, 1); return l }, "format 2"},
		"unknown table": {func(l []string) []string {
			return append(l, `{"table":"pods","key":"a","version":1,"at":"2030-01-01T00:00:00Z","object":{}}`)
		}, "pods"},
	} {
		if _, err := Restore(lines(bad.change)); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEncodeRefusesWhatIsTooLarge(t *testing.T) {
	if _, err := Encode(Command{Items: []Item{{Set("k", Volume{Name: strings.Repeat("x", MaxEntry)})}}}); err == nil || !strings.Contains(err.Error(), "262144") {
		t.Errorf("%v", err)
	}
}

// Whatever bytes stand in the log: no panic, an error wraps ErrHalt, and a state that took them survives its own snapshot.
func FuzzApply(f *testing.F) {
	f.Add([]byte(`{"format":1,"request":"r","at":"2030-01-01T00:00:00Z","items":[[{"table":"events","key":"a","version":0,"object":{"kind":"k","time":"2030-01-01T00:00:00+02:00"}}]]}`))
	f.Add([]byte(`{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"nodes","key":"a","version":0,"object":{"cpu":"-0.5","memory":"-1KiB"},"force":true}]]}`))
	f.Add([]byte(`{"format":1,"at":"9999-12-31T23:59:59-23:59","items":[[{"table":"sources","key":"\ud800","version":0,"object":null}]]}`))
	f.Add([]byte(`{"format":1,"at":"2030-01-01T00:00:00Z","items":[[{"table":"releases","key":"a","version":0,"object":{"stack":{},"services":null}}],null,[]]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := New()
		apply(t, s, 1, 1, encode(t, Command{At: epoch, Items: []Item{{Set("a", Event{Kind: "k"})}}}))
		if _, err := s.Apply(2, 1, data); err != nil {
			if !errors.Is(err, ErrHalt) {
				t.Fatalf("the error is no halt: %v", err)
			}
			return
		}
		lines := snapshot(s)
		again, err := Restore(slices.Values(lines))
		if err != nil {
			t.Fatalf("its own snapshot: %v", err)
		}
		if d := cmp.Diff(text(lines), text(snapshot(again))); d != "" {
			t.Fatalf("restored and frozen again:\n%s", d)
		}
	})
}

// Whatever a snapshot file holds: no panic, and what passes has the hash that it claims.
func FuzzRestore(f *testing.F) {
	s := New()
	apply(f, s, 1, 1, encode(f, Command{At: epoch, Request: "r", Items: []Item{{Set("a", Event{Kind: "k"}), Set("b", Volume{Name: "v"})}}}))
	f.Add([]byte(strings.Join(text(snapshot(s)), "\n")))
	f.Add([]byte(`{"format":1,"index":0,"term":0,"at":"2030-01-01T00:00:00Z","hash":"` + strings.Repeat("0", 64) + `"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Restore(func(yield func([]byte) bool) {
			for line := range strings.SplitSeq(string(data), "\n") {
				if !yield([]byte(line)) {
					return
				}
			}
		})
		if err != nil {
			return
		}
		if _, err := Restore(slices.Values(snapshot(s))); err != nil {
			t.Fatalf("its own snapshot: %v", err)
		}
	})
}
