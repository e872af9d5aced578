// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/crowd"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// The protocols of 7400.
const (
	alpnGRPC     = "h2"
	alpnRegister = "strait-register/1"
)

// Class is the class of the listener's connections in the withdrawal registry.
const Class withdrawal.Class = "control"

// ListenerConfig says whom a Listener lets in.
type ListenerConfig struct {
	Source      *trust.Source        // identity and bundles; required
	TrustDomain spiffeid.TrustDomain // whose identities are accepted; required
	// Denied says whether a certificate of an identity, issued at that time, was withdrawn. nil: none.
	Denied func(id spiffeid.ID, issued time.Time) (reason string, denied bool)
	// Register serves one registration and returns; the connection is closed afterwards. nil: registration is refused.
	Register func(context.Context, *tls.Conn)
	// Renew serves one renewal of an identity that has ended at most RenewGrace ago, and returns. nil: that is refused.
	Renew      func(context.Context, *tls.Conn)
	RenewGrace time.Duration
	// Withdrawals is where connections stand so that they end with their certificate and with their peer's denial. nil: nowhere.
	Withdrawals *withdrawal.Registry
	// HandshakeTimeout is how long a connection may take to say who it is (5 s).
	HandshakeTimeout time.Duration
	// MaxPending bounds connections that have not said who they are, registrations included (256); the oldest gives way to a
	// new one. Raising it costs about 20 KiB each.
	MaxPending int
	// Refused hears the reason, one word, of each connection that was turned away. nil: nobody does.
	Refused func(reason string)
	Logger  *slog.Logger
}

// Listener accepts verified connections for gRPC and serves registrations on the side.
type Listener struct {
	cfg   ListenerConfig
	log   *slog.Logger
	inner net.Listener
	tls   *tls.Config
	ready chan *verifiedConn
	crowd *crowd.Crowd // has not said who it is

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
}

// Open begins to accept on inner, which the Listener owns from now on.
func Open(inner net.Listener, cfg ListenerConfig) (*Listener, error) {
	if cfg.Source == nil || cfg.TrustDomain.IsZero() {
		return nil, errors.New("identity: Source and TrustDomain are required")
	}
	if cfg.HandshakeTimeout <= 0 {
		cfg.HandshakeTimeout = trust.HandshakeTimeout
	}
	if cfg.MaxPending <= 0 {
		cfg.MaxPending = 256
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Refused == nil {
		cfg.Refused = func(string) {}
	}
	l := &Listener{cfg: cfg, log: cfg.Logger, inner: inner, ready: make(chan *verifiedConn)}
	l.crowd = crowd.New(cfg.MaxPending, func() { l.cfg.Refused("too_many_pending") })
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.tls = l.tlsConfig()
	l.wg.Go(l.acceptLoop)
	return l, nil
}

// Accept returns the next verified connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr is where it listens.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Close stops accepting, ends pending handshakes and registrations, and waits for them. Accepted connections are the
// caller's. It is idempotent.
func (l *Listener) Close() error {
	var err error
	l.once.Do(func() {
		l.cancel()
		err = l.inner.Close()
		l.crowd.Close()
	})
	l.wg.Wait()
	return err
}

func (l *Listener) acceptLoop() {
	wait := 5 * time.Millisecond
	for {
		c, err := l.inner.Accept()
		switch {
		case err == nil:
			wait = 5 * time.Millisecond
			done := l.crowd.Add(c.RemoteAddr(), func() { _ = c.Close() })
			l.wg.Go(func() { l.handshake(c, done) })
		case l.ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		default: // out of descriptors, mostly: what is pending will free some
			l.log.Error("accept failed", "err", err)
			select {
			case <-time.After(wait):
			case <-l.ctx.Done():
				return
			}
			wait = min(2*wait, time.Second)
		}
	}
}

func (l *Listener) tlsConfig() *tls.Config {
	mutual := l.cfg.Source.ServerTLS(trust.TLSOptions{Authorize: l.authorize, ALPN: []string{alpnGRPC}})
	register := l.cfg.Source.ServerTLS(trust.TLSOptions{ServerOnly: true, SendRoots: true, ALPN: []string{alpnRegister}})
	renew := l.cfg.Source.RenewServerTLS(authorizeExpired(l.cfg.TrustDomain), l.cfg.RenewGrace)
	c := mutual.Clone()
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		switch {
		case slices.Contains(h.SupportedProtos, alpnGRPC):
			return mutual, nil
		case slices.Contains(h.SupportedProtos, alpnRegister) && l.cfg.Register != nil:
			return register, nil
		case slices.Contains(h.SupportedProtos, trust.ALPNRenew) && l.cfg.Renew != nil && l.cfg.RenewGrace > 0:
			return renew, nil
		}
		return nil, errors.New("no protocol of this port is offered")
	}
	return c
}

