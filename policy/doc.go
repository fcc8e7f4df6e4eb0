// Package policy judges what a commit wants to run, before anything of it runs.
//
// # Flow
//
// [LoadSource] reads a policy source, [New] compiles it together with the built-in rules into an [Engine], [Harden] writes into a stack
// what nobody wrote, and [Engine.Review] judges the result: at the revision gate when a commit was rendered, and at the plan gate before
// a revision, a prune or a person's word begins to change what runs, if any rule asks about that ([Engine.JudgesPlans]). The [Verdict]
// names the hash of the policy that made it: under another one, and at the time that [Engine.Renew] tells, the caller reviews again. A
// review depends on its [Input] alone, the time in it too, so the CLI, a pull request and the agent give the same answer.
//
// # Words
//
// A rule is one Rego file: its annotations hold title, reason and way out, its package the id (package baseline.host_paths is the rule
// baseline/host-paths). A set is a group of rules: baseline is what nobody should run by accident, restricted is what a careful owner
// demands, custom are the users' own. A finding is what a rule has against one field of a stack. A level says what findings do: enforce
// denies, warn tells, off does not ask.
//
// # Who may loosen
//
// The policy source is a directory of its own, in a repository that the owners of the machines guard (or on the machine), because a pull
// request that can change both an application and the policy that judges it is judged by nobody. So only the policy source holds
// exemptions, own rules and levels below the default. The level of a stack is the stricter one of two: what the policy source says
// (policy.yaml: for the stack, else for all; where it is silent, policy.level of the node's configuration; in the end enforce) and what
// the stack's repository says (`policy:` in gitops.yaml). A repository that asks for less gets a notice that says where it can be had.
// Who has no policy source and wants to loosen sets policy.level on the node, or points the node at a directory with an exemptions.yaml.
//
// # The policy source
//
// policy.yaml, exemptions.yaml and any number of *.rego files, all optional:
//
//	# policy.yaml
//	level: enforce               # for stacks that are not named below: enforce, warn or off
//	sets: {restricted: warn}     # by set; baseline and custom are enforced, restricted is off unless it says otherwise
//	registries: [ghcr.io/acme]   # what restricted/registries trusts
//	stacks:
//	  monitoring: {level: warn, sets: {restricted: off}}
//
//	# exemptions.yaml
//	exemptions:
//	  - rule: baseline/engine-sockets
//	    stack: proxy
//	    service: traefik         # without it, all services
//	    reason: Traefik reads its routes from the socket.
//	    until: 2027-01-31        # the last day on which it counts (UTC)
//
// # Own rules
//
// A rule is a file whose package is custom and a name, with a title. It puts findings into deny or warn; a package below custom that has
// neither is a library. A finding is an object, of which every key may be missing, or just the message:
//
//	# METADATA
//	# title: Every service names its team
//	# description: At three in the morning somebody has to know whom to call.
//	# custom:
//	#   way_out: Write a label team below deploy.
//	package custom.team_label
//
//	deny contains {
//		"service": service.name,                           # also "container"
//		"path": sprintf("%s.labels", [service.name]),      # gives the finding its file and line
//		"message": sprintf("%s has no label team.", [service.name]),
//		"way_out": "…",                                    # instead of the rule's own
//	} if {
//		some service in input.stack.services
//		not service.labels.team
//	}
//
// All that a rule may know is its input:
//
//	input.gate      "revision" or "plan"
//	input.now       the time, RFC 3339 in UTC
//	input.stack     the stack: the fields of [manifest.Stack] and all below it, under their JSON names; fields that are not set are missing.
//	                Sizes are texts ("64MiB": units.parse_bytes reads them), and so are cores ("0.5": to_number) and durations
//	                ("10s": time.parse_duration_ns).
//	                Values that look like secrets by their name are "***"
//	  …containers[_].imageRef    {name, tag, digest}: docker.io/library/nginx, 1.29, "" for what is not written
//	  …containers[_].secretEnv   names of the variables whose value looks like a secret
//	  …mounts[_].host            the real path of the host that a bind (or a data directory below dataRoot) shows
//	  …mounts[_].escapes         true: the source climbs out of its place by ..
//	  .volumes[_].host           the real path of the host that the options of a volume hide
//	input.images    image reference (as containers have it) to {user}, for images whose configuration is known, or to {trouble}: why the registry
//	                did not tell it
//	input.plan      at the plan gate, all that begins to change in the stack, by service:
//	                {action: start, replace, update (in place) or remove; stack; service, missing when the whole stack is removed;
//	                cause: revision, prune or person}. Heals, evacuations, automatic rollbacks and what follows from a change that was
//	                allowed are never judged
//	input.config    {registries, defaultCapabilities}
//
// A rule that reads input.plan judges what is done. Every other rule judges what would run, so at the plan gate its findings count only for
// services of which the plan starts something: a stack that breaks a rule can always be removed.
//
// The compiler knows this input, so a field that does not exist is an error when the rule is loaded. Functions that reach out of the
// input (network, clock, random numbers, environment) do not exist. A rule that fails, and one that takes longer than the time limit,
// denies with an error.
package policy
