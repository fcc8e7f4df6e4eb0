package compose

import (
	"context"
	"encoding/csv"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// corpusDir is beside the checkout: it holds other people's files and is no part of the repository.
const corpusDir = "../../../shared/corpus"

const outcomesFile = "../../fixtures/corpus.outcomes"

// corpusFile is one real file of the corpus, and whether compose-go reads it in the way of an agent.
type corpusFile struct {
	name  string // repository/path
	loads bool
}

func corpusFiles(t *testing.T) []corpusFile {
	t.Helper()
	f, err := os.Open(filepath.Join(corpusDir, "index.csv"))
	if err != nil {
		t.Skipf("the corpus of real Compose files is not here: %v", err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var out []corpusFile
	for _, r := range rows[1:] {
		if r[5] == "real" {
			out = append(out, corpusFile{strings.ReplaceAll(r[0], "/", "__") + "/" + r[2], r[7] == "ok"})
		}
	}
	return out
}

// overlays are files that only change another file of their repository, with the files that come before them.
var overlays = map[string][]string{
	"microservices-demo__microservices-demo/deploy/docker-compose/docker-compose.logging.yml": {"deploy/docker-compose/docker-compose.yml"},
	"BretFisher__dogvscat/stack-elk.override.yml":                                             {"stack-elk.yml"},
	"open-telemetry__opentelemetry-demo/compose.agent.yaml":                                   {"compose.yaml", "compose.observability.yaml"},
	"open-telemetry__opentelemetry-demo/compose.full.yaml":                                    {"compose.yaml"},
	"open-telemetry__opentelemetry-demo/compose.observability.yaml":                           {"compose.yaml"},
	"open-telemetry__opentelemetry-demo/compose.profiling.yaml":                               {"compose.yaml"},
	"open-telemetry__opentelemetry-demo/compose.tests.yaml":                                   {"compose.yaml"},
}

// corpusRepo copies a repository of the corpus and adds what the corpus does not carry: it has Compose files and env files only, so
// the files that these name get a stand-in each.
func corpusRepo(t *testing.T, repo string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(corpusDir, repo))); err != nil {
		t.Fatal(err)
	}
	for _, line := range testLines(t, "testdata/corpus.files") {
		name, ok := strings.CutPrefix(line, repo+"/")
		if !ok {
			continue
		}
		name, from, _ := strings.Cut(name, " = ")
		data := []byte("stand-in\n")
		if strings.Contains(path.Base(name), "env") || strings.HasSuffix(name, "config.monitoring") {
			data = []byte("STAND_IN=1\n")
		}
		if from != "" {
			var err error
			if data, err = os.ReadFile(filepath.Join(dir, from)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Join(dir, path.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func testLines(t *testing.T, file string) []string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range strings.Split(string(data), "\n") {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "#") {
			out = append(out, l)
		}
	}
	return out
}

func corpusVars(t *testing.T) map[string]string {
	t.Helper()
	vars := map[string]string{}
	for _, l := range testLines(t, "testdata/corpus.vars") {
		k, v, _ := strings.Cut(l, "=")
		vars[k] = v
	}
	return vars
}

// TestCorpusOutcomes gives each real file one outcome, each in its repository, with the variables and files that its author has and the
// corpus has not. The golden file holds an error's line and reason, so that a wrong reason shows in review.
func TestCorpusOutcomes(t *testing.T) {
	vars := corpusVars(t)
	repos := map[string]string{}
	parts := map[string]bool{}
	var out strings.Builder
	for _, file := range corpusFiles(t) {
		f := file.name
		repo, name, _ := strings.Cut(f, "/")
		if repos[repo] == "" {
			repos[repo] = corpusRepo(t, repo)
			for _, p := range load(t, Options{Root: repos[repo], Source: path.Base(repo), Vars: vars, Profiles: []string{"*"}}).Problems {
				if p.Rule == "part" {
					parts[repo+"/"+p.File] = true
				}
			}
		}
		b := load(t,
			Options{Root: repos[repo], Source: path.Base(repo), Files: append(overlays[f], name), Vars: vars, Profiles: []string{"*"}})
		got := outcome(b, parts[f] || overlays[f] != nil)
		if file.loads && strings.HasPrefix(got, "broken") || overlays[f] != nil && manifest.HasErrors(b.Problems) {
			t.Errorf("%s: compose-go loads it, but here it is %s:\n%s", f, got, problemText(b.Problems))
		}
		fmt.Fprintf(&out, "%s\t%s\n", f, got)
	}
	golden(t, outcomesFile, out.String())
}

func outcome(b *manifest.Bundle, part bool) string {
	if part {
		return "part"
	}
	rules := map[string]bool{}
	first := ""
	notices := false
	for _, p := range b.Problems {
		switch p.Severity {
		case manifest.Error:
			rules[p.Rule] = true
			if first == "" && p.Rule != RuleBuildOnly {
				first = fmt.Sprintf("broken (%d: %s)", p.Line, p.Rule)
			}
		case manifest.Notice:
			notices = true
		}
	}
	switch {
	case first != "":
		return first
	case rules[RuleBuildOnly]:
		return "build-only"
	case notices:
		return "notices"
	}
	return "planned"
}

func load(t testing.TB, o Options) *manifest.Bundle {
	t.Helper()
	b, err := Load(context.Background(), o)
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return b
}

// golden compares a text with a file, or writes the file when the test runs with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run the test with -update and look at the change\n%s", file, diff(string(want), got))
	}
}

// diff shows the lines that are in one text only.
func diff(want, got string) string {
	count := map[string]int{}
	for _, l := range strings.Split(want, "\n") {
		count[l]++
	}
	var out strings.Builder
	for _, l := range strings.Split(got, "\n") {
		if count[l]--; count[l] < 0 {
			fmt.Fprintf(&out, "+ %s\n", l)
		}
	}
	for _, l := range strings.Split(want, "\n") {
		if count[l] > 0 {
			count[l]--
			fmt.Fprintf(&out, "- %s\n", l)
		}
	}
	return out.String()
}
