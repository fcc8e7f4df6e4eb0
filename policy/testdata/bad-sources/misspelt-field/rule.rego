# METADATA
# title: A rule
package custom.rule

deny contains "x" if {
	some s in input.stack.services
	some c in s.containers
	c.priviledged
}
