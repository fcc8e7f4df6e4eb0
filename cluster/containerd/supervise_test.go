package containerd

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestSupervisorSaysWhyItCannotStart(t *testing.T) {
	dir := t.TempDir()
	for want, s := range map[string]Supervisor{
		"install containerd": {Dir: dir, Binary: "no-such-containerd"},
		"absolute":           {Dir: "relative"},
		"shorter":            {Dir: filepath.Join(dir, strings.Repeat("long", 30))},
	} {
		if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
}

func TestSupervisorTakesNoStrangerForItsOwn(t *testing.T) {
	s := Supervisor{Dir: t.TempDir()}
	if err := s.prepare(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []string{"", "x", "1", "-5", "999999999"} {
		writeTo(t, s.pidFile(), pid)
		if got, err := s.running(); got != 0 || err != nil {
			t.Errorf("pid file %q: %d, %v", pid, got, err)
		}
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Error("stopping nothing:", err)
	}
}
