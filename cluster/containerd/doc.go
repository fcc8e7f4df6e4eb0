// Package containerd runs containers with containerd: it implements the worker's Runtime, Images and Inspector, and is the only package
// that knows containerd's API. It works with containerd 1.6 and newer, and with runc below it.
//
// The flow: [Open] connects to the system's containerd, or to one that a [Supervisor] keeps running where none is. Ensure brings an image
// by digest: from the node, else from its registry. Create merges the image's configuration with the container's spec by Docker's rules into
// what runc reads, makes the container's record, its snapshot, fills new volumes from the image, and has the shim set all up without running
// it. Start runs it. List and Watch tell what became of it; Stop and Remove end it.
//
// Words: a record is containerd's note of a container or an image; it outlives reboots, and its labels are this node's own record of what it
// made. A task is containerd's word for the process of a container; it is called process here, because a task is something larger in
// this program. A shim is containerd's small process beside each container. A snapshot is a container's root file system. The keeper is our
// own small program beside each container: it writes the log (package tasklog), and inside a container it is the init process where one
// is asked for.
//
// What outlives what: a container needs its shim and its keeper, and nothing else. The shim is no child of ours nor of containerd, and the
// keeper is the shim's child, so agent and containerd may be killed and started again; exits that happened meanwhile are still told. The keeper
// asks the kernel to be spared when memory runs out, for without it a container that writes gets a broken pipe.
//
// Everything is in one containerd namespace, one cgroup parent and one state directory, so that RemoveAll leaves nothing. Two agents on
// one machine must have different namespaces.
package containerd
