# METADATA
# title: No container takes more than 4 GiB
# description: The machines have 8.
package custom.memory

import data.custom.sizes

# A rule may advise instead of deny.
warn contains {
	"service": service.name,
	"container": container.name,
	"path": sprintf("%s.resources.memory", [container.name]),
	"message": sprintf("%s may use %s.", [container.name, container.resources.memory]),
	"way_out": "Ask for a larger machine, or write a smaller limit.",
} if {
	some service in input.stack.services
	some container in service.containers
	sizes.bytes(container.resources.memory) > sizes.bytes("4GiB")
}
