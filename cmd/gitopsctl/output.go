package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// structured says whether the output is for a program.
func (c *cli) structured() bool { return c.output == "json" || c.output == "yaml" }

// only refuses output forms that a command does not have.
func (c *cli) only(forms ...string) error {
	for _, f := range append(forms, "", "json", "yaml") {
		if c.output == f {
			return nil
		}
	}
	return fmt.Errorf("-o %s: this command does not print so; write -o %s", c.output, strings.Join(append(forms, "json", "yaml"), ", "))
}

// printData writes a value as JSON or YAML, with the same names and order in both.
func (c *cli) printData(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("write %s: %w", c.output, err)
	}
	out := escapeJSON(b.Bytes())
	if c.output == "yaml" {
		var n yaml.Node
		if err := yaml.Unmarshal(out, &n); err != nil {
			return fmt.Errorf("write yaml: %w", err)
		}
		blockStyle(&n)
		y, err := yaml.Marshal(&n)
		if err != nil {
			return fmt.Errorf("write yaml: %w", err)
		}
		out = escapeJSON(y)
	}
	_, err := c.out.Write(out)
	return err
}

// printLine writes a value as one line of JSON: for feeds.
func (c *cli) printLine(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.out, "%s\n", escapeJSON(b))
	return err
}

// escapeJSON writes what a terminal might obey, and JSON (and YAML in double quotes) lets pass, as \u escapes.
func escapeJSON(b []byte) []byte {
	if !bytes.ContainsFunc(b, func(r rune) bool { return r != '\n' && hostile(r) }) {
		return b
	}
	var out bytes.Buffer
	for _, r := range string(b) {
		if r != '\n' && hostile(r) {
			for _, u := range utf16Units(r) {
				fmt.Fprintf(&out, `\u%04x`, u)
			}
			continue
		}
		out.WriteRune(r)
	}
	return out.Bytes()
}

func utf16Units(r rune) []rune {
	if r < 0x10000 {
		return []rune{r}
	}
	r -= 0x10000
	return []rune{0xd800 + r>>10, 0xdc00 + r&0x3ff}
}

// blockStyle makes YAML of what was read as JSON: no braces but for what is empty, quotes only where they are needed.
func blockStyle(n *yaml.Node) {
	if len(n.Content) > 0 {
		n.Style &^= yaml.FlowStyle
	}
	// In double quotes alone can escapes stand.
	if n.Kind == yaml.ScalarNode && !strings.ContainsFunc(n.Value, func(r rune) bool { return r != '\n' && hostile(r) }) {
		n.Style &^= yaml.DoubleQuotedStyle
	}
	for _, child := range n.Content {
		blockStyle(child)
	}
}

// hostile says whether a terminal may obey a rune, or show a text as another than it is: control characters, and those that turn the
// direction of writing.
func hostile(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029' || r == '\ufeff' || r == utf8.RuneError
}

// cleanLine makes text of others fit to be shown in a line: line ends and tabs become spaces, what a terminal might obey is written out.
func cleanLine(s string) string {
	return clean(strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' || r == '\t' }), " "))
}

// cleanText is cleanLine for text of several lines.
func cleanText(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = clean(strings.ReplaceAll(strings.TrimSuffix(l, "\r"), "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

func clean(s string) string {
	if strings.IndexFunc(s, hostile) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case !hostile(r):
			b.WriteRune(r)
		case r == utf8.RuneError:
			b.WriteString("?")
		case r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// style is a colour of the terminal.
type style string

// The styles. They follow the terminal's own sixteen colours.
const (
	plain style = ""
	bold  style = "1"
	good  style = "32"
	bad   style = "31"
	warn  style = "33"
	faint style = "2"
)

// paint colours a text on a terminal.
func (c *cli) paint(s style, text string) string {
	if s == plain || c.noColor || !c.outTTY || text == "" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// styleOf is the colour of a status word.
func styleOf(word string) style {
	switch word {
	case string(reconcile.Synced), string(reconcile.Healthy), string(state.Deployed), api.SourceFollowing, string(state.HealthHealthy),
		string(state.PhaseComplete):
		return good
	case string(reconcile.Blocked), string(reconcile.Failed), string(reconcile.Degraded), string(state.Stalled), api.SourceFailing,
		string(state.PhaseFailed), string(state.HealthUnhealthy), string(reconcile.Missing), string(manifest.Error):
		return bad
	case string(reconcile.OutOfSync), string(reconcile.Progressing), string(reconcile.Suspended), string(state.RolledBack),
		string(state.Aborted), api.SourceWaiting, string(manifest.Warn), string(state.HealthStarting):
		return warn
	}
	return plain
}

// when writes a time: how long ago on a terminal, in full elsewhere.
func (c *cli) when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	if !c.outTTY {
		return t.UTC().Format(time.RFC3339)
	}
	d := c.now().Sub(t)
	switch {
	case d < 0: // log time may be ahead of this clock
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// plural counts things: 1 task, 2 tasks.
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// dash stands for nothing.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// revision writes a revision, or a dash.
func revision(r manifest.Revision) string {
	if r.Commit == "" {
		return "-"
	}
	return r.String()
}
