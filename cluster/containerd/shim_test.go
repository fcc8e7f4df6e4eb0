package containerd

import (
	"strings"
	"testing"
)

// A container whose runtime the node lacks does not quietly run in another one.
func TestARuntimeThatTheNodeLacks(t *testing.T) {
	n := newNode(t)
	s := n.spec("elsewhere", "/app", "true")
	s.Spec.Runtime = "io.containerd.nowhere.v1"
	err := n.Create(n.ctx, s)
	if err == nil || !strings.Contains(err.Error(), "containerd-shim-nowhere-v1") {
		t.Errorf("got %v, want an error that names the missing program", err)
	}
}
