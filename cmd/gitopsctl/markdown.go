package main

import (
	"fmt"
	"html"
	"io"
	"strings"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Limits of a review comment: forges cut off long ones, and nobody reads them.
const (
	maxSteps  = 100 // rows of one table
	maxFields = 200
	maxText   = 300 // runes of one value
)

// marker lets a script find the comment again that it wrote before.
const marker = "<!-- gitopsd plan -->"

// writeMarkdown writes a plan as a comment for a pull request. Whatever comes from files, commits or the daemon goes through md or code, so
// that it can neither break out of its place nor bring links, images, mentions or HTML.
func writeMarkdown(w io.Writer, p api.Preview) {
	of := md(p.Source)
	if p.Revision.Commit != "" {
		of += " " + code(p.Revision.String())
	}
	sign := "✅"
	if p.Denied() {
		sign = "❌"
	} else if p.Summary.Waiting > 0 || len(p.Findings) > 0 {
		sign = "⚠️"
	}
	fmt.Fprintf(w, "%s\n### %s Plan of %s\n\n**%s** %s\n", marker, sign, of, verdictOf(p), counts(p.Summary))
	if len(p.Steps) > 0 {
		fmt.Fprint(w, "\n| | Action | What | Why |\n|---|---|---|---|\n")
		for _, s := range p.Steps[:min(len(p.Steps), maxSteps)] {
			m := marks[s.Action]
			fmt.Fprintf(w, "| %s | %s | %s | %s |\n", code(m.sign), md(string(s.Action)), code(where(s)), md(s.Reason.Message))
		}
		if n := len(p.Steps) - maxSteps; n > 0 {
			fmt.Fprintf(w, "\nAnd %d more steps.\n", n)
		}
	}
	markdownFields(w, p.Steps)
	markdownProblems(w, "Policy", p.Findings)
	markdownProblems(w, "Problems", p.Problems)
	if len(p.Data) > 0 {
		fmt.Fprint(w, "\n#### Data\n\n| Stack | Name | What happens |\n|---|---|---|\n")
		for _, d := range p.Data {
			fmt.Fprintf(w, "| %s | %s | %s |\n", code(d.Stack), code(d.Name), md(d.Message))
		}
	}
	if len(p.Hardening) > 0 {
		fmt.Fprintf(w, "\n<details><summary>%s that nobody wrote</summary>\n\n| Service | Value | Give it back with |\n|---|---|---|\n",
			plural(len(p.Hardening), "restriction"))
		for _, h := range p.Hardening {
			fmt.Fprintf(w, "| %s | %s | %s |\n", code(h.Stack+"/"+h.Service), md(h.Value), code(h.GiveBack))
		}
		fmt.Fprint(w, "\n</details>\n")
	}
}

func where(s reconcile.Step) string {
	if s.Node == "" {
		return subject(s)
	}
	return subject(s) + " on " + s.Node
}

// markdownFields writes the differences of fields, collapsed, one block for a step.
func markdownFields(w io.Writer, steps []reconcile.Step) {
	n := 0
	for _, s := range steps {
		if len(s.Fields) == 0 {
			continue
		}
		if n >= maxFields {
			fmt.Fprint(w, "\nMore fields differ; `gitopsctl plan` lists them all.\n")
			return
		}
		fmt.Fprintf(w, "\n<details><summary>%s: %s</summary>\n\n| Field | Now | Then |\n|---|---|---|\n",
			html.EscapeString(short(cleanLine(subject(s)))), plural(len(s.Fields), "field"))
		for _, f := range s.Fields {
			if n++; n > maxFields {
				break
			}
			f = f.Mask()
			fmt.Fprintf(w, "| %s | %s | %s |\n", code(f.Path), code(f.Old), code(f.New))
		}
		fmt.Fprint(w, "\n</details>\n")
	}
}

func markdownProblems(w io.Writer, title string, ps []manifest.Problem) {
	if len(ps) == 0 {
		return
	}
	fmt.Fprintf(w, "\n#### %s\n\n| Severity | Rule | Where | What |\n|---|---|---|---|\n", title)
	for _, p := range ps[:min(len(ps), maxSteps)] {
		at := p.Stack
		if p.Service != "" {
			at += "/" + p.Service
		}
		if p.File != "" {
			at = p.File
			if p.Line > 0 {
				at += fmt.Sprintf(":%d", p.Line)
			}
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", md(string(p.Severity)), code(p.Rule), code(at), md(p.Message))
	}
	if n := len(ps) - maxSteps; n > 0 {
		fmt.Fprintf(w, "\nAnd %d more.\n", n)
	}
}

func short(s string) string {
	if r := []rune(s); len(r) > maxText {
		return string(r[:maxText]) + "…"
	}
	return s
}

// md writes text so that Markdown and HTML find nothing of theirs in it. Every letter with a meaning becomes a character reference, which
// both only turn back when they show it. An invisible space breaks mentions, which forges look for in what is shown, too.
func md(s string) string { return strings.ReplaceAll(escape(s), "&#64;", "&#64;\u200b") }

// code writes text as code that stands in a table: HTML's code, since Markdown's own can't hold every letter. Forges link nothing in it.
func code(s string) string {
	if s == "" {
		return ""
	}
	return "<code>" + escape(s) + "</code>"
}

func escape(s string) string {
	s = short(cleanLine(s))
	var b strings.Builder
	for i, r := range s {
		switch {
		case strings.ContainsRune("\\`*_[]()<>|&~\"'$@#!", r),
			r == ':' && strings.HasPrefix(s[i:], "://"), // an address becomes a link by itself
			r == '.' && strings.HasSuffix(strings.ToLower(s[:i]), "www"):
			fmt.Fprintf(&b, "&#%d;", r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
