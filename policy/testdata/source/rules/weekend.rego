# METADATA
# title: Nothing is removed at the weekend
# description: Nobody is there to notice.
# custom:
#   way_out: Wait until Monday.
package custom.weekend

# A rule that reads the plan judges what is done. Heals and stops never get here.
deny contains {"service": item.service, "message": sprintf("%s would be removed on a %s.", [item.service, day])} if {
	some item in input.plan
	item.action == "remove"
	day := time.weekday(time.parse_rfc3339_ns(input.now))
	day in {"Saturday", "Sunday"}
}
