package compose

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/dotenv"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// variables are what a file's ${…} can name, and the record of those that it names in vain. The environment of this process never is
// among them.
type variables struct {
	values  map[string]string
	missing map[string]lack // ${X:?}: nothing works without it
	unset   map[string]lack // ${X}: becomes nothing
	grown   *int            // bytes that all texts expanded to so far
}

// maxExpanded bounds what variables expand to, in bytes: a few lines that name each other would else fill the memory.
const maxExpanded = 4 << 20

var errExpanded = fmt.Errorf("the variables expand to more than %d MiB; name fewer of them, or shorter ones", maxExpanded>>20)

// lack is a variable that has no value, and the first place that asks for it.
type lack struct {
	pos    manifest.Pos
	reason string // what the file says about it
}

func newVariables(values map[string]string) *variables {
	return &variables{values: values, missing: map[string]lack{}, unset: map[string]lack{}, grown: new(int)}
}

// with is the same record for other values.
func (v *variables) with(values map[string]string) *variables {
	return &variables{values: values, missing: v.missing, unset: v.unset, grown: v.grown}
}

func (v *variables) lookup(name string) (string, bool) {
	s, ok := v.values[name]
	return s, ok
}

func (l lack) before(m lack) bool {
	if l.pos.File != m.pos.File {
		return l.pos.File < m.pos.File
	}
	return l.pos.Line < m.pos.Line
}

func record(in map[string]lack, name string, l lack) {
	if old, ok := in[name]; !ok || l.before(old) {
		in[name] = l
	}
}

// expand replaces the variables of a text by Compose's rules. What is missing is recorded and taken as empty. The error tells a text
// that can't be read.
func (v *variables) expand(s string, pos manifest.Pos) (string, error) {
	if !strings.Contains(s, "$") {
		return s, nil
	}
	x := expander{vars: v, pos: pos, text: s}
	out, err := x.run(s)
	if *v.grown += len(out); err == nil && *v.grown > maxExpanded {
		return "", errExpanded
	}
	return out, err
}

// substitute is expand in the form that compose-go calls. All that is missing was recorded before.
func (v *variables) substitute(s string, lookup func(string) (string, bool)) (string, error) {
	if !strings.Contains(s, "$") {
		return s, nil
	}
	x := expander{vars: &variables{missing: map[string]lack{}, unset: map[string]lack{}}, get: lookup, text: s}
	return x.run(s)
}

type expander struct {
	vars *variables
	get  func(string) (string, bool) // instead of vars.lookup
	pos  manifest.Pos
	text string // the whole, for errors
}

func (x *expander) lookup(name string) (string, bool) {
	if x.get != nil {
		return x.get(name)
	}
	return x.vars.lookup(name)
}

func nameLen(s string) int {
	for i := 0; i < len(s); i++ {
		c := s[i]
		letter := c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return i
		}
	}
	return len(s)
}

func (x *expander) run(s string) (string, error) {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 {
			b.WriteString(s)
			return b.String(), nil
		}
		b.WriteString(s[:i])
		s = s[i+1:]
		if b.Len() > maxExpanded {
			return "", errExpanded
		}
		switch {
		case strings.HasPrefix(s, "$"):
			b.WriteByte('$')
			s = s[1:]
		case strings.HasPrefix(s, "{"):
			end := closing(s)
			if end < 0 {
				return "", x.invalid()
			}
			out, err := x.braced(s[1:end])
			if err != nil {
				return "", err
			}
			b.WriteString(out)
			s = s[end+1:]
		default:
			n := nameLen(s)
			if n == 0 {
				b.WriteByte('$') // $1, $/ and the like are no variables
				continue
			}
			b.WriteString(x.value(s[:n]))
			s = s[n:]
		}
	}
}

// closing finds the brace that ends the one at the start of s.
func closing(s string) int {
	depth := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}

func (x *expander) invalid() error {
	return fmt.Errorf("the text %q holds a $ that can't be read as a variable; write $$ for a plain $", shorten(x.text))
}

func (x *expander) value(name string) string {
	v, ok := x.lookup(name)
	if !ok {
		record(x.vars.unset, name, lack{pos: x.pos})
	}
	return v
}

// braced expands what is between ${ and }.
func (x *expander) braced(s string) (string, error) {
	n := nameLen(s)
	if n == 0 {
		return "", x.invalid()
	}
	name, rest := s[:n], s[n:]
	if rest == "" {
		return x.value(name), nil
	}
	v, ok := x.lookup(name)
	if strings.HasPrefix(rest, ":") {
		rest = rest[1:]
		ok = ok && v != ""
	}
	if rest == "" {
		return "", x.invalid()
	}
	op, word := rest[0], rest[1:]
	switch op {
	case '-':
		if ok {
			return v, nil
		}
		return x.run(word)
	case '+':
		if ok {
			return x.run(word)
		}
		return v, nil
	case '?':
		if ok {
			return v, nil
		}
		reason, err := x.run(word)
		if err != nil {
			return "", err
		}
		record(x.vars.missing, name, lack{pos: x.pos, reason: reason})
		return "", nil
	}
	return "", x.invalid()
}

