# METADATA
# title: A rule
package custom.rule

deny["x"] { input.stack.name == "x" }
