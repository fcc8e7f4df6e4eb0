package compose

import (
	"reflect"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/gitopsd/gitopsd/sync/manifest"
)

const extensionKey = "x-gitops"

// stackExtension is x-gitops at the top of a Compose file. gitops.yaml wins over it.
type stackExtension struct {
	DependsOn []string `yaml:"dependsOn"`
	Suspend   bool     `yaml:"suspend"`
	Prune     *bool    `yaml:"prune"`
	Volumes   *bool    `yaml:"pruneVolumes"`
	Drift     string   `yaml:"drift" enum:"heal report"`
	Ignore    []string `yaml:"ignoreDrift"`
	DataRoot  string   `yaml:"dataRoot"`
	Rollback  string   `yaml:"rollback" enum:"service stack"`
}

// serviceExtension is x-gitops of a service.
type serviceExtension struct {
	Probe    *probeExtension `yaml:"probe"`
	Seed     []string        `yaml:"seed"` // sources of mounts in the short form
	Storage  string          `yaml:"storage" enum:"local shared"`
	Rollback string          `yaml:"rollback" enum:"service stack"`
}

// probeExtension is a health check over the network.
type probeExtension struct {
	HTTP          string `yaml:"http"`
	TCP           bool   `yaml:"tcp"`
	Port          int    `yaml:"port" min:"1" max:"65535"`
	Interval      string `yaml:"interval"`
	Timeout       string `yaml:"timeout"`
	StartPeriod   string `yaml:"startPeriod"`
	StartInterval string `yaml:"startInterval"`
	Retries       int    `yaml:"retries" min:"1" max:"1000"`
}

// mountExtension is x-gitops of a mount in the long form.
type mountExtension struct {
	Seed    bool   `yaml:"seed"`
	Storage string `yaml:"storage" enum:"local shared"`
}

// volumeExtension is x-gitops of a top-level volume.
type volumeExtension struct {
	Storage string `yaml:"storage" enum:"local shared"`
}

// extension reads an x-gitops value into a struct. The path leads to the value's owner in the model.
func (s *scanner) extension(extensions map[string]any, into any, service string, owner ...string) {
	value, ok := extensions[extensionKey]
	if !ok || value == nil {
		return
	}
	var n yaml.Node
	if err := n.Encode(value); err != nil {
		pos, _ := s.locate(append(owner, extensionKey)...)
		s.add(manifest.Error, "extension", pos, service, "%s can't be read", extensionKey)
		return
	}
	faults := strict(&n, reflect.TypeOf(into).Elem(), extensionKey)
	if len(faults) == 0 {
		if err := n.Decode(into); err != nil {
			faults = append(faults, yamlFault(err).at(extensionKey))
		}
	}
	for _, f := range faults {
		pos, _ := s.locate(append(append([]string{}, owner...), strings.Split(f.path, ".")...)...)
		s.add(manifest.Error, "extension", pos, service, "%s", f.msg)
	}
}

// probe turns the extension into the manifest's form.
func (c *converter) probe(service string, p *probeExtension) *manifest.Probe {
	if p == nil {
		return nil
	}
	pos, _ := c.locate("services", service, extensionKey, "probe")
	if p.Port == 0 || (p.HTTP == "") != p.TCP || p.HTTP != "" && !strings.HasPrefix(p.HTTP, "/") {
		c.add(manifest.Error, "probe", pos, service, "a probe needs a port, and either http: with a path such as /healthz, or tcp: true")
		return nil
	}
	span := func(key, text string) manifest.Duration {
		if text == "" {
			return 0
		}
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			c.add(manifest.Error, "probe", pos, service, "probe.%s is %q; want a time such as 5s", key, text)
		}
		return manifest.Duration(d)
	}
	return &manifest.Probe{HTTP: p.HTTP, TCP: p.TCP, Port: uint16(p.Port), Timing: manifest.Health{
		Interval: span("interval", p.Interval), Timeout: span("timeout", p.Timeout), StartPeriod: span("startPeriod", p.StartPeriod),
		StartInterval: span("startInterval", p.StartInterval), Retries: p.Retries,
	}}
}
