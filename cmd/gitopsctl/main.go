package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(run(untilSignal(), os.Args[1:], system()))
}

// untilSignal is a context that the first Ctrl-C or SIGTERM ends, with the [signaled] as its cause. A second one does not ask.
func untilSignal() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		s := <-signals
		signal.Reset(os.Interrupt, syscall.SIGTERM)
		number, _ := s.(syscall.Signal)
		cancel(signaled{number})
	}()
	return ctx
}

// signaled says that a signal ended the program.
type signaled struct{ number syscall.Signal }

func (s signaled) Error() string { return s.number.String() }

// code is what a shell reports of a program that the signal killed.
func (s signaled) code() int { return 128 + int(s.number) }
