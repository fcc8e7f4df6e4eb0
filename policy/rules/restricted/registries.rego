# METADATA
# title: Images come from trusted registries
# description: >-
#   Whoever owns the registry decides what runs. The policy source names those that you trust under `registries:`; without such a list
#   this rule says nothing.
# custom:
#   way_out: >-
#     Use an image of a trusted registry, or add the registry to `registries:` in the policy source's policy.yaml.
package restricted.registries

trusted(name) if {
	some registry in input.config.registries
	data.lib.within(name, registry)
}

deny contains data.lib.finding(c, "image", message) if {
	count(input.config.registries) > 0
	some c in data.lib.containers
	not trusted(c.container.imageRef.name)
	message := sprintf("the image of %s is not from a trusted registry: %s.", [c.container.name, c.container.imageRef.name])
}
