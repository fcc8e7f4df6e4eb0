# METADATA
# title: Every service names its team
# description: At three in the morning somebody has to know whom to call.
# custom:
#   way_out: >-
#     Write `deploy: {labels: {team: NAME}}` with the name of your team.
package custom.team_label

deny contains {
	"service": service.name,
	"path": sprintf("%s.labels", [service.name]),
	"message": sprintf("%s has no label team.", [service.name]),
} if {
	some service in input.stack.services
	not service.labels.team
}
