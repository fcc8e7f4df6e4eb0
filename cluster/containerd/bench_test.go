package containerd

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// BenchmarkFifty makes, starts and removes 50 containers at once: by this package, with logs, and by the shortest loop over containerd's own
// client, without. The bound for the whole way of a task is 1.5 times the bare loop.
func BenchmarkFifty(b *testing.B) {
	const count = 50
	n := newNode(b)
	specs := make([]worker.ContainerSpec, count)
	for i := range specs {
		specs[i] = n.spec(fmt.Sprint("app", i), "sleep", "600")
		specs[i].Spec.Resources = manifest.Resources{Memory: 64 << 20, Pids: 64}
	}
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			n.all(count, func(i int) error {
				if err := n.Create(n.ctx, specs[i]); err != nil {
					return err
				}
				return n.Start(n.ctx, specs[i].ID)
			})
			n.all(count, func(i int) error { return n.Remove(n.ctx, specs[i].ID) })
		}
	})
	b.Run("bare", func(b *testing.B) {
		ctx := n.in(n.ctx)
		img, err := n.client.GetImage(ctx, specs[0].Image)
		n.must(err)
		containers, processes := make([]client.Container, count), make([]client.Task, count)
		for b.Loop() {
			n.all(count, func(i int) (err error) {
				id := fmt.Sprint("bare", i)
				containers[i], err = n.client.NewContainer(ctx, id, client.WithImage(img), client.WithNewSnapshot(id, img),
					client.WithNewSpec(oci.WithImageConfigArgs(img, []string{"sleep", "600"}), seccomp.WithDefaultProfile(),
						oci.WithMemoryLimit(64<<20), oci.WithPidsLimit(64), oci.WithHostNamespace("network"), oci.WithCgroup(n.o.CgroupParent+"/"+id)))
				if err != nil {
					return err
				}
				if processes[i], err = containers[i].NewTask(ctx, cio.NullIO); err != nil {
					return err
				}
				return processes[i].Start(ctx)
			})
			n.all(count, func(i int) error {
				gone, err := processes[i].Wait(ctx)
				if err != nil {
					return err
				}
				if err := processes[i].Kill(ctx, syscall.SIGKILL); err != nil {
					return err
				}
				<-gone
				if _, err := processes[i].Delete(ctx); err != nil {
					return err
				}
				return containers[i].Delete(ctx, client.WithSnapshotCleanup)
			})
		}
	})
	b.Run("list", func(b *testing.B) {
		n.all(count, func(i int) error {
			if err := n.Create(n.ctx, specs[i]); err != nil {
				return err
			}
			return n.Start(n.ctx, specs[i].ID)
		})
		for b.Loop() {
			if list, err := n.List(n.ctx); err != nil || len(list) != count {
				b.Fatal(len(list), err)
			}
		}
	})
}
