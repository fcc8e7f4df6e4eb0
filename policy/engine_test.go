package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// stackOf makes a stack of one service web; change adds what the test is about.
func stackOf(name string, change func(*manifest.Stack)) manifest.Stack {
	s := manifest.Stack{
		Name:  name,
		Files: []string{name + "/compose.yaml"},
		Services: []manifest.Service{{
			Name: "web", Replicas: 1, Labels: map[string]string{"team": "shop"},
			Containers: []manifest.Container{{Name: "web", Image: "docker.io/library/nginx:1.29"}},
		}},
	}
	if change != nil {
		change(&s)
	}
	return s
}

func privileged(s *manifest.Stack) { s.Services[0].Containers[0].Privileged = true }

func rulesOf(v Verdict) []string {
	var out []string
	for _, f := range v.Findings {
		out = append(out, f.Rule)
	}
	return out
}

func module(name, body string) Module {
	return Module{Name: name + ".rego", Source: "# METADATA\n# title: The rule " + name + "\npackage custom." + name + "\n\n" + body}
}

func TestAPlainStackIsAllowed(t *testing.T) {
	v := review(t, newEngine(t, Options{}), Input{Stack: stackOf("shop", nil)})
	if v.Decision != Allow || !v.Allowed() || len(v.Findings) != 0 || v.Level != Enforce || v.PolicyHash == "" || !v.Until.IsZero() {
		t.Errorf("%+v", v)
	}
	if (Verdict{}).Allowed() {
		t.Error("a verdict that nobody made allows")
	}
}

func TestFindingsNamePlaces(t *testing.T) {
	e := newEngine(t, Options{})
	in := func(origins map[string]manifest.Pos) Input {
		return Input{Sets: []string{Restricted}, Stack: stackOf("shop", func(s *manifest.Stack) {
			privileged(s)
			c := &s.Services[0].Containers[0]
			c.CapAdd = []string{"SYS_ADMIN"}
			c.Resources.Pids = -1
			s.Origins = origins
		})}
	}
	at := func(line int) manifest.Pos { return manifest.Pos{File: "shop/compose.yaml", Line: line} }
	for name, c := range map[string]struct {
		origins map[string]manifest.Pos
		want    map[string]string
	}{
		"field paths": {map[string]manifest.Pos{"web": at(2), "web.privileged": at(4), "web.capAdd": at(5), "web.resources.pids": at(9)},
			map[string]string{"baseline/privileged": "4", "baseline/capabilities": "5", "restricted/no-new-privileges": "2", "restricted/limits": "2 2 9"}},
		"enclosing ones": {map[string]manifest.Pos{"web": at(2), "web.resources": at(8)},
			map[string]string{"baseline/privileged": "2", "baseline/capabilities": "2", "restricted/limits": "8 8 8"}},
		"nothing": {nil, map[string]string{"baseline/privileged": "0", "baseline/capabilities": "0"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := map[string]string{}
			for _, f := range review(t, e, in(c.origins)).Findings {
				if f.File != "shop/compose.yaml" {
					t.Errorf("%s: file %q", f.Rule, f.File)
				}
				got[f.Rule] = strings.TrimSpace(got[f.Rule] + " " + fmt.Sprint(f.Line))
			}
			for rule, lines := range c.want {
				if got[rule] != lines {
					t.Errorf("%s: lines %q, want %q", rule, got[rule], lines)
				}
			}
		})
	}
	f := review(t, e, in(map[string]manifest.Pos{"web.privileged": at(4)})).Findings
	i := slices.IndexFunc(f, func(f Finding) bool { return f.Rule == "baseline/privileged" })
	want := "shop/compose.yaml:4: error: web runs privileged. " +
		"Remove `privileged: true` and name what the program needs, in `cap_add` or `devices`. [baseline/privileged]"
	if got := f[i].String(); got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
}

