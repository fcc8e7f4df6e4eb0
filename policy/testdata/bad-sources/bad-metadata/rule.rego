# METADATA
# title: A: rule
package custom.rule

deny contains "x" if input.stack.name == "x"
