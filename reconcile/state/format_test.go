package state

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// A log of format 1: a line for each entry, with its term, the hash of the state after it, its result as JSON, and the entry itself, tab by tab. Once the
// format is released the file never changes: -write is for before that.
const format1 = "../../fixtures/state/format-1.log"

var write = flag.Bool("write", false, "write "+format1+" anew")

// Every build gives the state that the build which wrote the log had, after each entry.
func TestFormat1(t *testing.T) {
	if *write {
		writeFormat1(t)
	}
	f, err := os.Open(format1)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := New()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 2*MaxEntry)
	index := uint64(0)
	for lines.Scan() {
		index++
		var term uint64
		field := strings.SplitN(lines.Text(), "\t", 4)
		if len(field) != 4 {
			t.Fatalf("line %d has %d fields", index, len(field))
		}
		if _, err := fmt.Sscan(field[0], &term); err != nil {
			t.Fatal(err)
		}
		res := apply(t, s, index, term, []byte(field[3]))
		if got := string(manifest.Canonical(res)); got != field[2] {
			t.Errorf("entry %d: result %s, was %s", index, got, field[2])
		}
		if got := s.View().Hash(); got != field[1] {
			t.Fatalf("entry %d: hash %s, was %s", index, got, field[1])
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	for _, table := range tableNames {
		n := 0
		for range tables[table].records(s.View()) {
			n++
		}
		if n == 0 {
			t.Errorf("the log has no object of %s", table)
		}
	}
}

// writeFormat1 writes a log with every field of every object, and with each thing that can become of an item.
func writeFormat1(t *testing.T) {
	var log []Command
	for _, full := range []Change{
		filled[Cluster](), filled[Node](), filled[Source](), filled[Stack](), filled[Release](), filled[Spec](), filled[Service](), filled[Retired](),
		filled[Task](), filled[Report](), filled[Volume](), filled[Network](), filled[Image](), filled[Secret](), filled[Event](),
	} {
		empty := full
		empty.Key, empty.Object = full.Table+"/empty", []byte("{}")
		log = append(log, Command{Request: "make " + full.Table, Actor: "leader", Items: []Item{{full, empty}}})
	}
	volume := func(version uint64, name string) Change { return Put("v", version, Volume{Name: name}) }
	n := uint64(len(log))
	log = append(log,
		Command{Items: []Item{{volume(0, "made")}}},
		Command{Items: []Item{{volume(n+1, "right version")}, {volume(n+1, "wrong version by now")}}},
		Command{Items: []Item{{volume(n+2, "whole"), Put("w", 7, Volume{Name: "or not at all"})}}},
		Command{Request: "make events", Items: []Item{{Set("v", Volume{Name: "a repeated request"})}}},
		Command{Term: 1, Items: []Item{{Set("v", Volume{Name: "another term"})}}},
		Command{Term: 2, Items: []Item{{Set("v", Volume{Name: "forced"})}}},
		Command{At: epoch.Add(-time.Hour), Items: []Item{{Set("late", Volume{Name: "a stamp from the past"})}}},
		Command{Items: []Item{{Delete[Volume]("v", n+6)}, {Delete[Volume]("w", 3)}, {Delete[Volume]("none", 0)}}},
		Command{Items: []Item{{volume(0, "made again")}, {}}},
	)
	var out bytes.Buffer
	s := New()
	for i, c := range log {
		if c.At.IsZero() {
			c.At = epoch.Add(time.Duration(i) * time.Minute)
		}
		term := uint64(1)
		if i >= 3 {
			term = 2
		}
		data := encode(t, c)
		res := apply(t, s, uint64(i+1), term, data)
		fmt.Fprintf(&out, "%d\t%s\t%s\t%s\n", term, s.View().Hash(), manifest.Canonical(res), data)
	}
	if err := os.WriteFile(format1, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// filled makes a change with every field of the object set.
func filled[T Object]() Change {
	var obj T
	fill(reflect.ValueOf(&obj).Elem(), 0, obj.table())
	return Put(obj.table()+"/full", 0, obj)
}

func fill(v reflect.Value, depth int, path string) {
	if depth > 12 {
		return
	}
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(epoch.Add(time.Duration(len(path)) * time.Millisecond)))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				fill(v.Field(i), depth+1, path+"."+f.Name)
			}
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), depth+1, path)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(v.Index(i), depth+1, fmt.Sprint(path, i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for i := range 2 {
			key, val := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(key, depth+1, fmt.Sprint("key", i))
			fill(val, depth+1, fmt.Sprint(path, i))
			v.SetMapIndex(key, val)
		}
	case reflect.String:
		v.SetString(path)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(len(path)))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(len(path)))
	case reflect.Interface:
	default:
		panic(fmt.Sprintf("%s: a %s in an object", path, v.Kind()))
	}
}
