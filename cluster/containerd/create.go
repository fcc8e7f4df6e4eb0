package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/sys/signal"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gitopsd/gitopsd/cluster/tasklog"
	"github.com/gitopsd/gitopsd/cluster/worker"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Create implements [worker.Runtime]. The image must be on the node: see Ensure. A create that fails leaves nothing behind.
func (r *Runtime) Create(ctx context.Context, spec worker.ContainerSpec) error {
	ctx = r.in(ctx)
	if spec.Cgroup == "" {
		spec.Cgroup = path.Join(r.o.CgroupParent, spec.ID)
	}
	img, err := r.facts(ctx, spec.Image, spec.Digest, spec.Spec.Platform)
	if err != nil {
		return err
	}
	users, err := r.users(ctx, img)
	if err != nil {
		return err
	}
	unmount, err := r.mountVolumes(ctx, &spec)
	defer unmount()
	if err != nil {
		return fmt.Errorf("create container %s: %w", spec.ID, err)
	}
	oci, err := buildSpec(&spec, &img.config, users, r.host)
	if err != nil {
		return fmt.Errorf("create container %s: %w", spec.ID, err)
	}
	if err := r.create(ctx, &spec, img, oci); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("create container %s: %w", spec.ID, ctx.Err())
		}
		return err
	}
	return nil
}

func (r *Runtime) create(ctx context.Context, spec *worker.ContainerSpec, img *imageFacts, oci *specs.Spec) (err error) {
	encoded, err := typeurl.MarshalAny(oci)
	if err != nil {
		return fmt.Errorf("encode the spec of %s: %w", spec.ID, err)
	}
	runtime := containers.RuntimeInfo{Name: firstOf(spec.Spec.Runtime, runtimeName)}
	if runtime.Name == runtimeName && r.o.RuntimeBinary != "" {
		if runtime.Options, err = typeurl.MarshalAny(&options.Options{BinaryName: r.o.RuntimeBinary}); err != nil {
			return fmt.Errorf("encode the options of runc: %w", err)
		}
	}
	labels := map[string]string{
		managedLabel: "true", imageLabel: spec.Image, digestLabel: spec.Digest, cgroupLabel: spec.Cgroup,
		commandLabel: shorten(oci.Process.Args[0], 512),
	}
	for k, v := range spec.Labels {
		labels[k] = encodeLabel(v)
	}
	// The record comes first: it refuses a second container of this id, and containerd keeps the snapshot for its sake.
	_, err = r.client.ContainerService().Create(ctx, containers.Container{
		ID: spec.ID, Labels: labels, Image: img.record, Spec: encoded, Snapshotter: r.o.Snapshotter, SnapshotKey: spec.ID,
		Runtime: runtime,
	})
	if err != nil {
		return wrap(err, "create container %s", spec.ID)
	}
	defer func() {
		if err != nil {
			ctx, cancel := cleanup(ctx)
			defer cancel()
			if undo := r.Remove(ctx, spec.ID); undo != nil {
				err = errors.Join(err, undo)
			}
		}
	}()
	ours := snapshots.WithLabels(map[string]string{managedLabel: "true"})
	rootfs, err := r.client.SnapshotService(r.o.Snapshotter).Prepare(ctx, spec.ID, img.chain, ours)
	if err != nil {
		if errdefs.IsNotFound(err) {
			r.forget(img)
		}
		return wrap(err, "make the root file system of %s", spec.ID)
	}
	if err := r.prepareFiles(spec, rootfs); err != nil {
		return fmt.Errorf("create container %s: %w", spec.ID, err)
	}
	output, err := r.logURI(spec)
	if err != nil {
		return err
	}
	whole, done := wholly(ctx)
	defer done()
	_, err = r.client.TaskService().Create(whole, &tasks.CreateTaskRequest{
		ContainerID: spec.ID, Rootfs: mount.ToProto(rootfs), Terminal: spec.Spec.TTY, Stdout: output, Stderr: stderrOf(output, spec.Spec.TTY),
	})
	if err != nil {
		program := oci.Process.Args[0]
		if why := startError(err, program); why != nil {
			return why
		}
		return wrap(err, "create container %s", spec.ID)
	}
	return nil
}

