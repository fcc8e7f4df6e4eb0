# METADATA
# title: The root file system is read-only
# description: Nobody can leave a changed program in a container whose file system is read-only; and what must be kept is seen to be in a volume.
# custom:
#   way_out: >-
#     Write `read_only: true`, and mount a `tmpfs` or a volume where the program writes.
package restricted.read_only

deny contains data.lib.finding(c, "readOnly", sprintf("the root file system of %s is writable.", [c.container.name])) if {
	some c in data.lib.containers
	not c.container.readOnly
}
