package compose

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/interpolation"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/schema"
	"github.com/compose-spec/compose-go/v2/template"
	"github.com/compose-spec/compose-go/v2/tree"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
	"go.yaml.in/yaml/v4"
	"golang.org/x/text/language"
	"golang.org/x/text/message"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// composeSchema is the schema of the Compose specification, compiled once.
var composeSchema = sync.OnceValues(func() (*jsonschema.Schema, error) {
	c := jsonschema.NewCompiler()
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(schema.Schema))
	if err != nil {
		return nil, fmt.Errorf("read the Compose schema: %w", err)
	}
	if err := c.AddResource("compose-spec.json", doc); err != nil {
		return nil, fmt.Errorf("read the Compose schema: %w", err)
	}
	return c.Compile("compose-spec.json")
})

// casts turn texts that come from variables into numbers and truth values, where the specification wants these.
var casts = sync.OnceValue(func() map[tree.Path]interpolation.Cast {
	return loader.ToOptions(&types.ConfigDetails{}, nil).Interpolate.TypeCastMapping
})

var castError = regexp.MustCompile(`error while interpolating ([^\n]+?): failed to cast to expected type`)

// validate checks one file by itself against the schema, so that each error has the line of this file, and all are told at once.
// compose-go checks only the merged whole, and stops at the first.
func (s *scanner) validate(u *unit) bool {
	before := len(s.problems)
	raw := plain(u.root, func(n *yaml.Node) string { return n.Value }).(map[string]any)
	doc, err := interpolation.Interpolate(raw, interpolation.Options{
		LookupValue: u.vars.lookup, TypeCastMapping: casts(), Substitute: substitute})
	if err != nil {
		// The library's text quotes values; only the paths are used.
		for _, m := range castError.FindAllStringSubmatch(err.Error(), -1) {
			pos, _ := u.descend(strings.Split(m[1], "."))
			s.errorf("schema", pos, "%s must be a number, or true or false, also once its variables are replaced", m[1])
		}
		if len(s.problems) == before {
			s.errorf("schema", manifest.Pos{File: u.file}, "the variables of the file can't be replaced")
		}
		// The result lacks what failed: the rest is checked as it is written.
		doc = plain(u.root, u.text).(map[string]any)
	}
	sch, err := composeSchema()
	if err != nil {
		panic(err) // the schema is a constant of the library
	}
	data, err := json.Marshal(doc)
	if err != nil {
		s.errorf("schema", manifest.Pos{File: u.file}, "the file holds a number that has no plain form, such as .inf or .nan")
		return false
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(data)))
	if err != nil {
		s.errorf("schema", manifest.Pos{File: u.file}, "the file can't be read as data")
		return false
	}
	var verr *jsonschema.ValidationError
	if errors.As(sch.Validate(value), &verr) {
		told := len(s.problems)
		for _, leaf := range leaves(verr) {
			s.schemaProblem(u, leaf)
		}
		if len(s.problems) == told {
			s.errorf("schema", manifest.Pos{File: u.file}, "the file is not as the Compose specification wants it")
		}
	}
	return !manifest.HasErrors(s.problems[before:])
}

// substitute is what compose-go calls for each text. Variables without a value were told of before.
func substitute(text string, lookup template.Mapping) (string, error) {
	return newVariables(nil).substitute(text, lookup)
}

// leaves finds the errors that say something. Of alternatives, the one that got furthest tells what was meant. The library walks maps in
// their random order, so the errors are put in one.
func leaves(e *jsonschema.ValidationError) []*jsonschema.ValidationError {
	if len(e.Causes) == 0 {
		return []*jsonschema.ValidationError{e}
	}
	branches := make([][]*jsonschema.ValidationError, len(e.Causes))
	for i, c := range e.Causes {
		branches[i] = leaves(c)
		slices.SortFunc(branches[i], compareErrors)
	}
	slices.SortFunc(branches, func(a, b []*jsonschema.ValidationError) int {
		return cmp.Or(cmp.Compare(reach(b), reach(a)), slices.CompareFunc(a, b, compareErrors))
	})
	switch e.ErrorKind.(type) {
	case *kind.OneOf, *kind.AnyOf:
		if reach(branches[0]) == len(e.InstanceLocation) {
			return []*jsonschema.ValidationError{alternatives(e, slices.Concat(branches...))}
		}
		return branches[0]
	}
	return slices.Concat(branches...)
}

// reach is how deep into the document the errors lie.
func reach(all []*jsonschema.ValidationError) int {
	deepest := 0
	for _, e := range all {
		deepest = max(deepest, len(e.InstanceLocation))
	}
	return deepest
}

