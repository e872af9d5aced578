// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"log/slog"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// StoreConfig makes a Store. Zero quotas are the defaults.
type StoreConfig struct {
	Self             spiffeid.TrustDomain // the consumer: heads for anybody else are refused
	MaxEntries       int                  // per peer (5000)
	MaxBytes         int                  // per peer, keys and bodies (8 MiB)
	ChangesPerSecond float64              // per peer (200), with a burst of MaxEntries
	AllowLoopback    bool                 // accept loopback addresses in gateway records (one-machine demos and tests)
	Now              func() time.Time
	Logger           *slog.Logger
}

// Result says what an update did.
type Result struct {
	Changed bool // the entries changed
	Fresh   bool // the head is newer than the one held
	Head    *Head
}

// View is one origin's catalog as it is held; immutable.
type View struct {
	Origin     spiffeid.TrustDomain
	Head       Head
	ReceivedAt time.Time // of the newest head
	Services   []*controlpb.CatalogService
	Gateways   []*controlpb.GatewayRecord
}

// Store is what peers offer us. Methods may be called concurrently.
type Store struct{}

// OpenStore reads what dir holds.
func OpenStore(dir *datadir.Dir, cfg StoreConfig) (*Store, error) { return &Store{}, nil }

// Apply verifies, judges, persists and then holds an update. Typed errors: *RollbackError, *ForkError, *QuotaError,
// *ForeignError, ErrResync.
func (s *Store) Apply(origin spiffeid.TrustDomain, u *controlpb.CatalogUpdate, bundles *trust.Bundles) (Result, error) {
	return Result{}, nil
}

// View returns what is held of origin, or nil.
func (s *Store) View(origin spiffeid.TrustDomain) *View { return nil }

// Mark returns the newest (epoch, seq) held of origin, zeros for none.
func (s *Store) Mark(origin spiffeid.TrustDomain) (epoch, seq uint64) { return 0, 0 }

// Signed returns the newest signed head held of origin, or nil: what an origin that lost its memory asks for.
func (s *Store) Signed(origin spiffeid.TrustDomain) *controlpb.SignedHead { return nil }

// Freshness judges the age of what is held.
func (s *Store) Freshness(origin spiffeid.TrustDomain, tunnelAlive bool) federation.Freshness {
	return federation.Withdrawn
}

// Conflict returns the evidence of a fork, or nil.
func (s *Store) Conflict(origin spiffeid.TrustDomain) *Conflict { return nil }

// Forget removes everything about origin, the mark and the evidence included (eviction, member reset-epoch).
func (s *Store) Forget(origin spiffeid.TrustDomain) error { return nil }

// Origins lists whom something is held of.
func (s *Store) Origins() []spiffeid.TrustDomain { return nil }

// Conflict is two valid heads with the same numbers and different content.
type Conflict struct {
	First, Second *controlpb.SignedHead
	SeenAt        time.Time
}
