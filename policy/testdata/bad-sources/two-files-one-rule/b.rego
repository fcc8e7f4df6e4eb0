# METADATA
# title: A rule
package custom.rule

deny contains "y" if input.stack.name == "x"