// The machines' owners say how strict policy is at least. The stack's own repository can only add to that.
func TestLevels(t *testing.T) {
	scope := func(l Level) Source { return Source{Scope: Scope{Level: l}} }
	stack := func(l Level) Source {
		return Source{Scope: Scope{Level: Enforce}, Stacks: map[string]Scope{"shop": {Level: l}}}
	}
	sets := func(l Level) Source { return Source{Scope: Scope{Sets: map[string]Level{Baseline: l}}} }
	for _, c := range []struct {
		name     string
		node     Level
		source   Source
		own      string
		decision Decision
		level    Level
		rules    string
	}{
		{"nobody says anything", "", Source{}, "", Deny, Enforce, "baseline/privileged"},
		{"the repository wants warn", "", Source{}, "warn", Deny, Enforce, "policy/level baseline/privileged"},
		{"the repository wants off", "", Source{}, "off", Deny, Enforce, "policy/level baseline/privileged"},
		{"the node says warn", Advise, Source{}, "", Warn, Advise, "baseline/privileged"},
		{"the node says off", Off, Source{}, "", Allow, Off, ""},
		{"the node says off, the repository enforce", Off, Source{}, "enforce", Deny, Enforce, "baseline/privileged"},
		{"the node says off, the repository warn", Off, Source{}, "warn", Warn, Advise, "baseline/privileged"},
		{"the source says warn", "", scope(Advise), "", Warn, Advise, "baseline/privileged"},
		{"the source says warn, the repository off", "", scope(Advise), "off", Warn, Advise, "policy/level baseline/privileged"},
		{"the source overrules the node", Off, scope(Enforce), "", Deny, Enforce, "baseline/privileged"},
		{"the source says off for the stack", "", stack(Off), "", Allow, Off, ""},
		{"the source says warn for the stack", "", stack(Advise), "", Warn, Advise, "baseline/privileged"},
		{"the source says warn for the set", "", sets(Advise), "", Warn, Enforce, "baseline/privileged"},
		{"the source switches the set off", "", sets(Off), "", Allow, Enforce, ""},
		{"an unknown level of the repository", "", Source{}, "lax", Deny, Enforce, "baseline/privileged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := stackOf("shop", privileged)
			s.Policy = c.own
			v := review(t, newEngine(t, Options{Level: c.node, Source: c.source}), Input{Stack: s})
			if got := strings.Join(rulesOf(v), " "); v.Decision != c.decision || v.Level != c.level || got != c.rules {
				t.Errorf("%s at %s: %q; want %s at %s: %q", v.Decision, v.Level, got, c.decision, c.level, c.rules)
			}
		})
	}
	if _, err := New(t.Context(), Options{Level: "lax"}); err == nil || !strings.Contains(err.Error(), `"lax" is no policy level`) {
		t.Errorf("an unknown level: %v", err)
	}
}

