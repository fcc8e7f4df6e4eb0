package compose

import (
	"encoding/json"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/schema"
	"github.com/compose-spec/compose-go/v2/tree"
	"github.com/sirupsen/logrus"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Each attribute that the specification knows has an answer: it works, or an entry says what becomes of it or of what it is part of.
func TestTheSupportTableAnswersForEveryAttribute(t *testing.T) {
	t.Parallel()
	works := map[tree.Path]bool{}
	for _, p := range accepted() {
		works[p] = true
	}
	for _, p := range schema.AttributePaths() {
		if works[p] {
			continue
		}
		answered := false
		for parts := p.Parts(); len(parts) > 0; parts = parts[:len(parts)-1] {
			a := answer(tree.NewPath(parts...))
			answered = answered || a.note != answer("no.such.key").note
		}
		if !answered {
			t.Errorf("%s has no entry in the support table", p)
		}
	}
}

// An entry that no attribute has would promise something that can't be written.
func TestTheSupportTableHoldsNoStrangers(t *testing.T) {
	t.Parallel()
	known := map[string]bool{}
	for _, p := range schema.AttributePaths() {
		known[string(p)] = true
	}
	for _, s := range supportTable {
		if !known[s.path] && s.path != "include" {
			t.Errorf("%s is no attribute of the Compose specification", s.path)
		}
		if s.verdict != works && !strings.Contains(s.note, " ") {
			t.Errorf("%s has no sentence", s.path)
		}
		for _, k := range strings.Fields(s.keys) {
			if !known[s.path+"."+k] && s.path+"."+k != "include.[]" {
				t.Errorf("%s.%s is no attribute of the Compose specification", s.path, k)
			}
		}
	}
}

// A key that a newer compose-go knows and this table does not is refused, not dropped.
func TestAnUnknownAttributeIsRefused(t *testing.T) {
	t.Parallel()
	p := answer("services.web.teleport").finding("teleport")
	if p.Severity != manifest.Error || !strings.Contains(p.Message, "teleport is not supported here") {
		t.Errorf("got %v", p)
	}
}

func TestSupportTableText(t *testing.T) {
	t.Parallel()
	golden(t, "testdata/support.md", SupportTable())
}

func TestTheSettingsSchemaIsThatOfTheType(t *testing.T) {
	t.Parallel()
	golden(t, "gitops.schema.json", string(settingsSchema()))
	if !*update && SettingsSchema != string(settingsSchema()) {
		t.Error("the embedded schema is not the one of the type")
	}
	if !json.Valid([]byte(SettingsSchema)) {
		t.Error("the schema is not JSON")
	}
}

// The environment of this process reaches no stack, however it is spelt, and compose-go's words reach no log.
func TestNothingComesFromTheProcess(t *testing.T) {
	for _, k := range []string{"TAG", "WHO", "COMPOSE_PROJECT_NAME", "COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_ENV_FILES"} {
		t.Setenv(k, "poison")
	}
	t.Setenv("HOME", "/poison")
	t.Chdir(t.TempDir())
	if err := os.WriteFile(".env", []byte("TAG=poison\nWHO=poison\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	logrus.SetOutput(&log)
	defer logrus.SetOutput(os.Stderr)
	root := writeTree(t, map[string]string{
		"web.env": "FROM_FILE=${WHO}\n",
		"compose.yaml": "version: '3'\nservices:\n  web:\n    image: x:${TAG:-1}\n    env_file: web.env\n    environment: [WHO, \"B=${WHO}\"]\n    tty: \"yes\"\n" +
			"    volumes: [\"~/data:/data\"]\n",
	})
	b := load(t, Options{Root: root, Source: "shop"})
	if len(b.Stacks) != 1 {
		t.Fatalf("problems: %v", b.Problems)
	}
	all := string(bundleBytes(b)) + problemText(b.Problems)
	if strings.Contains(all, "poison") {
		t.Errorf("the environment leaked into the bundle:\n%s", all)
	}
	if log.String() != "" {
		t.Errorf("compose-go wrote to the log:\n%s", log.String())
	}
	if logrus.StandardLogger().Out == io.Discard {
		t.Error("the log stays silenced after the load")
	}
}

// Values of secrets are in SecretValues and nowhere else.
func TestSecretValuesStayWhereTheyBelong(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{
		"token":        "hunter2-file",
		"compose.yaml": "services: {web: {image: x, secrets: [a, b]}}\nsecrets: {a: {file: ./token}, b: {environment: B}}\n",
	})
	b := load(t, Options{Root: root, Source: "shop", Vars: map[string]string{"B": "hunter2-env"}})
	got := b.Stacks[0].SecretValues
	if string(got["shop/a"]) != "hunter2-file" || string(got["shop/b"]) != "hunter2-env" {
		t.Fatalf("values are %q", got)
	}
	if text := string(manifest.Canonical(b)) + string(manifest.Canonical(b.Blobs)) + problemText(b.Problems); strings.Contains(text, "hunter2") {
		t.Errorf("a secret is in the bundle: %s", text)
	}
}

// A problem of a stack leaves the others alone, and names the stack although its file does not read.
func TestABrokenStackIsStillFound(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{
		"a/compose.yaml": "name: shop\nservices: [\n",
		"b/compose.yaml": "services: {web: {image: x}}\n",
	})
	b := load(t, Options{Root: root})
	if len(b.Stacks) != 1 || b.Stacks[0].Name != "b" {
		t.Errorf("stacks: %v", b.Stacks)
	}
	var names []string
	for _, f := range b.Found {
		names = append(names, f.Name)
	}
	if !slices.Equal(names, []string{"b", "shop"}) {
		t.Errorf("found: %v", names)
	}
}

// A stack that moved to another directory is the same stack.
func TestAMovedStackIsNoChange(t *testing.T) {
	t.Parallel()
	files := map[string]string{
		"compose.yaml": "name: shop\nservices: {web: {image: x, volumes: [\"./conf:/conf:ro\", \"./data:/data\"], env_file: web.env}}\n",
		"conf/a":       "a\n", "web.env": "A=1\n",
	}
	var hashes []string
	for _, dir := range []string{"", "apps/shop/", "other/"} {
		moved := map[string]string{}
		for name, text := range files {
			moved[dir+name] = text
		}
		b := load(t, Options{Root: writeTree(t, moved)})
		if len(b.Stacks) != 1 {
			t.Fatalf("%s: %v", dir, b.Problems)
		}
		hashes = append(hashes, manifest.Hash(&b.Stacks[0]))
	}
	if hashes[0] != hashes[1] || hashes[1] != hashes[2] {
		t.Errorf("hashes differ: %v", hashes)
	}
}

// Origins lead to the line that set a field: through merges, anchors, overrides, includes, bases and env files.
func TestOrigins(t *testing.T) {
	t.Parallel()
	root := writeTree(t, map[string]string{
		"compose.yaml": `x-base: &base
  privileged: true
  environment: &env
    FROM_ANCHOR: a
include: [inc/compose.yaml]
services:
  web:
    <<: *base
    image: x
    cap_add: [NET_ADMIN]
    volumes:
      - /etc:/host/etc:ro
      - {type: bind, source: /var, target: /host/var}
    env_file: web.env
  list:
    image: y
    environment:
      - ONE=1
      - TWO=2
    extends: {file: base.yaml, service: base}
`,
		"compose.override.yaml": "services:\n  web:\n    user: root\n    image: z\n",
		"inc/compose.yaml":      "services:\n  inc:\n    image: i\n    pid: host\n",
		"base.yaml":             "services:\n  base:\n    image: b\n    devices: [/dev/fuse]\n",
		"web.env":               "# comment\nFROM_FILE=1\n",
		"gitops.yaml":           "policy: warn\ndefaults: {memory: 64m}\n",
	})
	b := load(t, Options{Root: root, Source: "shop"})
	if len(b.Stacks) != 1 {
		t.Fatal(b.Problems)
	}
	want := map[string]manifest.Pos{
		"web": {File: "compose.override.yaml", Line: 2}, "web.privileged": {File: "compose.yaml", Line: 2},
		"web.image": {File: "compose.override.yaml", Line: 4}, "web.user": {File: "compose.override.yaml", Line: 3},
		"web.capAdd": {File: "compose.yaml", Line: 10}, "web.mounts[/host/etc]": {File: "compose.yaml", Line: 12},
		"web.mounts[/host/var]": {File: "compose.yaml", Line: 13}, "web.env.FROM_ANCHOR": {File: "compose.yaml", Line: 4},
		"web.env.FROM_FILE": {File: "web.env", Line: 2}, "web.securityOpt": {File: "compose.override.yaml", Line: 2},
		"web.resources.memory": {File: "gitops.yaml", Line: 2}, "list.env.TWO": {File: "compose.yaml", Line: 19},
		"list.devices": {File: "base.yaml",
			Line: 4}, "inc.pid": {File: "inc/compose.yaml", Line: 4}, "inc.networkMode": {File: "inc/compose.yaml", Line: 2},
	}
	for _, field := range sortedKeys(want) {
		if got := b.Stacks[0].Origin(field); got != want[field] {
			t.Errorf("%s: %v, want %v", field, got, want[field])
		}
	}
}
