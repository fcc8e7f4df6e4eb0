package compose

import (
	"testing"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// A finding about a setting of a stack names the line that sets it, and a setting for all stacks that changes is not forgotten where nothing else does.
func TestOriginsOfSettings(t *testing.T) {
	dir := writeTree(t, map[string]string{
		"gitops.yaml":        "vars: {A: b}\npolicy: warn\ndataRoot: /srv\nstacks:\n  - name: own\n    policy: enforce\n    dataRoot: /own\n",
		"own/compose.yaml":   "services: {web: {image: a}}\n",
		"plain/compose.yaml": "services: {web: {image: a}}\n",
		"ext/compose.yaml":   "services: {web: {image: a}}\nx-gitops:\n  dataRoot: /ext\n",
	})
	cache := &Cache{}
	check := func(stack, policy string, origins map[string]manifest.Pos) {
		t.Helper()
		for _, s := range load(t, Options{Root: dir, Hash: hasher(t, dir), Cache: cache}).Stacks {
			if s.Name != stack {
				continue
			}
			if s.Policy != policy {
				t.Errorf("%s: policy %q, want %q", stack, s.Policy, policy)
			}
			for field, want := range origins {
				if got := s.Origin(field); got != want {
					t.Errorf("%s: %s is said to be at %v, want %v", stack, field, got, want)
				}
			}
			return
		}
		t.Errorf("no stack %s", stack)
	}
	settings := func(line int) manifest.Pos { return manifest.Pos{File: "gitops.yaml", Line: line} }
	check("own", "enforce", map[string]manifest.Pos{"policy": settings(5), "dataRoot": settings(5)})
	check("plain", "warn", map[string]manifest.Pos{"policy": settings(2), "dataRoot": settings(3)})
	check("ext", "warn", map[string]manifest.Pos{"policy": settings(2), "dataRoot": {File: "ext/compose.yaml", Line: 2}})
	put(t, dir, "gitops.yaml", "dataRoot: /srv\npolicy: enforce\n")
	check("plain", "enforce", map[string]manifest.Pos{"policy": settings(2), "dataRoot": settings(1)})
}
