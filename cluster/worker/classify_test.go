package worker

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/gitopsd/gitopsd/reconcile/converge"
)

func TestClassify(t *testing.T) {
	for _, test := range []struct {
		verb   converge.Verb
		err    error
		reason string
		fault  bool
	}{
		{converge.Create, errors.New("no such program"), ReasonCreate, true},
		{converge.Create, fmt.Errorf("create container web: %w", context.DeadlineExceeded), ReasonCreate, false},
		{converge.Create, fmt.Errorf("create container web: %w", ErrUnavailable), ReasonCreate, false},
		{converge.Start, errors.New("permission denied"), ReasonStart, true},
		{converge.Start, fmt.Errorf("start container web: %w", ErrUnavailable), ReasonStart, false},
		{converge.Pull, fmt.Errorf("pull: %w", ErrUnavailable), ReasonRegistry, false},
		{converge.Pull, fmt.Errorf("pull: %w", ErrImageMissing), ReasonImageMissing, true},
		{converge.Create, &toldError{ReasonPortTaken, true, errors.New("port 80")}, ReasonPortTaken, true},
		{converge.Remove, errors.New("busy"), ReasonStop, false},
	} {
		if got := classify(test.verb, test.err); got.Reason.ID != test.reason || got.Fault != test.fault {
			t.Errorf("%s, %v: %s, the task's fault: %v; want %s, %v", test.verb, test.err, got.Reason.ID, got.Fault, test.reason, test.fault)
		}
	}
}
