package compose

import (
	"fmt"
	"slices"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// sharedVolumes warns where stacks declare one volume as theirs, by `name:`. Both get the same data, and it is removed with neither as long as the other uses it; but
// only one of them can have meant it to be its own.
func sharedVolumes(b *manifest.Bundle) []manifest.Problem {
	stacks := map[string][]*manifest.Stack{}
	for i := range b.Stacks {
		for _, v := range b.Stacks[i].Volumes {
			if v.Own() {
				stacks[v.Name] = append(stacks[v.Name], &b.Stacks[i])
			}
		}
	}
	var out []manifest.Problem
	for i := range b.Stacks {
		st := &b.Stacks[i]
		for _, v := range st.Volumes {
			of := stacks[v.Name]
			other := slices.IndexFunc(of, func(o *manifest.Stack) bool { return o != st })
			if !v.Own() || other < 0 {
				continue
			}
			pos := st.Origin("volumes." + v.Key)
			out = append(out, manifest.Problem{Severity: manifest.Warn, Rule: "volume-shared", Stack: st.Name, File: pos.File, Line: pos.Line,
				Message: fmt.Sprintf("the volume %s is declared by the stack %s too, and both use the same data; write external: true in the one that it does not belong to", v.Name, of[other].Name)})
		}
	}
	return out
}
