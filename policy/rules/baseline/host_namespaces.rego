# METADATA
# title: No namespaces of the host
# description: >-
#   In the host's network, PID, IPC or user namespace a container sees, and may disturb, what runs beside it: host services that listen on
#   localhost, other processes and their environment, shared memory.
# custom:
#   way_out: >-
#     Publish ports instead of `network_mode: host`, and remove `pid`, `ipc` and `userns_mode`.
package baseline.host_namespaces

deny contains {
	"service": service.name,
	"path": sprintf("%s.%s", [service.name, field]),
	"message": sprintf("%s uses the host's %s namespace.", [service.name, name]),
} if {
	some service in input.stack.services
	some field, name in {"networkMode": "network", "pid": "PID", "ipc": "IPC", "userns": "user"}
	service[field] == "host"
}

# The network that Swarm calls host is the host's network namespace.
deny contains {
	"service": service.name,
	"path": sprintf("%s.networks[host]", [service.name]),
	"message": sprintf("%s joins the network called host, which is the host's network namespace.", [service.name]),
} if {
	some service in input.stack.services
	some attachment in service.networks
	attachment.network == "host"
}