func compareErrors(a, b *jsonschema.ValidationError) int {
	return cmp.Or(slices.Compare(a.InstanceLocation, b.InstanceLocation), cmp.Compare(kindText(a), kindText(b)))
}

// alternatives joins the types that would have been right.
func alternatives(e *jsonschema.ValidationError, all []*jsonschema.ValidationError) *jsonschema.ValidationError {
	want := &kind.Type{}
	for _, l := range all {
		k, ok := l.ErrorKind.(*kind.Type)
		if !ok {
			return l
		}
		want.Got = k.Got
		for _, w := range k.Want {
			if !slices.Contains(want.Want, w) {
				want.Want = append(want.Want, w)
			}
		}
	}
	return &jsonschema.ValidationError{InstanceLocation: e.InstanceLocation, ErrorKind: want}
}

var english = message.NewPrinter(language.English)

func kindText(e *jsonschema.ValidationError) string { return e.ErrorKind.LocalizedString(english) }

var typeNames = map[string]string{"object": "a mapping",
	"array": "a list", "string": "a text", "number": "a number", "integer": "a whole number",
	"boolean": "true or false", "null": "nothing"}

func typeName(t string) string {
	if n, ok := typeNames[t]; ok {
		return n
	}
	return t
}

func (s *scanner) schemaProblem(u *unit, e *jsonschema.ValidationError) {
	at := e.InstanceLocation
	pos, _ := u.descend(at)
	name := strings.Join(at, ".")
	service := ""
	if len(at) > 1 && at[0] == "services" {
		service = at[1]
	}
	say := func(format string, args ...any) {
		s.add(manifest.Error, "schema", pos, service, "%s %s", orTop(name), fmt.Sprintf(format, args...))
	}
	switch k := e.ErrorKind.(type) {
	case *kind.AdditionalProperties:
		for _, key := range slices.Sorted(slices.Values(k.Properties)) {
			s.unknownKey(u, at, key, service)
		}
	case *kind.FalseSchema:
		// Said of each key of a mapping in which any one is wrong; only of an unknown key is it news.
		if last := len(at) - 1; last >= 0 && !slices.Contains(keysBelow(at[:last]), at[last]) {
			s.unknownKey(u, at[:last], at[last], service)
		}
	case *kind.Type:
		want := make([]string, len(k.Want))
		for i, w := range k.Want {
			want[i] = typeName(w)
		}
		say("must be %s, not %s", strings.Join(want, " or "), typeName(k.Got))
	case *kind.Required:
		say("needs %s", strings.Join(k.Missing, " and "))
	case *kind.Minimum:
		say("must be at least %s", k.Want.RatString())
	case *kind.Maximum:
		say("must be at most %s", k.Want.RatString())
	case *kind.UniqueItems:
		say("holds the same element twice")
	case *kind.Enum:
		var want []string
		for _, w := range k.Want {
			want = append(want, fmt.Sprint(w))
		}
		say("must be one of %s", strings.Join(want, ", "))
	case *kind.Format:
		say("is not a %s, such as 1m30s", k.Want)
	default:
		say("is not as the Compose specification wants it: %s", strings.TrimRight(kindText(e), "."))
	}
}

func (s *scanner) unknownKey(u *unit, at []string, key, service string) {
	pos, _ := u.descend(append(slices.Clone(at), key))
	name, known := join(strings.Join(at, "."), key), keysBelow(at)
	switch {
	case len(at) > 0 && at[0] == "include":
		s.add(manifest.Notice,
			"key-no-effect", pos, "", "%s has no effect: Compose does not know it; known are: %s", name, strings.Join(known, ", "))
	case len(known) == 0:
		s.add(manifest.Error, "key-unknown", pos, service, "%s: the name must be of letters, digits, ., - and _", name)
	default:
		s.add(manifest.Error, "key-unknown", pos, service, "%s is not a key of Compose; %s", name, suggest(key, known))
	}
}

// keysBelow lists the keys that the specification knows below a path of a document.
func keysBelow(at []string) []string {
	at = slices.Clone(at)
	for i, part := range at {
		if _, err := strconv.Atoi(part); err == nil && i > 0 {
			at[i] = tree.PathMatchList
		}
	}
	here := tree.NewPath(at...)
	var out []string
	for _, p := range schema.AttributePaths() {
		parts := p.Parts()
		if len(parts) != len(at)+1 || parts[len(at)] == tree.PathMatchAll {
			continue
		}
		if len(at) == 0 || here.Matches(tree.NewPath(parts[:len(at)]...)) {
			out = append(out, parts[len(at)])
		}
	}
	return out
}
