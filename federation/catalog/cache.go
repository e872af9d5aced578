// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"sync"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Cache is what a gateway holds of catalogs, in memory: what its own cluster offers, keyed by consumer, or what it pulled from
// peers, keyed by origin. It checks that entries match their head and that heads do not go back; whoever calls it has verified the
// head. Methods may be called concurrently.
type Cache struct {
	lim limits

	mu      sync.Mutex
	held    map[spiffeid.TrustDomain]*held
	changed map[spiffeid.TrustDomain]chan struct{}
}

// NewCache returns an empty cache; zero limits are the default quotas.
func NewCache(maxEntries, maxBytes int) *Cache {
	if maxEntries == 0 {
		maxEntries = DefaultMaxEntries
	}
	if maxBytes == 0 {
		maxBytes = DefaultMaxBytes
	}
	return &Cache{lim: limits{maxEntries, maxBytes}, held: map[spiffeid.TrustDomain]*held{}, changed: map[spiffeid.TrustDomain]chan struct{}{}}
}

// Apply takes an update for key. Typed errors: *HeadError, *RollbackError, *ForkError, *QuotaError, *ForeignError, ErrResync.
func (c *Cache) Apply(key spiffeid.TrustDomain, u *controlpb.CatalogUpdate) (Result, error) {
	head, err := ParseHead(u.GetHead().GetHead())
	if err != nil {
		return Result{}, &HeadError{Reason: "malformed", Err: err}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.held[key]
	next, changes, err := was.merge(u, head, c.lim)
	if err != nil {
		return Result{}, err
	}
	if next == was {
		return Result{Head: head}, nil
	}
	c.held[key] = next
	c.notifyLocked(key)
	return Result{Changed: changes > 0, Fresh: true, Head: head}, nil
}

func (c *Cache) notifyLocked(key spiffeid.TrustDomain) {
	if ch := c.changed[key]; ch != nil {
		close(ch)
		delete(c.changed, key)
	}
}

// Update answers a reader that has (epoch, seq): delta, snapshot, the head alone, or nil when nothing is held.
func (c *Cache) Update(key spiffeid.TrustDomain, haveEpoch, haveSeq uint64) *controlpb.CatalogUpdate {
	c.mu.Lock()
	h := c.held[key]
	c.mu.Unlock()
	return h.update(haveEpoch, haveSeq)
}

// Mark returns the newest (epoch, seq) held for key, zeros for none.
func (c *Cache) Mark(key spiffeid.TrustDomain) (epoch, seq uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.held[key]; h != nil {
		return h.head.Epoch, h.head.Seq
	}
	return 0, 0
}

// Signed returns the newest signed head held for key, or nil.
func (c *Cache) Signed(key spiffeid.TrustDomain) *controlpb.SignedHead {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.held[key]; h != nil {
		return h.signed
	}
	return nil
}

// Drop forgets key; a reader that waits for its change is woken.
func (c *Cache) Drop(key spiffeid.TrustDomain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.held[key]; ok {
		delete(c.held, key)
		c.notifyLocked(key)
	}
}

// Keys lists what is held, sorted.
func (c *Cache) Keys() []spiffeid.TrustDomain {
	c.mu.Lock()
	defer c.mu.Unlock()
	return sortedKeys(c.held)
}

// Changed returns a channel that is closed when key's head changes next, or key is dropped.
func (c *Cache) Changed(key spiffeid.TrustDomain) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := c.changed[key]
	if ch == nil {
		ch = make(chan struct{})
		c.changed[key] = ch
	}
	return ch
}
