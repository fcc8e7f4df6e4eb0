// Package network is the network of one node: bridges, the tasks' network namespaces and addresses, published ports, and what a
// neighbour's firewall must let through.
//
// The words: a network is a bridge on this node with a subnet and a gateway address; an endpoint is a task's network namespace, pinned
// below RunDir so that it lives before and after the task's processes, with one veth pair for each network the task is on; a published
// port is a port of the host that is spread over the healthy tasks of a service, the backends.
//
// The flow: [New] makes a [Manager]; [Manager.Prepare] turns on forwarding, reads what an earlier run left and sets it right, and is
// called again at each full pass because other programs rewrite firewalls. [Manager.EnsureNetwork] and [Manager.Attach] make things,
// [Manager.SetPublished] and [Manager.SetNames] say what is to be reachable, [Manager.Detach] and [Manager.RemoveNetwork] take away, and
// [Manager.List] tells what is there, read from the kernel: links carry their owner in their alias, so a restarted agent adopts
// them all without a file of its own. [Manager.Teardown] leaves the machine as it was before.
//
// Everything is in the kernel or in the names file (package names, served by the keeper), so names and ports go on while the agent is down.
//
// A node's block of addresses is chosen by [PickBlock], the subnets in it and the addresses of tasks by package reconcile; the caller records the choice.
//
// All rules live in one nftables table of our own. It is described as data, chains and sets with their contents (rules.go), compared
// with what the table holds, and only the difference is sent, in one transaction (table.go). Two kinds of rules must lie elsewhere: a base chain
// of another table that drops has the last word, so accept rules for our bridges are put at the top of such chains (neighbours.go).
//
// Containers have IPv4 addresses. The host's IPv6 addresses are served by the keeper's proxy.
package network
