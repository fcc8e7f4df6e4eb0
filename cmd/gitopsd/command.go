package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gitopsd/gitopsd/cluster"
	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/cmd/internal/usage"
	"github.com/gitopsd/gitopsd/policy"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// options are the flags. Each has a variable of the environment: --data-dir is GITOPSD_DATA_DIR.
type options struct {
	instance string
	dataDir  string
	runDir   string
	socket   string
	name     string
	cluster  string
	pool     []string
	bits     int
	logLevel string

	containerd string
	keeper     string
	plainHTTP  []string

	source   api.SourceSpec
	interval time.Duration
	token    string
	keyFile  string
	known    string
	signers  string

	policyDir   string
	policyLevel string
	memory      string
	cpu         string

	hookAddr   string
	hookSecret string
}

var validInstance = regexp.MustCompile(`^[a-z][a-z0-9]{0,5}$`)

func command(version string) *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use: "gitopsd", Short: "Run what Git says on this machine", Version: version,
		SilenceUsage: true, SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return fromEnv(cmd) },
	}
	f := root.PersistentFlags()
	f.StringVar(&o.instance, "instance", "gitops", "name of this agent on the machine: 1 to 6 lower-case letters and digits; two agents need two")
	f.StringVar(&o.dataDir, "data-dir", "", "what must survive: log, volumes, repository files (default /var/lib/gitopsd, or /var/lib/gitopsd-INSTANCE)")
	f.StringVar(&o.runDir, "run-dir", "", "what a reboot may take (default /run/gitopsd, or /run/gitopsd-INSTANCE)")
	f.StringVar(&o.containerd, "containerd", "/run/containerd/containerd.sock", "socket of the containerd to use; where none answers, one of our own is started")
	f.StringVar(&o.keeper, "keeper", "", "path of gitops-keeper (default beside gitopsd)")
	f.StringSliceVar(&o.plainHTTP, "plain-http", nil, "registries (host:port) that speak HTTP without TLS; those on loopback always may")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")

	run := &cobra.Command{
		Use: "run", Short: "Run the agent until it is told to stop; containers run on", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.complete(version); err != nil {
				return err
			}
			return run(cmd.Context(), o, version)
		},
	}
	r := run.Flags()
	r.StringVar(&o.socket, "socket", "", "where the API listens (default RUN-DIR/gitopsd.sock)")
	r.StringVar(&o.name, "name", "", "name of this node (default the host's name)")
	r.StringVar(&o.cluster, "cluster", "", "name of this cluster: picks its entry under clusters: in gitops.yaml")
	r.StringSliceVar(&o.pool, "pool", []string{"10.210.0.0/15", "172.20.0.0/14", "192.168.128.0/17"}, "addresses that the node's block is cut from; what the host's routes and Docker use is left out")
	r.IntVar(&o.bits, "block-bits", 19, "size of the node's block; each network takes a /26 of it, or more where its services need it")
	r.StringVar(&o.source.URL, "source", "", "repository to follow: https://, ssh://, user@host:path, or a path; added when the log has no source of its name")
	r.StringVar(&o.source.Name, "source-name", "", "name of the source (default from the URL)")
	r.StringVar(&o.source.Branch, "branch", "", "branch to follow (default the repository's own)")
	r.StringVar(&o.source.Tag, "tag", "", "tag to follow instead of a branch")
	r.StringVar(&o.source.Path, "path", "", "directory of the repository that holds the stacks")
	r.BoolVar(&o.source.Yes, "yes", false, "the source's first revision needs no approval")
	r.StringVar(&o.source.Verify, "verify", "none", "signature that a commit needs: none, ssh or gpg")
	r.StringVar(&o.signers, "signers-file", "", "file with the allowed signers (ssh) or the key ring (gpg)")
	r.StringVar(&o.token, "token-file", "", "file with the token for https")
	r.StringVar(&o.keyFile, "key-file", "", "file with the private key for ssh")
	r.StringVar(&o.known, "known-hosts-file", "", "known_hosts file for ssh (default the system's)")
	r.DurationVar(&o.interval, "interval", 30*time.Second, "how often the repository is asked for new commits")
	r.StringVar(&o.policyDir, "policy", "", "directory of the policy source: policy.yaml, exemptions.yaml, *.rego; from Git instead: gitopsctl source add --policy")
	r.StringVar(&o.policyLevel, "policy-level", "enforce", "enforce, warn or off, where the policy source says nothing")
	r.StringVar(&o.memory, "default-memory", "", "memory limit of containers that write none, as 512MiB (default none)")
	r.StringVar(&o.cpu, "default-cpu", "", "CPU limit of containers that write none, in cores (default none)")
	r.StringVar(&o.hookAddr, "webhook", "", "address that /hooks/git listens on, as :9000 (default off)")
	r.StringVar(&o.hookSecret, "webhook-secret-file", "", "file with the secret that is shared with the forge")

	root.AddCommand(run,
		&cobra.Command{
			Use: "teardown", Short: "Stop and remove everything that this agent made on the machine, but its volumes and its log", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				if err := o.complete(version); err != nil {
					return err
				}
				return teardown(cmd.Context(), o)
			},
		},
		&cobra.Command{
			Use: "import FILE...", Short: "Load images from OCI or docker archives, for machines without a registry", Args: cobra.MinimumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := o.complete(version); err != nil {
					return err
				}
				return importImages(cmd.Context(), o, args, cmd.OutOrStdout())
			},
		})
	root.CompletionOptions.DisableDefaultCmd = true
	usage.Tell(root)
	return root
}

