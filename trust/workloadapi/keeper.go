// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	requestTimeout = 10 * time.Second
	firstBackoff   = time.Second
	maxBackoff     = time.Minute
	// maxRecall bounds how long after a recall an identity is renewed: not all of a cluster in the same moment.
	maxRecall = 30 * time.Second
)

// keeper holds the applications' identity and keeps it fresh, from the first time that somebody wants it on.
type keeper struct {
	issue  func(context.Context) (*trust.Identity, error)
	denied func(spiffeid.ID, time.Time) (string, bool)
	every  time.Duration
	now    func() time.Time
	log    *slog.Logger
	wake   chan struct{} // cap 1

	mu       sync.Mutex
	wanted   bool
	id       *trust.Identity
	err      error         // of the last attempt
	changed  chan struct{} // closed when id or err change
	due      time.Time     // of the next attempt
	failures int
	before   time.Time // what was issued before is to be renewed
}

func newKeeper(cfg Config) *keeper {
	return &keeper{
		issue: cfg.Issuer.RequestIdentity, denied: cfg.Denied, every: cfg.RenewEvery, now: cfg.Now, log: cfg.Logger,
		wake: make(chan struct{}, 1), changed: make(chan struct{}),
	}
}

func (k *keeper) kick() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

func (k *keeper) changedLocked() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// want starts the keeper.
func (k *keeper) want() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wanted {
		return
	}
	k.wanted, k.due, k.failures = true, k.now(), 0
	k.kick()
}

// stop forgets the identity until somebody wants it again.
func (k *keeper) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.wanted {
		return
	}
	k.wanted, k.id, k.err = false, nil, nil
	k.changedLocked()
	k.kick()
}

// recall has an identity that was issued before t renewed soon. A t that lies before an earlier one changes nothing.
func (k *keeper) recall(t time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !t.After(k.before) {
		return
	}
	k.before = t
	if k.id != nil {
		k.recallLocked()
		k.kick()
	}
}

func (k *keeper) recallLocked() {
	if trust.Issued(k.id.Chain[0]).Before(k.before) {
		if soon := k.now().Add(rand.N(min(maxRecall, k.every/4) + 1)); soon.Before(k.due) {
			k.due = soon
		}
	}
}

// judge drops an identity that was withdrawn, and asks for another.
func (k *keeper) judge() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.id == nil || !k.deniedLocked(k.id) {
		return
	}
	k.id, k.err, k.due = nil, errWithdrawn, k.now()
	k.changedLocked()
	k.kick()
}

var errWithdrawn = errors.New("the identity was withdrawn")

func (k *keeper) deniedLocked(id *trust.Identity) bool {
	_, denied := k.denied(id.ID, trust.Issued(id.Chain[0]))
	return denied
}

// current is the identity, nil when there is none that holds now: then err says why. changed is closed at the next change.
func (k *keeper) current() (id *trust.Identity, changed <-chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.id != nil && k.now().Before(k.id.NotAfter):
		return k.id, k.changed, nil
	case k.id != nil && k.err == nil:
		return nil, k.changed, errors.New("the identity has ended")
	}
	return nil, k.changed, k.err
}

// run asks for identities when they are due, until ctx ends.
func (k *keeper) run(ctx context.Context) {
	for ctx.Err() == nil {
		if !k.sleep(ctx) {
			continue
		}
		attempt, cancel := context.WithTimeout(ctx, requestTimeout)
		id, err := k.issue(attempt)
		cancel()
		if ctx.Err() == nil {
			k.took(id, err)
		}
	}
	k.stop()
}

// sleep waits until an attempt is due: true. It returns false when something has changed, or ctx has ended.
func (k *keeper) sleep(ctx context.Context) bool {
	k.mu.Lock()
	wanted, wait := k.wanted, k.due.Sub(k.now())
	k.mu.Unlock()
	var due <-chan time.Time
	if wanted {
		if wait <= 0 {
			return true
		}
		t := time.NewTimer(min(wait, maxBackoff)) // a clock that was set back or forth is noticed within a minute
		defer t.Stop()
		due = t.C
	}
	select {
	case <-due:
		return wait <= maxBackoff
	case <-k.wake:
	case <-ctx.Done():
	}
	return false
}

// took takes the result of an attempt.
func (k *keeper) took(id *trust.Identity, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.wanted {
		return
	}
	if err == nil && k.deniedLocked(id) {
		err = errWithdrawn
	}
	now := k.now()
	if problem.Is(err, problem.IdentityWithdrawn) {
		k.id, err = nil, errWithdrawn // a refusal is no outage: what is left of its life is not served
	}
	if err != nil {
		k.err = err
		backoff := min(firstBackoff<<min(k.failures, 8), maxBackoff, max(k.every/4, time.Millisecond))
		k.due = now.Add(backoff - backoff/4 + rand.N(backoff/2+1))
		if k.failures++; k.failures&(k.failures-1) == 0 { // 1, 2, 4, …
			k.log.Warn("workload API: no identity for applications", "attempts", k.failures, "err", err)
		}
		k.changedLocked()
		return
	}
	if k.id == nil || k.failures > 0 {
		k.log.Info("workload API: identity for applications obtained", "id", id.ID, "not_after", id.NotAfter)
	}
	k.id, k.err, k.failures = id, nil, 0
	wait := k.every - k.every/10 + rand.N(k.every/5+1)
	k.due = now.Add(min(wait, id.NotAfter.Sub(now)/2))
	k.recallLocked()
	k.changedLocked()
}
