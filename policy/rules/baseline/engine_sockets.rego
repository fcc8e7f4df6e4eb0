# METADATA
# title: No sockets of container engines
# description: >-
#   Who can talk to an engine's socket can start a privileged container, so it is root on the machine. A read-only mount does not help: it
#   keeps the file from being replaced, not from being used.
# custom:
#   way_out: >-
#     Remove the mount. Nothing here reads Docker's API; programs that need it can't work without it, others run without the mount.
package baseline.engine_sockets

deny contains data.lib.report(mount, concat("", [": ", why])) if {
	some mount in data.lib.host_mounts
	why := data.lib.engine(mount)
}
