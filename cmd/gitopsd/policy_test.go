package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gitopsd/gitopsd/cluster"
	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/blob"
	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/cluster/seal"
	"github.com/gitopsd/gitopsd/cluster/store"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/fixtures/repo"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// still is a machine on which nothing runs.
type still struct {
	worker.Runtime
	worker.Network
}

func (still) Prepare(context.Context) (network.Neighbours, error)   { return network.Neighbours{}, nil }
func (still) SetPublished(context.Context, []network.Service) error { return nil }
func (still) SetNames(context.Context, network.Names) error         { return nil }
func (still) EnsureNetwork(context.Context, network.Network) error  { return nil }

type stillNetwork struct{ still }

func (stillNetwork) List(context.Context) (network.State, error) { return network.State{}, nil }

type stillRuntime struct{ still }

func (stillRuntime) List(context.Context) ([]worker.Container, error) { return nil, nil }
func (stillRuntime) Watch(ctx context.Context, _ func(worker.Event)) error {
	<-ctx.Done()
	return ctx.Err()
}

// agent is the daemon's decisions on real repositories, without containers: its worker is another node's.
func agent(t *testing.T, dir string) (node *cluster.Node, stop func()) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	src, err := newSources(filepath.Join(dir, "git"), "", slog.New(slog.DiscardHandler))
	must(err)
	st, err := store.Open(store.Options{Dir: filepath.Join(dir, "log"), ID: "n1"})
	must(err)
	blobs, err := blob.Open(blob.Options{Dir: filepath.Join(dir, "blobs")})
	must(err)
	key, err := seal.LoadKey(filepath.Join(dir, "key"))
	must(err)
	engine, err := policy.New(t.Context(), policy.Options{})
	must(err)
	node = cluster.New(cluster.Config{
		ID: "n1", Record: state.Node{Name: "n1", Block: "10.1.0.0/20", Platform: "linux/amd64", CPU: 64e9, Memory: 64 << 30, SealKey: key.Public()},
		Store: st, Sources: src, Blobs: blobs, Key: key, Policy: engine, Now: time.Now,
	}, worker.Config{
		Node: "n2", Runtime: stillRuntime{}, Network: stillNetwork{}, DataRoot: filepath.Join(dir, "data"), RunDir: memoryDir(t), LogDir: filepath.Join(dir, "logs"),
	})
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return node.Run(ctx) })
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := g.Wait(); err != nil {
			t.Errorf("run: %v", err)
		}
		blobs.Close()
		src.store.Close()
	}
	t.Cleanup(stop)
	return node, stop
}