func TestExemptions(t *testing.T) {
	exempt := func(x ...Exemption) Options {
		for i := range x {
			x[i].Reason = "reason " + fmt.Sprint(i)
		}
		return Options{Source: Source{Exemptions: x}}
	}
	day := func(d int) time.Time { return time.Date(2026, 11, d, 0, 0, 0, 0, time.UTC) }
	const rule = "baseline/privileged"
	for _, c := range []struct {
		name     string
		opts     Options
		decision Decision
		until    time.Time
		message  string
	}{
		{"none", exempt(), Deny, time.Time{}, "web runs privileged."},
		{"of the stack", exempt(Exemption{Rule: rule, Stack: "shop", Until: day(25)}), Allow, day(25), "web runs privileged."},
		{"of the service", exempt(Exemption{Rule: rule, Stack: "shop", Service: "web", Until: day(25)}), Allow, day(25), "web runs privileged."},
		{"of another service", exempt(Exemption{Rule: rule, Stack: "shop", Service: "db", Until: day(25)}), Deny, time.Time{}, "web runs privileged."},
		{"of another stack", exempt(Exemption{Rule: rule, Stack: "blog", Until: day(25)}), Deny, time.Time{}, "web runs privileged."},
		{"of another rule", exempt(Exemption{Rule: "baseline/devices", Stack: "shop", Until: day(25)}), Deny, time.Time{}, "web runs privileged."},
		{"that has ended", exempt(Exemption{Rule: rule, Stack: "shop", Until: day(20)}), Deny, time.Time{},
			"web runs privileged. Its exemption ended on 2026-11-19."},
		{"that ends this instant", exempt(Exemption{Rule: rule, Stack: "shop", Until: now}), Deny, time.Time{},
			"web runs privileged. Its exemption ended on 2026-11-20."},
		{"that ends after this instant", exempt(Exemption{Rule: rule, Stack: "shop", Until: now.Add(1)}), Allow, now.Add(1), "web runs privileged."},
		{"two", exempt(Exemption{Rule: rule, Stack: "shop", Until: day(24)}, Exemption{Rule: rule, Stack: "shop", Until: day(26)}),
			Allow, day(26), "web runs privileged."},
		{"one ended, one not", exempt(Exemption{Rule: rule, Stack: "shop", Until: day(26)}, Exemption{Rule: rule, Stack: "shop", Until: day(2)}),
			Allow, day(26), "web runs privileged."},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEngine(t, c.opts)
			v := review(t, e, Input{Stack: stackOf("shop", privileged)})
			if v.Decision != c.decision || !v.Until.Equal(c.until) || len(v.Findings) != 1 || v.Findings[0].Message != c.message {
				t.Fatalf("%+v", v)
			}
			f := v.Findings[0]
			if f.Exempted != (c.decision == Allow) || f.Exempted != (f.Severity == manifest.Notice) {
				t.Errorf("%+v", f)
			}
			if f.Exempted && !strings.Contains(f.Problem().Message, "Exempted until 2026-11-2") {
				t.Errorf("the problem does not tell of the exemption: %s", f.Problem().Message)
			}
		})
	}
	o := exempt(Exemption{Rule: rule, Stack: "shop", Until: day(25)}, Exemption{Rule: rule, Stack: "blog", Until: day(19)})
	if x := newEngine(t, o).Expired(now); len(x) != 1 || x[0].Stack != "blog" {
		t.Errorf("expired: %v", x)
	}
	if at := newEngine(t, o).Renew(now); !at.Equal(day(25)) {
		t.Errorf("verdicts are made again at %s, not when the first exemption ends", at)
	}
	if at := newEngine(t, o).Renew(day(25)); !at.IsZero() {
		t.Errorf("no exemption ends any more, but verdicts are made again at %s", at)
	}
	two := exempt(Exemption{Rule: rule, Stack: "shop", Until: day(26)}, Exemption{Rule: "baseline/capabilities", Stack: "shop", Until: day(24)})
	v := review(t, newEngine(t, two), Input{Stack: stackOf("shop", func(s *manifest.Stack) {
		privileged(s)
		s.Services[0].Containers[0].CapAdd = []string{"SYS_ADMIN"}
	})})
	if v.Decision != Allow || !v.Until.Equal(day(24)) {
		t.Errorf("the first end of the exemptions used does not count: %+v", v)
	}
}

