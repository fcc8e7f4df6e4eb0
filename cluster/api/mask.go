package api

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// stars stand for a value in the runtime's records; manifest.Masked is the same as JSON.
const stars = "***"

// maskSteps hides the values of fields that are named like a secret, in place.
func maskSteps(steps []reconcile.Step) {
	for i := range steps {
		for j, c := range steps[i].Fields {
			steps[i].Fields[j] = maskChange(c)
		}
	}
}

// maskChange hides a change's values. A change of a whole element (a container that comes or goes) carries the element as JSON, so its
// fields are looked at, too.
func maskChange(c manifest.Change) manifest.Change {
	m := c.Mask()
	if m == c {
		m.Old, m.New = maskText(c.Path, c.Old), maskText(c.Path, c.New)
	}
	return m
}

func maskText(path, text string) string {
	if !strings.HasPrefix(text, "{") && !strings.HasPrefix(text, "[") {
		return text
	}
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return text
	}
	field := path[strings.LastIndex(path, ".")+1:]
	return string(manifest.Canonical(maskValue("", strings.ToLower(field), v)))
}

func maskDrift(ds []TaskDrift) {
	for i := range ds {
		for j := range ds[i].Drift {
			if d := &ds[i].Drift[j]; manifest.Sensitive(d.Path) {
				if d.Want != "" {
					d.Want = stars
				}
				if d.Have != "" {
					d.Have = stars
				}
			}
		}
	}
}

// maskRecord hides what looks like a secret in a record of the runtime.
func maskRecord(raw json.RawMessage) (json.RawMessage, error) {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("read the runtime's record: %w", err)
	}
	out, err := json.Marshal(maskValue("", "", v))
	if err != nil {
		return nil, fmt.Errorf("write the runtime's record: %w", err)
	}
	return out, nil
}

// named are the objects whose fields are named by people, so that a name like a password's means one.
var named = map[string]bool{"env": true, "environment": true, "labels": true, "options": true}

// maskValue hides values in the field of an owner: texts in an object that is named by people by the field's name, and texts KEY=VALUE of a
// list, as environments and arguments are, by the key.
func maskValue(owner, field string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = maskValue(field, strings.ToLower(k), e)
		}
	case []any:
		for i, e := range v {
			text, isText := e.(string)
			if key, _, ok := strings.Cut(text, "="); isText && ok && manifest.Sensitive("env."+key) {
				v[i] = key + "=" + stars
				continue
			}
			v[i] = maskValue(owner, field, e)
		}
	case string:
		if named[owner] && manifest.Sensitive("env."+field) {
			return stars
		}
	}
	return v
}
