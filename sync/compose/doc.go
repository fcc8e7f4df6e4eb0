// Package compose turns a checkout of Compose files into desired state: Load reads a tree and returns a [manifest.Bundle].
//
// The flow of a load:
//
//	layout   which directories are stacks, by their Compose files and the optional gitops.yaml
//	scan     each file a stack consists of is parsed, bounded, checked against the Compose schema, and its paths confined to the tree
//	render   compose-go merges the files; every key it met is honoured, or told of (the support table)
//	convert  the project becomes a [manifest.Stack]: real names, mounts, policies, and the place in a file of each field
//	check    what belongs together fits: references, ports, names, across services and stacks
//
// A unit is one YAML file in the role it plays for a stack: the stack's own, an override, an included file, or one that is extended.
// A Problem names file, line and the way out. A stack with an error is left out of Bundle.Stacks; the others are not touched by it.
//
// compose-go is a parser, no sandbox: it reads any path a file names. So each path is resolved here first, through its symbolic links,
// and must lie in the tree. It also reads nothing from the environment of this process, but for the variables handed to it.
//
// This package is the only one that knows compose-go, and none of its types leave it.
package compose
