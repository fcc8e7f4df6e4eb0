package cluster

import (
	"context"
	"fmt"
	"strings"

	"github.com/gitopsd/gitopsd/cluster/api"
	"github.com/gitopsd/gitopsd/reconcile"
	"github.com/gitopsd/gitopsd/reconcile/state"
)

// volume forgets a volume, or has its node remove it with its data.
func (l *leader) volume(ctx context.Context, op api.Operation) (api.Result, error) {
	v := l.View()
	if err := api.CheckVolume(v, op); err != nil {
		return api.Result{}, err
	}
	e, _ := v.Volumes.Get(op.Volume)
	next := e.Value
	op.Stack = next.Stack
	node, _ := v.Nodes.Get(next.Node)
	on := node.Value.Name
	if on == "" {
		on = next.Node
	}
	if op.Kind == api.OpVolumeForget {
		message := fmt.Sprintf("volume %s on %s is forgotten; its data stay there", next.Name, on)
		if services, _ := reconcile.VolumeUsers(v, op.Volume); len(services) > 0 {
			message += fmt.Sprintf(", and the next task of %s may start without them on any node", strings.Join(services, ", "))
		}
		return l.change(ctx, op, message, state.Item{state.Delete[state.Volume](op.Volume, e.Version)})
	}
	message := fmt.Sprintf("%s removes volume %s with its data", on, next.Name)
	if next.Removing != nil {
		return api.Result{Index: v.Index, Message: message}, nil
	}
	next.Removing = &state.Reason{ID: ReasonByPerson, Message: "by " + op.Actor}
	return l.change(ctx, op, message, state.Item{state.Put(op.Volume, e.Version, next)})
}