// stderrOf is empty for a terminal, which has one stream.
func stderrOf(output string, tty bool) string {
	if tty {
		return ""
	}
	return output
}

func shorten(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// logURI tells the shim how to start the keeper that writes the container's log: one pair of arguments, because the shim shuffles several.
func (r *Runtime) logURI(spec *worker.ContainerSpec) (string, error) {
	if spec.Spec.Logging.Off || spec.LogDir == "" {
		if !spec.Spec.TTY {
			return "", nil
		}
		spec.LogDir = "" // a terminal needs a reader: the keeper reads and keeps nothing
	}
	l := spec.Spec.Logging
	size, files := int64(l.MaxSize), l.MaxFile
	if size <= 0 {
		size = tasklog.DefaultMaxSize
	}
	if files <= 0 {
		files = tasklog.DefaultMaxFiles
	}
	streams := "2"
	if spec.Spec.TTY {
		streams = "1"
	}
	arg := streams + "," + strconv.FormatInt(size, 10) + "," + strconv.Itoa(files) + "," + spec.LogDir
	uri, err := cio.LogURIGenerator("binary", r.o.KeeperPath, map[string]string{"log": arg})
	if err != nil {
		return "", fmt.Errorf("log of container %s: %w", spec.ID, err)
	}
	return uri.String(), nil
}

// Start implements [worker.Runtime].
func (r *Runtime) Start(ctx context.Context, id string) error {
	ctx = r.in(ctx)
	if err := r.noteStart(id); err != nil {
		return fmt.Errorf("start container %s: %w", id, err)
	}
	if _, err := r.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: id}); err != nil {
		_ = os.Remove(r.startFile(id))
		program := "of " + id
		if rec, recErr := r.client.ContainerService().Get(ctx, id); recErr == nil {
			program = rec.Labels[commandLabel]
		}
		if why := startError(err, program); why != nil {
			return why
		}
		return wrap(err, "start container %s", id)
	}
	return nil
}

// Stop implements [worker.Runtime]. An empty signal is SIGTERM.
func (r *Runtime) Stop(ctx context.Context, id string, sig string, grace time.Duration) error {
	ctx = r.in(ctx)
	number, err := signal.ParseSignal(firstOf(sig, "SIGTERM"))
	if err != nil {
		return permanent("stop container %s: %q is not a signal", id, sig)
	}
	ts := r.client.TaskService()
	now, err := ts.Get(ctx, &tasks.GetRequest{ContainerID: id})
	if errdefs.IsNotFound(native(err)) {
		if _, err := r.client.ContainerService().Get(ctx, id); err != nil {
			return wrap(err, "stop container %s", id)
		}
		return nil // it has no process any more
	}
	if err != nil {
		return wrap(err, "stop container %s", id)
	}
	if now.Process.Status == tasktypes.Status_STOPPED {
		return nil
	}
	if now.Process.Status == tasktypes.Status_CREATED {
		number = syscall.SIGKILL // nothing of the image's runs yet, and what is there would not hear
	}
	waitCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	gone := make(chan error, 1)
	go func() {
		_, err := ts.Wait(waitCtx, &tasks.WaitRequest{ContainerID: id})
		gone <- err
	}()
	kill := func(s syscall.Signal, all bool) error {
		_, err := ts.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(s), All: all})
		if errdefs.IsNotFound(native(err)) {
			return nil // it was quicker
		}
		return err
	}
	if err := kill(number, false); err != nil {
		return wrap(err, "stop container %s", id)
	}
	if now.Process.Status == tasktypes.Status_PAUSED {
		// A frozen process sees no signal.
		if err := r.Resume(ctx, id); err != nil {
			return err
		}
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	for {
		select {
		case err := <-gone:
			if err != nil && !errdefs.IsNotFound(native(err)) {
				return wrap(err, "stop container %s", id)
			}
			return nil
		case <-timer.C:
			if err := kill(syscall.SIGKILL, true); err != nil {
				return wrap(err, "kill container %s", id)
			}
		case <-ctx.Done():
			return fmt.Errorf("stop container %s: %w", id, ctx.Err())
		}
	}
}

