package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

const mountPrefix = "mount-"

// withMounted mounts a root file system for the time of fn, below the state directory.
func (r *Runtime) withMounted(mounts []mount.Mount, fn func(root string) error) (err error) {
	dir, err := os.MkdirTemp(r.o.StateDir, mountPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if undo := unmount(dir); err == nil {
			err = undo
		}
	}()
	if err := mount.All(mounts, dir); err != nil {
		return fmt.Errorf("mount a root file system: %w", err)
	}
	return fn(dir)
}

// unmount takes the mount and its directory away.
func unmount(dir string) error {
	if err := mount.UnmountAll(dir, unix.UMOUNT_NOFOLLOW); err != nil {
		// Somebody looks into it: out of sight now, gone when they leave.
		if err := mount.UnmountAll(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mountVolumes mounts the file systems that the container's volumes are, below the state directory, and makes its mounts binds of them. So it is the
// host that reaches a file server, whatever networks the container has. What a container binds stays mounted for it, so all can be unmounted when
// it is made; nothing is left to be counted or cleaned up, but after a crash, by the next Open.
func (r *Runtime) mountVolumes(ctx context.Context, spec *worker.ContainerSpec) (done func(), err error) {
	var dirs []string
	done = func() {
		for _, dir := range dirs {
			if err := unmount(dir); err != nil {
				r.o.Logger.Warn("unmount a volume", "container", spec.ID, "err", err)
			}
		}
	}
	spec.Mounts = slices.Clone(spec.Mounts)
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if m.From == nil {
			continue
		}
		if strings.HasPrefix(m.From.Type, "fuse") { // the library would run the program that the type names
			return done, permanent("mount %s at %s: FUSE file systems are not mounted here: mount it on the host and bind its directory", m.From.Device, m.Target)
		}
		dir, err := os.MkdirTemp(r.o.StateDir, mountPrefix)
		if err != nil {
			return done, fmt.Errorf("mount %s at %s: %w", m.From.Device, m.Target, err)
		}
		mounted := make(chan error, 1)
		go func() {
			mounted <- mount.All([]mount.Mount{{Type: m.From.Type, Source: m.From.Device, Options: m.From.Options}}, dir)
		}()
		select {
		case err = <-mounted:
			dirs = append(dirs, dir)
		case <-ctx.Done(): // a file server that does not answer holds the call, which nothing ends
			go func() {
				if err := errors.Join(<-mounted, unmount(dir)); err != nil {
					r.o.Logger.Debug("a mount that was given up", "container", spec.ID, "err", mountError(err, m.From.Type))
				}
			}()
			err = ctx.Err()
		}
		if err != nil {
			return done, fmt.Errorf("mount %s at %s: %w", m.From.Device, m.Target, mountError(err, m.From.Type))
		}
		if m.Source, err = inside(dir, m.Source); err != nil {
			return done, fmt.Errorf("mount %s at %s: %w", m.From.Device, m.Target, err)
		}
	}
	return done, nil
}

// inside makes a directory of a volume that is mounted at root, and returns its path. Links in it lead nowhere else.
func inside(root, dir string) (string, error) {
	at, err := securejoin.SecureJoin(root, dir)
	if err != nil {
		return "", err
	}
	return at, os.MkdirAll(at, 0o755)
}

// mountError is what the kernel said. The library's error holds the options too, and with them a password.
func mountError(err error, kind string) error {
	var errno syscall.Errno
	switch {
	case !errors.As(err, &errno):
		return err
	case errno == unix.ENODEV:
		return fmt.Errorf("this node's kernel has no file systems of the type %s: install what brings it (nfs-common, cifs-utils, a kernel module)", kind)
	case errno == unix.EINVAL:
		return fmt.Errorf("%w: the kernel does not take it with these options (`o:`)", errno)
	}
	return errno
}

// withImage mounts an image's files, read-only, for the time of fn.
func (r *Runtime) withImage(ctx context.Context, chain string, fn func(root string) error) (err error) {
	sn := r.client.SnapshotService(r.o.Snapshotter)
	key := viewPrefix + randomID()
	mounts, err := sn.View(ctx, key, chain, snapshots.WithLabels(map[string]string{gcRootLabel: "now"}))
	if err != nil {
		return wrap(err, "look into an image")
	}
	defer func() {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		if undo := sn.Remove(ctx, key); err == nil && undo != nil {
			err = wrap(undo, "remove a view of an image")
		}
	}()
	return r.withMounted(mounts, fn)
}

// prepareFiles does what must be done with the container's files before runc sees them: volumes are filled from the image, and a directory
// below a tmpfs gets the mode that the tmpfs asks for, because runc before 1.2 gives the tmpfs the directory's mode.
func (r *Runtime) prepareFiles(spec *worker.ContainerSpec, rootfs []mount.Mount) error {
	var work []func(root string) error
	for _, m := range spec.Mounts {
		if m.CopyUp {
			empty, err := needsCopy(m.Source)
			if err != nil {
				return fmt.Errorf("look into volume %s: %w", m.Source, err)
			}
			if empty {
				work = append(work, func(root string) error { return copyUp(root, m.Target, m.Source) })
			}
		}
		if mode, ok := tmpfsMode(m.Options); ok && m.Type == "tmpfs" {
			work = append(work, func(root string) error { return setMode(root, m.Target, mode) })
		}
	}
	if len(work) == 0 {
		return nil
	}
	return r.withMounted(rootfs, func(root string) error {
		for _, do := range work {
			if err := do(root); err != nil {
				return err
			}
		}
		return nil
	})
}

// setMode changes the mode of a directory of a container that does not run yet. A directory that is not there stays so.
func setMode(root, dir string, mode uint32) error {
	p, err := securejoin.SecureJoin(root, dir)
	if err != nil {
		return err
	}
	info, err := os.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() || unixMode(info) == mode {
		return nil
	}
	return unix.Chmod(p, mode)
}

func unixMode(info fs.FileInfo) uint32 {
	return info.Sys().(*syscall.Stat_t).Mode & 0o7777
}
