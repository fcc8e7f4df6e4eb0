# METADATA
# title: A rule
package custom.rule

deny contains "x" if f(1)

f(x) if f(x)