// The plan gate judges what a commit, a prune or a person causes. Rules about what runs judge only what the plan starts.
func TestPlanGate(t *testing.T) {
	o := Options{Source: Source{Modules: []Module{
		module("freeze", `deny contains {"service": i.service, "message": "frozen"} if { some i in input.plan; i.action == "remove" }`),
		module("named", `deny contains {"service": s.name, "message": "named web"} if { some s in input.stack.services; s.name == "web" }`),
	}}}
	e := newEngine(t, o)
	item := func(action, service string, cause Cause) Item {
		return Item{Action: action, Stack: "shop", Service: service, Cause: cause}
	}
	for _, c := range []struct {
		name  string
		items []Item
		want  string
	}{
		{"nothing", nil, ""},
		{"a start", []Item{item(ActionStart, "web", CauseRevision)}, "custom/named baseline/privileged"},
		{"a restart by a person", []Item{item(ActionReplace, "web", CausePerson)}, "custom/named baseline/privileged"},
		{"an update in place", []Item{item(ActionUpdate, "web", CauseRevision)}, "custom/named baseline/privileged"},
		{"a heal", []Item{item(ActionStart, "web", "heal")}, ""},
		{"an evacuation", []Item{item(ActionStart, "web", "evacuation")}, ""},
		{"a prune", []Item{item(ActionRemove, "web", CausePrune)}, "custom/freeze"},
		{"another service", []Item{item(ActionStart, "db", CauseRevision)}, ""},
		{"a start and a heal of the bad one", []Item{item(ActionStart, "db", CauseRevision), item(ActionStart, "web", "heal")}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := review(t, e, Input{Gate: PlanGate, Stack: stackOf("shop", privileged), Items: c.items})
			if got := strings.Join(rulesOf(v), " "); got != c.want || v.Allowed() != (c.want == "") {
				t.Errorf("%s: %q, want %q", v.Decision, got, c.want)
			}
		})
	}
	lib := Options{Source: Source{Modules: []Module{
		{Name: "lib.rego", Source: "package custom.lib\n\nremoved contains i.service if { some i in input.plan; i.action == \"remove\" }"},
		module("freeze", `deny contains {"service": s, "message": "frozen"} if some s in data.custom.lib.removed`),
	}}}
	v := review(t, newEngine(t, lib), Input{Gate: PlanGate, Stack: stackOf("shop", nil), Items: []Item{item(ActionRemove, "web", CausePrune)}})
	if v.Decision != Deny {
		t.Errorf("a rule that reads the plan through a library was not asked: %+v", v)
	}
	bind := stackOf("shop", func(s *manifest.Stack) {
		s.Volumes = []manifest.Volume{{Name: "shop_x", Key: "x", Options: map[string]string{"type": "none", "o": "bind", "device": "/etc"}}}
	})
	for action, want := range map[string]Decision{ActionStart: Deny, ActionRemove: Allow} {
		if v := review(t, newEngine(t, Options{}), Input{Gate: PlanGate, Stack: bind, Items: []Item{item(action, "web", CausePerson)}}); v.Decision != want {
			t.Errorf("%s beside a bad volume: %s, want %s", action, v.Decision, want)
		}
	}
}

// What a policy looks at beside the stack decides when it has to be asked again, and whether the plan gate is asked at all.
func TestWhatAPolicyReads(t *testing.T) {
	stack := stackOf("shop", nil)
	sets := func(name string, l Level) map[string]Level { return map[string]Level{name: l} }
	for _, c := range []struct {
		name          string
		src           Source
		plans, images bool
		renew         time.Duration
	}{
		{name: "nothing"},
		{name: "a rule about stacks", src: Source{Modules: []Module{module("x", `deny contains "x" if input.stack.name == "x"`)}}},
		{name: "the plan", src: Source{Modules: []Module{module("x", `deny contains "x" if count(input.plan) > 3`)}}, plans: true},
		{name: "the plan, imported", src: Source{Modules: []Module{module("x", "import input.plan as p\n\ndeny contains \"x\" if count(p) > 3")}}, plans: true},
		{name: "the gate", src: Source{Modules: []Module{module("x", `deny contains "x" if input.gate == "plan"`)}}, plans: true},
		{name: "the time", src: Source{Modules: []Module{module("x", `deny contains "x" if startswith(input.now, "2030")`)}}, renew: RenewEvery},
		{name: "images", src: Source{Modules: []Module{module("x", `deny contains "x" if input.images[_].user == ""`)}}, images: true, renew: RenewEvery},
		{name: "all of it", src: Source{Modules: []Module{module("x", `deny contains "x" if count(input) > 9`)}}, plans: true, images: true, renew: RenewEvery},
		{name: "the restricted set", src: Source{Scope: Scope{Sets: sets(Restricted, Enforce)}}, images: true, renew: RenewEvery},
		{name: "the restricted set for another stack", src: Source{Stacks: map[string]Scope{"blog": {Sets: sets(Restricted, Advise)}}}, renew: RenewEvery},
		{name: "policy off", src: Source{Scope: Scope{Level: Off, Sets: sets(Restricted, Enforce)}}, renew: RenewEvery},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEngine(t, Options{Source: c.src})
			if e.JudgesPlans() != c.plans || e.ReadsImages(&stack) != c.images {
				t.Errorf("plans %v, images %v", e.JudgesPlans(), e.ReadsImages(&stack))
			}
			at := e.Renew(now)
			if c.renew == 0 != at.IsZero() || c.renew != 0 && !at.Equal(now.Add(c.renew)) {
				t.Errorf("renewed at %v", at)
			}
		})
	}
}

