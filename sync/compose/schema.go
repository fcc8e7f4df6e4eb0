package compose

import (
	_ "embed"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
)

// SettingsSchema is the JSON schema of gitops.yaml, for editors.
//
//go:embed gitops.schema.json
var SettingsSchema string

// settingsSchema writes the schema that the settings type stands for. A test compares it with the embedded file.
func settingsSchema() []byte {
	s := schemaOf(reflect.TypeFor[settings]())
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "gitops.yaml"
	s["description"] = "Settings of a source of stacks. All are optional."
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic(err) // maps of strings and numbers always have a JSON form
	}
	return append(out, '\n')
}

func schemaOf(t reflect.Type) map[string]any {
	switch t.Kind() {
	case reflect.Pointer:
		return schemaOf(t.Elem())
	case reflect.Struct:
		props := map[string]any{}
		for i := range t.NumField() {
			f := t.Field(i)
			if !f.IsExported() {
				continue
			}
			p := schemaOf(f.Type)
			if doc := f.Tag.Get("doc"); doc != "" {
				p["description"] = doc
			}
			if enum := strings.Fields(f.Tag.Get("enum")); len(enum) > 0 {
				p["enum"] = enum
			}
			for tag, key := range map[string]string{"min": "minimum", "max": "maximum"} {
				if v, err := strconv.Atoi(f.Tag.Get(tag)); err == nil {
					p[key] = v
				}
			}
			props[f.Tag.Get("yaml")] = p
		}
		return map[string]any{"type": "object", "properties": props, "additionalProperties": false,
			"patternProperties": map[string]any{"^x-": map[string]any{}}}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": schemaOf(t.Elem())}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem())}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int, reflect.Int64:
		return map[string]any{"type": "integer"}
	}
	if t == reflect.TypeFor[scalar]() {
		return map[string]any{"type": []string{"string", "number", "boolean", "null"}}
	}
	return map[string]any{"type": "string"}
}
