# METADATA
# title: No devices of the host
# description: >-
#   A device gives raw access past the file system and the network: a disk, memory, a serial port. device_cgroup_rules open devices that
#   the container can create itself.
# custom:
#   way_out: >-
#     Remove `devices` and `device_cgroup_rules`, or write an exemption in the policy source for the machine's owner to sign.
package baseline.devices

harmless := {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}

deny contains data.lib.finding(c, sprintf("devices[%s]", [device.target]), message) if {
	some c in data.lib.containers
	some device in c.container.devices
	not device.source in harmless
	message := sprintf("%s uses the device %s.", [c.container.name, device.source])
}

deny contains data.lib.finding(c, sprintf("cgroupRules[%d]", [i]), sprintf("%s opens devices by the rule %q.", [c.container.name, rule])) if {
	some c in data.lib.containers
	some i, rule in c.container.cgroupRules
}
