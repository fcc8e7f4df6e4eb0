package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// keeperLook is how often the keeper is looked after.
const keeperLook = 2 * time.Second

// keeper looks after the process that answers names and serves ports on IPv6. It is no child in spirit: in a session of its own it outlives the agent,
// and the next agent takes it over by its pid file.
type keeper struct {
	path  string // of gitops-keeper
	table string // the file that it reads
	pid   string
	logs  string
	log   *slog.Logger
}

// Run keeps it running until ctx ends, and leaves it running then.
func (k *keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(keeperLook)
	defer tick.Stop()
	for {
		if _, alive := k.alive(); !alive {
			if err := k.start(); err != nil {
				k.log.Error("start gitops-keeper: names do not resolve until it runs", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// alive finds the running keeper: the process of the pid file, if it is what we started.
func (k *keeper) alive() (int, bool) {
	b, err := os.ReadFile(k.pid)
	if err != nil {
		return 0, false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, false
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return pid, err == nil && bytes.Contains(line, []byte("names\x00"+k.table+"\x00"))
}

func (k *keeper) start() error {
	if err := os.MkdirAll(filepath.Dir(k.pid), 0o711); err != nil {
		return err
	}
	out, err := os.OpenFile(k.logs, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(k.path, "names", k.table)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	k.log.Info("gitops-keeper runs", "pid", cmd.Process.Pid)
	go cmd.Wait() //nolint:errcheck // so that it does not stay as a zombie when it ends before us
	return os.WriteFile(k.pid, []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o600)
}

// stop ends it.
func (k *keeper) stop(ctx context.Context) error {
	pid, alive := k.alive()
	if !alive {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("stop gitops-keeper: %w", err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, alive := k.alive(); !alive {
			return os.Remove(k.pid)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop gitops-keeper: %w", ctx.Err())
		case <-tick.C:
		}
	}
}