func TestOwnRules(t *testing.T) {
	e := newEngine(t, Options{Source: exampleSource(t)})
	s := stackOf("shop", func(s *manifest.Stack) {
		s.Services[0].Labels = nil
		s.Services[0].Containers[0].Resources.Memory = 5 << 30
		s.Origins = map[string]manifest.Pos{"web": {File: "shop/compose.yaml", Line: 2}, "web.resources.memory": {File: "shop/compose.yaml", Line: 7}}
	})
	v := review(t, e, Input{Stack: s})
	var got []string
	for _, f := range v.Findings {
		if f.Set == Custom {
			got = append(got, f.String())
		} else if f.Severity != manifest.Warn {
			t.Errorf("restricted is set to warn, but %s", f)
		}
	}
	want := []string{
		"shop/compose.yaml:2: error: web has no label team. Write `deploy: {labels: {team: NAME}}` with the name of your team. [custom/team-label]",
		"shop/compose.yaml:7: warn: web may use 5GiB. Ask for a larger machine, or write a smaller limit. [custom/memory]",
	}
	if d := cmp.Diff(want, got); d != "" || v.Decision != Deny {
		t.Errorf("%s\n%s", v.Decision, d)
	}
	rules := e.Rules()
	i := slices.IndexFunc(rules, func(r Rule) bool { return r.ID == "custom/weekend" })
	if d := cmp.Diff(Rule{ID: "custom/weekend", Set: Custom, Title: "Nothing is removed at the weekend", Reason: "Nobody is there to notice.",
		WayOut: "Wait until Monday.", File: "rules/weekend.rego"}, rules[i]); d != "" {
		t.Error(d)
	}
	remove := Input{Gate: PlanGate, Stack: stackOf("shop", nil), Items: []Item{{Action: ActionRemove, Stack: "shop", Service: "web", Cause: CausePrune}}}
	if v := review(t, e, remove); v.Decision != Allow { // a Friday
		t.Errorf("on a working day: %+v", v)
	}
	remove.Now = now.AddDate(0, 0, 1)
	if v := review(t, e, remove); v.Decision != Deny || v.Findings[0].Message != "web would be removed on a Saturday." {
		t.Errorf("on a Saturday: %+v", v)
	}
}

// A finding may be just a message, and what it leaves out comes from the rule's description.
func TestFindingForms(t *testing.T) {
	e := newEngine(t, Options{Source: Source{Modules: []Module{
		module("forms", `deny contains "only a message"
deny contains {}
deny contains {"container": "web", "message": 7}
deny contains 5
deny contains {"service": "web", "message": concat("", ["long ", sprintf("%600d", [1])])}`),
	}}})
	v := review(t, e, Input{Stack: stackOf("shop", nil)})
	var got []string
	for _, f := range v.Findings {
		if f.Rule != "custom/forms" || f.Severity != manifest.Error {
			t.Errorf("%+v", f)
		}
		got = append(got, fmt.Sprintf("%s|%s|%.20s", f.Service, f.Path, strings.TrimSpace(f.Message)))
		if n := len([]rune(f.Message)); n > maxMessage+1 {
			t.Errorf("a message of %d runes", n)
		}
	}
	want := []string{"||The rule forms.", "||The rule forms.", "||only a message", "|web|The rule forms.", "web|web|long                "}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got, cmp.Transformer("trim", strings.TrimSpace)); d != "" || v.Decision != Deny {
		t.Errorf("%s\n%s", v.Decision, d)
	}
}

