package converge

import (
	"time"

	"github.com/gitopsd/gitopsd/reconcile/state"
	"github.com/gitopsd/gitopsd/sync/manifest"
)

// Check is where the health check of one attempt stands. Its rules are Docker's: starting until the first success; failures within start_period, before the
// first success, do not count; retries failures in a row make it unhealthy; start_interval is the pace until the first success within start_period.
type Check struct {
	Spec    manifest.Health
	Started time.Time // when the container began to run
	Health  state.Health
	Failed  int       // failures in a row that count
	Next    time.Time // when to check again
}

// NewCheck begins the checks of an attempt: as starting, or as healthy where an agent that was restarted adopts it.
func NewCheck(spec manifest.Health, started time.Time, h state.Health) Check {
	c := Check{Spec: spec, Started: started, Health: h}
	c.Next = started.Add(c.pace(started))
	return c
}

// pace is the wait until the next check.
func (c Check) pace(now time.Time) time.Duration {
	if c.Health == state.HealthStarting && c.grace(now) && c.Spec.StartInterval > 0 {
		return min(c.Spec.StartInterval.Std(), c.Spec.Interval.Std())
	}
	return c.Spec.Interval.Std()
}

// grace says whether failures do not count yet.
func (c Check) grace(now time.Time) bool {
	return now.Before(c.Started.Add(c.Spec.StartPeriod.Std()))
}

// Result takes in how a check that ended now went.
func (c Check) Result(ok bool, now time.Time) Check {
	switch {
	case ok:
		c.Health, c.Failed = state.HealthHealthy, 0
	case c.Health == state.HealthStarting && c.grace(now):
	default:
		if c.Failed++; c.Failed >= max(c.Spec.Retries, 1) {
			c.Health = state.HealthUnhealthy
		}
	}
	c.Next = now.Add(c.pace(now))
	return c
}
