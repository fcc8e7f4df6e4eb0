# METADATA
# title: Images are not called latest
# description: Nobody can tell from `latest`, or from no tag at all, which version runs or what a rollback would go back to.
# custom:
#   way_out: >-
#     Write the version that you want as the image's tag.
package restricted.latest

deny contains data.lib.finding(c, "image", sprintf("the image of %s names no version: %s.", [c.container.name, c.container.image])) if {
	some c in data.lib.containers
	c.container.imageRef.digest == ""
	c.container.imageRef.tag in {"", "latest"}
}
