package manifest

import (
	"cmp"
	"time"
)

// Defaults of Compose and Swarm (docs: compose-spec "deploy", SwarmKit's defaults), written into each service by [Resolve].
const (
	DefaultStopGrace   = Duration(10 * time.Second)
	DefaultMonitor     = Duration(5 * time.Second)
	DefaultDeadline    = Duration(5 * time.Minute) // ours: Swarm waits for ever
	DefaultDelay       = Duration(time.Second)     // ours: base of the restart backoff; Swarm waits a fixed 5s
	DefaultInterval    = Duration(30 * time.Second)
	DefaultTimeout     = Duration(30 * time.Second)
	DefaultStartPoll   = Duration(5 * time.Second) // start_interval
	DefaultRetries     = 3
	DefaultPids        = 4096
	DefaultLogMaxSize  = Bytes(10 << 20)
	DefaultLogMaxFile  = 5
	DefaultPruneBudget = 50 // percent
)

// Resolve writes the defaults of this version into a service, so that what was accepted stays what it is when defaults change.
// A failure action that nobody wrote stays empty: it is decided when a rollout fails, as it depends on whether there is a stable revision.
func Resolve(s *Service) {
	if s.StopGrace == 0 {
		s.StopGrace = DefaultStopGrace
	}
	if s.Restart.Condition == "" {
		s.Restart.Condition = RestartAny
	}
	if s.Restart.Delay == 0 && s.Restart.Condition != RestartNever {
		s.Restart.Delay = DefaultDelay
	}
	for _, u := range []*UpdatePolicy{&s.Update, &s.Rollback} {
		if u.Monitor == 0 {
			u.Monitor = DefaultMonitor
		}
		if u.Deadline == 0 {
			u.Deadline = DefaultDeadline
		}
	}
	for i := range s.Containers {
		c := &s.Containers[i]
		if c.Probe != nil {
			c.Probe.Timing = c.Probe.Timing.WithDefaults(nil)
		}
		if c.Resources.Pids == 0 {
			c.Resources.Pids = DefaultPids
		}
		if c.Logging.MaxSize == 0 {
			c.Logging.MaxSize = DefaultLogMaxSize
		}
		if c.Logging.MaxFile == 0 {
			c.Logging.MaxFile = DefaultLogMaxFile
		}
	}
}

// WithDefaults is the check with what it leaves out: taken from the image's check, where there is one, as a Docker engine does, else Compose's defaults.
// [Resolve] leaves a container's check as it was written, because the image is known only where it runs.
func (h Health) WithDefaults(image *Health) Health {
	if image == nil {
		image = &Health{}
	}
	if len(h.Test) == 0 {
		h.Test = image.Test
	}
	h.Interval = cmp.Or(h.Interval, image.Interval, DefaultInterval)
	h.Timeout = cmp.Or(h.Timeout, image.Timeout, DefaultTimeout)
	h.StartPeriod = cmp.Or(h.StartPeriod, image.StartPeriod)
	h.StartInterval = cmp.Or(h.StartInterval, image.StartInterval, DefaultStartPoll)
	h.Retries = cmp.Or(h.Retries, image.Retries, DefaultRetries)
	return h
}
