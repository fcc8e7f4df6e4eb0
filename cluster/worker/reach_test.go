package worker

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/gitopsd/gitopsd/cluster/network"
	"github.com/gitopsd/gitopsd/reconcile/converge"
	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// refusing is a network layer that makes no network while it has a reason.
type refusing struct {
	Network
	why error
}

func (r *refusing) EnsureNetwork(context.Context, network.Network) error { return r.why }
func (r *refusing) Attach(context.Context, network.Endpoint) (string, error) {
	return "/ns", nil
}

// A task whose network could not be made says why, and not that the network is not there; once it can be made, the task starts.
func TestTaskSaysWhyItsNetworkWasRefused(t *testing.T) {
	log := &oneLog{state: state.New()}
	nets := &refusing{why: errors.New("network shop_default: subnet 10.0.0.0/24 overlaps 10.0.0.1/16 of the host's eth0; give it another subnet")}
	w := New(Config{Node: "n1", Network: nets, Log: log})
	made := state.Network{Stack: "shop", Subnets: map[string]string{"n1": "10.0.0.0/24"}}
	if err := log.Report(t.Context(), []state.Item{{state.Set("shop_default", made)}}, nil); err != nil {
		t.Fatal(err)
	}
	var task converge.Assignment
	task.ID, task.Addrs = "shop/web.1.1", map[string]string{"shop_default": "10.0.0.2"}
	task.Spec = manifest.Service{Networks: []manifest.Attachment{{Network: "shop_default"}}}
	attach := func() error {
		w.ensureNetworks(t.Context(), log.View(), []converge.Assignment{task})
		j := job{Worker: w, task: task, nets: w.networks, refuse: w.refused}
		_, err := j.attach(t.Context())
		return err
	}
	for range 2 { // it is told in each pass
		if err := attach(); err == nil || !strings.Contains(err.Error(), "overlaps 10.0.0.1/16 of the host's eth0; give it another subnet") {
			t.Errorf("got %v", err)
		}
	}
	nets.why = nil
	if err := attach(); err != nil {
		t.Errorf("when nothing is in the way any more: %v", err)
	}
}
