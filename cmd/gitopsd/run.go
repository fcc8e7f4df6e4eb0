package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster"
	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cluster/blob"
	"github.com/gitopsd/gitopsd/cluster/containerd"
	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/cluster/seal"
	"github.com/gitopsd/gitopsd/cluster/store"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// probeTime is how long a containerd has to answer before it counts as not there.
const probeTime = 2 * time.Second

// gcPercent keeps the heap near what lives in it: the agent is mostly at rest, and its memory is the tasks' loss.
const gcPercent = 50

// domain is the search domain of tasks.
const domain = "svc.internal"

func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: want debug, info, warn or error", o.logLevel)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}

// run joins the parts and runs them until ctx ends.
func run(ctx context.Context, o *options, version string) (err error) {
	log, err := o.logger()
	if err != nil {
		return err
	}
	debug.SetGCPercent(gcPercent)
	initial, err := o.initial()
	if err != nil {
		return err
	}
	defaults, err := o.hardening()
	if err != nil {
		return err
	}
	engine, err := o.policy(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.dataDir, 0o711); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	unlock, err := lock(filepath.Join(o.dataDir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	alone, err := o.alone()
	if err != nil {
		return err
	}
	defer alone()
	ctx, end := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	defer func() { // what was started ends before the locks are given back, whatever ended this
		end()
		_ = g.Wait() // the last Wait told of it
	}()
	id, err := identity(filepath.Join(o.dataDir, "node-id"), "n-")
	if err != nil {
		return err
	}
	key, err := seal.LoadKey(filepath.Join(o.dataDir, "node.key"))
	if err != nil {
		return err
	}
	src, err := newSources(filepath.Join(o.dataDir, "git"), o.cluster, log)
	if err != nil {
		return err
	}
	hook, err := o.webhook(src, log)
	if err != nil {
		return err
	}
	defer hook.Close()
	rt, err := o.connect(ctx, g, log)
	if err != nil {
		return err
	}
	defer rt.Close()
	starts := true
	defer func() {
		if err != nil && starts && o.containerdAddress() != o.containerd {
			err = fmt.Errorf("%w\nThe containerd of this instance runs on, with all that runs on it. It is used again at the next start; `gitopsd teardown` with the same flags stops it", err)
		}
	}()
	nets, err := network.New(network.Config{Name: o.instance, RunDir: o.runDir, StateDir: filepath.Join(o.dataDir, "network")}, log)
	if err != nil {
		return err
	}
	blobs, err := blob.Open(blob.Options{Dir: filepath.Join(o.dataDir, "blobs")})
	if err != nil {
		return err
	}
	defer blobs.Close()
	st, err := store.Open(store.Options{Dir: filepath.Join(o.dataDir, "log"), ID: id, Logger: log})
	if err != nil {
		return err
	}
	cl, record, err := o.record(st.View(), nets, id, key, version)
	if err != nil {
		st.Close()
		return err
	}
	for _, e := range st.View().Sources.All() {
		if e.Value.Policy && o.policyDir != "" {
			st.Close()
			return fmt.Errorf("--policy %s: source %s holds the policy of this cluster, and there is one: start without --policy, and remove the source if you want the directory instead", o.policyDir, e.Value.Name)
		}
	}
	starts = false
	log.Info("gitopsd starts", "version", version, "node", id, "name", o.name, "data", o.dataDir, "block", record.Block)

	cfg := cluster.Config{
		ID: id, Record: record, Cluster: cl, Version: version, Store: st, Sources: src, Blobs: blobs, Key: key, Policy: engine, OwnPolicy: o.policyDir != "", Harden: defaults,
		Initial: initial, Now: time.Now, Logger: log,
	}
	node := cluster.New(cfg, worker.Config{
		Node: id, Cluster: cl.ID, Runtime: rt, Images: rt, Inspector: rt, Network: nets, Content: cluster.Content{Blobs: blobs},
		DataRoot: record.DataRoot, RunDir: o.runDir, LogDir: filepath.Join(o.dataDir, "logs"), CgroupParent: "/" + o.namespace(), Domain: domain, Logger: log,
	})
	server := api.NewServer(api.Config{Socket: o.socket, Version: version, Node: id, Backend: node, Live: node, Planner: node, Rendered: src.rendered, Log: log})
	keeper := &keeper{path: o.keeper, table: nets.NamesFile(), pid: filepath.Join(o.runDir, "keeper.pid"), logs: filepath.Join(o.dataDir, "keeper.log"), log: log}
	g.Go(func() error { return node.Run(ctx) })
	g.Go(func() error { return server.Run(ctx) })
	g.Go(func() error { return keeper.Run(ctx) })
	g.Go(func() error { return hook.Run(ctx) })
	return g.Wait()
}

// connect opens the containerd that answers, or starts one.
func (o *options) connect(ctx context.Context, g *errgroup.Group, log *slog.Logger) (*containerd.Runtime, error) {
	opts := containerd.Options{
		Address: o.containerd, Namespace: o.namespace(), StateDir: filepath.Join(o.runDir, "containers"), KeeperPath: o.keeper,
		CredentialFiles: credentialFiles(o.dataDir), PlainHTTP: o.plainHTTP, Logger: log,
	}
	if answers(o.containerd) {
		return containerd.Open(ctx, opts)
	}
	sup := &containerd.Supervisor{Dir: filepath.Join(o.dataDir, "containerd"), RunDir: filepath.Join(o.runDir, "containerd"), Logger: log}
	log.Info("no containerd answers; running one of our own", "asked", o.containerd, "address", sup.Address())
	failed := make(chan error, 1)
	g.Go(func() error {
		err := sup.Run(ctx)
		failed <- err
		return err
	})
	ready, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := sup.Ready(ready); err != nil {
		select {
		case err := <-failed:
			return nil, fmt.Errorf("start containerd: %w; install it: apt-get install containerd runc", err)
		default:
			return nil, fmt.Errorf("start containerd: %w; its log is %s", err, sup.LogFile())
		}
	}
	opts.Address = sup.Address()
	return containerd.Open(ctx, opts)
}

// answers says whether something listens on a unix socket.
func answers(socket string) bool {
	c, err := net.DialTimeout("unix", socket, probeTime)
	if err != nil {
		return false
	}
	return c.Close() == nil
}

func credentialFiles(dataDir string) []string {
	files := []string{filepath.Join(dataDir, "registry.json")}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		files = append(files, filepath.Join(dir, "config.json"))
	}
	return append(files, "/root/.docker/config.json")
}

func (o *options) policy(ctx context.Context) (*policy.Engine, error) {
	level, err := policy.ParseLevel(o.policyLevel)
	if err != nil {
		return nil, fmt.Errorf("--policy-level: %w", err)
	}
	opts := policy.Options{Level: level}
	if o.policyDir != "" {
		if opts.Source, err = policy.LoadSource(os.DirFS(o.policyDir)); err != nil {
			return nil, fmt.Errorf("read the policy source %s: %w", o.policyDir, err)
		}
	}
	return policy.New(ctx, opts)
}

// record describes the cluster and this node: as the log has them, or new.
func (o *options) record(v *state.View, nets *network.Manager, id string, key *seal.Key, version string) (state.Cluster, state.Node, error) {
	n := state.Node{
		Name: o.name, Platform: runtime.GOOS + "/" + runtime.GOARCH, CPU: manifest.CPU(runtime.NumCPU()) * 1e9, DataRoot: filepath.Join(o.dataDir, "data"),
		Version: version, SealKey: key.Public(),
	}
	if boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		n.Boot = strings.TrimSpace(string(boot))
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		n.Memory = manifest.Bytes(info.Totalram * uint64(info.Unit))
	}
	cl, known := v.Clusters.Get("cluster")
	if !known {
		b := make([]byte, 8)
		_, _ = rand.Read(b)
		cl.Value = state.Cluster{ID: "c-" + hex.EncodeToString(b), Pool: o.pool}
	}
	if was, ok := v.Nodes.Get(id); ok {
		n.Block = was.Value.Block
		return cl.Value, n, nil
	}
	var pool []netip.Prefix
	for _, s := range cl.Value.Pool {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return cl.Value, n, fmt.Errorf("--pool %s: %w", s, err)
		}
		pool = append(pool, p)
	}
	taken, err := nets.HostPrefixes()
	if err != nil {
		return cl.Value, n, err
	}
	block, err := network.PickBlock(pool, taken, o.bits)
	if err != nil {
		return cl.Value, n, fmt.Errorf("choose the node's addresses: %w; name other ones with --pool", err)
	}
	n.Block = block.String()
	return cl.Value, n, nil
}

