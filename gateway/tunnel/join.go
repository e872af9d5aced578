// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"

	"github.com/strait-mesh/strait/internal/crowd"
	"github.com/strait-mesh/strait/trust"
)

const (
	// MaxJoinFrame bounds one frame of a join conversation.
	MaxJoinFrame = 256 << 10
	// JoinExporterLabel names the TLS exporter that proofs are bound to.
	JoinExporterLabel = "EXPORTER-strait-join/1"

	joinLife        = 5 * time.Minute
	joinIdle        = time.Minute
	joinFirst       = 10 * time.Second
	maxJoins        = 16
	maxJoinsAddress = 4
	tcpProbe        = time.Second
)

// JoinConn is one join conversation: frames both ways between two control planes, unread here.
type JoinConn struct {
	Transport string
	Address   string
	State     tls.ConnectionState
	UDPOK     bool
	TCPOK     bool
	RTT       time.Duration

	rw    joinStream
	fresh bool // accepted, and nothing read yet
	close func()
}

type joinStream interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// ReadFrame reads the next frame; silence for a minute ends the conversation (10 s before an acceptor's first).
func (c *JoinConn) ReadFrame() ([]byte, error) {
	wait := joinIdle
	if c.fresh {
		wait, c.fresh = joinFirst, false
	}
	_ = c.rw.SetReadDeadline(time.Now().Add(wait))
	b, err := ReadFrame(c.rw, MaxJoinFrame)
	if err == nil && len(b) == 0 {
		err = fmt.Errorf("%w: empty join frame", ErrMalformed)
	}
	return b, err
}

// WriteFrame writes a frame. The client writes first: on QUIC the server sees the stream only then.
func (c *JoinConn) WriteFrame(b []byte) error {
	if len(b) > MaxJoinFrame {
		return errors.New("join frame too large")
	}
	_ = c.rw.SetWriteDeadline(time.Now().Add(10 * time.Second))
	return WriteFrame(c.rw, b)
}

// Exporter returns 32 bytes bound to this connection.
func (c *JoinConn) Exporter() ([]byte, error) {
	return c.State.ExportKeyingMaterial(JoinExporterLabel, nil, 32)
}

// Close ends the conversation. Frames already written are delivered first where the other end still reads.
func (c *JoinConn) Close() { c.close() }

func (e *Endpoint) joinServerTLS() *tls.Config {
	if e.cfg.Join == nil {
		return nil
	}
	return e.cfg.Source.ServerTLS(trust.TLSOptions{ALPN: []string{ALPNJoin}, AcceptUnverifiedClient: true, SendRoots: true})
}

// admitJoin counts a new conversation; the caller calls the func when it is over.
func (e *Endpoint) admitJoin(from net.Addr) (func(), bool) {
	host := crowd.Group(from)
	if e.cfg.Join == nil || !e.joinRL.admit(host, time.Now()) {
		return nil, false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.joins) >= maxJoins || e.joinsFrom(host) >= maxJoinsAddress {
		return nil, false
	}
	key := &host
	e.joins[key] = struct{}{}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.joins, key)
	}, true
}

func (e *Endpoint) joinsFrom(host netip.Prefix) (n int) {
	for k := range e.joins {
		if *k == host {
			n++
		}
	}
	return n
}

// Rates of new join conversations: of everybody, and of one address, so that none can use up what there is for all.
const (
	joinRate, joinBurst  = 5, 16
	joinRateOne, joinOne = 1, joinBurst / 4
	maxJoinAddresses     = 1024
)

// joinLimiter is one token bucket for everybody and one for each address (a /32, or a /64). Its zero value is ready.
type joinLimiter struct {
	mu   sync.Mutex
	all  *rate.Limiter
	each map[netip.Prefix]*rate.Limiter
}

// admit takes from both buckets, or from none.
func (l *joinLimiter) admit(from netip.Prefix, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all, l.each = rate.NewLimiter(joinRate, joinBurst), map[netip.Prefix]*rate.Limiter{}
	}
	one := l.each[from]
	if one == nil {
		if len(l.each) >= maxJoinAddresses {
			clear(l.each) // the bucket of all still holds
		}
		one = rate.NewLimiter(joinRateOne, joinOne)
		l.each[from] = one
	}
	return one.TokensAt(now) >= 1 && l.all.AllowN(now, 1) && one.AllowN(now, 1)
}

