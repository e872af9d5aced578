// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// QUIC limits. A stream's window bounds what a slow receiver makes us hold; raising it raises the throughput of one
// stream (window / RTT) and the memory a peer may claim (connection window × links).
const (
	streamWindow      = 256 << 10
	connWindow        = 4 << 20
	maxInteractive    = 1024
	maxControl        = 64
	maxUni            = -1
	quicIdle          = 10 * time.Second
	handshakeTimeout  = 5 * time.Second
	initialPacketSize = 1200
)

func quicConfig(streams int64) *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:           handshakeTimeout,
		MaxIdleTimeout:                 quicIdle,
		KeepAlivePeriod:                quicIdle / 4,
		InitialStreamReceiveWindow:     streamWindow / 2,
		MaxStreamReceiveWindow:         streamWindow,
		InitialConnectionReceiveWindow: connWindow / 4,
		MaxConnectionReceiveWindow:     connWindow,
		MaxIncomingStreams:             streams,
		MaxIncomingUniStreams:          maxUni,
		InitialPacketSize:              initialPacketSize,
		EnableDatagrams:                true,
	}
}

// quicLink is a link over one QUIC connection.
type quicLink struct{ c *quic.Conn }

func (l *quicLink) open(ctx context.Context) (counted, error) {
	s, err := l.c.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	return &quicStream{Stream: s}, nil
}

func (l *quicLink) accept(ctx context.Context) (counted, error) {
	s, err := l.c.AcceptStream(ctx)
	if err != nil {
		return nil, err
	}
	return &quicStream{Stream: s}, nil
}

func (l *quicLink) sendPacket(b []byte) error {
	err := l.c.SendDatagram(b)
	var large *quic.DatagramTooLargeError
	if errors.As(err, &large) {
		return errTooLarge
	}
	return err
}

func (l *quicLink) packetSize() int {
	var large *quic.DatagramTooLargeError
	if errors.As(l.c.SendDatagram(tooWide[:]), &large) { // the only way to ask
		return int(large.MaxDatagramPayloadSize)
	}
	return 0
}

// tooWide fits into no packet of any path.
var tooWide [64 << 10]byte

func (l *quicLink) receivePacket(ctx context.Context) ([]byte, error) {
	return l.c.ReceiveDatagram(ctx)
}
func (l *quicLink) state() tls.ConnectionState { return l.c.ConnectionState().TLS }
func (l *quicLink) remoteAddr() net.Addr       { return l.c.RemoteAddr() }
func (l *quicLink) done() <-chan struct{}      { return l.c.Context().Done() }

func (l *quicLink) stats() linkStats {
	s := l.c.ConnectionStats()
	return linkStats{rtt: s.SmoothedRTT, sent: s.PacketsSent, lost: s.PacketsLost,
		bytesIn: s.BytesReceived, bytesOut: s.BytesSent, congestionWnd: s.CongestionWindow}
}

func (l *quicLink) close(code closeCode, reason string) {
	_ = l.c.CloseWithError(quic.ApplicationErrorCode(code), reason)
}

// resetCode is the application error code of a stream that was reset.
const resetCode = 1

// quicStream maps half-close to FIN and reset to RESET_STREAM with STOP_SENDING.
type quicStream struct {
	*quic.Stream
	one    [1]byte
	reset  atomic.Bool
	closed atomic.Bool // after Close a Reset would take back what was written
	gone   sync.Once
	end    func()
}

func (s *quicStream) onEnd(f func()) { s.end = f }

func (s *quicStream) ended() {
	s.gone.Do(func() {
		if s.end != nil {
			s.end()
		}
	})
}

// CloseWrite implements Stream.
func (s *quicStream) CloseWrite() error { return s.Stream.Close() }

// Reset implements Stream.
func (s *quicStream) Reset() {
	s.reset.Store(true)
	s.CancelRead(resetCode)
	if !s.closed.Load() {
		s.CancelWrite(resetCode)
	}
	s.ended()
}

// Close implements Stream: what was written is still delivered, what was not read is given up.
func (s *quicStream) Close() error {
	s.closed.Store(true)
	s.CancelRead(resetCode)
	_ = s.Stream.Close()
	s.ended()
	return nil
}

// ReadPooled reads without holding a buffer while there is nothing to read.
func (s *quicStream) ReadPooled(take func() []byte, _ func()) (int, error) {
	if _, err := s.Peek(s.one[:]); err != nil {
		return 0, s.readError(err)
	}
	return s.Read(take())
}

// Read implements Stream.
func (s *quicStream) Read(b []byte) (int, error) {
	n, err := s.Stream.Read(b)
	return n, s.readError(err)
}

// readError keeps a stream that was reset here from looking finished: quic-go (v0.65) reports io.EOF to a reader that wakes
// after CancelRead once the other end's RESET_STREAM has told the final size.
func (s *quicStream) readError(err error) error {
	if err == io.EOF && s.reset.Load() {
		return ErrReset
	}
	return err
}

// dialQUIC dials from the listening socket.
func (e *Endpoint) dialQUIC(ctx context.Context, address string, config *tls.Config, streams int64) (*quic.Conn, error) {
	if e.quic == nil {
		return nil, errors.New("udp is disabled")
	}
	addr, err := resolveUDP(ctx, address)
	if err != nil {
		return nil, err
	}
	return e.quic.Dial(ctx, addr, config, quicConfig(streams))
}

func resolveUDP(ctx context.Context, address string) (*net.UDPAddr, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, err
	}
	return &net.UDPAddr{IP: ips[0].IP, Zone: ips[0].Zone, Port: n}, nil
}
