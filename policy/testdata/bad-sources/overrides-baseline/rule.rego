# METADATA
# title: A rule
package baseline.privileged

deny contains "x" if input.stack.name == "x"
