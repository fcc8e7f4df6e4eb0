package schedule_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"github.com/gitopsd/gitopsd/reconcile/schedule"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Each file is one situation:
//
//	node NAME [platform=P] [memory=N] [cpu=N]     a node
//	place SERVICE [home=NODE] [platform=P] [memory=N] [cpu=N] [port=N] [ip=A] [udp]   where a task goes, or why nowhere; it then counts as there
func TestPlace(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		var nodes []schedule.Node
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			arg := map[string]string{}
			for _, a := range d.CmdArgs[1:] {
				arg[a.Key] = strings.Join(a.Vals, ",")
			}
			var memory manifest.Bytes
			var cpu manifest.CPU
			if m := arg["memory"]; m != "" {
				if err := memory.UnmarshalText([]byte(m)); err != nil {
					t.Fatal(err)
				}
			}
			if c := arg["cpu"]; c != "" {
				if err := cpu.UnmarshalText([]byte(c)); err != nil {
					t.Fatal(err)
				}
			}
			name := d.CmdArgs[0].Key
			switch d.Cmd {
			case "node":
				n := schedule.Node{ID: name, Platform: "linux/amd64", FreeCPU: 4e9, FreeMemory: 8 << 30, Ports: map[string]string{}, Same: map[string]int{}}
				if p := arg["platform"]; p != "" {
					n.Platform = p
				}
				if memory > 0 {
					n.FreeMemory = memory
				}
				if cpu > 0 {
					n.FreeCPU = cpu
				}
				nodes = append(nodes, n)
				return "ok\n"
			case "place":
				spec := &manifest.Service{Containers: []manifest.Container{{Platform: arg["platform"], Resources: manifest.Resources{ReserveMemory: memory, ReserveCPU: cpu}}}}
				if p := arg["port"]; p != "" {
					var port manifest.Port
					if _, err := fmt.Sscan(p, &port.Published); err != nil {
						t.Fatal(err)
					}
					port.HostIP = arg["ip"]
					if _, udp := arg["udp"]; udp {
						port.Protocol = "udp"
					}
					spec.Ports = append(spec.Ports, port)
				}
				p := schedule.Place(schedule.Ask{Service: name, Slot: 1, Home: arg["home"], Spec: spec}, nodes)
				if p.Node == "" {
					return p.Refusal + "\n"
				}
				for i := range nodes {
					if nodes[i].ID == p.Node {
						nodes[i].Take(name, spec)
					}
				}
				return "on " + p.Node + "\n"
			}
			t.Fatalf("unknown command %s", d.Cmd)
			return ""
		})
	})
}

// A task never goes to a node that refuses it when it is asked alone, and is refused only where each node alone refuses it.
func TestPlaceNeverOnARefusingNode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var nodes []schedule.Node
		for i := range rapid.IntRange(0, 5).Draw(t, "nodes") {
			n := schedule.Node{
				ID: fmt.Sprintf("n%d", i), Platform: rapid.SampledFrom([]string{"linux/amd64", "linux/arm64"}).Draw(t, "platform"),
				FreeCPU: manifest.CPU(rapid.IntRange(-1, 4).Draw(t, "cpu")), FreeMemory: manifest.Bytes(rapid.IntRange(-1, 4).Draw(t, "memory")),
				Ports: map[string]string{}, Same: map[string]int{"s/web": rapid.IntRange(0, 3).Draw(t, "same")}, Tasks: rapid.IntRange(0, 9).Draw(t, "tasks"),
			}
			if rapid.Bool().Draw(t, "taken") {
				n.Ports["tcp/80"] = rapid.SampledFrom([]string{"s/web", "s/api"}).Draw(t, "holder")
			}
			nodes = append(nodes, n)
		}
		spec := &manifest.Service{Containers: []manifest.Container{{
			Platform:  rapid.SampledFrom([]string{"", "linux/amd64", "linux/arm64/v8"}).Draw(t, "wants"),
			Resources: manifest.Resources{ReserveCPU: manifest.CPU(rapid.IntRange(0, 3).Draw(t, "reserve cpu")), ReserveMemory: manifest.Bytes(rapid.IntRange(0, 3).Draw(t, "reserve memory"))},
		}}}
		if rapid.Bool().Draw(t, "publishes") {
			spec.Ports = []manifest.Port{{Published: 80, Target: 80}}
		}
		ask := schedule.Ask{Service: "s/web", Slot: 1, Home: rapid.SampledFrom([]string{"", "n0", "n1"}).Draw(t, "home"), Spec: spec}
		got := schedule.Place(ask, nodes)
		for i := range nodes {
			alone := schedule.Place(ask, nodes[i:i+1])
			switch {
			case alone.Node == "" && got.Node == nodes[i].ID:
				t.Fatalf("placed on %s, which refuses: %s", got.Node, alone.Refusal)
			case alone.Node != "" && got.Node == "":
				t.Fatalf("refused (%s), but %s takes it", got.Refusal, alone.Node)
			}
		}
		if (got.Node == "") == (got.Refusal == "") {
			t.Fatalf("neither or both of a node and a refusal: %+v", got)
		}
	})
}
