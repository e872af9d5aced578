// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"github.com/strait-mesh/strait/internal/relay"
)

// Transports of a session.
const (
	QUIC = "quic"
	TCP  = "tcp"
)

// ALPN protocols on the listening port.
const (
	ALPNQUIC = "strait/1"
	ALPNTCP  = "strait-tcp/1"
	ALPNJoin = "strait-join/1"
)

// Stream is one stream of a session: a relay.Stream with deadlines.
type Stream interface {
	relay.Stream
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// counted is a Stream that says once when it has been closed or reset at this end.
type counted interface {
	Stream
	onEnd(func())
}

// closeCode says to the other end why a link ends.
type closeCode uint64

const (
	closeNormal    closeCode = 0
	closeShutdown  closeCode = 1
	closeRefused   closeCode = 2
	closeWithdrawn closeCode = 3
	closeSilent    closeCode = 4
	closeProtocol  closeCode = 5
)

// errTooLarge says that a packet does not fit into a datagram.
var errTooLarge = errors.New("packet too large for a datagram")

// errNoDatagrams says that the link has no datagrams; packets go over a stream.
var errNoDatagrams = errors.New("link without datagrams")

// link is one connection between two gateways: QUIC, or yamux over TLS.
type link interface {
	open(ctx context.Context) (counted, error)
	accept(ctx context.Context) (counted, error)
	sendPacket(b []byte) error
	packetSize() int // of the largest packet that sendPacket takes now; 0 without datagrams
	receivePacket(ctx context.Context) ([]byte, error)
	state() tls.ConnectionState
	remoteAddr() net.Addr
	stats() linkStats
	done() <-chan struct{}
	close(code closeCode, reason string)
}

// linkStats are running totals; rtt is zero where the transport does not say.
type linkStats struct {
	rtt           time.Duration
	sent, lost    uint64 // packets or segments
	bytesIn       uint64
	bytesOut      uint64
	congestionWnd uint64
}

// netStream gives a Stream the rest of net.Conn, for libraries that want one.
type netStream struct {
	Stream
	local, remote net.Addr
}

func (s netStream) LocalAddr() net.Addr  { return s.local }
func (s netStream) RemoteAddr() net.Addr { return s.remote }
