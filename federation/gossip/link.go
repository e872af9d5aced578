// SPDX-License-Identifier: Apache-2.0

package gossip

import (
	"context"
	"net"
)

// Link carries gossip between this gateway and the gateways it has live sessions with. A peer is named
// "<gateway>.<cluster>"; the link has authenticated that name before it says it, and gives what comes in to Gossip.Deliver and
// Gossip.DeliverStream under it. Methods may be called concurrently, and from within Deliver: a link holds no lock of its own while
// it delivers.
type Link interface {
	// Peers lists the names of live sessions.
	Peers() []string
	// SendDatagram sends one packet of at most MaxPacket bytes, unreliably; one that does not fit a datagram now may go as a
	// one-shot stream. It may keep b. If it blocks, only packets to this peer wait; it returns when the session
	// ends.
	SendDatagram(peer string, b []byte) error
	// OpenStream opens a reliable stream for one push/pull exchange. ctx bounds the opening, not the stream.
	OpenStream(ctx context.Context, peer string) (net.Conn, error)
}

// Sizes in bytes.
const (
	// MaxPacket is the largest packet handed to Link.SendDatagram: UDPBufferSize and a checksum.
	MaxPacket = udpBufferSize + 5

	udpBufferSize = 1150
)
