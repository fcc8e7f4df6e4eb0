# METADATA
# title: Programs can't gain privileges
# description: Without no-new-privileges, a set-user-id program in the image (su, sudo, ping) makes another user root again.
# custom:
#   way_out: >-
#     Write `security_opt: ["no-new-privileges:true"]`.
package restricted.no_new_privileges

deny contains data.lib.finding(c, "noNewPrivs", sprintf("%s lets its programs gain privileges.", [c.container.name])) if {
	some c in data.lib.containers
	not c.container.noNewPrivs
}