// Remove implements [worker.Runtime].
func (r *Runtime) Remove(ctx context.Context, id string) error {
	ctx = r.in(ctx)
	if err := r.removeTask(ctx, id); err != nil {
		return wrap(err, "remove container %s", id)
	}
	if err := r.client.SnapshotService(r.o.Snapshotter).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return wrap(err, "remove the root file system of %s", id)
	}
	if err := os.Remove(r.startFile(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	// The record goes last: as long as it is there, List tells of what is left.
	if err := r.client.ContainerService().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return wrap(err, "remove container %s", id)
	}
	return nil
}

func (r *Runtime) removeTask(ctx context.Context, id string) error {
	ts := r.client.TaskService()
	now, err := ts.Get(ctx, &tasks.GetRequest{ContainerID: id})
	if errdefs.IsNotFound(native(err)) {
		return nil
	}
	if err != nil {
		return err
	}
	if now.Process.Status != tasktypes.Status_STOPPED {
		if err := r.kill(ctx, id, now.Process.Status); err != nil {
			return err
		}
	}
	whole, done := wholly(ctx)
	defer done()
	_, err = ts.Delete(whole, &tasks.DeleteTaskRequest{ContainerID: id})
	if err == nil || errdefs.IsNotFound(native(err)) {
		return nil
	}
	return err
}

// kill kills all processes of a container and waits until they are gone.
func (r *Runtime) kill(ctx context.Context, id string, status tasktypes.Status) error {
	ts := r.client.TaskService()
	waitCtx, cancel := context.WithTimeout(ctx, cleanupTime)
	defer cancel()
	gone := make(chan error, 1)
	go func() {
		_, err := ts.Wait(waitCtx, &tasks.WaitRequest{ContainerID: id})
		gone <- err
	}()
	_, err := ts.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(syscall.SIGKILL), All: true})
	if err != nil && !errdefs.IsNotFound(native(err)) {
		return err
	}
	var resumed error
	if status == tasktypes.Status_PAUSED || status == tasktypes.Status_PAUSING {
		// Some kernels do not let a frozen process see even a kill; with others it is gone by now and cannot be resumed.
		_, resumed = ts.Resume(ctx, &tasks.ResumeTaskRequest{ContainerID: id})
	}
	if err := <-gone; err != nil && !errdefs.IsNotFound(native(err)) {
		return errors.Join(err, resumed)
	}
	return nil
}

// Update implements [worker.Inspector]. Limits that r leaves out are taken away.
func (r *Runtime) Update(ctx context.Context, id string, limits manifest.Resources) error {
	encoded, err := json.Marshal(unlimited(resources(&limits, r.host), r.host))
	if err != nil {
		return fmt.Errorf("encode limits: %w", err)
	}
	ctx = r.in(ctx)
	_, err = r.client.TaskService().Update(ctx, &tasks.UpdateTaskRequest{ContainerID: id, Resources: resourcesAny(encoded)})
	return wrap(err, "set limits of container %s", id)
}

// Resume implements [worker.Inspector]. Resuming what is not paused is no error.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	ctx = r.in(ctx)
	now, err := r.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err == nil && now.Process.Status == tasktypes.Status_PAUSED {
		_, err = r.client.TaskService().Resume(ctx, &tasks.ResumeTaskRequest{ContainerID: id})
	}
	return wrap(err, "resume container %s", id)
}
