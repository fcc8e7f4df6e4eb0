package manifest_test

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// sound is a stack without a fault.
func sound() *manifest.Stack {
	return &manifest.Stack{Name: "shop", Files: []string{"compose.yaml"},
		Networks: []manifest.Network{{Name: "shop_default", Key: "default", Subnet: "10.1.0.0/24", Gateway: "10.1.0.1"}},
		Volumes:  []manifest.Volume{{Name: "shop_data", Key: "data"}},
		Secrets:  []manifest.Secret{{Name: "shop/token", Key: "token"}},
		Services: []manifest.Service{
			{Name: "db", Replicas: 1, Restart: manifest.RestartPolicy{Condition: manifest.RestartOnFailure},
				Networks: []manifest.Attachment{{Network: "shop_default", IPv4: "10.1.0.9"}},
				Containers: []manifest.Container{{Name: "db",
					Image: "db:1", Mounts: []manifest.Mount{{Kind: manifest.MountVolume, Source: "shop_data", Target: "/data"}}}}},
			{Name: "web", Replicas: 2, Restart: manifest.RestartPolicy{Condition: manifest.RestartAny},
				Networks:  []manifest.Attachment{{Network: "shop_default"}},
				Ports:     []manifest.Port{{Published: 80, Target: 8080}},
				DependsOn: []manifest.Dependency{{Service: "db", Condition: manifest.Healthy}},
				Containers: []manifest.Container{{Name: "web",
					Image: "web:1", Secrets: []manifest.SecretUse{{Secret: "shop/token", Target: "/run/secrets/token"}}}}},
		}}
}

