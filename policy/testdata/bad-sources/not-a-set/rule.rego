# METADATA
# title: A rule
package custom.rule

deny := true if input.stack.name == "x"