// fromEnv sets flags that were not given from the environment.
func fromEnv(cmd *cobra.Command) error {
	var errs []error
	for _, env := range os.Environ() {
		name, value, _ := strings.Cut(env, "=")
		rest, ours := strings.CutPrefix(name, "GITOPSD_")
		if !ours {
			continue
		}
		flag := cmd.Flags().Lookup(strings.ReplaceAll(strings.ToLower(rest), "_", "-"))
		if flag == nil || flag.Changed {
			continue
		}
		if err := cmd.Flags().Set(flag.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("%s in the environment: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// complete fills in what depends on other flags, and says what can't work before anything is touched.
func (o *options) complete(string) error {
	if os.Geteuid() != 0 {
		return errors.New("it needs root, for containers and networks: run it with sudo")
	}
	if !validInstance.MatchString(o.instance) {
		return fmt.Errorf("--instance %q: want 1 to 6 lower-case letters and digits, a letter first", o.instance)
	}
	for _, p := range o.pool {
		if _, err := netip.ParsePrefix(p); err != nil {
			return fmt.Errorf("--pool %s: write addresses as 10.210.0.0/15", p)
		}
	}
	suffix := ""
	if o.instance != "gitops" {
		suffix = "-" + o.instance
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&o.dataDir, "/var/lib/gitopsd"+suffix)
	def(&o.runDir, "/run/gitopsd"+suffix)
	def(&o.socket, filepath.Join(o.runDir, "gitopsd.sock"))
	for _, p := range []*string{&o.dataDir, &o.runDir, &o.socket, &o.containerd} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	if o.keeper == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find gitops-keeper: %w", err)
		}
		o.keeper = filepath.Join(filepath.Dir(self), "gitops-keeper")
	}
	if _, err := os.Stat(o.keeper); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("gitops-keeper is not at %s: install it beside gitopsd, or say where it is with --keeper", o.keeper)
	}
	if o.name == "" {
		o.name, _ = os.Hostname()
	}
	return nil
}

// namespace is the agent's containerd namespace and cgroup: runc keeps state by it, so it must be unique on the machine.
func (o *options) namespace() string {
	if o.instance == "gitops" {
		return "gitopsd"
	}
	return "gitopsd-" + o.instance
}

// initial is the source of the flags, if there is one.
func (o *options) initial() ([]cluster.Source, error) {
	s := o.source
	if s.URL == "" {
		return nil, nil
	}
	if s.Name == "" {
		s.Name = sourceName(s.URL)
	}
	s.Interval = manifest.Duration(o.interval)
	for _, f := range []struct {
		flag, path string
		into       *string
	}{{"--token-file", o.token, &s.Token}, {"--key-file", o.keyFile, &s.Key}, {"--known-hosts-file", o.known, &s.KnownHosts}, {"--signers-file", o.signers, &s.Signers}} {
		if f.path == "" {
			continue
		}
		b, err := os.ReadFile(f.path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.flag, err)
		}
		*f.into = string(b)
	}
	s.Token = strings.TrimSpace(s.Token)
	src := cluster.SourceOf(s)
	if err := errors.Join(s.Check(), spec(src).Check()); err != nil {
		return nil, err
	}
	return []cluster.Source{src}, nil
}

var notName = regexp.MustCompile(`[^a-z0-9-]+`)

// sourceName derives a source's name from its URL: the last part of the path.
func sourceName(url string) string {
	base := strings.TrimSuffix(strings.TrimRight(url, "/"), ".git")
	if i := strings.LastIndexAny(base, "/:"); i >= 0 {
		base = base[i+1:]
	}
	if name := strings.Trim(notName.ReplaceAllString(strings.ToLower(base), "-"), "-"); name != "" {
		return name
	}
	return "main"
}

// hardening are the limits for containers that write none.
func (o *options) hardening() (policy.Defaults, error) {
	var d policy.Defaults
	if o.memory != "" {
		if err := d.Memory.UnmarshalText([]byte(o.memory)); err != nil {
			return d, fmt.Errorf("--default-memory %q: write an amount as 512MiB or 2GiB", o.memory)
		}
	}
	if o.cpu != "" {
		cpu, err := manifest.ParseCPU(o.cpu)
		if err != nil {
			return d, fmt.Errorf("--default-cpu: %w", err)
		}
		d.CPU = cpu
	}
	return d, nil
}