func TestASoundStackIsValid(t *testing.T) {
	t.Parallel()
	if ps := manifest.Validate(sound()); len(ps) > 0 {
		t.Errorf("problems: %v", ps)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, rule, at string
		spoil          func(s *manifest.Stack)
	}{
		{"stack name", "stack-name", "", func(s *manifest.Stack) { s.Name = "Shop/1" }},
		{"long stack name", "stack-name", "", func(s *manifest.Stack) { s.Name = strings.Repeat("a", 64) }},
		{"service name", "service-name", "web", func(s *manifest.Stack) { s.Services[1].Name = "we b" }},
		{"volume outside", "object-name", "volumes.data", func(s *manifest.Stack) { s.Volumes[0].Name = "../../etc" }},
		{"secret of others", "object-name", "secrets.token", func(s *manifest.Stack) {
			s.Secrets[0] = manifest.Secret{Name: "source/other", Key: "token", External: true}
		}},
		{"network outside", "object-name", "networks.default", func(s *manifest.Stack) { s.Networks[0].Name = "a b" }},
		{"secret over a file", "mount-target", "web", func(s *manifest.Stack) {
			s.Services[1].Containers[0].Secrets[0].Target = "/run/secrets/../../etc/shadow"
		}},
		{"replicas", "replicas", "web.replicas", func(s *manifest.Stack) { s.Services[1].Replicas = -1 }},
		{"job that restarts", "job-restart", "web.restart", func(s *manifest.Stack) { s.Services[1].Mode = manifest.ReplicatedJob }},
		{"no container", "service-empty", "web", func(s *manifest.Stack) { s.Services[1].Containers = nil }},
		{"no image", "image", "web.image", func(s *manifest.Stack) { s.Services[1].Containers[0].Image = "" }},
		{"unknown network", "network-unknown", "web", func(s *manifest.Stack) { s.Services[1].Networks[0].Network = "x" }},
		{"mode and networks", "network-mode", "web", func(s *manifest.Stack) { s.Services[1].NetworkMode = "host" }},
		{"unknown volume", "volume-unknown", "db.mounts[/data]", func(s *manifest.Stack) { s.Volumes = nil }},
		{"unknown secret", "secret-unknown", "web", func(s *manifest.Stack) { s.Secrets = nil }},
		{"mount at the root", "mount-target", "db", func(s *manifest.Stack) { s.Services[0].Containers[0].Mounts[0].Target = "/" }},
		{"two mounts at one target", "mount-twice", "db.mounts[/data]", func(s *manifest.Stack) {
			c := &s.Services[0].Containers[0]
			c.Mounts = append(c.Mounts, c.Mounts[0])
		}},
		{"unknown dependency", "depends-on-unknown", "web", func(s *manifest.Stack) { s.Services[1].DependsOn[0].Service = "x" }},
		{"dependency on itself", "depends-on-circle", "web", func(s *manifest.Stack) { s.Services[1].DependsOn[0].Service = "web" }},
		{"circle", "depends-on-circle", "db", func(s *manifest.Stack) {
			s.Services[0].DependsOn = []manifest.Dependency{{Service: "web", Condition: manifest.Started}}
		}},
		{"never completes", "depends-on-never", "web", func(s *manifest.Stack) {
			s.Services[1].DependsOn[0].Condition = manifest.Completed
			s.Services[0].Restart.Condition = manifest.RestartAny
		}},
		{"address of another network", "address", "db", func(s *manifest.Stack) { s.Services[0].Networks[0].IPv4 = "10.2.0.1" }},
		{"address of the gateway", "address", "db", func(s *manifest.Stack) { s.Services[0].Networks[0].IPv4 = "10.1.0.1" }},
		{"one address, two replicas", "address", "db", func(s *manifest.Stack) { s.Services[0].Replicas = 2 }},
		{"one address, two services", "address", "web", func(s *manifest.Stack) {
			s.Services[1].Replicas, s.Services[1].Networks[0].IPv4 = 1, "10.1.0.9"
		}},
		{"odd subnet", "network-subnet", "networks.default", func(s *manifest.Stack) { s.Networks[0].Subnet = "10.1.0.7/24" }},
		{"no subnet", "network-subnet", "networks.default", func(s *manifest.Stack) { s.Networks[0].Subnet = "" }},
		{"port twice", "port-twice", "web.ports", func(s *manifest.Stack) {
			s.Services[1].Ports = append(s.Services[1].Ports, manifest.Port{Published: 80, Target: 81})
		}},
		{"shared port", "port-shared", "web.ports", func(s *manifest.Stack) { s.Services[0].Ports = []manifest.Port{{Published: 80, Target: 81}} }},
		{"port 0", "port", "web.ports", func(s *manifest.Stack) { s.Services[1].Ports[0].Target = 0 }},
		{"protocol", "port", "web.ports", func(s *manifest.Stack) { s.Services[1].Ports[0].Protocol = "icmp" }},
		{"little memory", "resources", "web", func(s *manifest.Stack) { s.Services[1].Containers[0].Resources.Memory = 1 }},
		{"swap without memory", "resources", "web", func(s *manifest.Stack) { s.Services[1].Containers[0].Resources.MemorySwap = 1 << 30 }},
		{"negative", "resources", "web", func(s *manifest.Stack) { s.Services[1].Containers[0].Resources.CPU = -1 }},
		{"ratio", "update-ratio", "web", func(s *manifest.Stack) { s.Services[1].Update.MaxFailures = 2_000_000 }},
		{"rollback of a rollback", "update-value", "web", func(s *manifest.Stack) { s.Services[1].Rollback.FailureAction = manifest.ActionRollback }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := sound()
			s.Origins = map[string]manifest.Pos{"": {File: "compose.yaml"}, c.at: {File: "compose.yaml", Line: 7}}
			c.spoil(s)
			ps := manifest.Validate(s)
			i := slices.IndexFunc(ps, func(p manifest.Problem) bool { return p.Rule == c.rule })
			if i < 0 {
				t.Fatalf("no problem of the rule %s among %v", c.rule, ps)
			}
			if p := ps[i]; c.at != "" && c.name != "service name" && (p.File != "compose.yaml" || p.Line != 7) {
				t.Errorf("the place is %s:%d, want that of %s", p.File, p.Line, c.at)
			}
		})
	}
}

// A circle is found exactly when names can't be put in an order in which each comes after what it needs.
func TestCycle(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c", "d", "e"}
		graph := map[string][]string{}
		for _, n := range names {
			graph[n] = rapid.SliceOfN(rapid.SampledFrom(names), 0, 2).Draw(t, n)
		}
		done := map[string]bool{}
		for range names {
			for _, n := range names {
				if !slices.ContainsFunc(graph[n], func(d string) bool { return !done[d] }) {
					done[n] = true
				}
			}
		}
		circle := manifest.Cycle(graph)
		if (circle != nil) != (len(done) < len(names)) {
			t.Fatalf("circle %v in %v", circle, graph)
		}
		for i := 1; i < len(circle); i++ {
			if !slices.Contains(graph[circle[i-1]], circle[i]) {
				t.Fatalf("%v is no path of %v", circle, graph)
			}
		}
		if circle != nil && circle[0] != circle[len(circle)-1] {
			t.Fatalf("%v does not end where it begins", circle)
		}
	})
}
