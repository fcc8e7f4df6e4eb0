# METADATA
# title: No sysctls that reach the host
# description: >-
#   Only some kernel parameters are kept per namespace: net.*, System V IPC and POSIX message queues. All others, and these too in a
#   namespace of the host, change the whole machine.
# custom:
#   way_out: >-
#     Remove the line from `sysctls` and set the parameter on the machine itself, in /etc/sysctl.d.
package baseline.sysctls

ipc := {
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_next_id", "kernel.sem_next_id", "kernel.msg_next_id", "kernel.shm_rmid_forced",
}

own(name, service) if {
	startswith(name, "net.")
	object.get(service, "networkMode", "") != "host"
}

own(name, service) if {
	name in ipc
	object.get(service, "ipc", "") != "host"
}

own(name, service) if {
	startswith(name, "fs.mqueue.")
	object.get(service, "ipc", "") != "host"
}

deny contains {
	"service": service.name,
	"path": sprintf("%s.sysctls.%s", [service.name, written]),
	"message": sprintf("%s sets %s, which is the whole machine's.", [service.name, written]),
} if {
	some service in input.stack.services
	some written, _ in service.sysctls
	not own(replace(written, "/", "."), service)
}
