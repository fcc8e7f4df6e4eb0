package compose

import (
	"fmt"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/tree"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// verdict is what becomes of a Compose key.
type verdict int

const (
	works   verdict = iota // honoured, as far as the note says
	idle                   // read, without effect: a notice
	refused                // the stack does not render
)

func (v verdict) String() string { return [...]string{"yes", "no effect", "refused"}[v] }

// support is the answer to one attribute path of the Compose specification.
type support struct {
	path    string // as compose-go writes paths: `*` is any key, `[]` any element
	verdict verdict
	// keys are what may stand below the path, divided by spaces. A key that is not here, nor has an entry of its own, is refused:
	// a newer compose-go that reads more keys changes nothing by itself.
	keys string
	note string // for works: the extent; for idle and refused: a sentence and the way out
}

// supportTable answers for every attribute of the specification. A test compares it with compose-go's list.
var supportTable = []support{
	{"name", works, "", "the stack's name"},
	{"version", works, "", "obsolete; dropped, as Compose does"},
	{"include", works, "[].path [].project_directory [].env_file", "files of the same repository"},
	{"jobs", refused, "", "jobs are not run here; use a service with deploy.mode: replicated-job"},
	{"models", refused, "", "models need Docker Model Runner; run the model server as a service"},

	{"services", works, "*", ""},
	{"services.*.annotations", idle, "", "containers get no OCI annotations here; use labels"},
	{"services.*.attach", idle, "", "it only sets what `docker compose up` prints; see gitopsctl logs"},
	{"services.*.blkio_config", idle, "", "block I/O is not limited here"},
	{"services.*.build", idle, "", "nothing is built here; with an image beside it, that image is used"},
	{"services.*.cap_add", works, "", ""},
	{"services.*.cap_drop", works, "", ""},
	{"services.*.cgroup", works, "", "private"},
	{"services.*.cgroup_parent", idle, "", "containers are always in the agent's own cgroups"},
	{"services.*.command", works, "", ""},
	{"services.*.configs", works, "[].source [].target [].uid [].gid [].mode", ""},
	{"services.*.container_name", works, "", "one more name on the service's networks"},
	{"services.*.cpu_count", idle, "", "it is for Windows; use cpus"},
	{"services.*.cpu_percent", idle, "", "it is for Windows; use cpus"},
	{"services.*.cpu_period", works, "", "with cpu_quota: a limit in cores"},
	{"services.*.cpu_quota", works, "", "a limit in cores"},
	{"services.*.cpu_rt_period", refused, "", "real-time scheduling is not given here; remove the key"},
	{"services.*.cpu_rt_runtime", refused, "", "real-time scheduling is not given here; remove the key"},
	{"services.*.cpu_shares", works, "", ""},
	{"services.*.cpus", works, "", ""},
	{"services.*.cpuset", works, "", ""},
	{"services.*.credential_spec", refused, "", "it is for Windows containers; remove the key"},
	{"services.*.depends_on", works, "* *.condition *.required *.restart", "all conditions; restart: true follows each rollout of the other service"},
	{"services.*.deploy", works, "", ""},
	{"services.*.deploy.endpoint_mode", works, "", "dnsrr; vip is taken as that"},
	{"services.*.deploy.labels", works, "*", "kept with the service"},
	{"services.*.deploy.mode", works, "", "replicated, global, replicated-job, global-job"},
	{"services.*.deploy.placement", works, "constraints preferences preferences.[].spread max_replicas_per_node", "for clusters of more than one node"},
	{"services.*.deploy.replicas", works, "", ""},
	{"services.*.deploy.resources", works, "limits limits.cpus limits.memory limits.pids reservations reservations.cpus reservations.memory " +
		"reservations.generic_resources reservations.generic_resources.[].discrete_resource_spec " +
		"reservations.generic_resources.[].discrete_resource_spec.kind reservations.generic_resources.[].discrete_resource_spec.value",
		"generic_resources are not counted"},
	{"services.*.deploy.resources.reservations.devices", refused, "", "GPUs and other reserved devices are not given here; name the device files under devices:"},
	{"services.*.deploy.restart_policy", works, "condition delay max_attempts window", "delay is the base of an exponential backoff"},
	{"services.*.deploy.rollback_config", works, "parallelism delay failure_action monitor max_failure_ratio order", ""},
	{"services.*.deploy.update_config", works, "parallelism delay failure_action monitor max_failure_ratio order",
		"failure_action defaults to rollback where there is a stable revision"},
	{"services.*.develop", idle, "", "it is for `docker compose watch`"},
	{"services.*.device_cgroup_rules", works, "", ""},
	{"services.*.devices", works, "[].source [].target [].permissions", "device files of the host"},
	{"services.*.dns", works, "", ""},
	{"services.*.dns_opt", works, "", ""},
	{"services.*.dns_search", works, "", ""},
	{"services.*.domainname", works, "", ""},
	{"services.*.entrypoint", works, "", "resets the image's command, as in Docker"},
	{"services.*.env_file", works, "[].path [].required [].format", ""},
	{"services.*.environment", works, "*", ""},
	{"services.*.expose", works, "", "services of a network always reach each other"},
	{"services.*.extends", works, "file service", ""},
	{"services.*.external_links", refused, "", "there are no links to other containers here; let both stacks join one external network"},
	{"services.*.extra_hosts", works, "*", ""},
	{"services.*.gpus", refused, "", "GPUs are not given here; name the device files under devices:"},
	{"services.*.group_add", works, "", ""},
	{"services.*.healthcheck", works, "test interval timeout retries start_period start_interval disable", ""},
	{"services.*.hostname", works, "", ""},
	{"services.*.image", works, "", ""},
	{"services.*.init", works, "", ""},
	{"services.*.ipc", works, "", "host, private, shareable, none"},
	{"services.*.isolation", idle, "", "it is for Windows"},
	{"services.*.label_file", works, "", ""},
	{"services.*.labels", works, "*", "kept with the service"},
	{"services.*.links", works, "", "an alias and an order of start"},
	{"services.*.logging", works, "driver options options.*", "json-file, local and none; max-size and max-file"},
	{"services.*.mac_address", works, "", ""},
	{"services.*.mem_limit", works, "", ""},
	{"services.*.mem_reservation", works, "", ""},
	{"services.*.mem_swappiness", works, "", "with cgroup v1"},
	{"services.*.memswap_limit", works, "", ""},
	{"services.*.models", refused, "", "models need Docker Model Runner; run the model server as a service"},
	{"services.*.network_mode", works, "", "host, none, service:NAME, container:NAME of the same stack"},
	{"services.*.networks", works, "* *.aliases *.gw_priority *.ipv4_address *.mac_address *.priority *.use_service_name_alias", ""},
	{"services.*.networks.*.driver_opts", idle, "", "options of Docker's network drivers have no meaning here"},
	{"services.*.networks.*.interface_name", idle, "", "interfaces are named eth0, eth1 and so on, in the order of the networks"},
	{"services.*.networks.*.ipv6_address", refused, "", "networks between containers are IPv4 here; remove the key"},
	{"services.*.networks.*.link_local_ips", refused, "", "link-local addresses are not given here; remove the key"},
	{"services.*.oom_kill_disable", works, "", "with cgroup v1"},
	{"services.*.oom_score_adj", works, "", ""},
	{"services.*.pid", works, "", "host"},
	{"services.*.pids_limit", works, "", "4096 where nobody says"},
	{"services.*.platform", works, "", ""},
	{"services.*.ports", works, "[].target [].published [].host_ip [].protocol [].mode [].name [].app_protocol",
		"short and long form, ranges; name and app_protocol only describe"},
	{"services.*.post_start", idle, "", "hooks are not run here; make it a service of its own, with depends_on"},
	{"services.*.pre_start", refused, "", "hooks are not run here; make it a service of its own, and depend on it with service_completed_successfully"},
	{"services.*.pre_stop", idle, "", "hooks are not run here; let the program act on its stop_signal"},
	{"services.*.privileged", works, "", "where policy allows it"},
	{"services.*.profiles", works, "", "`profiles:` in gitops.yaml switches them on"},
	{"services.*.provider", refused, "", "providers run programs outside of containers; remove the key"},
	{"services.*.pull_policy", works, "", "always, missing, never"},
	{"services.*.pull_refresh_after", idle, "", "images are not looked up again by age; push a new tag or digest"},
	{"services.*.read_only", works, "", ""},
	{"services.*.restart", works, "", ""},
	{"services.*.runtime", works, "", "runc, or a containerd shim such as io.containerd.runsc.v1"},
	{"services.*.scale", works, "", ""},
	{"services.*.secrets", works, "[].source [].target [].uid [].gid [].mode", "on a tmpfs"},
	{"services.*.security_opt", works, "", "no-new-privileges; seccomp: unconfined, or a profile of the repository; apparmor; systempaths"},
	{"services.*.shm_size", works, "", ""},
	{"services.*.stdin_open", works, "", ""},
	{"services.*.stop_grace_period", works, "", ""},
	{"services.*.stop_signal", works, "", ""},
	{"services.*.storage_opt", idle, "", "the size of a container's own layer is not limited here"},
	{"services.*.sysctls", works, "*", "net.*, fs.mqueue.* and those of IPC"},
	{"services.*.tmpfs", works, "", ""},
	{"services.*.tty", works, "", ""},
	{"services.*.ulimits", works, "* *.soft *.hard", ""},
	{"services.*.umask", refused, "", "the umask is the image's here; set it in the entrypoint"},
	{"services.*.use_api_socket", refused, "", "there is no Docker API here; remove the key"},
	{"services.*.user", works, "", ""},
	{"services.*.userns_mode", works, "", "host, which is what containers have anyway"},
	{"services.*.uts", works, "", "a namespace of its own"},
	{"services.*.volumes", works, "[].type [].source [].target [].read_only [].bind [].bind.create_host_path [].bind.propagation [].bind.recursive " +
		"[].volume [].volume.nocopy [].volume.subpath [].tmpfs [].tmpfs.size [].tmpfs.mode",
		"named, anonymous, tmpfs, host paths, files of the repository"},
	{"services.*.volumes.[].bind.selinux", idle, "", "files are not relabelled (z, Z): label them once with chcon where SELinux is enforced"},
	{"services.*.volumes.[].consistency", idle, "", "it is for Docker Desktop on macOS"},
	{"services.*.volumes.[].image", refused, "", "an image can't be mounted here; copy what you need from it in your own image"},
	{"services.*.volumes.[].volume.labels", idle, "", "labels of a volume belong under the top-level volumes:"},
	{"services.*.volumes_from", refused, "", "volumes are not taken from other services here; mount the same named volume in both"},
	{"services.*.working_dir", works, "", ""},

	{"networks", works, "*", ""},
	{"networks.*.attachable", works, "", "always: other stacks join a network as external"},
	{"networks.*.driver", works, "", "bridge, overlay"},
	{"networks.*.driver_opts", idle, "*", "options of Docker's network drivers have no meaning here"},
	{"networks.*.enable_ipv4", works, "", "true"},
	{"networks.*.enable_ipv6", works, "", "false"},
	{"networks.*.external", works, "name", "shared with other stacks"},
	{"networks.*.internal", works, "", ""},
	{"networks.*.ipam", works, "driver config config.[].subnet config.[].gateway", "one IPv4 subnet"},
	{"networks.*.ipam.config.[].aux_addresses", idle, "", "no addresses are kept free; give ipv4_address to the services that need a fixed one"},
	{"networks.*.ipam.config.[].ip_range", idle, "", "addresses are taken from the whole subnet"},
	{"networks.*.ipam.options", idle, "", "options of Docker's address drivers have no meaning here"},
	{"networks.*.labels", works, "*", ""},
	{"networks.*.name", works, "", ""},

	{"volumes", works, "*", ""},
	{"volumes.*.driver", works, "", "local; another driver's volume is kept on the node, with a notice"},
	{"volumes.*.driver_opts", works, "*", "of the local driver: NFS, CIFS, tmpfs and binds"},
	{"volumes.*.external", works, "name", ""},
	{"volumes.*.labels", works, "*", ""},
	{"volumes.*.name", works, "", ""},

	{"secrets", works, "*", ""},
	{"secrets.*.driver", refused, "", "secrets come from a file, a variable, or `gitopsctl secret set` with external: true"},
	{"secrets.*.driver_opts", refused, "", "secrets come from a file, a variable, or `gitopsctl secret set` with external: true"},
	{"secrets.*.environment", works, "", "a variable of .env, gitops.yaml or --var"},
	{"secrets.*.external", works, "name", "set with `gitopsctl secret set`"},
	{"secrets.*.file", works, "", "a file of the repository"},
	{"secrets.*.labels", idle, "", "secrets have no labels here"},
	{"secrets.*.name", works, "", ""},
	{"secrets.*.template_driver", refused, "", "secrets are not templates here; remove the key"},

	{"configs", works, "*", ""},
	{"configs.*.content", works, "", ""},
	{"configs.*.environment", works, "", ""},
	{"configs.*.external", works, "name", "refused: keep the file in the repository"},
	{"configs.*.file", works, "", "a file of the repository"},
	{"configs.*.labels", idle, "", "configs have no labels here"},
	{"configs.*.name", works, "", ""},
	{"configs.*.template_driver", refused, "", "configs are not templates here; write the values with ${VARIABLES}"},
}

// accepted lists the paths that need no word: all that the table says works.
var accepted = sync.OnceValue(func() []tree.Path {
	var out []tree.Path
	for _, s := range supportTable {
		if s.verdict != works {
			continue
		}
		out = append(out, tree.Path(s.path))
		for _, k := range strings.Fields(s.keys) {
			out = append(out, tree.Path(s.path+"."+k))
		}
	}
	return out
})

// answer finds what the table says of a path that is not accepted.
func answer(p tree.Path) support {
	for _, s := range supportTable {
		if s.verdict != works && p.Matches(tree.Path(s.path)) {
			return s
		}
	}
	return support{path: string(p), verdict: refused, note: "remove it, or write it under a key that starts with x-"}
}

// finding turns an attribute that is not accepted into a Problem without a place.
func (s support) finding(key string) manifest.Problem {
	if s.verdict == idle {
		return manifest.Problem{Severity: manifest.Notice,
			Rule: "key-no-effect", Message: fmt.Sprintf("%s has no effect here: %s", key, s.note)}
	}
	return manifest.Problem{Severity: manifest.Error, Rule: "key-refused", Message: fmt.Sprintf("%s is not supported here: %s", key, s.note)}
}

// SupportTable is the README's table of Compose keys, in Markdown: every key with what becomes of it here.
func SupportTable() string {
	var b strings.Builder
	b.WriteString("| key | here | note |\n|---|---|---|\n")
	for _, s := range supportTable {
		key := strings.TrimPrefix(s.path, "services.*.")
		key = strings.NewReplacer(".*", "", ".[]", "").Replace(key)
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", key, s.verdict, s.note)
	}
	b.WriteString("| `x-gitops` | yes | extensions of this program: probe, seed, storage, rollback, dependsOn |\n")
	b.WriteString("| `x-*` | yes | yours; not read |\n")
	return b.String()
}