// instanceLock is a file that all agents of the instance's name share, wherever their directories are. teardown removes it.
func (o *options) instanceLock() string { return "/run/gitopsd-" + o.instance + ".lock" }

// alone makes sure that one agent of the instance's name runs on the machine: links, rules and containers are named after it.
func (o *options) alone() (func(), error) {
	unlock, err := lock(o.instanceLock())
	if err != nil {
		return nil, fmt.Errorf("instance %s is in use on this machine: stop the gitopsd that runs, or give this one another --instance", o.instance)
	}
	return unlock, nil
}

// lock makes sure that one agent uses the data directory.
func lock(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another gitopsd runs with %s: stop it first, or give this one another --instance and --data-dir", filepath.Dir(path))
	}
	return func() { f.Close() }, nil
}

// identity reads an id from a file, or makes one and keeps it there.
func identity(path, prefix string) (string, error) {
	b, err := os.ReadFile(path)
	if id := strings.TrimSpace(string(b)); err == nil && id != "" {
		return id, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read this node's id: %w", err)
	}
	raw := make([]byte, 6)
	_, _ = rand.Read(raw)
	id := prefix + hex.EncodeToString(raw)
	if err := os.WriteFile(path, []byte(id+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("keep this node's id: %w", err)
	}
	return id, nil
}

// importImages loads archives into the agent's namespace of containerd.
func importImages(ctx context.Context, o *options, files []string, out io.Writer) error {
	rt, err := containerd.Open(ctx, containerd.Options{Address: o.containerdAddress(), Namespace: o.namespace(), StateDir: filepath.Join(o.runDir, "containers"), KeeperPath: o.keeper})
	if err != nil {
		return err
	}
	defer rt.Close()
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		refs, err := rt.Import(ctx, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("import %s: %w", path, err)
		}
		for _, r := range refs {
			fmt.Fprintln(out, r)
		}
	}
	return nil
}

// containerdAddress is the containerd in use: the one of the flag, or our own.
func (o *options) containerdAddress() string {
	sup := &containerd.Supervisor{Dir: filepath.Join(o.dataDir, "containerd"), RunDir: filepath.Join(o.runDir, "containerd")}
	if !answers(o.containerd) && answers(sup.Address()) {
		return sup.Address()
	}
	return o.containerd
}
