# METADATA
# title: No host file systems through volume options
# description: >-
#   `driver_opts` of the local driver are handed to mount(8). A block device or an overlay reaches any file of the host past all checks of
#   paths. Binds that are written this way are judged like binds; NFS, CIFS and tmpfs are fine.
# custom:
#   way_out: >-
#     Use a named volume without `driver_opts`, NFS or CIFS, or mount the file system on the host and bind its directory.
package baseline.volume_types

fine := {"", "none", "bind", "tmpfs", "nfs", "nfs4", "cifs", "smb3"}

deny contains {
	"path": sprintf("volumes.%s", [volume.key]),
	"message": sprintf("the volume %s mounts a file system of type %s of the host.", [volume.key, type]),
} if {
	some volume in input.stack.volumes
	type := lower(trim_space(object.get(volume, ["options", "type"], "")))
	not type in fine
}
