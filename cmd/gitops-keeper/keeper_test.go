package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gitopsd/gitopsd/cluster/tasklog"
)

// TestMain makes the test binary the keeper itself where it is called with a keeper's arguments: package sidecar has acted before this runs,
// so only what it leaves to main gets here.
func TestMain(m *testing.M) {
	if os.Getenv("KEEPER_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func keeper(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), "KEEPER_TEST_MAIN=1")
	return cmd
}

// logger is a running `log`, as the shim starts it.
type logger struct {
	cmd      *exec.Cmd
	out, err *os.File
	stderr   bytes.Buffer
}

func startLogger(t *testing.T, env []string, setting string) *logger {
	t.Helper()
	l := &logger{}
	outR, outW := pipe(t)
	errR, errW := pipe(t)
	readyR, readyW := pipe(t)
	l.out, l.err = outW, errW
	l.cmd = keeper(t.Context(), "log", setting)
	l.cmd.Env = append(l.cmd.Env, env...)
	l.cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	l.cmd.Stderr = &l.stderr
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range l.cmd.ExtraFiles {
		f.Close()
	}
	if b, err := io.ReadAll(readyR); err != nil || len(b) != 1 {
		t.Fatalf("ready is told by %q, %v; %s", b, err, &l.stderr)
	}
	return l
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func entries(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := tasklog.Read(t.Context(), dir, tasklog.Query{}, func(e tasklog.Entry) error {
		fmt.Fprintf(&b, "%s %s\n", e.Stream, e.Text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestLogReadsToTheEndOfBothStreams(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a,b", "log")
	l := startLogger(t, nil, "2,100000,5,"+dir)
	fmt.Fprint(l.out, "one\ntwo\nno end")
	l.out.Close()
	fmt.Fprint(l.err, "oops\n")
	// The shim's goodbye comes when the output is at an end, or just before.
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(l.err, "last word\n")
	l.err.Close()
	if err := l.cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, &l.stderr)
	}
	got := entries(t, dir)
	for _, want := range []string{"stdout one\n", "stdout two\n", "stdout no end\n", "stderr oops\n", "stderr last word\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

// A terminal has one stream; the shim never closes the other.
func TestLogOfATerminalEndsWithItsStream(t *testing.T) {
	dir := t.TempDir()
	l := startLogger(t, nil, "1,0,0,"+dir)
	fmt.Fprint(l.out, "tty\r\n")
	l.out.Close()
	if err := l.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, dir); got != "stdout tty\r\n" {
		t.Errorf("%q", got)
	}
}

func TestLogWithoutADirectoryOnlyReads(t *testing.T) {
	l := startLogger(t, nil, "2,0,0,")
	if _, err := l.out.Write(bytes.Repeat([]byte("x"), 1<<20)); err != nil { // more than a pipe holds
		t.Fatal(err)
	}
	l.out.Close()
	l.err.Close()
	if err := l.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestLogThatCannotBeWrittenStopsTheStart(t *testing.T) {
	for _, setting := range []string{"2,0,0,/proc/no/such/dir", "3,0,0,/tmp", "x,0,0,/tmp", "2,0", ""} {
		r, _ := pipe(t)
		ready, w := pipe(t)
		cmd := keeper(t.Context(), "log", setting)
		cmd.ExtraFiles = []*os.File{r, r, w}
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "gitops-keeper: ") {
			t.Errorf("%q: %v %s", setting, err, out)
		}
		w.Close()
		if b, _ := io.ReadAll(ready); len(b) > 0 {
			t.Errorf("%q: ready is told", setting)
		}
	}
}

// The keeper of a container must not set up what only `names` needs.
func TestLogDoesNotInitialiseWhatItDoesNotUse(t *testing.T) {
	dir := t.TempDir()
	l := startLogger(t, []string{"GODEBUG=inittrace=1"}, "2,0,0,"+dir)
	l.out.Close()
	l.err.Close()
	if err := l.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	trace := l.stderr.String()
	if !strings.Contains(trace, "init os ") {
		t.Fatalf("no trace of what was initialised:\n%s", trace)
	}
	for _, heavy := range []string{"github.com/miekg/dns", "crypto/tls", "net"} {
		if strings.Contains(trace, "init "+heavy+" @") {
			t.Errorf("%s was initialised", heavy)
		}
	}
}

// run runs the keeper to its end and returns its exit code and output.
func run(t *testing.T, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := keeper(ctx, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestInitAndExecEndAsTheirCommandDoes(t *testing.T) {
	notExecutable := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notExecutable, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"init", "exec"} {
		for _, test := range []struct {
			args []string
			code int
			out  string
		}{
			{[]string{"--", "sh", "-c", "echo hi; exit 7"}, 7, "hi\n"},
			{[]string{"--", "/bin/sh", "-c", "echo $0", "-c"}, 0, "-c\n"},
			{[]string{"--", "no-such-program-here"}, 127, "no-such-program-here"},
			{[]string{"--", "/no/such/program"}, 127, "/no/such/program"},
			{[]string{"--", notExecutable}, 126, "permission denied"},
			{[]string{"--", "/tmp"}, 126, "permission denied"},
			{[]string{"--"}, 2, "COMMAND"},
			{[]string{"sh"}, 2, "COMMAND"},
			{[]string{"-stdin", "--", "sh", "-c", "test -p /dev/stdin && echo a pipe"}, 0, "a pipe\n"},
		} {
			code, out := run(t, append([]string{how}, test.args...)...)
			if code != test.code || !strings.Contains(out, test.out) {
				t.Errorf("%s %q: %d %q, want %d %q", how, test.args, code, out, test.code, test.out)
			}
		}
	}
	if code, _ := run(t, "init", "--", "sh", "-c", "kill -TERM $$"); code != 128+15 {
		t.Errorf("a command that a signal ended: code %d", code)
	}
}

func TestInitPassesSignalsOn(t *testing.T) {
	cmd := keeper(t.Context(), "init", "--", "sh", "-c", "trap 'echo got it; exit 9' USR1; echo ready; while :; do read x; done")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 6)
	if _, err := io.ReadFull(stdout, line); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(stdout)
	_ = cmd.Wait()
	stdin.Close()
	if code := cmd.ProcessState.ExitCode(); code != 9 || string(rest) != "got it\n" {
		t.Errorf("code %d, output %q", code, rest)
	}
}

func TestOthersAreToldHowToCallIt(t *testing.T) {
	for _, args := range [][]string{{}, {"nothing"}, {"names"}, {"log"}} {
		if code, out := run(t, args...); code != 2 || !strings.HasPrefix(out, "usage: ") {
			t.Errorf("%q: %d %q", args, code, out)
		}
	}
}
