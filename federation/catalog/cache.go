// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Cache is what a gateway holds of catalogs, in memory: what its own cluster offers, keyed by consumer, or what it pulled from
// peers, keyed by origin. It checks that entries match their head; whoever calls it has verified the head. Methods may be called
// concurrently.
type Cache struct{}

// NewCache returns an empty cache; zero limits are those of StoreConfig.
func NewCache(maxEntries, maxBytes int) *Cache { return &Cache{} }

// Apply takes an update for key. Typed errors as Store.Apply.
func (c *Cache) Apply(key spiffeid.TrustDomain, u *controlpb.CatalogUpdate) (Result, error) {
	return Result{}, nil
}

// Update answers a reader that has (epoch, seq): delta, snapshot, the head alone, or nil when nothing is held.
func (c *Cache) Update(key spiffeid.TrustDomain, haveEpoch, haveSeq uint64) *controlpb.CatalogUpdate {
	return nil
}

// Mark returns the newest (epoch, seq) held for key, zeros for none.
func (c *Cache) Mark(key spiffeid.TrustDomain) (epoch, seq uint64) { return 0, 0 }

// Drop forgets key.
func (c *Cache) Drop(key spiffeid.TrustDomain) {}

// Keys lists what is held.
func (c *Cache) Keys() []spiffeid.TrustDomain { return nil }

// Changed returns a channel that is closed when key's head changes next.
func (c *Cache) Changed(key spiffeid.TrustDomain) <-chan struct{} { return nil }
