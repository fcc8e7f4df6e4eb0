# METADATA
# title: No sensitive paths of the host
# description: >-
#   System directories hold the keys, programs and settings of the machine, and the state of other containers. A container that writes
#   them owns the machine, and one that reads them learns its secrets. Directories of your own (/srv, /opt, /data, /mnt, below /home) are
#   fine.
# custom:
#   way_out: >-
#     Mount a named volume or a directory of your own, or keep the file in the repository and mount it by its relative path.
#     /etc/localtime, /etc/timezone and CA certificates may be mounted read-only.
package baseline.host_paths

# These and all below them, and every parent of them.
trees := {
	"/boot/", "/dev/", "/etc/", "/proc/", "/root/", "/run/", "/sys/", "/usr/",
	"/var/lib/containerd/", "/var/lib/containers/", "/var/lib/docker/", "/var/lib/gitopsd/", "/var/lib/kubelet/", "/var/lib/rancher/",
	"/var/lib/dpkg/", "/var/lib/systemd/", "/var/spool/cron/",
}

harmless := {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}

read_only := {
	"/etc/hostname/", "/etc/localtime/", "/etc/os-release/", "/etc/timezone/", "/usr/lib/os-release/", "/usr/share/zoneinfo/",
	"/etc/ca-certificates/", "/etc/pki/ca-trust/", "/etc/ssl/certs/", "/usr/local/share/ca-certificates/", "/usr/share/ca-certificates/",
}

sensitive(mount) if strings.any_prefix_match(mount.dir, trees)

sensitive(mount) if strings.any_prefix_match(trees, mount.dir)

sensitive(mount) if mount.host == "/home"

# Keys lie in the home directories of people.
sensitive(mount) if regex.match(`/(\.ssh|\.gnupg|\.docker|\.aws|\.kube)/`, mount.dir)

fine(mount) if mount.host in harmless

fine(mount) if {
	mount.read_only
	strings.any_prefix_match(mount.dir, read_only)
}

deny contains data.lib.report(mount, how) if {
	some mount in data.lib.host_mounts
	sensitive(mount)
	not fine(mount)
	not data.lib.engine(mount) # told by baseline/engine-sockets
	how := {true: ", which is sensitive even read-only", false: ", which is sensitive"}[mount.read_only]
}

# A data directory or a subpath that climbs out of the place it belongs to.
deny contains data.lib.finding(c, sprintf("mounts[%s]", [mount.target]), message) if {
	some c in data.lib.containers
	some mount in c.container.mounts
	mount.escapes
	message := sprintf("the source of the mount at %s leaves the directory it belongs to.", [mount.target])
}