// authorize judges a verified identity inside the handshake.
func (l *Listener) authorize(id spiffeid.ID) error {
	if err := trust.AuthorizeTrustDomain(l.cfg.TrustDomain)(id); err != nil {
		return err
	}
	if KindOf(id) == 0 {
		return errors.New("neither workload, gateway, operator nor control plane")
	}
	return l.withdrawn(id, time.Time{}) // its certificate is judged after the handshake, before anything is read
}

func (l *Listener) withdrawn(id spiffeid.ID, issued time.Time) error {
	if l.cfg.Denied != nil {
		if reason, denied := l.cfg.Denied(id, issued); denied {
			return errors.New("withdrawn: " + reason)
		}
	}
	return nil
}

func (l *Listener) handshake(raw net.Conn, done func()) {
	defer done()
	c := tls.Server(raw, l.tls)
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		reason := refusal(ctx, err)
		l.cfg.Refused(reason)
		l.log.Debug("handshake refused", "remote", raw.RemoteAddr(), "reason", reason, "err", err)
		return
	}
	if serve := l.exchange(c.ConnectionState().NegotiatedProtocol); serve != nil {
		_ = raw.SetDeadline(time.Now().Add(l.cfg.HandshakeTimeout))
		serve(ctx, c)
		_ = c.Close()
		return
	}
	peer, err := trust.PeerFromState(c.ConnectionState())
	if err != nil {
		_ = raw.Close()
		l.cfg.Refused("no_certificate")
		return
	}
	v := &verifiedConn{Conn: c, peer: *peer}
	if l.cfg.Withdrawals != nil {
		v.remove = l.cfg.Withdrawals.Add(withdrawal.Subject{Peer: peer.ID.TrustDomain(), Identity: peer.ID, Class: Class, Issued: peer.Issued(),
			NotAfter: peer.NotAfter},
			func(reason string) {
				l.log.Info("connection withdrawn", "peer", peer.ID, "reason", reason)
				_ = raw.Close() // at once: a TLS close would wait for a peer that does not read
			})
	}
	if err := l.withdrawn(peer.ID, peer.Issued()); err != nil { // also between the handshake and the registry
		_ = v.Close()
		l.cfg.Refused("not_authorized")
		return
	}
	select {
	case l.ready <- v:
	case <-ctx.Done():
		_ = v.Close()
	}
}

// exchange is what serves the connections of a protocol of one exchange; nil for every other protocol.
func (l *Listener) exchange(protocol string) func(context.Context, *tls.Conn) {
	switch protocol {
	case alpnRegister:
		return l.cfg.Register
	case trust.ALPNRenew:
		return l.cfg.Renew
	}
	return nil
}

// refusal names the reason of a failed handshake in one word.
func refusal(ctx context.Context, err error) string {
	var v *trust.VerifyError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &v):
		return v.Reason
	case ctx.Err() != nil:
		return "timeout"
	case errors.As(err, &header):
		return "not_tls"
	}
	return "handshake"
}

// verifiedConn is a connection whose handshake has succeeded.
type verifiedConn struct {
	*tls.Conn
	peer   trust.Peer
	remove func()
	once   sync.Once
}

// Close ends the connection and its entry in the withdrawal registry.
func (c *verifiedConn) Close() error {
	c.once.Do(func() {
		if c.remove != nil {
			c.remove()
		}
	})
	return c.Conn.Close()
}
