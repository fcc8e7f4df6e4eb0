# METADATA
# title: No capabilities beyond Docker's default
# description: >-
#   Each capability is a part of root's power over the machine. Docker's default list is what ordinary programs need; SYS_ADMIN, SYS_MODULE,
#   SYS_PTRACE, NET_ADMIN and others reach beyond the container.
# custom:
#   way_out: >-
#     Remove it from `cap_add`. If the program really needs it, write an exemption in the policy source.
package baseline.capabilities

deny contains data.lib.finding(c, sprintf("capAdd[%d]", [i]), sprintf("%s adds the capability %s.", [c.container.name, name])) if {
	some c in data.lib.containers
	some i, written in c.container.capAdd
	name := trim_prefix(upper(written), "CAP_")
	not name in input.config.defaultCapabilities
}
