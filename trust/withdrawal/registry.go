// SPDX-License-Identifier: Apache-2.0

package withdrawal

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// ReasonExpired ends what outlived its certificate.
const ReasonExpired = "identity_expired"

// Class says what kind of thing stands in the registry.
type Class string

// The classes.
const (
	Stream       Class = "stream"       // relayed by a gateway
	Tunnel       Class = "tunnel"       // between gateways
	LocalSession Class = "local"        // between sidecar and gateway
	Inbound      Class = "inbound"      // inner connection, at the callee's sidecar
	Outbound     Class = "outbound"     // inner connection, at the caller's sidecar
	Subscription Class = "subscription" // discovery or catalog
)

// Subject is what is judged.
type Subject struct {
	Peer     spiffeid.TrustDomain // of the other end
	Identity spiffeid.ID          // of the other end, where known
	Export   string               // "<namespace>/<name>:<port>", where it concerns a service
	Class    Class
	Issued   time.Time // of the other end's certificate (trust.Issued); zero: the identity is known by name only
	NotAfter time.Time // of the other end's certificate; zero: no limit
}

type entry struct {
	subject Subject
	end     func(reason string)
	index   int // in the heap; -1 when it has no deadline
}

// Config of a Registry.
type Config struct {
	Now func() time.Time // nil: time.Now
}

// Registry holds what stands. Make it with New; Run ends what expires.
type Registry struct {
	now func() time.Time

	mu      sync.Mutex
	entries map[*entry]struct{}
	expiry  expiryHeap
	wake    chan struct{}
}

// New makes an empty registry.
func New(cfg Config) *Registry {
	r := &Registry{now: cfg.Now, entries: map[*entry]struct{}{}, wake: make(chan struct{}, 1)}
	if r.now == nil {
		r.now = time.Now
	}
	return r
}

// Add puts a subject into the registry. The caller calls remove when the thing ends by itself; remove is idempotent. Add
// first and look at the policy afterwards: whatever changes in between then finds the subject here.
func (r *Registry) Add(s Subject, end func(reason string)) (remove func()) {
	e := &entry{subject: s, end: end, index: -1}
	r.mu.Lock()
	r.entries[e] = struct{}{}
	if !s.NotAfter.IsZero() {
		heap.Push(&r.expiry, e)
		if r.expiry[0] == e {
			select {
			case r.wake <- struct{}{}:
			default:
			}
		}
	}
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.removeLocked(e)
	}
}

func (r *Registry) removeLocked(e *entry) bool {
	if _, ok := r.entries[e]; !ok {
		return false
	}
	delete(r.entries, e)
	if e.index >= 0 {
		heap.Remove(&r.expiry, e.index)
	}
	return true
}

// Judge asks judge about every subject and ends those that are refused, with the reason given. It returns how many. judge
// runs without the registry's lock.
func (r *Registry) Judge(judge func(Subject) (reason string, ok bool)) int {
	r.mu.Lock()
	all := make([]*entry, 0, len(r.entries))
	for e := range r.entries {
		all = append(all, e)
	}
	r.mu.Unlock()
	ended := 0
	for _, e := range all {
		reason, ok := judge(e.subject)
		if ok {
			continue
		}
		r.mu.Lock()
		stood := r.removeLocked(e)
		r.mu.Unlock()
		if stood {
			ended++
			e.end(reason)
		}
	}
	return ended
}

// Len is how many subjects stand.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.entries)
}

// Snapshot copies the subjects, in no order.
func (r *Registry) Snapshot() []Subject {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Subject, 0, len(r.entries))
	for e := range r.entries {
		out = append(out, e.subject)
	}
	return out
}

// Run ends subjects at their NotAfter until ctx ends. The wall clock is read again at least once a second, so that a step of
// the clock is noticed.
func (r *Registry) Run(ctx context.Context) error {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		t.Reset(r.expire())
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-t.C:
		}
	}
}

// expire ends what is due and returns how long to sleep.
func (r *Registry) expire() time.Duration {
	var due []*entry
	wait := time.Hour
	r.mu.Lock()
	now := r.now()
	for len(r.expiry) > 0 {
		e := r.expiry[0]
		if left := e.subject.NotAfter.Sub(now); left > 0 {
			wait = min(left, time.Second)
			break
		}
		r.removeLocked(e)
		due = append(due, e)
	}
	r.mu.Unlock()
	for _, e := range due {
		e.end(ReasonExpired)
	}
	return wait
}

type expiryHeap []*entry

func (h expiryHeap) Len() int           { return len(h) }
func (h expiryHeap) Less(i, j int) bool { return h[i].subject.NotAfter.Before(h[j].subject.NotAfter) }
func (h expiryHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *expiryHeap) Push(x any) {
	e := x.(*entry)
	e.index = len(*h)
	*h = append(*h, e)
}
func (h *expiryHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	e.index = -1
	return e
}
