# METADATA
# title: A rule
package custom.rule

deny contains uuid.rfc4122("x")
