// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"net"
)

// Link carries gossip between this gateway and the gateways it has live sessions with. A peer is named
// "<gateway>.<cluster>"; the link has authenticated that name before it says it, and gives what comes in to Gossip.Deliver and
// Gossip.DeliverStream under it. Methods may be called concurrently.
type Link interface {
	// Peers lists the names of live sessions.
	Peers() []string
	// SendDatagram sends one packet of at most MaxPacket bytes, unreliably. It never blocks and may keep b.
	SendDatagram(peer string, b []byte) error
	// OpenStream opens a reliable stream for one push/pull exchange.
	OpenStream(ctx context.Context, peer string) (net.Conn, error)
}

// MaxPacket is the largest packet handed to Link.SendDatagram, in bytes.
const MaxPacket = 1150
