package policy

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

func TestHarden(t *testing.T) {
	limits := Defaults{Memory: 256 << 20, CPU: 5e8}
	const (
		pids     = "web.resources.pids=4096 <- pids_limit: -1"
		memory   = "web.resources.memory=256MiB <- mem_limit: 2g  # your own value wins over defaults:"
		cpu      = "web.resources.cpu=0.5 <- cpus: 2  # your own value wins over defaults:"
		caps     = "web.capAdd <- cap_add: [NET_ADMIN]  # name what it needs"
		seccomp  = `web.securityOpt=Docker's default seccomp profile <- security_opt: ["seccomp=unconfined"]`
		apparmor = `web.securityOpt=Docker's default AppArmor profile, where the kernel has AppArmor <- security_opt: ["apparmor=unconfined"]`
	)
	for _, c := range []struct {
		name     string
		in       manifest.Container
		defaults Defaults
		out      manifest.Resources
		told     []string
	}{
		{"nothing written", manifest.Container{}, Defaults{}, manifest.Resources{Pids: 4096}, []string{pids, caps, seccomp, apparmor}},
		{"with defaults", manifest.Container{}, limits, manifest.Resources{Pids: 4096, Memory: 256 << 20, CPU: 5e8},
			[]string{pids, memory, cpu, caps, seccomp, apparmor}},
		{"own limits", manifest.Container{Resources: manifest.Resources{Pids: -1, Memory: 1 << 30, CPU: 2e9}}, limits,
			manifest.Resources{Pids: -1, Memory: 1 << 30, CPU: 2e9}, []string{caps, seccomp, apparmor}},
		{"a swap limit below the default", manifest.Container{Resources: manifest.Resources{Pids: 9, CPU: 1, MemorySwap: 64 << 20}}, limits,
			manifest.Resources{Pids: 9, CPU: 1, Memory: 64 << 20, MemorySwap: 64 << 20},
			[]string{"web.resources.memory=64MiB <- mem_limit: 2g  # your own value wins over defaults:", caps, seccomp, apparmor}},
		{"more reserved than the default", manifest.Container{Resources: manifest.Resources{Pids: 9, ReserveMemory: 512 << 20, ReserveCPU: 1e9}}, limits,
			manifest.Resources{Pids: 9, CPU: 1e9, Memory: 512 << 20, ReserveMemory: 512 << 20, ReserveCPU: 1e9},
			[]string{"web.resources.memory=512MiB <- mem_limit: 2g  # your own value wins over defaults:",
				"web.resources.cpu=1 <- cpus: 2  # your own value wins over defaults:", caps, seccomp, apparmor}},
		{"privileged", manifest.Container{Privileged: true}, Defaults{}, manifest.Resources{Pids: 4096}, []string{pids}},
		{"drops all, own profiles", manifest.Container{CapDrop: []string{"ALL"}, SecurityOpt: []string{"seccomp:unconfined", "apparmor=mine"}}, Defaults{},
			manifest.Resources{Pids: 4096}, []string{pids}},
		{"a profile of the repository", manifest.Container{SecurityOpt: []string{manifest.SeccompDenies + "sha256:00"}}, Defaults{},
			manifest.Resources{Pids: 4096}, []string{pids, caps, apparmor}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.in.Name = "web"
			s := manifest.Stack{Name: "shop", Services: []manifest.Service{{Name: "web", Containers: []manifest.Container{c.in}}}}
			got, applied := Harden(s, c.defaults)
			if d := cmp.Diff(c.out, got.Services[0].Containers[0].Resources); d != "" {
				t.Error(d)
			}
			var told []string
			for _, a := range applied {
				value := "=" + a.Value
				if a.Path == "web.capAdd" {
					value = ""
				}
				told = append(told, fmt.Sprintf("%s%s <- %s", a.Path, value, a.GiveBack))
			}
			if d := cmp.Diff(c.told, told); d != "" {
				t.Error(d)
			}
		})
	}
}

// Hardening changes nothing that somebody wrote, leaves the stack it was given alone, and is done after one time.
func TestHardenIsDoneOnce(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s := genStack(rt)
		for i := range s.Services {
			r := &s.Services[i].Containers[0].Resources
			r.Memory = manifest.Bytes(rapid.SampledFrom([]int64{0, 1 << 20}).Draw(rt, "memory"))
			r.Pids = rapid.SampledFrom([]int64{0, -1, 10}).Draw(rt, "pids")
		}
		d := Defaults{Memory: manifest.Bytes(rapid.SampledFrom([]int64{0, 1 << 30}).Draw(rt, "default")), CPU: 1}
		before, _ := json.Marshal(s)
		once, _ := Harden(s, d)
		if after, _ := json.Marshal(s); string(after) != string(before) {
			rt.Fatal("the stack that was given changed")
		}
		twice, _ := Harden(once, d)
		if diff := cmp.Diff(once, twice); diff != "" {
			rt.Fatal(diff)
		}
		for i := range s.Services {
			was, is := s.Services[i].Containers[0].Resources, once.Services[i].Containers[0].Resources
			if was.Memory != 0 && was.Memory != is.Memory || was.Pids != 0 && was.Pids != is.Pids {
				rt.Fatalf("a written limit changed: %+v, %+v", was, is)
			}
		}
	})
}
