package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// Supervisor keeps a containerd of our own running, for machines that have none. It has its own root, state and socket below one directory.
//
// The containerd lives on when this process ends, and so do its containers: it is in a session of its own, and the next Supervisor for the
// same directory takes it over by its pid file and socket. A service manager must not kill the agent's whole cgroup for that
// (systemd: KillMode=process).
type Supervisor struct {
	// Dir is an absolute directory for images, snapshots and records.
	Dir string
	// RunDir is an absolute directory for the socket, the pid file and the state that a reboot ends; default Dir/run.
	RunDir string
	// Binary is containerd's name or path; default "containerd". Its shim and runc must be on the PATH.
	Binary string
	Logger *slog.Logger // default: nothing is logged
}

// Address is the socket of the containerd, for Options.
func (s *Supervisor) Address() string { return filepath.Join(s.runDir(), "containerd.sock") }

func (s *Supervisor) runDir() string { return firstOf(s.RunDir, filepath.Join(s.Dir, "run")) }

func (s *Supervisor) pidFile() string { return filepath.Join(s.runDir(), "containerd.pid") }

// LogFile is where the containerd writes its own log.
func (s *Supervisor) LogFile() string { return filepath.Join(s.Dir, "containerd.log") }

const (
	restartMin = 500 * time.Millisecond
	restartMax = 30 * time.Second
	// steadyAfter is how long a containerd must have run for its end to count as the first.
	steadyAfter = time.Minute
	pollEvery   = 50 * time.Millisecond
	maxOwnLog   = 10 << 20
	maxSocket   = 107 // bytes of a socket's path, the kernel's bound
)

// Run takes over the containerd that runs, or starts one, and starts it again, with growing pauses, each time it ends. It returns nil when
// ctx ends; the containerd stays. It fails at once where no containerd can ever be started.
func (s *Supervisor) Run(ctx context.Context) error {
	logger := s.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	if err := s.prepare(); err != nil {
		return err
	}
	pause := restartMin
	for {
		began := time.Now()
		ended, err := s.attachOrStart()
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("start containerd: %w: install containerd, or run it as a service", err)
		}
		if err == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-ended:
				err = errors.New("it ended")
			}
		}
		if time.Since(began) > steadyAfter {
			pause = restartMin
		}
		logger.Error("containerd does not run; it is started again", "error", err, "after", pause, "log", s.LogFile())
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		pause = min(2*pause, restartMax)
	}
}

// Ready waits until the containerd answers.
func (s *Supervisor) Ready(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", s.Address())
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return withKind(worker.ErrUnavailable, "wait for containerd at %s: %v: see %s", s.Address(), err, s.LogFile())
		case <-tick.C:
		}
	}
}

// Stop ends the containerd, for good where no Run is going on. Containers that still run stay, without anyone to look after them.
func (s *Supervisor) Stop(ctx context.Context) error {
	pid, err := s.running()
	if pid == 0 || err != nil {
		return err
	}
	ended, err := watchProcess(pid)
	if err != nil {
		return nil // gone already
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop containerd: %w", err)
	}
	select {
	case <-ended:
	case <-ctx.Done():
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill containerd: %w", err)
		}
		<-ended
	}
	for _, f := range []string{s.pidFile(), s.Address(), s.Address() + ".ttrpc"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// prepare writes the configuration. Version 2 of its form is read by all versions from 1.6 on.
func (s *Supervisor) prepare() error {
	if !filepath.IsAbs(s.Dir) || !filepath.IsAbs(s.runDir()) {
		return fmt.Errorf("start containerd: directory %s must be absolute", s.Dir)
	}
	if len(s.Address()+".ttrpc") > maxSocket {
		return fmt.Errorf("start containerd: %s is too long for a socket: set a shorter directory", s.Address())
	}
	for _, dir := range []string{s.Dir, s.runDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("start containerd: %w", err)
		}
	}
	q := strconv.Quote
	config := strings.Join([]string{
		"version = 2",
		"root = " + q(filepath.Join(s.Dir, "root")),
		"state = " + q(filepath.Join(s.runDir(), "state")),
		"oom_score = -999",
		// Nothing of Kubernetes, no storage that needs its own set-up, and no directory outside of ours.
		`disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",`,
		`  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",`,
		`  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",`,
		`  "io.containerd.snapshotter.v1.zfs"]`,
		"[grpc]", "  address = " + q(s.Address()),
		"[debug]", `  level = "warn"`,
		"",
	}, "\n")
	if err := os.WriteFile(s.configFile(), []byte(config), 0o600); err != nil {
		return fmt.Errorf("write containerd's configuration: %w", err)
	}
	return nil
}

func (s *Supervisor) configFile() string { return filepath.Join(s.Dir, "containerd.toml") }

// running returns the pid of the containerd of this directory, 0 where there is none. A pid that belongs to another program by now is none.
func (s *Supervisor) running() (int, error) {
	raw, err := os.ReadFile(s.pidFile())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read containerd's pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid <= 1 {
		return 0, nil
	}
	args, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || !strings.Contains(string(args), s.configFile()) {
		return 0, nil
	}
	return pid, nil
}

// attachOrStart returns a channel that closes when the containerd ends.
func (s *Supervisor) attachOrStart() (<-chan struct{}, error) {
	pid, err := s.running()
	if err != nil {
		return nil, err
	}
	if pid != 0 {
		if ended, err := watchProcess(pid); err == nil {
			return ended, nil
		}
	}
	return s.start()
}

func (s *Supervisor) start() (<-chan struct{}, error) {
	if info, err := os.Stat(s.LogFile()); err == nil && info.Size() > maxOwnLog {
		if err := os.Truncate(s.LogFile(), 0); err != nil {
			return nil, err
		}
	}
	log, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(firstOf(s.Binary, "containerd"), "--config", s.configFile())
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.pidFile(), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(ended)
	}()
	return ended, nil
}

// watchProcess returns a channel that closes when a process ends that need not be our child.
func watchProcess(pid int) (<-chan struct{}, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer unix.Close(fd)
		defer close(ended)
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	return ended, nil
}
