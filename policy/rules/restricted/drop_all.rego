# METADATA
# title: Containers drop all capabilities
# description: >-
#   Most programs need none of the capabilities of Docker's default list. Only NET_BIND_SERVICE, for ports below 1024, may be added again.
# custom:
#   way_out: >-
#     Write `cap_drop: [ALL]`, and `cap_add: [NET_BIND_SERVICE]` where the program listens on a port below 1024.
package restricted.drop_all

deny contains data.lib.finding(c, "capDrop", sprintf("%s does not drop all capabilities.", [c.container.name])) if {
	some c in data.lib.containers
	not "ALL" in {upper(name) | some name in c.container.capDrop}
}

deny contains data.lib.finding(c, sprintf("capAdd[%d]", [i]), sprintf("%s adds the capability %s.", [c.container.name, name])) if {
	some c in data.lib.containers
	some i, written in c.container.capAdd
	name := trim_prefix(upper(written), "CAP_")
	name != "NET_BIND_SERVICE"
}
