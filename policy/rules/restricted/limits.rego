# METADATA
# title: Memory, CPU and processes are limited
# description: A container without limits can starve the machine and everything else that runs on it.
# custom:
#   way_out: >-
#     Write `deploy: {resources: {limits: {memory: 256M, cpus: "0.5"}}}`, or give all services limits by `defaults:` in gitops.yaml.
package restricted.limits

deny contains data.lib.finding(c, sprintf("resources.%s", [field]), sprintf("%s has no %s limit.", [c.container.name, name])) if {
	some c in data.lib.containers
	some field, name in {"memory": "memory", "cpu": "CPU"}
	not c.container.resources[field]
}

# Without a written limit there is the default one; only -1 takes it away.
deny contains data.lib.finding(c, "resources.pids", sprintf("%s takes its limit of processes away.", [c.container.name])) if {
	some c in data.lib.containers
	c.container.resources.pids < 0
}
