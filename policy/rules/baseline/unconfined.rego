# METADATA
# title: No unconfined profiles
# description: >-
#   Docker's seccomp and AppArmor profiles and the masked paths of /proc and /sys close doors from a container into the kernel that no
#   ordinary program needs. A seccomp profile of the repository that allows what it does not name closes only the doors that its author
#   thought of, so it counts as none; one that denies what it does not name is as good as its list.
# custom:
#   way_out: >-
#     Remove the line from `security_opt`, or give the seccomp profile a `defaultAction` that denies, such as SCMP_ACT_ERRNO, and name what
#     the program needs. An AppArmor profile that the machine has loaded may be named.
package baseline.unconfined

options contains {"at": c, "index": i, "key": pair[1], "value": lower(pair[2])} if {
	some c in data.lib.containers
	some i, written in c.container.securityOpt
	pair := regex.find_all_string_submatch_n(`^\s*([a-z-]+)\s*[=:]\s*(.*?)\s*$`, written, 1)[0]
}

loose("seccomp", value) if {
	not value in {"builtin", "default", "runtime/default"}
	not startswith(value, "deny-by-default@")
}

loose("apparmor", "unconfined")

loose("systempaths", "unconfined")

loose("label", value) if value in {"disable", "type:spc_t", "type=spc_t"}

loose("writable-cgroups", value) if not value in {"false", "0"}

deny contains data.lib.finding(o.at, sprintf("securityOpt[%d]", [o.index]), message) if {
	some o in options
	loose(o.key, o.value)
	message := sprintf("%s switches a protection off: %s=%s.", [o.at.container.name, o.key, o.value])
}
