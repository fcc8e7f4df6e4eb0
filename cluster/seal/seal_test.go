package seal

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/reconcile/state"
)

const canary = "canary-hunter2-never-seen"

func key(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// betrays says whether the text shows the secret in any of the usual spellings.
func betrays(text string, secret []byte) bool {
	for _, form := range []string{string(secret), hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret), fmt.Sprint(secret)} {
		if strings.Contains(text, strings.Trim(form, "=[]")) {
			return true
		}
	}
	return false
}

func TestOnlyTheNodesItIsSealedToOpenIt(t *testing.T) {
	a, b, c := key(t), key(t), key(t)
	s, err := Seal("shop/db-password", []byte(canary), map[string]string{"a": a.Public(), "b": b.Public()})
	if err != nil {
		t.Fatal(err)
	}
	for node, k := range map[string]*Key{"a": a, "b": b} {
		if got, err := k.Open(s, node); err != nil || string(got) != canary {
			t.Errorf("node %s: %q, %v", node, got, err)
		}
	}
	if _, err := c.Open(s, "c"); !errors.Is(err, ErrNotForNode) {
		t.Errorf("node c: %v", err)
	}
	if _, err := c.Open(s, "a"); !errors.Is(err, ErrUnreadable) {
		t.Errorf("node c as a: %v", err)
	}
	if _, err := a.Open(s, "b"); !errors.Is(err, ErrUnreadable) {
		t.Errorf("node a as b: %v", err)
	}

	moved, err := b.Rewrap(s, "b", map[string]string{"b": b.Public(), "c": c.Public()})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Open(moved, "c"); err != nil || string(got) != canary {
		t.Errorf("node c after rewrap: %q, %v", got, err)
	}
	if _, err := a.Open(moved, "a"); !errors.Is(err, ErrNotForNode) {
		t.Errorf("node a after rewrap: %v", err)
	}
	if !bytes.Equal(moved.Sealed, s.Sealed) {
		t.Error("rewrapping changed the sealed value")
	}
	if _, err := c.Rewrap(s, "c", map[string]string{"c": c.Public()}); !errors.Is(err, ErrNotForNode) {
		t.Errorf("a node that can't open it rewraps it: %v", err)
	}
}

func TestASecretDoesNotPassForAnother(t *testing.T) {
	a := key(t)
	to := map[string]string{"a": a.Public()}
	one, err := Seal("one", []byte(canary), to)
	if err != nil {
		t.Fatal(err)
	}
	two, err := Seal("two", []byte("other"), to)
	if err != nil {
		t.Fatal(err)
	}
	renamed := one
	renamed.Name = "two"
	mixed := one
	mixed.Keys = two.Keys
	future := one
	future.Sealed = append([]byte{format + 1}, one.Sealed[1:]...)
	for what, s := range map[string]state.Secret{"renamed": renamed, "another's key": mixed} {
		if got, err := a.Open(s, "a"); !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
	if _, err := a.Open(future, "a"); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("of a newer format: %v", err)
	}
}

// Whatever bit is changed, the secret does not open, and no error shows the value.
func TestTampering(t *testing.T) {
	a := key(t)
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.SliceOfN(rapid.Byte(), 12, 200).Draw(t, "value")
		s, err := Seal("n", value, map[string]string{"a": a.Public()})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := a.Open(s, "a"); err != nil || !bytes.Equal(got, value) {
			t.Fatalf("untouched: %v", err)
		}
		if text, err := json.Marshal(s); err != nil || betrays(string(text), value) {
			t.Fatalf("the JSON shows the value: %s, %v", text, err)
		}
		part := s.Sealed
		if rapid.Bool().Draw(t, "key") {
			part = s.Keys["a"]
		}
		if rapid.Bool().Draw(t, "cut") {
			n := rapid.IntRange(0, len(part)-1).Draw(t, "length")
			if len(part) == len(s.Sealed) && &part[0] == &s.Sealed[0] {
				s.Sealed = part[:n]
			} else {
				s.Keys["a"] = part[:n]
			}
		} else {
			part[rapid.IntRange(0, len(part)-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		}
		got, err := a.Open(s, "a")
		if err == nil || got != nil {
			t.Fatalf("it opens: %x", got)
		}
		if betrays(err.Error(), value) {
			t.Fatalf("the error shows the value: %v", err)
		}
	})
}

func TestErrorsAndTextsHideValues(t *testing.T) {
	a := key(t)
	private := a.identity.String()
	h := NewHasher()
	_, noNodes := Seal("n", []byte(canary), nil)
	_, badKey := Seal("n", []byte(canary), map[string]string{"a": "age1nonsense"})
	_, noName := Seal("", []byte(canary), map[string]string{"a": a.Public()})
	_, large := Seal("n", bytes.Repeat([]byte(canary), MaxValue/len(canary)+1), map[string]string{"a": a.Public()})
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte(private+"Q"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, badFile := LoadKey(path)
	for _, err := range []error{noNodes, badKey, noName, large, badFile} {
		if err == nil {
			t.Error("no error")
			continue
		}
		if betrays(err.Error(), []byte(canary)) || strings.Contains(err.Error(), private[:20]) {
			t.Errorf("shows a secret: %v", err)
		}
	}
	for _, text := range []string{fmt.Sprint(a), fmt.Sprintf("%v %+v %#v %s", a, a, a, a), fmt.Sprintf("%v %+v %#v", struct{ K *Key }{a}, struct{ K *Key }{a}, []*Key{a})} {
		if strings.Contains(text, "SECRET") {
			t.Errorf("shows the key: %s", text)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v", h, h, h); betrays(text, h.key) {
		t.Errorf("shows the hash key: %s", text)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	made := make([]*Key, 8)
	var wg sync.WaitGroup
	for i := range made { // all get the one key that stays
		wg.Go(func() {
			k, err := LoadKey(path)
			if err != nil {
				t.Error(err)
				return
			}
			made[i] = k
		})
	}
	wg.Wait()
	again, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range made {
		if k == nil || k.Public() != again.Public() {
			t.Fatal("two keys for one node")
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if list, err := os.ReadDir(filepath.Dir(path)); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(path); !errors.Is(err, ErrKeyFile) {
		t.Errorf("an empty key file: %v", err)
	}
}

func TestRefs(t *testing.T) {
	a := key(t)
	h := NewHasher()
	s, err := h.Secret(map[string]string{"a": a.Public()})
	if err != nil {
		t.Fatal(err)
	}
	same, err := OpenHasher(s, a, "a")
	if err != nil {
		t.Fatal(err)
	}
	ref := h.Ref("name", []byte(canary))
	if same.Ref("name", []byte(canary)) != ref {
		t.Error("the same key gives another reference")
	}
	for what, other := range map[string]string{
		"value": h.Ref("name", []byte(canary+"x")), "name": h.Ref("nam", []byte("e"+canary)), "key": NewHasher().Ref("name", []byte(canary)),
	} {
		if other == ref {
			t.Errorf("another %s gives the same reference", what)
		}
	}
	if text, err := json.Marshal(s); err != nil || betrays(string(text), h.key) {
		t.Errorf("the JSON shows the key: %s, %v", text, err)
	}
	wrong, err := Seal("n", h.key, map[string]string{"a": a.Public()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenHasher(wrong, a, "a"); err == nil {
		t.Error("another secret passes for the hash key")
	}
}
