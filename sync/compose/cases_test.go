package compose

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// caseTree writes the files of a case. Its comment holds one option a line: source, path, files, cluster, profiles, var, and
// `symlink NAME TARGET`. Beside the tree lies a file that nothing in it may reach.
func caseTree(t *testing.T, a *txtar.Archive) Options {
	t.Helper()
	top := t.TempDir()
	root := filepath.Join(top, "repo")
	put(t, top, "outside.txt", "CANARY=leaked\n")
	put(t, top, "outside.yaml", "services: {canary: {image: canary}}\n")
	put(t, top, "repo/.git/config", "[core]\n")
	o := Options{Root: root, Source: "source", Vars: map[string]string{}}
	for _, f := range a.Files {
		if !strings.HasPrefix(f.Name, "want.") {
			put(t, root, f.Name, string(f.Data))
		}
	}
	for _, l := range strings.Split(string(a.Comment), "\n") {
		key, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		switch key {
		case "", "#":
		case "source":
			o.Source = value
		case "path":
			o.Path = value
		case "files":
			o.Files = strings.Fields(value)
		case "cluster":
			o.Cluster = value
		case "profiles":
			o.Profiles = strings.Fields(value)
		case "var":
			k, v, _ := strings.Cut(value, "=")
			o.Vars[k] = v
		case "symlink":
			name, target, _ := strings.Cut(value, " ")
			file := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, file); err != nil {
				t.Fatal(err)
			}
		case "limit":
			o.Limits = Limits{FileSize: 2000, ContentFiles: 3, Services: 4, Units: 5, ContentSize: 1000}
		default:
			t.Fatalf("unknown option %q", l)
		}
	}
	return o
}

// eachCase runs a test for each archive of a directory. The function gives the new text of the section `want.…`.
func eachCase(t *testing.T, dir, section string, got func(t *testing.T, b *manifest.Bundle) string) {
	files, err := filepath.Glob(filepath.Join("testdata", dir, "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases in testdata/%s: %v", dir, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			o := caseTree(t, a)
			b := load(t, o)
			text := got(t, b)
			if strings.Contains(text, "leaked") || strings.Contains(text, "canary") {
				t.Errorf("something outside of the tree was read:\n%s", text)
			}
			if strings.Contains(text, filepath.Dir(o.Root)) {
				t.Errorf("the text names the checkout's place:\n%s", text)
			}
			if again := load(t, o); !bytes.Equal(bundleBytes(again), bundleBytes(b)) {
				t.Errorf("a second load differs:\n%s", diff(string(bundleBytes(b)), string(bundleBytes(again))))
			}
			var want string
			at := -1
			for i, f := range a.Files {
				if f.Name == section {
					want, at = string(f.Data), i
				}
			}
			if want == text {
				return
			}
			if !*update {
				t.Errorf("differs; run with -update and look at the change\n%s", diff(want, text))
				return
			}
			if at < 0 {
				a.Files = append(a.Files, txtar.File{Name: section})
				at = len(a.Files) - 1
			}
			a.Files[at].Data = []byte(text)
			if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func problemText(ps []manifest.Problem) string {
	var b strings.Builder
	for _, p := range ps {
		b.WriteString(p.String())
		if p.Service != "" {
			b.WriteString(" (" + p.Stack + "/" + p.Service + ")")
		} else if p.Stack != "" {
			b.WriteString(" (" + p.Stack + ")")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// TestBadInput: each case has at least one error, and its problems are as written.
func TestBadInput(t *testing.T) {
	eachCase(t, "bad", "want.problems", func(t *testing.T, b *manifest.Bundle) string {
		if !manifest.HasErrors(b.Problems) {
			t.Error("no error was found")
		}
		text := problemText(b.Problems)
		for i := range b.Stacks {
			text += "renders: " + b.Stacks[i].Name + "\n"
		}
		return text
	})
}

// TestGoodInput: each case has no error, and renders to what is written.
func TestGoodInput(t *testing.T) {
	eachCase(t, "good", "want.json", func(t *testing.T, b *manifest.Bundle) string {
		if manifest.HasErrors(b.Problems) {
			t.Errorf("unexpected errors:\n%s", problemText(b.Problems))
		}
		var out bytes.Buffer
		for i := range b.Stacks {
			if err := json.Indent(&out, manifest.Canonical(&b.Stacks[i]), "", " "); err != nil {
				t.Fatal(err)
			}
			out.WriteString("\n")
			for name := range b.Stacks[i].SecretValues {
				out.WriteString("secret value: " + name + "\n")
			}
		}
		for _, p := range b.Problems {
			out.WriteString("# " + problemText([]manifest.Problem{p}))
		}
		return out.String()
	})
}
