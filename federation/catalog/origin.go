// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"context"
	"log/slog"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// OriginConfig makes an Origin.
type OriginConfig struct {
	Self   spiffeid.TrustDomain
	Signer func() *trust.Identity // the catalog signer's current identity; nil result: not now
	// Epoch re-reads the signer's term before every signature: it returns the term's epoch, raised in the store by
	// compare-and-swap to at least atLeast, or an error when another process holds the term.
	Epoch          func(ctx context.Context, atLeast uint64) (uint64, error)
	BundleSequence func() uint64 // nil: 0
	TTL            time.Duration // 0: DefaultTTL; heads are signed again every third of it
	Now            func() time.Time
	Logger         *slog.Logger
}

// Origin is what this cluster offers, one catalog for each consumer. Run signs; the other methods may be called concurrently
// and never sign themselves.
type Origin struct{}

// NewOrigin starts nothing.
func NewOrigin(cfg OriginConfig) (*Origin, error) { return &Origin{}, nil }

// Run signs what changed and signs again every ttl/3, until ctx ends.
func (o *Origin) Run(ctx context.Context) error { return nil }

// Set replaces what consumer is offered: entry bodies by key ("svc/<ns>/<name>", "gw/<name>").
func (o *Origin) Set(consumer spiffeid.TrustDomain, entries map[string][]byte) error { return nil }

// Drop forgets a consumer.
func (o *Origin) Drop(consumer spiffeid.TrustDomain) {}

// Update returns what a consumer that has (epoch, seq) is missing: a delta, a snapshot, the head alone when nothing is missing,
// or nil when nothing is signed yet.
func (o *Origin) Update(consumer spiffeid.TrustDomain, haveEpoch, haveSeq uint64) *controlpb.CatalogUpdate {
	return nil
}

// Head returns the newest signed head for consumer, or nil.
func (o *Origin) Head(consumer spiffeid.TrustDomain) *Head { return nil }

// Changed returns a channel that is closed when any head is signed next.
func (o *Origin) Changed() <-chan struct{} { return nil }

// Meet takes a head of our own that a peer holds; a higher epoch than ours makes the next signature jump above it.
func (o *Origin) Meet(sh *controlpb.SignedHead, bundles *trust.Bundles) error { return nil }