func (e *Endpoint) serveJoinQUIC(ctx context.Context, c *quic.Conn) {
	done, ok := e.admitJoin(c.RemoteAddr())
	if !ok {
		_ = c.CloseWithError(quic.ApplicationErrorCode(closeRefused), "busy")
		return
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, joinLife)
	defer cancel()
	first, cancelFirst := context.WithTimeout(ctx, joinFirst)
	s, err := c.AcceptStream(first)
	cancelFirst()
	if err != nil {
		_ = c.CloseWithError(quic.ApplicationErrorCode(closeProtocol), "no stream")
		return
	}
	jc := &JoinConn{Transport: QUIC, Address: c.RemoteAddr().String(), State: c.ConnectionState().TLS, UDPOK: true, rw: s,
		RTT: c.ConnectionStats().SmoothedRTT, fresh: true}
	jc.close = func() { closeJoinQUIC(c, s) }
	defer jc.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.CloseWithError(quic.ApplicationErrorCode(closeShutdown), "over") })
	defer stop()
	e.cfg.Join(ctx, jc)
}

// closeJoinQUIC ends the stream and gives the last frames a second to arrive: closing right after a write loses data.
func closeJoinQUIC(c *quic.Conn, s *quic.Stream) {
	_ = s.Close()
	_ = s.SetReadDeadline(time.Now().Add(time.Second))
	var b [512]byte
	for {
		if _, err := s.Read(b[:]); err != nil {
			break
		}
	}
	_ = c.CloseWithError(quic.ApplicationErrorCode(closeNormal), "")
}

func (e *Endpoint) serveJoinTCP(ctx context.Context, c *tls.Conn) {
	done, ok := e.admitJoin(c.RemoteAddr())
	if !ok {
		c.NetConn().Close()
		return
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, joinLife)
	defer cancel()
	jc := newJoinTCP(c)
	jc.fresh = true
	defer jc.Close()
	stop := context.AfterFunc(ctx, func() { c.NetConn().Close() })
	defer stop()
	e.cfg.Join(ctx, jc)
}

func newJoinTCP(c *tls.Conn) *JoinConn {
	bare, _ := c.NetConn().(*net.TCPConn)
	tuneTCP(bare)
	return &JoinConn{Transport: TCP, Address: c.RemoteAddr().String(), State: c.ConnectionState(), TCPOK: true, rw: c,
		close: func() {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_ = c.Close()
		}}
}

// DialJoin opens a conversation with the first of addresses that answers as config wants it, QUIC with a head start.
func (e *Endpoint) DialJoin(ctx context.Context, addresses []string, config *tls.Config) (*JoinConn, error) {
	return raceAttempts(ctx, attempts(addresses, e.quic != nil, true, e.cfg.HeadStart),
		func(ctx context.Context, a attempt) (*JoinConn, error) { return e.dialJoin(ctx, a, config) }, (*JoinConn).Close)
}

func (e *Endpoint) dialJoin(ctx context.Context, a attempt, config *tls.Config) (*JoinConn, error) {
	start := time.Now()
	config = config.Clone()
	config.NextProtos = []string{ALPNJoin}
	if a.transport == TCP {
		c, err := e.dialTLS(ctx, a.address, config)
		if err != nil {
			return nil, err
		}
		jc := newJoinTCP(c)
		jc.Address, jc.RTT = a.address, time.Since(start)/2 // TCP and TLS: two round trips
		return jc, nil
	}
	c, err := e.dialQUIC(ctx, a.address, config, -1)
	if err != nil {
		return nil, err
	}
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		_ = c.CloseWithError(quic.ApplicationErrorCode(closeNormal), "")
		return nil, err
	}
	jc := &JoinConn{Transport: QUIC, Address: a.address, State: c.ConnectionState().TLS, UDPOK: true, rw: s,
		RTT: c.ConnectionStats().SmoothedRTT}
	jc.close = func() { closeJoinQUIC(c, s) }
	jc.TCPOK = answersTCP(ctx, a.address)
	return jc, nil
}

// answersTCP reports whether somebody accepts TCP at an address: the operator is told whether the fallback would work.
func answersTCP(ctx context.Context, address string) bool {
	ctx, cancel := context.WithTimeout(ctx, tcpProbe)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}
