// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// State is what a peer is to us. Words as in the operator API.
type State string

// The states of a peer.
const (
	StateAwaiting State = "awaiting-approval" // known, not trusted; no resource
	StateJoining  State = "joining"           // approved: bundle and records for probing only; routes and grants nothing
	StateReady    State = "ready"             // probes have crossed both ways
	StateEvicted  State = "evicted"           // withdrawn; its name stays reserved
)

// AllNamespaces in Peer.Sameness grants sameness for every namespace.
const AllNamespaces = "*"

// View is all that is known about the federation at one moment. Immutable: do not modify what it points to.
type View struct {
	Revision    uint64 // increases with each view
	Federation  federation.FederationName
	Cluster     federation.ClusterName
	TrustDomain spiffeid.TrustDomain
	Region      string
	Version     string

	Peers    []*Peer        // sorted by cluster; evicted and awaiting ones too
	Gateways []*Gateway     // own, sorted by name
	Bundles  *trust.Bundles // own, and of peers that are joining or ready
	Alarms   []Alarm        // newest last, at most 64

	ownBundle *trust.Bundle
}

// Peer is one other cluster.
type Peer struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     federation.ClusterName
	Federation  federation.FederationName
	Region      string
	State       State
	Reason      string // why it is not simply ready; empty otherwise

	Bundle        *trust.Bundle // nil unless joining or ready
	BundleHash    [32]byte
	BundleUpdated time.Time // when the peer last confirmed it
	BundleSource  string    // SourceJoin, SourceCatalog
	BundleError   string    // why it could not be refreshed, or what was offered was refused; empty: all is well
	// SeenOurs is the sequence of our bundle that every live proxy of the peer has acknowledged, 0 when it is none that we know.
	SeenOurs uint64
	Denied   []catalog.Denial // identities of its own that it withdrew
	Gateways []*controlpb.GatewayRecord
	Sameness []string // namespaces that we consent to; AllNamespaces

	// what it offers us
	Catalog   *catalog.View // nil: none received, or not ready
	Freshness federation.Freshness
	Conflict  bool   // a fork of its catalog was seen
	Refused   string // why its last catalog update was refused; empty: it was not

	Tunnels  []Tunnel
	TunnelUp bool // any of them

	OfferedByUs  int // services
	IntroducedBy federation.ClusterName
	Stages       []string  // of the join, persisted so far
	Since        time.Time // of State
	Joined       time.Time // zero until ready for the first time
	Expires      time.Time // of an unfinished join; zero otherwise
	Version      string
	ClockSkew    time.Duration // theirs minus ours when last compared
}

// Trusted reports whether identities of the peer's trust domain are verified at all.
func (p *Peer) Trusted() bool { return p.State == StateJoining || p.State == StateReady }

// Ready reports whether the peer may route, be granted and be offered anything.
func (p *Peer) Ready() bool { return p.State == StateReady }

// Same reports whether the operator consents that the peer's services in namespace are the same as ours.
func (p *Peer) Same(namespace string) bool {
	return slices.Contains(p.Sameness, AllNamespaces) || slices.Contains(p.Sameness, namespace)
}

// Resource is the peer as its own cluster's gateways subscribe to it, or nil when it must be absent.
func (p *Peer) Resource() *controlpb.Peer {
	if !p.Trusted() || p.Bundle == nil {
		return nil
	}
	state := controlpb.PeerState_PEER_STATE_JOINING
	if p.Ready() {
		state = controlpb.PeerState_PEER_STATE_READY
	}
	return &controlpb.Peer{
		TrustDomain: p.TrustDomain.String(), Cluster: p.Cluster.String(), Federation: p.Federation.String(), Region: p.Region,
		State: state, BundleJwks: p.Bundle.Marshal(), BundleSequence: p.Bundle.Sequence(), Gateways: p.Gateways,
	}
}

// Tunnel is one session between an own gateway and one of a peer.
type Tunnel struct {
	Gateway string // own
	*controlpb.Tunnel
}

// Gateway is a gateway of this cluster. It stays listed for a day after its link ended: data planes outlive control planes.
type Gateway struct {
	Name         string
	ID           spiffeid.ID
	LocalAddress string
	Advertise    []string
	Zone         string
	Version      string
	Connected    bool
	LastSeen     time.Time // when the link ended; meaningful while not Connected
}

// Alarm is something that an operator should look at.
type Alarm struct {
	At      time.Time
	Cluster federation.ClusterName
	// name_taken, introduction_refused, catalog_fork, catalog_refused, token_misused, reused_name, bundle_rollback, bundle_fork,
	// bundle_too_large, own_bundle_rollback
	Kind string
	Text string
}

// Peer returns the peer of td, or nil.
func (v *View) Peer(td spiffeid.TrustDomain) *Peer {
	for _, p := range v.Peers {
		if p.TrustDomain == td {
			return p
		}
	}
	return nil
}

// ByCluster returns the peer of that name, or nil.
func (v *View) ByCluster(name federation.ClusterName) *Peer {
	for _, p := range v.Peers {
		if p.Cluster == name {
			return p
		}
	}
	return nil
}
