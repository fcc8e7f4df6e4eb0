# METADATA
# title: No privileged containers
# description: >-
#   A privileged container has all capabilities, all devices and no seccomp or AppArmor profile: whoever breaks into it owns the machine.
# custom:
#   way_out: >-
#     Remove `privileged: true` and name what the program needs, in `cap_add` or `devices`.
package baseline.privileged

deny contains data.lib.finding(c, "privileged", sprintf("%s runs privileged.", [c.container.name])) if {
	some c in data.lib.containers
	c.container.privileged
}
