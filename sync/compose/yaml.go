package compose

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// The bounds of one YAML file. Real Compose files have at most a few thousand values and are some ten levels deep.
const (
	maxNodes = 100_000 // values as compose-go counts them
	maxDepth = 100
)

// fault is something wrong in one file.
type fault struct {
	line int
	path string // of the value, where a path says more than the line
	rule string
	msg  string
}

func (f *fault) at(path string) *fault {
	f.path = path
	return f
}

func faultf(line int, rule, format string, args ...any) *fault {
	return &fault{line: line, rule: rule, msg: fmt.Sprintf(format, args...)}
}

var yamlLine = regexp.MustCompile(`line (\d+)(?:, column \d+)?:? ?`)

// parseYAML reads the one document of a file. It returns nil without a fault for a file that holds nothing.
func parseYAML(data []byte) (root *yaml.Node, f *fault) {
	// The library is fuzzed by its authors, but a panic on hostile bytes must not end the agent.
	defer func() {
		if r := recover(); r != nil {
			root, f = nil, faultf(0, "yaml-syntax", "the file can't be read as YAML: the parser failed on it")
		}
	}()
	if i := bytes.IndexByte(data, 0); i >= 0 && !utf16(data) {
		return nil, faultf(1+bytes.Count(data[:i], []byte("\n")), "yaml-syntax", "the file holds a NUL byte; it is not a text file")
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, yamlFault(err)
	}
	if err := dec.Decode(&second); err == nil {
		return nil, faultf(second.Line, "yaml-documents",
			"the file holds more than one YAML document; put each stack into a file of its own, or remove the line ---")
	} else if !errors.Is(err, io.EOF) {
		return nil, yamlFault(err)
	}
	if len(doc.Content) == 0 || isNull(doc.Content[0]) {
		return nil, nil
	}
	root = doc.Content[0]
	if f := (&inspector{sizes: map[*yaml.Node]int{}}).inspect(root); f != nil {
		return nil, f
	}
	if root.Kind != yaml.MappingNode {
		return nil, faultf(root.Line, "yaml-syntax", "the file must hold keys and values at its top, such as services:")
	}
	return root, nil
}

func utf16(data []byte) bool {
	return bytes.HasPrefix(data, []byte{0xff, 0xfe}) || bytes.HasPrefix(data, []byte{0xfe, 0xff})
}

// yamlFault makes a sentence with a line from a parser's error.
func yamlFault(err error) *fault {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	text = strings.TrimPrefix(text, "load errors: ")
	text, _, _ = strings.Cut(text, "\n")
	line := 0
	// The parser writes where the surrounding thing began, then where it went wrong.
	if all := yamlLine.FindAllStringSubmatchIndex(text, -1); all != nil {
		m := all[len(all)-1]
		line, _ = strconv.Atoi(text[m[2]:m[3]])
		if strings.HasPrefix(text, "while parsing") {
			line++ // yaml v4.0.0-rc.4 counts from 0 in errors of its parser, from 1 in those of its scanner
		}
		if rest := strings.TrimSpace(text[m[1]:]); rest != "" {
			text = rest
		}
	}
	if strings.Contains(text, "cannot start any token") {
		text += "; indent with spaces, not with tabs"
	}
	return faultf(line, "yaml-syntax", "this is not valid YAML: %s", text)
}

// inspector checks the bounds and the keys of a document, and what its aliases would expand to.
type inspector struct {
	nodes int
	sizes map[*yaml.Node]int // expanded size; -1 while it is being computed
}

func (in *inspector) inspect(root *yaml.Node) *fault {
	_, f := in.size(root, 0)
	return f
}