// shorten cuts a text for a message, so that no file's contents fill a screen.
func shorten(s string) string {
	s, _, cut := strings.Cut(s, "\n")
	if r := []rune(s); len(r) > 60 {
		s, cut = string(r[:60]), true
	}
	if cut {
		s += "…"
	}
	return s
}

// problems makes one error of all required variables that have no value, and one notice of the others.
func (v *variables) problems(stack string) []manifest.Problem {
	var out []manifest.Problem
	if len(v.missing) > 0 {
		names := sortedLacks(v.missing)
		var list []string
		for _, n := range names {
			l := v.missing[n]
			item := fmt.Sprintf("%s (%s:%d", n, l.pos.File, l.pos.Line)
			if l.reason != "" {
				item += ", " + strconv.Quote(shorten(l.reason))
			}
			list = append(list, item+")")
		}
		first := v.missing[names[0]].pos
		out = append(out,
			manifest.Problem{Severity: manifest.Error, Rule: "variable-required", Stack: stack, File: first.File, Line: first.Line,
				Message: fmt.Sprintf("%s no value: %s; set %s in .env beside the file, under vars: in gitops.yaml, or with --var NAME=VALUE",
					plural(len(list), "this required variable has", "these required variables have"), strings.Join(list, ", "),
					plural(len(list), "it", "them"))})
	}
	unset := map[string]lack{}
	for n, l := range v.unset {
		if _, worse := v.missing[n]; !worse {
			unset[n] = l
		}
	}
	if len(unset) > 0 {
		names := sortedLacks(unset)
		first := unset[names[0]].pos
		out = append(out,
			manifest.Problem{Severity: manifest.Notice, Rule: "variable-unset", Stack: stack, File: first.File, Line: first.Line,
				Message: fmt.Sprintf("not set, so empty: %s; set %s in .env beside the file, under vars: in gitops.yaml, "+
					"give a default as ${NAME:-value}, or write $$ for a plain $",
					strings.Join(names, ", "), plural(len(names), "it", "them"))})
	}
	return out
}

func sortedLacks(m map[string]lack) []string {
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		if m[a].before(m[b]) {
			return -1
		}
		if m[b].before(m[a]) {
			return 1
		}
		return strings.Compare(a, b)
	})
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

var dotenvLine = regexp.MustCompile(`line (\d+)`)

// parseEnv reads a file of KEY=VALUE lines. The parser's own message is not passed on: it quotes values.
func parseEnv(file string, data []byte, into map[string]string, format string, lookup func(string) (string, bool)) *fault {
	if line := explodes(data); line > 0 {
		return faultf(line, "env-file", "%v", errExpanded)
	}
	err := dotenv.ParseWithFormat(strings.NewReader(string(data)), "", into, lookup, format)
	if err == nil {
		return nil
	}
	if strings.HasPrefix(err.Error(), "unsupported env_file format") {
		return faultf(0, "env-file", "the format %q of the env_file %s is not known; leave it out", format, file)
	}
	line := 0
	if m := dotenvLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ = strconv.Atoi(m[1])
	}
	if strings.Contains(err.Error(), "required variable") {
		return faultf(line,
			"env-file", "a required variable (${NAME:?}) has no value; set it in an earlier line, or under vars: in gitops.yaml")
	}
	return faultf(line, "env-file", "the line is not NAME=VALUE")
}

var (
	envName = regexp.MustCompile(`^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_.-]*)\s*=`)
	envUse  = regexp.MustCompile(`\$\{?([A-Za-z_][A-Za-z0-9_]*)`)
)

// explodes finds the line of an env_file by which its variables, that name each other, may expand to more than maxExpanded. The parser has no bound of its own.
// It counts too much where quotes keep a variable from being read, which no honest file notices.
func explodes(data []byte) int {
	size, name, total := map[string]int{}, "", 0
	for i, line := range strings.Split(string(data), "\n") {
		more := len(line)
		for _, use := range envUse.FindAllStringSubmatch(line, -1) {
			more += size[use[1]]
		}
		if m := envName.FindStringSubmatch(line); m != nil {
			name, size[m[1]] = m[1], 0
		}
		size[name] += more // a line without a name goes on with the value before
		if total += more; total > maxExpanded {
			return i + 1
		}
	}
	return 0
}
