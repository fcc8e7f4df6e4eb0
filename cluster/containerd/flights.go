package containerd

import (
	"context"
	"sync"
)

// flights lets several callers share one long work of the same key. The work goes on as long as one of them waits for it.
type flights struct {
	mu     sync.Mutex
	active map[string]*flight
}

type flight struct {
	waiting int
	cancel  context.CancelFunc
	done    chan struct{}
	err     error
}

// do runs work, or joins the one that runs already under this key. When ctx ends it returns ctx's error; the last to leave ends the work.
func (f *flights) do(ctx context.Context, key string, work func(context.Context) error) error {
	f.mu.Lock()
	fl := f.active[key]
	if fl == nil {
		shared, cancel := context.WithCancel(context.WithoutCancel(ctx))
		fl = &flight{cancel: cancel, done: make(chan struct{})}
		if f.active == nil {
			f.active = map[string]*flight{}
		}
		f.active[key] = fl
		go func() {
			fl.err = work(shared)
			f.mu.Lock()
			if f.active[key] == fl {
				delete(f.active, key)
			}
			f.mu.Unlock()
			cancel()
			close(fl.done)
		}()
	}
	fl.waiting++
	f.mu.Unlock()
	select {
	case <-fl.done:
		return fl.err
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fl.waiting--
	if fl.waiting == 0 {
		// Nobody may join a work that is being given up.
		if f.active[key] == fl {
			delete(f.active, key)
		}
		fl.cancel()
	}
	return ctx.Err()
}
