package sidecar

import (
	"errors"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// command reads [-stdin] -- COMMAND… and finds the program.
func command(args []string) (file string, argv []string, code int) {
	if args[0] == "-stdin" {
		if err := endlessStdin(); err != nil {
			say("open a standard input: " + err.Error())
			return "", nil, 1
		}
		args = args[1:]
	}
	if len(args) < 2 || args[0] != "--" {
		say("want [-stdin] -- COMMAND…")
		return "", nil, exitUsage
	}
	argv = args[1:]
	file, err := lookPath(argv[0])
	if err != nil {
		say(argv[0] + ": " + err.Error())
		if errors.Is(err, os.ErrPermission) {
			return "", nil, exitNotExecutable
		}
		return "", nil, exitNotFound
	}
	return file, argv, 0
}

// endlessStdin puts a pipe at standard input that has no end: the reader holds the writing side too.
func endlessStdin() error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	both, err := os.OpenFile("/proc/self/fd/"+itoa(p[0]), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer both.Close()
	return unix.Dup3(int(both.Fd()), 0, 0)
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

// lookPath finds a program as runc does: a name with a slash is a path, others are looked for in PATH.
func lookPath(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	found := error(syscall.ENOENT)
	for dir := range strings.SplitSeq(os.Getenv("PATH"), ":") {
		if dir == "" {
			dir = "."
		}
		file := dir + "/" + name
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, os.ErrPermission) {
			found = err
		}
	}
	return "", found
}

func executable(file string) error {
	info, err := os.Stat(file)
	if err != nil {
		return errors.Unwrap(err)
	}
	if info.IsDir() {
		return syscall.EACCES
	}
	return unix.Access(file, unix.X_OK)
}

// become replaces this process by the command.
func become(args []string) int {
	file, argv, code := command(args)
	if code != 0 {
		return code
	}
	err := syscall.Exec(file, argv, os.Environ())
	say(argv[0] + ": " + err.Error())
	return exitNotExecutable
}

// beInit runs the command as its child, passes every signal on to it, and reaps the orphans that the kernel hands to the first process of a
// container. It ends as the command ends.
func beInit(args []string) int {
	file, argv, code := command(args)
	if code != 0 {
		return code
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{}}
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		// On a terminal the command gets a process group of its own in the foreground, so that Ctrl-C reaches it once.
		attr.Sys.Foreground = true
		attr.Sys.Ctty = 0
	}
	pid, err := syscall.ForkExec(file, argv, attr)
	if err != nil {
		say(argv[0] + ": " + err.Error())
		return exitNotExecutable
	}
	for s := range signals {
		switch s {
		case syscall.SIGCHLD:
			if status, ended := reap(pid); ended {
				return status
			}
		case syscall.SIGURG, syscall.SIGPIPE, syscall.SIGTTIN, syscall.SIGTTOU:
			// The Go runtime sends itself SIGURG; the others are about our own use of the terminal.
		default:
			_ = syscall.Kill(pid, s.(syscall.Signal)) // it may have just ended
		}
	}
	return 0
}

// reap collects all processes that have ended. ended tells that the command was among them.
func reap(command int) (code int, ended bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return code, ended
		}
		if pid == command {
			ended = true
			code = ws.ExitStatus()
			if ws.Signaled() {
				code = exitSignal + int(ws.Signal())
			}
		}
	}
}
