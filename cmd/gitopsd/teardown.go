package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/containerd"
	"github.com/gitopsd/gitopsd/cluster/network"
)

// teardown removes what the agent made: containers, images, links, rules, namespaces, mounts, cgroups, and sets sysctls as they were. The data directory
// stays: volumes and the log are a person's to remove.
func teardown(ctx context.Context, o *options) error {
	o.logLevel = "warn"
	log, err := o.logger()
	if err != nil {
		return err
	}
	if _, err := os.Stat(o.dataDir); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintln(os.Stderr, "nothing to remove: there is no", o.dataDir)
		return nil
	}
	unlock, err := lock(filepath.Join(o.dataDir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	alone, err := o.alone()
	if err != nil {
		return err
	}
	defer alone()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var errs []error
	sup := &containerd.Supervisor{Dir: filepath.Join(o.dataDir, "containerd"), RunDir: filepath.Join(o.runDir, "containerd"), Logger: log}
	address := o.containerdAddress()
	if answers(address) {
		rt, err := containerd.Open(ctx, containerd.Options{Address: address, Namespace: o.namespace(), StateDir: filepath.Join(o.runDir, "containers"), KeeperPath: o.keeper, Logger: log})
		if err == nil {
			err = errors.Join(rt.RemoveAll(ctx), rt.Close())
		}
		errs = append(errs, err)
	}
	if address == sup.Address() {
		errs = append(errs, sup.Stop(ctx))
	}
	nets, err := network.New(network.Config{Name: o.instance, RunDir: o.runDir, StateDir: filepath.Join(o.dataDir, "network")}, log)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	k := &keeper{path: o.keeper, table: nets.NamesFile(), pid: filepath.Join(o.runDir, "keeper.pid"), log: log}
	errs = append(errs, k.stop(ctx), nets.Teardown(ctx))
	if err := unix.Unmount(filepath.Join(o.runDir, "secrets"), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("unmount the secrets: %w", err))
	}
	// A volume that an agent was killed over while it mounted it: what is in it must not go with the directory.
	if left, err := filepath.Glob(filepath.Join(o.runDir, "containers", "mount-*")); err == nil {
		for _, dir := range left {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	if err := errors.Join(append(errs, os.RemoveAll(o.runDir), os.Remove(o.instanceLock()))...); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "removed all that instance %s made; its data stay in %s\n", o.instance, o.dataDir)
	return nil
}
