// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Config makes a Manager.
type Config struct {
	// What this cluster is; required.
	Federation  federation.FederationName
	Cluster     federation.ClusterName
	TrustDomain spiffeid.TrustDomain
	Region      string

	Dir *datadir.Dir // peers/, tokens/, catalogs/, identity/join.key; required

	// Identity is the control plane's own SVID (/strait/controlplane), Signer the catalog signer's, Bundle the own trust
	// domain's bundle: read anew at each use; required. A nil result means "not now".
	Identity func() *trust.Identity
	Signer   func() *trust.Identity
	Bundle   func() *trust.Bundle
	// RaiseSequence takes the own bundle past a sequence that a member has seen of it. nil: that is nobody's here. It must not call back.
	RaiseSequence func(seen uint64) error

	// PeerID is the verified identity of the caller of a gRPC method; required to serve Link.
	PeerID func(ctx context.Context) (spiffeid.ID, bool)

	Epochs  EpochStore  // nil: a file in Dir
	Objects PeerObjects // nil: nothing is mirrored

	// GatewayAddresses overrides what own gateways advertise in tokens and records (Federation.spec.gatewayAddresses); nil or an
	// empty result: what each gateway says.
	GatewayAddresses func() []string
	// Introducers are clusters whose introductions need no approval (Federation.spec.introducers); nil: none.
	Introducers func() []federation.ClusterName
	// Reserved names no newcomer may take, beside those known; nil: none.
	Reserved func() []federation.ClusterName

	// Acked returns the sequence of td's bundle that every live proxy of ours has acknowledged; nil, or not ok: not known. Denied
	// are the identities of this cluster that are withdrawn; nil: none. Neither may call the Manager, but for View.
	Acked  func(td spiffeid.TrustDomain) (sequence uint64, ok bool)
	Denied func() []catalog.Denial
	// BundleChanged, AckedChanged and DeniedChanged return a channel that is closed when Bundle, Acked or Denied would answer
	// something else; they are called again after each. nil: looked at each second.
	BundleChanged, AckedChanged, DeniedChanged func() <-chan struct{}

	CatalogTTL    time.Duration // of own heads; 0: catalog.DefaultTTL
	AllowLoopback bool          // accept loopback addresses of peers' gateways (one-machine demos and tests)

	// ProbeEvery is how often a joining peer is probed until both directions are proven; 500 ms. Raising it delays joins.
	ProbeEvery time.Duration
	// JoinExpiry is how long an unfinished join may be resumed; 24 h. Raising it lengthens what a stolen, bound state is worth.
	JoinExpiry time.Duration
	// IntroduceEvery is how often an approved introduction is tried; 5 s, doubling up to 5 min.
	IntroduceEvery time.Duration
	// EpochWait is how long the first signature waits for peers to tell the newest head they hold; 5 s. Only with peers.
	EpochWait time.Duration

	Version string           // of the software, for peers to see
	Now     func() time.Time // nil: time.Now
	Logger  *slog.Logger     // nil: discard
}

func (c Config) withDefaults() (Config, error) {
	if c.Federation.IsZero() || c.Cluster.IsZero() || c.TrustDomain.IsZero() {
		return c, errors.New("federate: federation, cluster and trust domain are required")
	}
	if c.Dir == nil || c.Identity == nil || c.Signer == nil || c.Bundle == nil {
		return c, errors.New("federate: Dir, Identity, Signer and Bundle are required")
	}
	if c.PeerID == nil {
		c.PeerID = func(context.Context) (spiffeid.ID, bool) { return spiffeid.ID{}, false }
	}
	if c.GatewayAddresses == nil {
		c.GatewayAddresses = func() []string { return nil }
	}
	if c.Introducers == nil {
		c.Introducers = func() []federation.ClusterName { return nil }
	}
	if c.Reserved == nil {
		c.Reserved = func() []federation.ClusterName { return nil }
	}
	if c.Acked == nil {
		c.Acked = func(spiffeid.TrustDomain) (uint64, bool) { return 0, false }
	}
	if c.Denied == nil {
		c.Denied = func() []catalog.Denial { return nil }
	}
	setDefault(&c.ProbeEvery, 500*time.Millisecond)
	setDefault(&c.JoinExpiry, 24*time.Hour)
	setDefault(&c.IntroduceEvery, 5*time.Second)
	setDefault(&c.EpochWait, 5*time.Second)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// PeerObjects mirrors peers into the configuration API, where an operator may edit spec.sameness; whoever implements it calls
// Manager.SetSameness when one did. Calls come from one goroutine, newest state only, and are repeated after an error.
type PeerObjects interface {
	Upsert(ctx context.Context, p Peer) error
	Delete(ctx context.Context, cluster federation.ClusterName) error
	// List names the objects that exist; those that are no peer's any more are deleted at the start.
	List(ctx context.Context) ([]federation.ClusterName, error)
}

// EpochStore holds the catalog epoch, the only number that must never go back while peers remember it.
type EpochStore interface {
	// Current returns the stored epoch, 0 for none.
	Current(ctx context.Context) (uint64, error)
	// CompareAndSwap replaces old by new, durably, or returns ErrEpochConflict.
	CompareAndSwap(ctx context.Context, old, new uint64) error
}

// ErrEpochConflict says that the stored epoch is not what the caller thought.
var ErrEpochConflict = errors.New("epoch: another process changed it")
