// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"sync"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// maxPending bounds the origins with a hint outstanding; beyond it hints are dropped.
const maxPending = 1024

// coalescer lets through at most one hint a second for each origin, the first at once. What comes in between is one hint later.
type coalescer struct {
	wake chan struct{}

	mu      sync.Mutex
	pending map[spiffeid.TrustDomain]bool
	last    map[spiffeid.TrustDomain]time.Time
}

func newCoalescer() *coalescer {
	return &coalescer{wake: make(chan struct{}, 1), pending: map[spiffeid.TrustDomain]bool{}, last: map[spiffeid.TrustDomain]time.Time{}}
}

func (c *coalescer) add(td spiffeid.TrustDomain) {
	c.mu.Lock()
	if len(c.pending) < maxPending {
		c.pending[td] = true
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// due takes what may go out now and says when the next may (zero: nothing is pending).
func (c *coalescer) due(now time.Time) (ready []spiffeid.TrustDomain, next time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for td, t := range c.last {
		if now.Sub(t) >= hintInterval {
			delete(c.last, td)
		}
	}
	for td := range c.pending {
		t, recent := c.last[td]
		if recent {
			if at := t.Add(hintInterval); next.IsZero() || at.Before(next) {
				next = at
			}
			continue
		}
		ready = append(ready, td)
		delete(c.pending, td)
		c.last[td] = now
	}
	return ready, next
}

// run emits until ctx ends. emit may block: meanwhile hints for one origin become one.
func (c *coalescer) run(ctx context.Context, emit func(spiffeid.TrustDomain)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		}
		ready, next := c.due(time.Now())
		for _, td := range ready {
			emit(td)
		}
		if !next.IsZero() {
			timer.Reset(max(0, time.Until(next)))
		}
	}
}
