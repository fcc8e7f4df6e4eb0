package policy

import (
	"fmt"
	"testing"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

// fiveServices is a stack of the size that the benchmarks of the whole program use.
func fiveServices(i int) manifest.Stack {
	s := manifest.Stack{Name: fmt.Sprintf("stack%d", i), Origins: map[string]manifest.Pos{}, Files: []string{"compose.yaml"}}
	for j := range 5 {
		name := fmt.Sprintf("s%d", j)
		s.Services = append(s.Services, manifest.Service{
			Name: name, Replicas: 2, Labels: map[string]string{"team": "a", "tier": "b"},
			Networks: []manifest.Attachment{{Network: s.Name + "_default"}},
			Ports:    []manifest.Port{{Published: uint16(8000 + j), Target: 80}},
			Containers: []manifest.Container{{
				Name: name, Image: "docker.io/library/nginx:1.29",
				Env: map[string]string{"A": "1", "DB_PASSWORD_FILE": "/run/secrets/db", "URL": "http://x/"},
				Mounts: []manifest.Mount{
					{Kind: manifest.MountVolume, Source: s.Name + "_data", Target: "/data"},
					{Kind: manifest.MountBind, Source: "/srv/x", Target: "/x"},
				},
			}},
		})
		s.Origins[name] = manifest.Pos{File: "compose.yaml", Line: 2 + j}
	}
	s.Volumes = []manifest.Volume{{Name: s.Name + "_data", Key: "data"}}
	return s
}

func BenchmarkNew(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		newEngine(b, Options{})
	}
}

func BenchmarkReview(b *testing.B) {
	for name, sets := range map[string][]string{"baseline": nil, "restricted": {Restricted}} {
		b.Run(name, func(b *testing.B) {
			in := Input{Stack: fiveServices(0), Sets: sets}
			e := newEngine(b, Options{})
			b.ReportAllocs()
			for b.Loop() {
				review(b, e, in)
			}
		})
	}
}

func BenchmarkReview1000Stacks(b *testing.B) {
	e := newEngine(b, Options{})
	stacks := make([]manifest.Stack, 1000)
	for i := range stacks {
		stacks[i] = fiveServices(i)
	}
	for b.Loop() {
		for _, s := range stacks {
			review(b, e, Input{Stack: s})
		}
	}
}
