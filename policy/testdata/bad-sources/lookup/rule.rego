# METADATA
# title: A rule
package custom.rule

deny contains "x" if net.lookup_ip_addr("localhost")