// memoryDir is a directory on a tmpfs, where a worker need not mount one for secrets.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "gitopsd-test-")
	if err != nil {
		t.Skipf("no tmpfs for the worker's files: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Rules come from a repository of their own: a signed commit there judges what the applications' repository asks for, at once, and neither an unsigned nor a broken one
// changes that.
func TestPolicyFromGit(t *testing.T) {
	dir := t.TempDir()
	key := repo.NewSSHKey(t)
	rules := repo.New(t, filepath.Join(dir, "rules.git"))
	apps := repo.New(t, filepath.Join(dir, "apps.git"))
	apps.Commit("two stacks", repo.Files{
		"shop/compose.yaml":  "services:\n  web:\n    image: web:1\n    labels: {team: shop}\n",
		"proxy/compose.yaml": "services:\n  proxy:\n    image: proxy:1\n    volumes: [/var/run/docker.sock:/var/run/docker.sock]\n",
	})
	exempt := "exemptions:\n  - {rule: baseline/engine-sockets, stack: proxy, reason: it reads routes, until: 2090-01-31}\n"
	good := rules.Apply(repo.Change{Message: "let the proxy in", Files: repo.Files{"machines/exemptions.yaml": exempt}, Sign: key})

	node, stop := agent(t, filepath.Join(dir, "agent"))
	operate := func(op api.Operation) { operate(t, node, op) }
	source := func(name string) state.Source {
		e, _ := node.View().Sources.Get(name)
		return e.Value
	}
	stack := func(name string) state.Wanted {
		e, _ := node.View().Stacks.Get(name)
		return e.Value.Wanted
	}
	operate(api.Operation{Kind: api.OpSourceAdd, SourceSpec: &api.SourceSpec{
		Name: "rules", URL: rules.Dir(), Path: "machines", Verify: "ssh", Signers: key.AllowedSigner("owner@example.org"), Policy: true,
	}})
	until(t, node, "the policy is in force", func(*state.View) bool {
		return source("rules").Accepted.Commit == good && source("rules").PolicyHash != ""
	})
	operate(api.Operation{Kind: api.OpSourceAdd, SourceSpec: &api.SourceSpec{Name: "apps", URL: apps.Dir(), Yes: true}})
	until(t, node, "the exemption lets the proxy in", func(*state.View) bool {
		return stack("proxy").Decision == state.DecisionAccepted && stack("shop").Decision == state.DecisionAccepted
	})

	owner := "# METADATA\n# title: Every service has an owner\n# custom:\n#   way_out: Write a label owner.\npackage custom.owner\n\n" +
		"deny contains {\"service\": s.name, \"path\": sprintf(\"%s.labels\", [s.name]), \"message\": sprintf(\"%s has no owner.\", [s.name])} if {\n" +
		"\tsome s in input.stack.services\n\tnot s.containers[0].labels.owner\n}\n"
	second := rules.Apply(repo.Change{Message: "owners", Files: repo.Files{"machines/owner.rego": owner}, Sign: key})
	until(t, node, "the new rule judges what runs", func(*state.View) bool {
		w := stack("shop")
		return source("rules").Accepted.Commit == second && w.Decision == state.DecisionBlocked && w.Verdict.Policy == source("rules").PolicyHash &&
			strings.Contains(fmt.Sprint(w.Reasons), "shop/compose.yaml:4: error: web has no owner. Write a label owner. [custom/owner]")
	})
	if tasks := node.View().Tasks.Len(); tasks != 2 {
		t.Errorf("%d tasks are there, not the two that ran", tasks)
	}
	inForce := source("rules").PolicyHash

	rules.Apply(repo.Change{Message: "half a rule", Files: repo.Files{"machines/owner.rego": owner + "\ndeny contains"}, Sign: key})
	until(t, node, "the broken policy is refused in words", func(*state.View) bool {
		s := source("rules")
		return s.Trouble != nil && s.Trouble.ID == reconcile.ReasonBadPolicy && strings.Contains(s.Trouble.Message, "owner.rego:1") && s.Accepted.Commit == second
	})
	rules.Apply(repo.Change{Message: "nobody's", Delete: []string{"machines/owner.rego"}, Files: repo.Files{"machines/exemptions.yaml": exempt}})
	until(t, node, "the unsigned policy is refused", func(*state.View) bool {
		w := source("rules").Waiting
		return len(w) == 1 && w[0].ID == reconcile.ReasonUnsigned && source("rules").PolicyHash == inForce
	})

	// The repository is gone, and the agent starts again: the policy that was accepted last judges on.
	stop()
	rules.DeleteRef("refs/heads/main")
	third := apps.Commit("a third stack", repo.Files{"blog/compose.yaml": "services:\n  blog:\n    image: blog:1\n"})
	node, _ = agent(t, filepath.Join(dir, "agent"))
	until(t, node, "the new stack is judged by it", func(*state.View) bool {
		return source("apps").Accepted.Commit == third && strings.Contains(fmt.Sprint(stack("blog").Reasons), "custom/owner")
	})
}

// A source that can't be followed is told as failing, and the others are followed.
func TestSourceThatCantBeFollowed(t *testing.T) {
	dir := t.TempDir()
	apps := repo.New(t, filepath.Join(dir, "apps.git"))
	commit := apps.Commit("a stack", repo.Files{"shop/compose.yaml": "services:\n  web:\n    image: web:1\n"})
	node, _ := agent(t, filepath.Join(dir, "agent"))
	operate(t, node, api.Operation{Kind: api.OpSourceAdd, SourceSpec: &api.SourceSpec{Name: "bad", URL: "ext::sh"}})
	operate(t, node, api.Operation{Kind: api.OpSourceAdd, SourceSpec: &api.SourceSpec{Name: "apps", URL: apps.Dir(), Yes: true}})
	until(t, node, "the bad one is told, the good one followed", func(v *state.View) bool {
		bad, _ := v.Sources.Get("bad")
		good, _ := v.Sources.Get("apps")
		return bad.Value.Trouble != nil && strings.Contains(bad.Value.Trouble.Message, "Use https://") && good.Value.Accepted.Commit == commit
	})
}

// operate does one operation, once the node leads.
func operate(t *testing.T, node *cluster.Node, op api.Operation) {
	t.Helper()
	op.ID, op.Actor = fmt.Sprint(time.Now().UnixNano()), "test"
	var err error
	until(t, node, "the node leads", func(*state.View) bool {
		_, err = node.Operate(t.Context(), op)
		return api.KindOf(err) != api.NoQuorum
	})
	if err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition that the log may bring.
func until(t *testing.T, node *cluster.Node, what string, ok func(*state.View) bool) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for !ok(node.View()) {
		select {
		case <-node.Changed(node.View().Index):
		case <-again.C:
		case <-deadline:
			v := node.View()
			for name, s := range v.Sources.All() {
				t.Logf("source %s: %+v %v", name, s.Value, s.Value.Trouble)
			}
			for _, st := range reconcile.Statuses(v) {
				t.Logf("stack %s: %s %v", st.Name, st.Sync, st.Reasons)
			}
			t.Fatalf("not in time: %s", what)
		}
	}
}
