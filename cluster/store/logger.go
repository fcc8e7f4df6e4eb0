package store

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger writes what raft says to a slog.Logger, one level lower: raft warns of each election, and a lone server holds one at each start.
type raftLogger struct {
	to      *slog.Logger
	name    string
	implied []any
}

func newRaftLogger(to *slog.Logger) hclog.Logger {
	return &raftLogger{to: to.With("component", "raft")}
}

func (l *raftLogger) level(h hclog.Level) slog.Level {
	switch {
	case h >= hclog.Error:
		return slog.LevelWarn
	case h >= hclog.Warn:
		return slog.LevelInfo
	case h >= hclog.Info:
		return slog.LevelDebug
	}
	return slog.LevelDebug - 4
}

func (l *raftLogger) on(h hclog.Level) bool { return l.to.Enabled(context.Background(), l.level(h)) }

func (l *raftLogger) Log(h hclog.Level, msg string, args ...any) {
	if !l.on(h) {
		return
	}
	plain := make([]any, len(args))
	for i, a := range args {
		switch a := a.(type) {
		case hclog.Format: // a format and its arguments
			format, _ := a[0].(string)
			plain[i] = fmt.Sprintf(format, a[1:]...)
		case fmt.Stringer:
			plain[i] = a.String()
		default:
			plain[i] = a
		}
	}
	l.to.Log(context.Background(), l.level(h), msg, plain...) //nolint:sloglint // raft's own messages
}

func (l *raftLogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *raftLogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *raftLogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *raftLogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *raftLogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *raftLogger) IsTrace() bool { return l.on(hclog.Trace) }
func (l *raftLogger) IsDebug() bool { return l.on(hclog.Debug) }
func (l *raftLogger) IsInfo() bool  { return l.on(hclog.Info) }
func (l *raftLogger) IsWarn() bool  { return l.on(hclog.Warn) }
func (l *raftLogger) IsError() bool { return l.on(hclog.Error) }

func (l *raftLogger) ImpliedArgs() []any { return l.implied }
func (l *raftLogger) Name() string       { return l.name }

func (l *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{to: l.to.With(args...), name: l.name, implied: append(l.implied[:len(l.implied):len(l.implied)], args...)}
}

func (l *raftLogger) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

func (l *raftLogger) ResetNamed(name string) hclog.Logger {
	return &raftLogger{to: l.to, name: name, implied: l.implied}
}

// SetLevel does nothing: the slog handler decides.
func (l *raftLogger) SetLevel(hclog.Level) {}

func (l *raftLogger) GetLevel() hclog.Level {
	for h := hclog.Trace; h <= hclog.Error; h++ {
		if l.on(h) {
			return h
		}
	}
	return hclog.Off
}

func (l *raftLogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.to.Handler(), slog.LevelInfo)
}

func (l *raftLogger) StandardWriter(o *hclog.StandardLoggerOptions) io.Writer {
	return l.StandardLogger(o).Writer()
}
