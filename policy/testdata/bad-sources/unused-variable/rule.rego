# METADATA
# title: A rule
package custom.rule

deny contains "x" if {
	y := 1
}
