# METADATA
# title: Images are pinned by digest
# description: >-
#   A tag is a name that its owner can move. A digest is the image itself: what was reviewed is what runs, today and after a rollback.
# custom:
#   way_out: >-
#     Write the image with its digest, as `nginx:1.29@sha256:…`; `docker buildx imagetools inspect IMAGE` prints it.
package restricted.digest

deny contains data.lib.finding(c, "image", sprintf("the image of %s is not pinned: %s.", [c.container.name, c.container.image])) if {
	some c in data.lib.containers
	c.container.imageRef.digest == ""
}
