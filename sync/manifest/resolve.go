package manifest

import "time"

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
		if h := c.Health; h != nil && !h.Disabled {
			h.resolve()
		}
		if c.Probe != nil {
			c.Probe.Timing.resolve()
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

func (h *Health) resolve() {
	if h.Interval == 0 {
		h.Interval = DefaultInterval
	}
	if h.Timeout == 0 {
		h.Timeout = DefaultTimeout
	}
	if h.StartInterval == 0 {
		h.StartInterval = DefaultStartPoll
	}
	if h.Retries == 0 {
		h.Retries = DefaultRetries
	}
}
