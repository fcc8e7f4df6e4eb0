package sidecar

import (
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gitopsd/gitopsd/cluster/tasklog"
)

// The file descriptors that the shim hands to the program named in a binary:// log URI.
const (
	stdoutFD = 3
	stderrFD = 4
	readyFD  = 5
)

// writeLog reads a container's output until its end and writes it with package tasklog. setting is STREAMS,SIZE,FILES,DIR: the number of
// streams (1 for a terminal), the size of a segment in bytes, the number of segments, and the directory; without one nothing is kept.
//
// The container waits for its start until ready is told. A SIGTERM comes when the container is removed: its output is at an end then, or
// is read to its end first.
func writeLog(setting string) int {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	f := strings.SplitN(setting, ",", 4)
	if len(f) != 4 {
		say("log: want STREAMS,SIZE,FILES,DIR")
		return exitUsage
	}
	streams, err1 := strconv.Atoi(f[0])
	size, err2 := strconv.ParseInt(f[1], 10, 64)
	files, err3 := strconv.Atoi(f[2])
	if err1 != nil || err2 != nil || err3 != nil || streams < 1 || streams > 2 {
		say("log: STREAMS is 1 or 2, SIZE and FILES are numbers")
		return exitUsage
	}
	// Without its reader a container's writes fail: be the last to go when memory runs out. Without the right to do this, go on.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
	var out output = discard{}
	if f[3] != "" {
		w, err := tasklog.Create(f[3], tasklog.Options{MaxSize: size, MaxFiles: files})
		if err != nil {
			say(err.Error())
			return 1
		}
		defer w.Close()
		out = kept{w, [2]*tasklog.Splitter{tasklog.NewSplitter(w, tasklog.Stdout), tasklog.NewSplitter(w, tasklog.Stderr)}}
	}
	if _, err := unix.Write(readyFD, []byte{0}); err != nil {
		return 1 // the shim is gone
	}
	unix.Close(readyFD)
	copyOutput(out, streams)
	return 0
}

// output takes what a stream says.
type output interface {
	space(stream int) []byte
	take(stream, n int) // n = 0 is the end
	flush()
}

type kept struct {
	w       *tasklog.Writer
	streams [2]*tasklog.Splitter
}

func (k kept) space(i int) []byte { return k.streams[i].Space() }
func (k kept) flush()             { k.w.Flush() }

func (k kept) take(i, n int) {
	if n == 0 {
		k.streams[i].End(time.Now())
		return
	}
	k.streams[i].Take(time.Now(), n)
}

type discard struct{}

var waste [4096]byte

func (discard) space(int) []byte { return waste[:] }
func (discard) take(int, int)    {}
func (discard) flush()           {}

// copyOutput returns when the first so many streams have ended.
func copyOutput(out output, streams int) {
	fds := []unix.PollFd{{Fd: stdoutFD, Events: unix.POLLIN}, {Fd: stderrFD, Events: unix.POLLIN}}[:streams]
	for open := streams; open > 0; {
		if _, err := unix.Poll(fds, -1); err != nil {
			continue // a signal
		}
		for i := range fds {
			if fds[i].Fd < 0 || fds[i].Revents == 0 {
				continue
			}
			n, err := unix.Read(int(fds[i].Fd), out.space(i))
			if err == unix.EINTR || err == unix.EAGAIN {
				continue
			}
			if err != nil || n == 0 {
				n = 0
				fds[i].Fd = -1 // poll leaves it out
				open--
			}
			out.take(i, n)
		}
		out.flush()
	}
}
