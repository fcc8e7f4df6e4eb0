# METADATA
# title: A rule
package custom.rule

deny contains "x" if input.stak.name == "x"
