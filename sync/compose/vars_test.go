package compose

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/template"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

func lookupTest(name string) (string, bool) {
	v, ok := map[string]string{"SET": "value", "EMPTY": "", "A": "a", "_b1": "b"}[name]
	return v, ok
}

// Where both read a text, our substitution and Compose's give the same.
func TestSubstitutionIsThatOfCompose(t *testing.T) {
	defer silence()()
	rapid.Check(t, func(t *rapid.T) {
		compareSubstitution(t, strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"$",
			"$$", "${", "}", "SET", "EMPTY", "UNSET", "A", "_b1", "-", ":-", "+", ":+",
			"?", ":?", "1", " ", "/", "text", "${SET}", "${UNSET:-x}", "${EMPTY:-${A}}", "${SET:+y}", "$A"}), 0, 8).Draw(t, "text"), ""))
	})
}

func compareSubstitution(t interface {
	Errorf(string, ...any)
	Helper()
}, text string) {
	t.Helper()
	want, wantErr := template.Substitute(text, lookupTest)
	x := expander{vars: newVariables(map[string]string{"SET": "value",
		"EMPTY": "", "A": "a", "_b1": "b"}), pos: manifest.Pos{File: "f", Line: 1}, text: text}
	got, gotErr := x.run(text)
	if wantErr != nil || gotErr != nil {
		return // both sides have texts that only one of them refuses; ours are told with the line
	}
	if len(x.vars.missing) == 0 && got != want && !odd(text) {
		t.Errorf("%q: got %q, Compose gives %q", text, got, want)
	}
}

// odd texts are those where Compose's regular expression takes the last brace of a line for the closing one.
func odd(text string) bool {
	depth, open := 0, 0
	for _, r := range text {
		switch r {
		case '{':
			depth++
			open++
		case '}':
			depth--
		}
	}
	return depth != 0 || open > 1
}

func TestSubstitution(t *testing.T) {
	t.Parallel()
	values := map[string]string{"SET": "v", "EMPTY": ""}
	for _, c := range []struct{ text, want, missing, unset string }{
		{"plain", "plain", "", ""},
		{"$SET ${SET} $$SET $1 $/ $", "v v $SET $1 $/ $", "", ""},
		{"${EMPTY:-d} ${EMPTY-d} ${NO-d} ${NO:-d}", "d  d d", "", ""},
		{"${SET:+y} ${EMPTY:+y} ${EMPTY+y} ${NO+y}", "y  y ", "", ""},
		{"${NO} $NO2", " ", "", "NO NO2"},
		{"${NO:?why} ${EMPTY:?} ${EMPTY?}", "  ", "EMPTY NO", ""},
		{"${NO:-${DEEP:?x}} ${SET:-${UNUSED:?x}}", " v", "DEEP", ""},
		{"${NO:-${SET}-${NO2}}", "v-", "", "NO2"},
		{`{"a": "${SET}", "b": {}}`, `{"a": "v", "b": {}}`, "", ""},
	} {
		v := newVariables(values)
		got, err := v.expand(c.text, manifest.Pos{File: "f", Line: 3})
		if err != nil || got != c.want {
			t.Errorf("%q: %q, %v; want %q", c.text, got, err, c.want)
		}
		if m := strings.Join(sortedKeys(v.missing), " "); m != c.missing {
			t.Errorf("%q: missing %q, want %q", c.text, m, c.missing)
		}
		if u := strings.Join(sortedKeys(v.unset), " "); u != c.unset {
			t.Errorf("%q: unset %q, want %q", c.text, u, c.unset)
		}
	}
	for _, bad := range []string{"${", "${}", "${1}", "${SET", "${SET:}", "${SET!x}", "${SET x}"} {
		if _, err := newVariables(values).expand(bad, manifest.Pos{}); err == nil {
			t.Errorf("%q reads", bad)
		}
	}
}

// FuzzLoad: whatever the bytes of a file are, the load ends with a bundle, tells no path of this machine, and gives the same again.
func FuzzLoad(f *testing.F) {
	for _, dir := range []string{"bad", "good"} {
		files, _ := filepath.Glob(filepath.Join("testdata", dir, "*.txtar"))
		for _, name := range files {
			data, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			if _, text, ok := strings.Cut(string(data), "-- compose.yaml --\n"); ok {
				text, _, _ = strings.Cut(text, "\n-- ")
				f.Add(text)
			}
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		top := t.TempDir()
		put(t, top, "outside.txt", "CANARY=leaked\n")
		put(t, top, "repo/compose.yaml", text)
		put(t, top, "repo/file", "x\n")
		o := Options{Root: filepath.Join(top, "repo"), Source: "shop", Profiles: []string{"*"}}
		b := load(t, o)
		out := problemText(b.Problems)
		if strings.Contains(out, top) {
			t.Errorf("a problem names the checkout's place:\n%s", out)
		}
		if strings.Contains(string(bundleBytes(b)), "leaked") && !strings.Contains(text, "leaked") {
			t.Errorf("a file outside of the tree was read")
		}
		if len(b.Stacks) == 0 && !manifest.HasErrors(b.Problems) {
			t.Errorf("nothing renders and no error says why:\n%s", out)
		}
		if !slices.Equal(bundleBytes(b), bundleBytes(load(t, o))) {
			t.Error("a second load differs")
		}
		for i := range b.Stacks {
			if again := manifest.Validate(&b.Stacks[i]); manifest.HasErrors(again) {
				t.Errorf("a rendered stack is not valid: %v", again)
			}
		}
	})
}

// The order in which files and keys are met does not show in the result.
func TestLoadIsDeterministic(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c", "d", "e"}
		keys := []string{"image: x",
			"image: [bad]", "ports: [\"80:80\"]", "networks: [gone]", "volumes: [\"gone:/x\", \"./x:/y\"]", "gpus: all", "depends_on: [a]",
			"blkio_config: {weight: 10}", "restart: maybe", "environment: {A: ${A}, B: ${B:?}}"}
		write := func(order []string, lines map[string][]string) string {
			var b strings.Builder
			b.WriteString("services:\n")
			for _, n := range order {
				fmt.Fprintf(&b, "  %s:\n    labels: {a: b}\n", n)
				for _, l := range lines[n] {
					b.WriteString("    " + l + "\n")
				}
			}
			return b.String()
		}
		lines := map[string][]string{}
		for _, n := range names {
			lines[n] = rapid.SliceOfNDistinct(rapid.SampledFrom(keys),
				1, 4, func(s string) string { k, _, _ := strings.Cut(s, ":"); return k }).Draw(t, n)
		}
		dir, err := os.MkdirTemp("", "compose")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := os.WriteFile(filepath.Join(dir, "compose.yaml"), []byte(write(names, lines)), 0o644); err != nil {
			t.Fatal(err)
		}
		first, err := Load(t.Context(), Options{Root: dir, Source: "shop"})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			again, err := Load(t.Context(), Options{Root: dir, Source: "shop"})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(bundleBytes(first), bundleBytes(again)) {
				t.Fatalf("two loads differ:\n%s", diff(problemText(first.Problems), problemText(again.Problems)))
			}
		}
	})
}
