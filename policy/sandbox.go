package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
)

// allowedBuiltins are the functions that rules may call. It is a list of what is allowed, so that a function which a newer OPA brings
// stays out until somebody has looked at it. All of them depend on their arguments alone (and on the machine's time zones, where one is
// named): no network, clock, random number, environment or file.
var allowedBuiltins = strings.Fields(`
	assign eq equal gt gte lt lte neq internal.member_2 internal.member_3 internal.template_string internal.print print
	and or minus intersection union set_diff
	abs ceil div floor mul plus rem round numbers.range numbers.range_step format_int
	bits.and bits.lsh bits.negate bits.or bits.rsh bits.xor
	count max min product sort sum
	array.concat array.flatten array.reverse array.slice
	object.filter object.get object.keys object.remove object.subset object.union object.union_n
	json.filter json.is_valid json.marshal json.patch json.remove json.unmarshal
	concat contains endswith indexof indexof_n lower replace split sprintf startswith strings.any_prefix_match strings.any_suffix_match
	strings.count strings.replace_n strings.reverse substring trim trim_left trim_prefix trim_right trim_space trim_suffix upper
	glob.match glob.quote_meta
	regex.find_all_string_submatch_n regex.find_n regex.is_valid regex.match regex.replace regex.split
	is_array is_boolean is_null is_number is_object is_set is_string type_name to_number
	semver.compare semver.is_valid units.parse units.parse_bytes
	base64.decode base64.encode base64.is_valid hex.decode hex.encode crypto.sha256 uri.is_valid uri.parse
	graph.reachable walk
	time.add_date time.clock time.date time.diff time.format time.parse_duration_ns time.parse_ns time.parse_rfc3339_ns time.weekday
	rego.metadata.chain rego.metadata.rule`)

// capabilities are what the compiler lets rules use. JSON schemas are fetched from nowhere.
var capabilities = sync.OnceValue(func() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(slices.Clone(c.Builtins), func(b *ast.Builtin) bool { return !slices.Contains(allowedBuiltins, b.Name) })
	c.AllowNet = []string{}
	return c
})

// explain turns the errors of Rego's parser and compiler into ours: one line each, FILE:LINE: what.
func explain(err error) error {
	var list ast.Errors
	var one *ast.Error
	switch {
	case errors.As(err, &list):
	case errors.As(err, &one):
		list = ast.Errors{one}
	default:
		return err
	}
	var out []error
	for _, e := range list {
		msg := e.Message
		if name, ok := strings.CutPrefix(msg, "undefined function "); ok && isBuiltin(name) {
			msg = name + " can't be called here: rules get no network, clock, random numbers, environment or files; all they may know is in `input`"
		}
		if d := e.Details; d != nil {
			msg += "\n\t" + strings.Join(d.Lines(), "\n\t")
		}
		switch l := e.Location; {
		case l == nil:
			out = append(out, errors.New(msg))
		case l.Row == 0:
			out = append(out, fmt.Errorf("%s: %s", l.File, msg))
		default:
			out = append(out, fmt.Errorf("%s:%d: %s", l.File, l.Row, msg))
		}
	}
	return errors.Join(out...)
}

func isBuiltin(name string) bool {
	return slices.ContainsFunc(ast.CapabilitiesForThisVersion().Builtins, func(b *ast.Builtin) bool { return b.Name == name })
}
