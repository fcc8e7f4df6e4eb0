// Package api is how people and programs talk to a daemon: JSON over HTTP/1.1, on a unix socket that only root may open.
//
// The flow: [Server] answers reads from a View of the facts, sends writes as an [Operation] to its [Backend], asks [Live] what runs right
// now and [Planner] what a revision would change. [Client] is the other side, and hides HTTP from its callers. Both use the wire types of
// this package and those of reconcile, state and manifest, so that the terminal, a script and the log tell of a thing in the same words.
//
// Words: an operation is a write with an id of the caller's choice, so that it may be sent again; a feed is an answer without end, of
// server-sent events (text/event-stream) or of JSON lines; a session is one exec, on a connection that left HTTP behind (see [Frame]).
//
// Routes, all below /v1 but /metrics:
//
//	GET   version, status, history, volumes, secrets, events   facts, from the View
//	GET   drift, inspect, logs                                 what runs, from Live
//	GET   changes, progress, events?watch=1                    feeds: an answer goes on while the View moves
//	POST  operations                                           a write
//	POST  plan, plan/revision, sources/test                    questions to the Planner
//	POST  exec                                                 a session
//
// Errors are {"error": sentence, "reason": id, "names": [what there is]}; the HTTP status is the [Kind]. No answer holds a secret's value:
// values of fields that are named like a secret are masked before they leave the server, and what secret.set brings is never sent back.
package api
