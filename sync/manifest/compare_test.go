package manifest_test

import (
	"bytes"
	"encoding"
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// service draws a resolved service with fields of every sort that Compare treats in its own way.
func service(t *rapid.T) *manifest.Service {
	small := rapid.IntRange(0, 3)
	word := rapid.SampledFrom([]string{"", "a", "b"})
	s := &manifest.Service{
		Name: "web", Replicas: small.Draw(t, "replicas"), Hostname: word.Draw(t, "hostname"),
		Labels: rapid.MapOfN(rapid.SampledFrom([]string{"x", "y"}), word, 0, 2).Draw(t, "labels"),
	}
	s.Update.Parallelism = small.Draw(t, "parallelism")
	s.Update.StartFirst = rapid.Bool().Draw(t, "startFirst")
	s.Restart.MaxAttempts = small.Draw(t, "maxAttempts")
	for _, name := range []string{"web", "side"}[:rapid.IntRange(1, 2).Draw(t, "containers")] {
		c := manifest.Container{Name: name, Image: rapid.SampledFrom([]string{"i:1", "i:2"}).Draw(t, "image")}
		c.Env = rapid.MapOfN(rapid.SampledFrom([]string{"A", "B", "PASSWORD"}), word, 0, 3).Draw(t, "env")
		c.Resources.Memory = manifest.Bytes(small.Draw(t, "memory")) << 20
		c.Resources.ShmSize = manifest.Bytes(small.Draw(t, "shm"))
		if rapid.Bool().Draw(t, "check") {
			c.Health = &manifest.Health{Test: []string{"CMD", "true"}, Retries: small.Draw(t, "retries")}
		}
		for _, target := range []string{"/a", "/b"}[:rapid.IntRange(0, 2).Draw(t, "mounts")] {
			c.Mounts = append(c.Mounts, manifest.Mount{Kind: manifest.MountVolume, Source: word.Draw(t, "source"), Target: target})
		}
		s.Containers = append(s.Containers, c)
	}
	for _, port := range []uint16{80, 81}[:rapid.IntRange(0, 2).Draw(t, "ports")] {
		s.Ports = append(s.Ports, manifest.Port{Target: port, Published: uint16(small.Draw(t, "published"))})
	}
	manifest.Resolve(s)
	return s
}

// A service is the same as itself, also after it was written and read.
func TestCompareSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := service(t)
		var read manifest.Service
		if err := json.Unmarshal(manifest.Canonical(s), &read); err != nil {
			t.Fatal(err)
		}
		if effect, changes := manifest.Compare(s, &read); effect != manifest.Same || len(changes) > 0 {
			t.Fatalf("%s: %v", effect, changes)
		}
		if manifest.Hash(s) != manifest.Hash(&read) || !bytes.Equal(manifest.Canonical(s), manifest.Canonical(&read)) {
			t.Fatal("another hash after writing and reading")
		}
	})
}

// The effect is same if and only if the hashes are equal; in place if and only if what differs, differs where a running task can be changed; and it is
// the same both ways.
func TestCompareEffect(t *testing.T) {
	running := func(s *manifest.Service) *manifest.Service {
		cp := *s
		cp.Replicas, cp.Update, cp.Rollback, cp.Restart, cp.Labels, cp.Ports = 0, manifest.UpdatePolicy{}, manifest.UpdatePolicy{}, manifest.RestartPolicy{}, nil, nil
		cp.Containers = slices.Clone(s.Containers)
		for i := range cp.Containers {
			cp.Containers[i].Health, cp.Containers[i].Resources.Memory = nil, 0
		}
		return &cp
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := service(t), service(t)
		want := manifest.Replace
		switch {
		case manifest.Hash(a) == manifest.Hash(b):
			want = manifest.Same
		case manifest.Hash(running(a)) == manifest.Hash(running(b)):
			want = manifest.InPlace
		}
		effect, changes := manifest.Compare(a, b)
		back, reverse := manifest.Compare(b, a)
		if effect != want || back != want {
			t.Fatalf("%s and %s, want %s: %v", effect, back, want, changes)
		}
		if len(changes) != len(reverse) || (len(changes) == 0) != (want == manifest.Same) {
			t.Fatalf("%v\n%v", changes, reverse)
		}
		for i, c := range changes {
			if c.Old == c.New {
				t.Fatalf("%s differs from itself", c.Path)
			}
			if r := reverse[i]; r.Path != c.Path || r.Old != c.New || r.New != c.Old || r.Effect != c.Effect {
				t.Fatalf("there %+v, back %+v", c, r)
			}
			if m := c.Mask(); manifest.Sensitive(c.Path) && (strings.Contains(m.Old, `"a"`) || strings.Contains(m.New, `"b"`)) {
				t.Fatalf("%s is told in clear: %+v", c.Path, m)
			}
		}
	})
}

