# METADATA
# description: What several rules share. Nothing here denies.
package lib

# Each container of the stack, with the service whose tasks it runs in.
containers := [{"service": service, "container": container} |
	some service in input.stack.services
	some container in service.containers
]

# finding builds what a rule reports about a field of a container.
finding(c, field, message) := {
	"service": c.service.name,
	"container": c.container.name,
	"path": sprintf("%s.%s", [c.container.name, field]),
	"message": message,
}

# Every path of the host that the stack can reach: binds, data directories, and volumes whose options hide a bind. `host` is the real
# path: clean, with the usual symbolic links of a Linux system followed (/var/run is /run, /bin is /usr/bin). `dir` is the same with a
# slash at its end.
host_mounts := array.concat(host_binds, host_volumes)

host_binds := [mount |
	some c in containers
	some m in c.container.mounts
	m.host
	mount := {"host": m.host, "dir": slash(m.host), "read_only": object.get(m, "readOnly", false), "at": c, "mount": m}
]

host_volumes := [mount |
	some v in input.stack.volumes
	v.host
	read_only := regex.match(`(^|,)ro(,|$)`, object.get(v, ["options", "o"], ""))
	mount := {"host": v.host, "dir": slash(v.host), "read_only": read_only, "volume": v.key}
]

slash("/") := "/"

slash(path) := concat("", [path, "/"]) if path != "/"

# report makes a finding of a host mount: who mounts what, and why that is not right.
report(m, why) := finding(m.at, sprintf("mounts[%s]", [m.mount.target]), message) if {
	message := sprintf("%s mounts %s of the host%s.", [m.at.container.name, written(m.mount), why])
}

report(m, why) := {
	"path": sprintf("volumes.%s", [m.volume]),
	"message": sprintf("the volume %s is really %s of the host%s.", [m.volume, m.host, why]),
}

# written shows a path as it was written, and what it really is where that is another one.
written(mount) := mount.host if object.get(mount, "source", "") in {mount.host, ""}

written(mount) := sprintf("%s, that is %s", [mount.source, mount.host]) if not object.get(mount, "source", "") in {mount.host, ""}

# within says whether a path is the directory or lies below it.
within(path, dir) if path == dir

within(path, dir) if startswith(path, concat("", [dir, "/"]))

engine_sockets := {
	"buildkitd.sock", "containerd-debug.sock", "containerd.sock", "containerd.sock.ttrpc", "cri-dockerd.sock", "crio.sock", "docker-desktop.sock",
	"docker-raw.sock", "docker.raw.sock", "docker.sock", "dockershim.sock", "gitopsd.sock", "kubelet.sock", "podman.sock",
}

# Directories in which engines keep their sockets. Those of rootless engines are below /run/user.
engine_dirs := {
	"/run/buildkit/", "/run/containerd/", "/run/crio/", "/run/docker/", "/run/gitopsd/", "/run/k3s/", "/run/podman/", "/run/user/",
}

# engine says what a host mount gives of a container engine: its socket, or a directory that holds sockets.
engine(mount) := "that is the socket of a container engine" if {
	parts := split(mount.host, "/")
	parts[count(parts) - 1] in engine_sockets
} else := "engines keep their sockets there" if {
	strings.any_prefix_match(mount.dir, engine_dirs)
} else := "the sockets of container engines are below it" if {
	strings.any_prefix_match(engine_dirs, mount.dir)
}
