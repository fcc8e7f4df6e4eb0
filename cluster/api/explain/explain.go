// Package explain holds a paragraph for each id that gitopsd gives as a reason, and for each rule that a problem of a file names: what it
// means and what a person can do. Rules of policy are not here, they tell of themselves ([github.com/gitopsd/gitopsd/policy.Rule]).
//
// The texts are in reasons.md: a heading `## id: title`, then the text. A test reads the whole program for ids and fails on one without a
// text, and on a text without an id.
package explain

import (
	_ "embed"
	"slices"
	"strings"
	"sync"
)

//go:embed reasons.md
var source string

// Entry is what there is to say of an id.
type Entry struct {
	ID    string `json:"id"`
	Title string `json:"title"` // a short sentence, without the names of a case
	Text  string `json:"text"`  // paragraphs: what it means, and the way out
}

var entries = sync.OnceValue(func() []Entry { return parse(source) })

// All lists the entries by id.
func All() []Entry { return slices.Clone(entries()) }

// Of finds the entry of an id.
func Of(id string) (Entry, bool) {
	i, ok := slices.BinarySearchFunc(entries(), id, func(e Entry, id string) int { return strings.Compare(e.ID, id) })
	if !ok {
		return Entry{}, false
	}
	return entries()[i], true
}

func parse(text string) []Entry {
	var out []Entry
	for _, section := range strings.Split("\n"+text, "\n## ")[1:] {
		head, body, _ := strings.Cut(section, "\n")
		id, title, _ := strings.Cut(head, ": ")
		body, _, _ = strings.Cut(body, "\n# ") // the heading of the next chapter
		out = append(out, Entry{ID: id, Title: strings.TrimSpace(title), Text: strings.TrimSpace(body)})
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.ID, b.ID) })
	return out
}
