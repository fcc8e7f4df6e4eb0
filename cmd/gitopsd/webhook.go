package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gitopsd/gitopsd/sync/git"
)

// Bounds of the port that the whole internet may reach: a request that does not come in this time, or with more headers, is dropped, and so is a connection beside that
// many others, since the agent needs its files for other things.
const (
	hookTime    = 10 * time.Second
	hookHeaders = 16 << 10 // bytes
	hookConns   = 256
)

// webhook is the port that forges tell of pushes on. A nil one is off.
type webhook struct {
	listener net.Listener
	server   *http.Server
	open     atomic.Int32 // connections
}

// webhook opens the port, if the flags ask for it. What is wrong with the flags is told here, before anything runs. Run serves it, Close gives it back.
func (o *options) webhook(src *sources, log *slog.Logger) (*webhook, error) {
	switch {
	case o.hookAddr == "" && o.hookSecret == "":
		return nil, nil
	case o.hookAddr == "":
		return nil, errors.New("--webhook-secret-file has no use without --webhook: add --webhook :9000, or leave it out")
	case o.hookSecret == "":
		return nil, errors.New("--webhook needs --webhook-secret-file: without a secret anybody could send requests; make one with `openssl rand -hex 32`")
	}
	secret, err := secretFile(o.hookSecret)
	if err != nil {
		return nil, fmt.Errorf("--webhook-secret-file: %w", err)
	}
	hook, err := git.NewWebhook(git.WebhookConfig{Secret: secret, Trigger: src.watcher.Trigger, Logger: log})
	if err != nil {
		return nil, fmt.Errorf("--webhook-secret-file %s: %w", o.hookSecret, err)
	}
	l, err := net.Listen("tcp", o.hookAddr)
	if err != nil {
		return nil, fmt.Errorf("--webhook %s: %w", o.hookAddr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/hooks/git", hook)
	w := &webhook{listener: l}
	w.server = &http.Server{Handler: mux, ReadTimeout: hookTime, WriteTimeout: hookTime, MaxHeaderBytes: hookHeaders, ConnState: w.count,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)} // what strangers do wrong is no news
	return w, nil
}

// count drops connections beyond the bound.
func (w *webhook) count(c net.Conn, now http.ConnState) {
	switch now {
	case http.StateNew:
		if w.open.Add(1) > hookConns {
			_ = c.Close()
		}
	case http.StateClosed:
		w.open.Add(-1)
	}
}

// secretFile reads a file whose text is a secret, and that only its owner may read.
func secretFile(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if open := info.Mode().Perm() & 0o077; open != 0 {
		return "", fmt.Errorf("%s may be read or written by others (mode %04o): chmod 600 %s", path, info.Mode().Perm(), path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return "", fmt.Errorf("%s is empty: `openssl rand -hex 32` makes a secret", path)
	}
	return text, nil
}

// Run serves the port until ctx ends.
func (w *webhook) Run(ctx context.Context) error {
	if w == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = w.server.Close() })
	defer stop()
	if err := w.server.Serve(w.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("webhook: %w", err)
	}
	return nil
}

// Close gives the port back where Run did not.
func (w *webhook) Close() {
	if w != nil {
		_ = w.listener.Close()
	}
}
