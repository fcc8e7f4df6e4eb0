# METADATA
# title: A rule
package custom.rule

deny contains "x" if rand.intn("x", 2) == 1
