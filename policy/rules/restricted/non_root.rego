# METADATA
# title: Containers run as another user than root
# description: >-
#   Root in a container is root of the machine for everything that the walls around it let through. A program that is another user gains
#   much less by breaking out.
# custom:
#   way_out: >-
#     Write `user:` with an id other than 0, as `user: "1000:1000"`, and give it the directories it writes.
package restricted.non_root

root(user) if regex.match(`^(0+|root)?(:.*)?$`, user)

user(container) := trim_space(container.user)

deny contains data.lib.finding(c, "user", sprintf("%s runs as root: user is %q.", [c.container.name, c.container.user])) if {
	some c in data.lib.containers
	root(user(c.container))
}

deny contains data.lib.finding(c, "user", sprintf("%s runs as root: neither the file nor the image names a user.", [c.container.name])) if {
	some c in data.lib.containers
	not c.container.user
	input.images[c.container.image].user == ""
}

deny contains data.lib.finding(c, "user", sprintf("%s runs as root: the image's user is %q.", [c.container.name, image])) if {
	some c in data.lib.containers
	not c.container.user
	image := trim_space(input.images[c.container.image].user)
	image != ""
	root(image)
}

deny contains data.lib.finding(c, "user", message) if {
	some c in data.lib.containers
	not c.container.user
	not input.images[c.container.image]
	message := sprintf("%s may run as root: the file names no user and the image's is not known yet.", [c.container.name])
}

deny contains object.union(data.lib.finding(c, "user", message), {"way_out": way_out}) if {
	some c in data.lib.containers
	not c.container.user
	trouble := input.images[c.container.image].trouble
	message := sprintf("%s may run as root: the file names no user, and the image's is not known: %s.", [c.container.name, trouble])
	way_out := "Write `user:`, or try again: the image is asked for again every minute, and at once by `gitopsctl sync`."
}
