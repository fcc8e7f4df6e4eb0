# METADATA
# title: A rule
package custom.rule

deny contains "x" if time.now_ns() > 0