// The worst findings are kept, and the decision counts those that are not.
func TestManyFindings(t *testing.T) {
	e := newEngine(t, Options{Source: Source{Modules: []Module{
		module("many", `warn contains sprintf("a %d", [i]) if some i in numbers.range(1, 300)`),
		module("one", `deny contains "z"`),
	}}})
	v := review(t, e, Input{Stack: stackOf("shop", nil)})
	last := v.Findings[len(v.Findings)-1]
	if v.Decision != Deny || len(v.Findings) != MaxFindings+1 || last.Message != "And 101 more findings." {
		t.Errorf("%s, %d findings, %s", v.Decision, len(v.Findings), last.Message)
	}
	if !slices.Contains(rulesOf(v), "custom/one") {
		t.Error("the finding that denies was cut off")
	}
}

func TestARuleThatFailsBlocks(t *testing.T) {
	e := newEngine(t, Options{Source: Source{Modules: []Module{module("broken", `deny contains "x" if to_number(input.stack.name) > 1`)}}})
	v, err := e.Review(t.Context(), Input{Gate: RevisionGate, Stack: stackOf("shop", nil), Now: now})
	if err == nil || v.Allowed() || v.PolicyHash != e.Hash() {
		t.Fatalf("%+v, %v", v, err)
	}
	for _, part := range []string{"judge stack shop by the custom rules", "broken.rego:5", "until the rule is repaired"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
}

func TestTimeLimit(t *testing.T) {
	bombs := map[string]string{
		"loops": `deny contains "x" if {
	n := numbers.range(1, 100000)
	some a in n
	some b in n
	some c in n
	a + b + c == 0
}`,
		"a large comprehension": `deny contains "x" if count({[a, b] | some a in numbers.range(1, 100000); some b in numbers.range(1, 100000)}) == 0`,
		"a large range":         `deny contains "x" if count(numbers.range(1, 100000000000)) == 0`,
	}
	for name, body := range bombs {
		t.Run(name, func(t *testing.T) {
			e := newEngine(t, Options{Timeout: 50 * time.Millisecond, Source: Source{Modules: []Module{module("bomb", body)}}})
			in := Input{Gate: RevisionGate, Stack: stackOf("shop", nil), Now: now}
			v, err := e.Review(t.Context(), in)
			if err == nil || v.Decision != Deny || !strings.Contains(err.Error(), "the custom rules took longer than 50ms") {
				t.Errorf("%s, %v", v.Decision, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := e.Review(ctx, in); !errors.Is(err, context.Canceled) {
				t.Errorf("with a context that has ended: %v", err)
			}
		})
	}
}

// Rules see no secret value, so none can get into a message.
func TestSecretsAreMasked(t *testing.T) {
	const canary = "canary-4711"
	e := newEngine(t, Options{Source: Source{Modules: []Module{module("leak", `deny contains json.marshal(input)`)}}})
	s := stackOf("shop", func(s *manifest.Stack) {
		c := &s.Services[0].Containers[0]
		c.Env = map[string]string{"DB_PASSWORD": canary, "API_TOKEN": canary}
		c.Labels = map[string]string{"x.auth.token": canary}
		s.Services[0].Labels = map[string]string{"password": canary}
		s.Volumes = []manifest.Volume{{Name: "shop_nas", Key: "nas", Options: map[string]string{
			"type": "cifs", "device": "//nas/x", "o": "username=u,PassWord=" + canary + ",rw"}}}
		s.Networks = []manifest.Network{{Name: "n", Key: "n", Labels: map[string]string{"secret": canary}}}
		s.SecretValues = map[string][]byte{"shop/key": []byte(canary)}
	})
	before, _ := json.Marshal(s)
	val, err := inputValue(Input{Gate: RevisionGate, Stack: s, Now: now}, nil, e.config())
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(val.String(), canary) {
		t.Errorf("the input holds a secret: %s", val)
	}
	if after, _ := json.Marshal(s); !bytes.Equal(before, after) {
		t.Error("the stack was changed")
	}
	v := review(t, e, Input{Stack: s})
	if text := fmt.Sprintf("%+v", v); strings.Contains(text, canary) || v.Decision != Deny {
		t.Error(text)
	}
}

// Everything that a verdict depends on beside its input changes the hash, and nothing else does.
func TestHash(t *testing.T) {
	opts := map[string]Options{
		"nothing":   {},
		"level":     {Level: Advise},
		"timeout":   {Timeout: time.Second},
		"scope":     {Source: Source{Scope: Scope{Level: Advise}}},
		"set":       {Source: Source{Scope: Scope{Sets: map[string]Level{Restricted: Advise}}}},
		"stack":     {Source: Source{Stacks: map[string]Scope{"shop": {Level: Off}}}},
		"registry":  {Source: Source{Registries: []string{"ghcr.io"}}},
		"exemption": {Source: Source{Exemptions: []Exemption{{Rule: "baseline/devices", Stack: "shop", Reason: "x", Until: now}}}},
		"module":    {Source: Source{Modules: []Module{module("a", `deny contains "x" if input.stack.name == "a"`)}}},
		"rule":      {Source: Source{Modules: []Module{module("a", `deny contains "x" if input.stack.name == "b"`)}}},
	}
	seen := map[string]string{}
	for name, o := range opts {
		h := newEngine(t, o).Hash()
		if other, twice := seen[h]; twice {
			t.Errorf("%s and %s have one hash", name, other)
		}
		seen[h] = name
		if again := newEngine(t, o).Hash(); again != h {
			t.Errorf("%s: two hashes", name)
		}
	}
	if newEngine(t, Options{Level: Enforce, Timeout: DefaultTimeout}).Hash() != newEngine(t, Options{}).Hash() {
		t.Error("defaults that are written are another policy")
	}
}

// genStack draws stacks that break some rules of each set.
func genStack(t *rapid.T) manifest.Stack {
	pick := func(label string, of ...string) string { return rapid.SampledFrom(of).Draw(t, label) }
	s := manifest.Stack{Name: pick("stack", "shop", "blog"), Policy: pick("policy", "", "enforce", "warn", "off")}
	for i := range rapid.IntRange(0, 3).Draw(t, "services") {
		name := fmt.Sprintf("s%d", i)
		s.Services = append(s.Services, manifest.Service{
			Name: name, NetworkMode: pick("net", "", "host"),
			Containers: []manifest.Container{{
				Name: name, Image: pick("image", "nginx", "docker.io/library/nginx:1", "nginx@sha256:00"), User: pick("user", "", "root", "1000"),
				Privileged: rapid.Bool().Draw(t, "privileged"), NoNewPrivs: rapid.Bool().Draw(t, "nnp"),
				Mounts: []manifest.Mount{{Kind: manifest.MountBind, Target: "/x", Source: pick("bind", "/srv", "/etc", "/var/run/docker.sock")}},
			}},
		})
	}
	return s
}

func genExemption(t *rapid.T) Exemption {
	return Exemption{
		Rule:    rapid.SampledFrom([]string{"baseline/privileged", "baseline/host-paths", "baseline/engine-sockets", "restricted/latest"}).Draw(t, "rule"),
		Stack:   rapid.SampledFrom([]string{"shop", "blog"}).Draw(t, "for"),
		Service: rapid.SampledFrom([]string{"", "s0", "s1"}).Draw(t, "of"),
		Reason:  "r",
		Until:   now.Add(time.Duration(rapid.IntRange(-2, 2).Draw(t, "days")) * 24 * time.Hour),
	}
}

func denied(v Verdict) []string {
	var out []string
	for _, f := range v.Findings {
		if f.Severity == manifest.Error {
			out = append(out, f.Rule+" "+f.Path)
		}
	}
	return out
}

// One more exemption never adds a denial, and the same input gives the same verdict.
func TestExemptionsOnlyLoosen(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		stacks := rapid.SliceOfN(rapid.Custom(genStack), 1, 4).Draw(rt, "stacks")
		list := rapid.SliceOfN(rapid.Custom(genExemption), 1, 4).Draw(rt, "exemptions")
		level := rapid.SampledFrom([]Level{Enforce, Advise, Off}).Draw(rt, "level")
		sets := map[string]Level{Restricted: rapid.SampledFrom([]Level{Enforce, Advise, Off}).Draw(rt, "restricted")}
		engine := func(x []Exemption) *Engine {
			return newEngine(t, Options{Level: level, Source: Source{Scope: Scope{Sets: sets}, Exemptions: x}})
		}
		less, one := engine(list[:len(list)-1]), engine(list)
		for _, s := range stacks {
			compareVerdicts(rt, review(t, less, Input{Stack: s}), review(t, one, Input{Stack: s}), review(t, one, Input{Stack: s}))
		}
	})
}

func compareVerdicts(rt *rapid.T, fewer, more, again Verdict) {
	for _, d := range denied(more) {
		if !slices.Contains(denied(fewer), d) {
			rt.Fatalf("%s is denied only with one more exemption", d)
		}
	}
	if fewer.Allowed() && !more.Allowed() {
		rt.Fatalf("%s became %s", fewer.Decision, more.Decision)
	}
	if d := cmp.Diff(more, again); d != "" {
		rt.Fatalf("a second review differs: %s", d)
	}
	if (len(denied(more)) > 0) != (more.Decision == Deny) {
		rt.Fatalf("%s with %v", more.Decision, denied(more))
	}
}

// What rules may call is known to OPA, and is none of what reaches out of the input.
func TestAllowedBuiltins(t *testing.T) {
	for _, name := range allowedBuiltins {
		if !isBuiltin(name) {
			t.Errorf("OPA knows no %s", name)
		}
	}
	for _, b := range capabilities().Builtins {
		for _, bad := range []string{"http.", "net.", "opa.", "rand.", "uuid.", "time.now", "io.jwt", "providers.", "crypto.x509", "graphql",
			"trace", "json.match_schema", "json.verify_schema", "rego.parse"} {
			if strings.HasPrefix(b.Name, bad) {
				t.Errorf("rules can call %s", b.Name)
			}
		}
		if b.Nondeterministic {
			t.Errorf("%s may give two answers", b.Name)
		}
	}
}

// Messages can't drive a terminal, whatever the stack's fields hold.
func TestMessagesAreOneCleanLine(t *testing.T) {
	s := stackOf("shop", func(s *manifest.Stack) { s.Services[0].Sysctls = map[string]string{"vm.\x1b[2J\nx": "1"} })
	v := review(t, newEngine(t, Options{}), Input{Stack: s})
	if m := v.Findings[0].Message; m != "web sets vm. [2J x, which is the whole machine's." {
		t.Errorf("%q", m)
	}
}

func TestConcurrentReviews(t *testing.T) {
	e := newEngine(t, Options{Source: exampleSource(t)})
	want := review(t, e, Input{Stack: stackOf("shop", privileged)})
	fresh := newEngine(t, Options{Source: exampleSource(t)})
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			v, err := fresh.Review(t.Context(), Input{Gate: RevisionGate, Stack: stackOf("shop", privileged), Now: now})
			if d := cmp.Diff(want, v); err != nil || d != "" {
				t.Errorf("%v %s", err, d)
			}
		})
	}
	g.Wait()
}
