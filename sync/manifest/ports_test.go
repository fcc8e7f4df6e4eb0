package manifest

import (
	"encoding/json"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func ports(first, last, shift uint16, protocol string) []Port {
	var out []Port
	for p := int(first); p <= int(last); p++ {
		out = append(out, Port{Published: uint16(p), Target: uint16(p) + shift, Protocol: protocol})
	}
	return out
}

// A long range is one element whatever lies between its ports, a short one is written as it always was.
func TestPortsAreWrittenShort(t *testing.T) {
	both := append(ports(10000, 20000, 0, "udp"), ports(10000, 20000, 0, "")...)
	slices.SortFunc(both, ComparePorts)
	for _, c := range []struct {
		ports Ports
		want  string
	}{
		{nil, "null"},
		{ports(80, 81, 8000, ""), `[{"published":80,"target":8080},{"published":81,"target":8081}]`},
		{ports(1, 65535, 0, ""), `[{"published":1,"target":1,"count":65535}]`},
		{both, `[{"published":10000,"target":10000,"count":10001},{"published":10000,"target":10000,"protocol":"udp","count":10001}]`},
		{[]Port{{Published: 9, Target: 1}, {Published: 8, Target: 2}}, `[{"published":9,"target":1},{"published":8,"target":2}]`},
	} {
		data, err := json.Marshal(c.ports)
		if err != nil || string(data) != c.want {
			t.Errorf("%.200s, %v, want %s", data, err, c.want)
		}
		var back Ports
		if err := json.Unmarshal(data, &back); err != nil || !slices.Equal(back, c.ports) || (back == nil) != (c.ports == nil) {
			t.Errorf("%d ports come back as %d, %v", len(c.ports), len(back), err)
		}
	}
	for _, bad := range []string{`[{"published":65000,"target":1,"count":1000}]`, `[{"published":1,"target":65535,"count":2}]`, `[{"count":-1}]`, `{}`, `[3]`} {
		var p Ports
		if err := json.Unmarshal([]byte(bad), &p); err == nil {
			t.Errorf("%s gives %v", bad, p)
		}
	}
}

// Whatever the ports are, and in whatever order, they come back as they were, written twice the same.
func TestPortsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var p Ports
		for range rapid.IntRange(0, 4).Draw(t, "ranges") {
			first, n := rapid.IntRange(0, 65535).Draw(t, "first"), rapid.IntRange(0, 80).Draw(t, "length")
			protocol := rapid.SampledFrom([]string{"", "udp"}).Draw(t, "protocol")
			shift := rapid.SampledFrom([]int{0, 1, 30}).Draw(t, "shift")
			for i := range n {
				if first+i+shift <= 65535 {
					p = append(p, Port{Published: uint16(first + i), Target: uint16(first + i + shift), Protocol: protocol})
				}
			}
		}
		if rapid.Bool().Draw(t, "sorted") {
			slices.SortStableFunc(p, ComparePorts)
		}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var back Ports
		if err := json.Unmarshal(data, &back); err != nil || !slices.Equal(back, p) {
			t.Fatalf("%s: %v", data, err)
		}
		if again, _ := json.Marshal(back); string(again) != string(data) {
			t.Fatalf("%s is written again as %s", data, again)
		}
	})
}
