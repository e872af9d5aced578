// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"log/slog"
	"net"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Config makes a Gossip.
type Config struct {
	Name       string                    // of this gateway, "<gateway>.<cluster>"
	Federation federation.FederationName // label on every packet: other federations' are dropped
	Link       Link
	Logger     *slog.Logger // nil discards
}

// Member is one gateway that gossip has heard of. A hint for whom to dial, nothing else.
type Member struct {
	Name    string // "<gateway>.<cluster>"
	Gateway string
	Cluster federation.ClusterName
	Status  string // alive, failed, left
}

// Gossip is this gateway's part in the federation's gossip. Its methods may be called concurrently, and before Run.
type Gossip struct{}

// New starts nothing.
func New(cfg Config) (*Gossip, error) { return &Gossip{}, nil }

// Run gossips until ctx ends, and returns after every goroutine has ended.
func (g *Gossip) Run(ctx context.Context) error { return nil }

// Hint tells every member that the catalogs of origin changed: at most one event a second for each origin, the last one wins.
func (g *Gossip) Hint(origin spiffeid.TrustDomain) {}

// Hints says whose catalogs changed somewhere. One reader; a full queue forgets nothing, it coalesces.
func (g *Gossip) Hints() <-chan spiffeid.TrustDomain { return nil }

// Members lists who gossip has heard of.
func (g *Gossip) Members() []Member { return nil }

// Join makes contact with a peer that the link has a session with. Call it when a session came up.
func (g *Gossip) Join(peer string) {}

// Deliver takes one packet that came from a peer. It never blocks and keeps b.
func (g *Gossip) Deliver(from string, b []byte) {}

// DeliverStream takes a stream that a peer opened for a push/pull exchange, and closes it.
func (g *Gossip) DeliverStream(from string, c net.Conn) {}
