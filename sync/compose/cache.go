package compose

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Cache remembers renderings between loads of commits of one source. A rendering is used again when each path that it read, or looked
// for in vain, has the same object hash in the new commit, and the settings for it are the same. It is safe for concurrent use, and keeps
// what the latest loads used.
type Cache struct {
	mu      sync.Mutex
	entries map[string]*cached // by directory and name of the plan
	stats   CacheStats
}

// CacheStats count what loads did since the cache was made.
type CacheStats struct {
	Rendered int // stacks that were rendered
	Reused   int // stacks that were taken from the cache
}

// Stats returns the counts.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// cached is a rendering with the hashes of what it depends on; the hash of what is absent is empty.
type cached struct {
	mu       sync.Mutex // held while it is rendered: who asks for the same meanwhile takes that
	settings string
	inputs   map[string]string
	result   *rendering
}

// cached renders a plan, or takes the rendering of an earlier load when nothing that it depends on changed.
func (l *loading) cached(ctx context.Context, p plan) (*rendering, error) {
	c := l.opts.Cache
	if c == nil || l.opts.Hash == nil {
		return l.fresh(ctx, p)
	}
	key, settings := p.dir+"\x00"+p.name, l.settingsKey(p)
	e := c.entry(key)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.result != nil && e.settings == settings && l.unchanged(e.inputs) {
		c.count(func(s *CacheStats) { s.Reused++ })
		return e.result, nil
	}
	t := l.fork()
	r := l.render(ctx, p, t)
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("render the stacks: %w", err)
	}
	inputs := make(map[string]string, len(t.noted))
	for name := range t.noted {
		inputs[name], _ = l.opts.Hash(name)
	}
	c.count(func(s *CacheStats) { s.Rendered++ })
	e.settings, e.inputs, e.result = settings, inputs, r
	return r, nil
}

func (c *Cache) entry(key string) *cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = map[string]*cached{}
	}
	e := c.entries[key]
	if e == nil {
		e = &cached{}
		c.entries[key] = e
	}
	return e
}

func (c *Cache) count(f func(*CacheStats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.stats)
}

func (l *loading) fresh(ctx context.Context, p plan) (*rendering, error) {
	r := l.render(ctx, p, l.fork())
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("render the stacks: %w", err)
	}
	return r, nil
}

// fork is the tree with an empty record of what was read.
func (l *loading) fork() *checkout {
	t := *l.tree
	t.noted = map[string]bool{}
	return &t
}

func (l *loading) unchanged(inputs map[string]string) bool {
	for name, was := range inputs {
		if is, _ := l.opts.Hash(name); is != was {
			return false
		}
	}
	return true
}

// settingsKey identifies all that reaches a rendering besides files: the entry and its line, the variables and the options.
func (l *loading) settingsKey(p plan) string {
	problem := ""
	if p.problem != nil {
		problem = p.problem.String()
	}
	data, err := json.Marshal(struct {
		Name, Dir, Problem   string
		Files                []string
		Entry                stackEntry
		Line                 int
		Declared             bool
		Vars                 map[string]string
		Profiles             []string
		Defaults             defaultsEntry
		Policy               string
		Lines                []int // of what holds for all stacks
		Cluster, DataRoot    string
		Source, SettingsPath string
		Limits               Limits
	}{p.name, p.dir, problem, p.files, p.entry, p.line, p.declared, l.vars(p.entry, nil), l.profiles(p.entry), l.settings.Defaults,
		l.settings.Policy, []int{l.settings.line("defaults", -1), l.settings.line("policy", -1), l.settings.line("dataRoot", -1)}, l.opts.Cluster, l.settings.DataRoot, l.opts.Source, l.settingsPath(), l.opts.Limits})
	if err != nil {
		panic(err) // plain strings, numbers and maps
	}
	return manifest.Hash(json.RawMessage(data))
}

// forget drops what no plan of the latest load used.
func (c *Cache) forget(plans []plan) {
	if c == nil {
		return
	}
	keep := map[string]bool{}
	for _, p := range plans {
		keep[p.dir+"\x00"+p.name] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.entries, func(k string, _ *cached) bool { return !keep[k] })
}

// sortedKeys lists the keys of a map in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
