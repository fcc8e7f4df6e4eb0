# METADATA
# title: A rule
package custom.rule

deny.x contains "y" if input.stack.name == "x"
