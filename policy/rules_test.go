package policy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

var update = flag.Bool("update", false, "write what the rules find into the bad fixtures")

var now = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func newEngine(t testing.TB, o Options) *Engine {
	t.Helper()
	e, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func review(t testing.TB, e *Engine, in Input) Verdict {
	t.Helper()
	if in.Gate == "" {
		in.Gate = RevisionGate
	}
	if in.Now.IsZero() {
		in.Now = now
	}
	v, err := e.Review(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// fixture is one file below testdata/rules: a stack called shop with one service called web, of which it writes only what matters.
type fixture struct {
	Container  map[string]any    `yaml:"container"` // fields of the service's container
	Service    map[string]any    `yaml:"service"`   // fields of the service
	Volumes    []map[string]any  `yaml:"volumes"`
	DataRoot   string            `yaml:"dataRoot"`
	Images     map[string]string `yaml:"images"`
	Troubles   map[string]string `yaml:"troubles"` // of images
	Registries []string          `yaml:"registries"`
	Want       []string          `yaml:"want"` // bad fixtures: each finding as `path: message`
}

func readFixture(t *testing.T, file string) fixture {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var f fixture
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	dec.KnownFields(true)
	if err := dec.Decode(&f); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return f
}

func (f fixture) stack(t *testing.T) manifest.Stack {
	t.Helper()
	merge := func(base, more map[string]any) map[string]any {
		for k, v := range more {
			base[k] = v
		}
		return base
	}
	container := merge(map[string]any{"name": "web", "image": "docker.io/library/web:1"}, f.Container)
	service := merge(map[string]any{"name": "web", "containers": []any{container}}, f.Service)
	data, err := json.Marshal(map[string]any{"name": "shop", "services": []any{service}, "volumes": f.Volumes, "dataRoot": f.DataRoot})
	if err != nil {
		t.Fatal(err)
	}
	var s manifest.Stack
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

// Every rule finds what its bad fixtures hold, in the words written there, and nothing in its good ones; and every rule has both.
func TestRules(t *testing.T) {
	plain := newEngine(t, Options{})
	for _, r := range plain.Rules() {
		t.Run(r.ID, func(t *testing.T) {
			if r.Reason == "" || r.WayOut == "" {
				t.Errorf("%s has no reason or no way out", r.ID)
			}
			for _, kind := range []string{"good", "bad"} {
				files, err := filepath.Glob(filepath.Join("testdata/rules", r.ID, kind, "*.yaml"))
				if err != nil || len(files) == 0 {
					t.Errorf("%s has no %s fixture (%v)", r.ID, kind, err)
				}
				for _, file := range files {
					t.Run(kind+"/"+filepath.Base(file), func(t *testing.T) {
						e, f := plain, readFixture(t, file)
						if len(f.Registries) > 0 {
							e = newEngine(t, Options{Source: Source{Registries: f.Registries}})
						}
						checkFixture(t, e, f, r, kind, file)
					})
				}
			}
		})
	}
}

func checkFixture(t *testing.T, e *Engine, f fixture, r Rule, kind, file string) {
	v := review(t, e, Input{Stack: f.stack(t), ImageUsers: f.Images, ImageTroubles: f.Troubles, Sets: []string{r.Set}})
	var got []string
	for _, x := range v.Findings {
		if x.Rule != r.ID {
			continue
		}
		got = append(got, x.Path+": "+x.Message)
		if x.Severity != manifest.Error || x.Set != r.Set || x.WayOut == "" || v.Decision != Deny {
			t.Errorf("%s: an incomplete finding, or no denial: %+v, %s", file, x, v.Decision)
		}
	}
	if kind == "good" {
		if len(got) > 0 {
			t.Errorf("%s: found\n%s", file, strings.Join(got, "\n"))
		}
		return
	}
	if len(got) == 0 {
		t.Fatalf("%s: nothing was found", file)
	}
	if *update {
		writeWant(t, file, got)
		return
	}
	if d := cmp.Diff(f.Want, got); d != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", file, d)
	}
}

func writeWant(t *testing.T, file string, got []string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text, _, _ := strings.Cut(string(data), "want:\n")
	text += "want:\n"
	for _, g := range got {
		text += fmt.Sprintf("  - %q\n", g)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A folder of fixtures that no rule reads would look like a test and be none.
func TestFixturesBelongToRules(t *testing.T) {
	dirs, err := filepath.Glob("testdata/rules/*/*")
	if err != nil {
		t.Fatal(err)
	}
	rules := newEngine(t, Options{}).Rules()
	for _, d := range dirs {
		id := filepath.ToSlash(strings.TrimPrefix(d, "testdata/rules/"))
		if !slices.ContainsFunc(rules, func(r Rule) bool { return r.ID == id }) {
			t.Errorf("%s: there is no rule %s", d, id)
		}
	}
}

// A rule sees each port of a range, however the range is written down.
func TestRulesSeeEachPort(t *testing.T) {
	var ports manifest.Ports
	for p := range uint16(5000) {
		ports = append(ports, manifest.Port{Published: p + 1, Target: p + 1})
	}
	v, err := inputValue(Input{Gate: RevisionGate, Now: now, Stack: manifest.Stack{Name: "shop", Services: []manifest.Service{{Name: "web", Ports: ports}}}}, nil, configFacts{})
	if err != nil {
		t.Fatal(err)
	}
	if text := v.String(); strings.Contains(text, `"count"`) || strings.Count(text, `"published"`) != len(ports) || !strings.Contains(text, `"published": 4567`) {
		t.Errorf("%d ports, beginning with %.300s", strings.Count(text, `"published"`), text)
	}
}
