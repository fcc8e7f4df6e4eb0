# METADATA
# title: No unconfined profiles
# description: >-
#   Docker's seccomp and AppArmor profiles and the masked paths of /proc and /sys close doors from a container into the kernel that no
#   ordinary program needs. A seccomp profile that comes with the application can allow everything, so it counts as none.
# custom:
#   way_out: >-
#     Remove the line from `security_opt`. An AppArmor profile that the machine has loaded may be named.
package baseline.unconfined

options contains {"at": c, "index": i, "key": pair[1], "value": lower(pair[2])} if {
	some c in data.lib.containers
	some i, written in c.container.securityOpt
	pair := regex.find_all_string_submatch_n(`^\s*([a-z-]+)\s*[=:]\s*(.*?)\s*$`, written, 1)[0]
}

loose("seccomp", value) if not value in {"builtin", "default", "runtime/default"}

loose("apparmor", "unconfined")

loose("systempaths", "unconfined")

loose("label", value) if value in {"disable", "type:spc_t", "type=spc_t"}

loose("writable-cgroups", value) if not value in {"false", "0"}

deny contains data.lib.finding(o.at, sprintf("securityOpt[%d]", [o.index]), message) if {
	some o in options
	loose(o.key, o.value)
	message := sprintf("%s switches a protection off: %s=%s.", [o.at.container.name, o.key, o.value])
}
