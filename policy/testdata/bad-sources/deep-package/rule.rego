# METADATA
# title: A rule
package custom.a.b

deny contains "x" if input.stack.name == "x"
