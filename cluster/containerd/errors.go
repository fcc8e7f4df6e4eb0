package containerd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"

	"github.com/gitopsd/gitopsd/cluster/worker"
)

// kindError is a sentence of ours with one of worker's kinds.
type kindError struct {
	text string
	kind error
}

func (e *kindError) Error() string        { return e.text }
func (e *kindError) Is(target error) bool { return target == e.kind }

func permanent(format string, args ...any) error {
	return &kindError{text: fmt.Sprintf(format, args...), kind: worker.ErrPermanent}
}

func withKind(kind error, format string, args ...any) error {
	return &kindError{text: fmt.Sprintf(format, args...), kind: kind}
}

// wrap says what was tried and translates containerd's kinds of errors into the worker's.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	tried := fmt.Sprintf(format, args...)
	err = native(err)
	if isKind(err) {
		return fmt.Errorf("%s: %w", tried, err)
	}
	if full := diskFull(err, tried); full != nil {
		return full
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errdefs.IsCanceled(err), errdefs.IsDeadlineExceeded(err):
		return fmt.Errorf("%s: %w", tried, err)
	case errdefs.IsNotFound(err):
		return withKind(worker.ErrNotFound, "%s: %s", tried, plain(err))
	case errdefs.IsUnavailable(err):
		return withKind(worker.ErrUnavailable, "%s: containerd does not answer: %s", tried, plain(err))
	}
	return fmt.Errorf("%s: %s", tried, plain(err))
}

// native gives an error its kind back that it lost on its way through gRPC. Errors that have their kind are left as they are.
func native(err error) error {
	if _, remote := status.FromError(err); remote {
		return errgrpc.ToNative(err)
	}
	return err
}

func isKind(err error) bool {
	var k *kindError
	return errors.As(err, &k)
}

// plain takes the noise of the layers off an error's text.
func plain(err error) string {
	text := err.Error()
	if i := strings.LastIndex(text, "rpc error: code = "); i >= 0 {
		if _, rest, ok := strings.Cut(text[i:], " desc = "); ok {
			text = rest
		}
	}
	return text
}

// startError explains why a container's program did not start. runc has no codes for it, only words.
func startError(err error, program string) error {
	text := plain(native(err))
	low := strings.ToLower(text)
	exec := strings.Contains(low, "exec:") || strings.Contains(low, "exec ") || strings.Contains(low, "executable")
	switch {
	case strings.Contains(low, "executable file not found"), exec && strings.Contains(low, "no such file or directory"):
		return permanent("the image has no executable %q: check `command:` and `entrypoint:` (%s)", program, lastPart(text))
	case exec && strings.Contains(low, "permission denied"):
		return permanent("%q cannot be executed, permission denied: check its mode, and that no noexec mount covers it (%s)",
			program, lastPart(text))
	case exec && strings.Contains(low, "is a directory"):
		return permanent("%q is a directory, not a program (%s)", program, lastPart(text))
	case strings.Contains(low, "exec format error"):
		return permanent("%q is built for another kind of machine, or is a script without a #! line (%s)", program, lastPart(text))
	}
	return nil
}

// lastPart is the end of a long chain of wrapped errors, where the cause is.
func lastPart(text string) string {
	text = strings.TrimSuffix(text, ": unknown")
	for _, mark := range []string{"unable to start container process: ", "OCI runtime exec failed: ", "OCI runtime create failed: "} {
		if i := strings.LastIndex(text, mark); i >= 0 {
			return text[i+len(mark):]
		}
	}
	return text
}
