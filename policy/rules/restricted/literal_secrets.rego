# METADATA
# title: No secrets in environment variables
# description: >-
#   A value in `environment` or in `.env` is in Git for ever, and every program of the container can read it. Judged by the variable's
#   name, so it may be wrong: the values of switches, numbers, files and addresses without a password are left alone.
# custom:
#   way_out: >-
#     Use `secrets:` and the variable's _FILE form where the image has one (POSTGRES_PASSWORD_FILE: /run/secrets/db), with the
#     value from `gitopsctl secret set`.
package restricted.literal_secrets

deny contains data.lib.finding(c, sprintf("env.%s", [name]), sprintf("%s gets what looks like a secret in %s.", [c.container.name, name])) if {
	some c in data.lib.containers
	some name in c.container.secretEnv
}
