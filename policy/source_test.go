package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func exampleSource(t testing.TB) Source {
	t.Helper()
	src, err := LoadSource(os.DirFS("testdata/source"))
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func TestLoadSource(t *testing.T) {
	src := exampleSource(t)
	var names []string
	for i, m := range src.Modules {
		names = append(names, m.Name)
		src.Modules[i].Source = ""
	}
	want := Source{
		Scope:      Scope{Level: Enforce, Sets: map[string]Level{Restricted: Advise}},
		Stacks:     map[string]Scope{"monitoring": {Level: Advise, Sets: map[string]Level{Restricted: Off}}},
		Registries: []string{"docker.io/library", "ghcr.io/acme"},
		Exemptions: []Exemption{
			{Rule: "baseline/engine-sockets", Stack: "proxy", Service: "traefik", File: "exemptions.yaml", Line: 2,
				Reason: "Traefik finds its routes through the socket until our ingress reads labels.", Until: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)},
			{Rule: "baseline/host-namespaces", Stack: "proxy", File: "exemptions.yaml", Line: 7,
				Reason: "It was the quickest way to keep the addresses of clients.", Until: time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)},
		},
		Modules: src.Modules,
	}
	if d := cmp.Diff(want, src); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if d := cmp.Diff([]string{"rules/memory.rego", "rules/sizes.rego", "rules/team_label.rego", "rules/weekend.rego"}, names); d != "" {
		t.Error(d)
	}
}

func TestLoadSourceOfNothing(t *testing.T) {
	src, err := LoadSource(fstest.MapFS{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Source{}, src); d != "" {
		t.Error(d)
	}
}

// fieldList is what the compiler offers instead of a field that does not exist: all fields of the manifest's type.
var fieldList = regexp.MustCompile(`want \(one of\): \[.*\]`)

// Each folder of testdata/bad-sources is a policy source with something wrong; want.txt is what a person is told.
func TestBadSources(t *testing.T) {
	dirs, err := filepath.Glob("testdata/bad-sources/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no folders: %v", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			src, err := LoadSource(os.DirFS(dir))
			if err == nil {
				_, err = New(t.Context(), Options{Source: src})
			}
			if err == nil {
				t.Fatal("the source loads")
			}
			problems := Problems("x", err)
			for _, p := range problems {
				if p.Message == "" || strings.ContainsAny(p.Message, "\n\t") || p.Line > 0 && !strings.Contains(err.Error(), fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Message)) {
					t.Errorf("%+v is not of the error", p)
				}
			}
			if len(problems) == 0 {
				t.Error("the error is no problem")
			}
			file := filepath.Join(dir, "want.txt")
			got := fieldList.ReplaceAllString(err.Error(), "want (one of): […]") + "\n"
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("(-want +got; -update writes it)\n%s", d)
			}
		})
	}
}

func TestLoadModulesSkipsAndLimits(t *testing.T) {
	mods, err := LoadModules(fstest.MapFS{
		"a.rego":          {Data: []byte("package custom.a")},
		"a_test.rego":     {Data: []byte("package custom.a_test")},
		".git/x.rego":     {Data: []byte("x")},
		"testdata/x.rego": {Data: []byte("x")},
		"sub/b.rego":      {Data: []byte("package custom.b")},
		"README.md":       {Data: []byte("x")},
	})
	if err != nil || len(mods) != 2 || mods[0].Name != "a.rego" || mods[1].Name != "sub/b.rego" {
		t.Errorf("got %v, %v", mods, err)
	}
	many := fstest.MapFS{}
	for i := range MaxModules + 1 {
		many[fmt.Sprintf("r%03d.rego", i)] = &fstest.MapFile{Data: []byte("package custom.x")}
	}
	heavy := fstest.MapFS{}
	for i := range MaxSourceSize/MaxModuleSize + 1 {
		heavy[fmt.Sprintf("r%03d.rego", i)] = &fstest.MapFile{Data: make([]byte, MaxModuleSize)}
	}
	for name, c := range map[string]struct {
		fsys fs.FS
		want string
	}{
		"a large file":    {fstest.MapFS{"big.rego": {Data: make([]byte, MaxModuleSize+1)}}, "big.rego: larger than 262144 bytes"},
		"many files":      {many, "r200.rego: the policy source is too large"},
		"many bytes":      {heavy, "r016.rego: the policy source is too large"},
		"a link":          {fstest.MapFS{"l.rego": {Mode: fs.ModeSymlink, Data: []byte("/etc/passwd")}}, "l.rego: not a plain file"},
		"a settings link": {fstest.MapFS{"policy.yaml": {Mode: fs.ModeSymlink, Data: []byte("/etc/passwd")}}, "policy.yaml: not a plain file"},
		"large settings":  {fstest.MapFS{"policy.yaml": {Data: []byte(strings.Repeat("#", MaxYAMLSize+1))}}, "policy.yaml: larger than"},
	} {
		if _, err := LoadSource(c.fsys); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := LoadModules(os.DirFS("testdata/none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a source that is not there: %v", err)
	}
}

// Whatever an exemptions file holds, it is read into exemptions that are whole, or refused by an error that names the file.
func FuzzParseExemptions(f *testing.F) {
	for _, file := range []string{"testdata/source/exemptions.yaml", "testdata/bad-sources/exemptions/exemptions.yaml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("exemptions: &a [*a]"))
	f.Add([]byte("a: &a [x,x]\nb: &b [*a,*a]\nexemptions: [*b,*b]"))
	f.Add([]byte("<<: {exemptions: []}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := ParseExemptions("exemptions.yaml", data)
		if err != nil {
			if len(list) > 0 || !strings.Contains(err.Error(), "exemptions.yaml") {
				t.Errorf("%d exemptions with the error %v", len(list), err)
			}
			return
		}
		for _, x := range list {
			if x.Rule == "" || x.Stack == "" || strings.TrimSpace(x.Reason) == "" || x.Until.IsZero() || x.Line == 0 {
				t.Errorf("half an exemption: %+v", x)
			}
		}
	})
}

// Whatever a Rego file holds, loading it ends without a panic, and an error names the file.
func FuzzModule(f *testing.F) {
	files, err := filepath.Glob("testdata/*/*/*.rego")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Fuzz(func(t *testing.T, src string) {
		_, err := New(t.Context(), Options{Source: Source{Modules: []Module{{Name: "own.rego", Source: src}}}})
		if err != nil && !strings.Contains(err.Error(), "own.rego") {
			t.Errorf("the error does not name the file: %v", err)
		}
	})
}
