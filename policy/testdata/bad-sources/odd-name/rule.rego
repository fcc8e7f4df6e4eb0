# METADATA
# title: A rule
package custom["A-b"]

deny contains "x" if input.stack.name == "x"