// Defaults are written once: what is resolved stays as it is.
func TestResolveTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := service(t)
		before := manifest.Hash(s)
		manifest.Resolve(s)
		if manifest.Hash(s) != before {
			t.Fatal("resolving again changes it")
		}
	})
}

// What is written is read back as it was.
func TestValuesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := manifest.Duration(rapid.Int64().Draw(t, "duration"))
		var d2 manifest.Duration
		if text, _ := d.MarshalText(); d2.UnmarshalText(text) != nil || d2 != d {
			t.Fatalf("%s is read as %s", d, d2)
		}
		b := manifest.Bytes(rapid.Int64().Draw(t, "bytes"))
		var b2 manifest.Bytes
		if text, _ := b.MarshalText(); b2.UnmarshalText(text) != nil || b2 != b {
			t.Fatalf("%s is read as %s", b, b2)
		}
		c := manifest.CPU(rapid.Int64Range(-1e18, 1e18).Draw(t, "cpu"))
		var c2 manifest.CPU
		if text, _ := c.MarshalText(); c2.UnmarshalText(text) != nil || c2 != c {
			t.Fatalf("%s is read as %s", c, c2)
		}
	})
}

func TestValuesRefused(t *testing.T) {
	var d manifest.Duration
	var b manifest.Bytes
	for _, text := range []string{"", "5", "1x", "s"} {
		if d.UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is read as the duration %s", text, d)
		}
	}
	for _, text := range []string{"", "1.5GiB", "MiB", "9223372036854775807GiB", "1 MiB"} {
		if b.UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is read as %s bytes", text, b)
		}
	}
	for _, text := range []string{"x", "1.0000000001", "1.-5", "99999999999", "1.+5"} {
		if c, err := manifest.ParseCPU(text); err == nil {
			t.Errorf("%q is read as %s cores", text, c)
		}
	}
	if got := manifest.Bytes(math.MaxInt64).String(); got != "9223372036854775807" {
		t.Error(got)
	}
	if got := manifest.Duration(90 * time.Second).String(); got != "1m30s" {
		t.Error(got)
	}
}

// FuzzValues: whatever text reads as a value is written as one that reads as the same.
func FuzzValues(f *testing.F) {
	for _, s := range []string{"1m30s", "64MiB", "-8589934592GiB", "0.000000001", "-1000000000.5", ".", "-.5", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		again := func(v, w interface {
			encoding.TextUnmarshaler
			encoding.TextMarshaler
		}) {
			if v.UnmarshalText([]byte(text)) != nil {
				return
			}
			written, err := v.MarshalText()
			if err != nil {
				t.Fatal(err)
			}
			if err := w.UnmarshalText(written); err != nil {
				t.Fatalf("%q is written as %q, which does not read: %v", text, written, err)
			}
			if !reflect.DeepEqual(v, w) {
				t.Errorf("%q reads as %v, and what that writes as %v", text, v, w)
			}
		}
		again(new(manifest.Duration), new(manifest.Duration))
		again(new(manifest.Bytes), new(manifest.Bytes))
		again(new(manifest.CPU), new(manifest.CPU))
	})
}
