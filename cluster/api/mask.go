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

// maskChange hides a change's values. A change of a whole element (a container that comes or goes) carries the element as JSON, so its fields are
// looked at, too.
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
	return string(manifest.Canonical(maskValue(path, v)))
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

// maskRecord hides what looks like a secret in a record of the runtime: in objects by the name of the field, in lists of KEY=VALUE by the key.
func maskRecord(raw json.RawMessage) (json.RawMessage, error) {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("read the runtime's record: %w", err)
	}
	out, err := json.Marshal(maskValue("", v))
	if err != nil {
		return nil, fmt.Errorf("write the runtime's record: %w", err)
	}
	return out, nil
}

// namedValues are the objects whose fields are named by people, so that a name like a password's means one.
var namedValues = map[string]bool{"env": true, "labels": true, "options": true, "environment": true}

func maskValue(path string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = maskValue(path+"."+strings.ToLower(k), e)
		}
	case []any:
		for i, e := range v {
			v[i] = maskValue(path+"[]", e)
		}
	case string:
		parts := strings.Split(strings.ReplaceAll(path, "[]", ""), ".")
		if key, _, ok := strings.Cut(v, "="); ok && strings.HasSuffix(path, "env[]") && manifest.Sensitive("env."+key) {
			return key + "=" + stars
		}
		if n := len(parts); n > 1 && namedValues[parts[n-2]] && manifest.Sensitive("env."+parts[n-1]) {
			return stars
		}
	}
	return v
}