func (in *inspector) size(n *yaml.Node, depth int) (int, *fault) {
	if depth > maxDepth {
		return 0, faultf(n.Line, "yaml-limit", "the file is nested more than %d levels deep", maxDepth)
	}
	if n.Kind == yaml.AliasNode {
		size, seen := in.sizes[n.Alias]
		if seen && size < 0 {
			return 0, faultf(n.Line, "yaml-cycle", "the alias *%s is part of what it stands for", n.Value)
		}
		if !seen {
			return 0, faultf(n.Line, "yaml-syntax", "the alias *%s stands for nothing", n.Value)
		}
		return size, nil
	}
	if in.nodes++; in.nodes > maxNodes {
		return 0, faultf(n.Line, "yaml-limit", "the file holds more than %d values", maxNodes)
	}
	in.sizes[n] = -1
	total := 1
	keys := map[string]int{}
	for i, child := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 0 {
			if f := checkKey(child, keys); f != nil {
				return 0, f
			}
		}
		size, f := in.size(child, depth+1)
		if f != nil {
			return 0, f
		}
		if total = addCapped(total, size); total > maxNodes {
			return 0, faultf(n.Line, "yaml-limit", "the aliases of the file expand to more than %d values", maxNodes)
		}
	}
	in.sizes[n] = total
	return total, nil
}

func addCapped(a, b int) int {
	if a > math.MaxInt-b {
		return math.MaxInt
	}
	return a + b
}

func checkKey(key *yaml.Node, seen map[string]int) *fault {
	if key.Kind == yaml.AliasNode {
		key = key.Alias
	}
	if key.Kind != yaml.ScalarNode {
		return faultf(key.Line, "yaml-syntax", "a key must be a plain text, not a list or a mapping")
	}
	if tag := key.ShortTag(); tag != "!!str" && tag != "!!merge" {
		return faultf(key.Line, "yaml-syntax", "the key %s is no text (%s); put it in quotes", key.Value, strings.TrimPrefix(tag, "!!"))
	}
	if first, twice := seen[key.Value]; twice {
		return faultf(key.Line, "yaml-duplicate", "the key %q is here for the second time; it is first in line %d", key.Value, first)
	}
	seen[key.Value] = key.Line
	return nil
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// target follows an alias.
func target(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// entry finds a key of a mapping, through merge keys. It returns the nodes of the key and of the value.
func entry(n *yaml.Node, key string) (k, v *yaml.Node) {
	n = target(n)
	if n == nil || n.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if target(n.Content[i]).Value == key {
			return n.Content[i], n.Content[i+1]
		}
	}
	for _, m := range merged(n) {
		if k, v := entry(m, key); k != nil {
			return k, v
		}
	}
	return nil, nil
}

// merged lists what `<<` brings into a mapping, first one first.
func merged(n *yaml.Node) []*yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].ShortTag() != "!!merge" {
			continue
		}
		v := target(n.Content[i+1])
		if v.Kind == yaml.SequenceNode {
			var out []*yaml.Node
			for _, e := range v.Content {
				out = append(out, target(e))
			}
			return out
		}
		return []*yaml.Node{v}
	}
	return nil
}

// plain turns a document into maps, lists and values, as a decoder would: aliases and merge keys are resolved, values marked !reset
// are left out. Each text goes through the function.
func plain(n *yaml.Node, text func(n *yaml.Node) string) any {
	n = target(n)
	switch n.Kind {
	case yaml.MappingNode:
		out := map[string]any{}
		fill(out, n, text)
		return out
	case yaml.SequenceNode:
		out := make([]any, 0, len(n.Content))
		for _, e := range n.Content {
			if target(e).Tag != "!reset" {
				out = append(out, plain(e, text))
			}
		}
		return out
	}
	if n.ShortTag() == "!!str" || n.Tag == "!override" {
		return text(n)
	}
	var v any
	if err := n.Decode(&v); err != nil {
		return n.Value
	}
	switch v.(type) {
	case bool, int, int64, uint64, float64:
		return v
	case nil:
		return nil
	}
	return text(n) // a date and the like: Compose knows only texts, numbers and truth values
}

func fill(out map[string]any, n *yaml.Node, text func(n *yaml.Node) string) {
	sources := merged(n)
	for i := len(sources) - 1; i >= 0; i-- {
		if sources[i].Kind == yaml.MappingNode {
			fill(out, sources[i], text)
		}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := target(n.Content[i]), n.Content[i+1]
		if key.ShortTag() == "!!merge" || target(value).Tag == "!reset" {
			continue
		}
		out[key.Value] = plain(value, text)
	}
}
