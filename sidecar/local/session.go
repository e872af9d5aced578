// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// wireVersion is of the messages; a gateway that answers another one is not used.
const wireVersion = 1

// maxPeers bounds the list that one gateway may send.
const maxPeers = 4096

// Session is one live local session.
type Session struct {
	gateway Gateway
	id      preface.SessionID
	key     []byte
	conn    *tls.Conn
	set     *Set

	counter  atomic.Uint64
	draining atomic.Bool
	peers    atomic.Pointer[map[spiffeid.TrustDomain]Tunnel]
	rotateIn time.Duration

	kicked  chan struct{} // cap 1: health changed
	markers chan *controlpb.TraceMarker
	rotate  chan struct{}
	replace chan struct{} // cap 1
	stable  chan struct{}
	done    chan struct{}

	endOnce sync.Once
	reason  atomic.Pointer[string]
	remove  func()
}

// Gateway is where the session leads.
func (s *Session) Gateway() Gateway { return s.gateway }

// ID is the session's, for prefaces.
func (s *Session) ID() preface.SessionID { return s.id }

// Key keys the MACs of prefaces.
func (s *Session) Key() []byte { return s.key }

// NextCounter returns a counter never given before.
func (s *Session) NextCounter() uint64 { return s.counter.Add(1) }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Reason says why it ended; empty while it lives.
func (s *Session) Reason() string {
	if r := s.reason.Load(); r != nil {
		return *r
	}
	return ""
}

// Tunnel says what this gateway knows of the way to td.
func (s *Session) Tunnel(td spiffeid.TrustDomain) (t Tunnel, known bool) {
	peers := s.peers.Load()
	if peers == nil {
		return Tunnel{}, false
	}
	t, ok := (*peers)[td]
	return t, ok
}

// Mark queues a trace marker; with a full queue it is dropped (markers are best effort).
func (s *Session) Mark(m *controlpb.TraceMarker) {
	select {
	case s.markers <- m:
	default:
	}
}

func (s *Session) kick() {
	select {
	case s.kicked <- struct{}{}:
	default:
	}
}

// end closes the session once.
func (s *Session) end(reason string) {
	s.endOnce.Do(func() {
		s.reason.Store(&reason)
		s.conn.NetConn().Close() // never blocks behind a peer that does not read
		close(s.done)
	})
}

// open dials g and waits for its welcome.
func (s *Set) open(ctx context.Context, g Gateway) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	raw, err := s.cfg.Dial(ctx, g.Address)
	if err != nil {
		return nil, fmt.Errorf("dial gateway: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn := tls.Client(raw, s.cfg.Source.ClientTLS(trust.TLSOptions{
		Authorize: trust.AuthorizeID(g.ID), ALPN: []string{preface.ALPN}, ServerName: g.Name,
	}))
	session, err := s.greet(ctx, g, conn)
	if err != nil {
		raw.Close()
		if ctx.Err() != nil {
			err = errors.Join(err, ctx.Err())
		}
		return nil, err
	}
	if !stop() {
		raw.Close()
		return nil, ctx.Err()
	}
	return session, nil
}

func (s *Set) greet(ctx context.Context, g Gateway, conn *tls.Conn) (*Session, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("handshake with gateway: %w", err)
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != preface.ALPN {
		return nil, fmt.Errorf("gateway does not speak %s", preface.ALPN)
	}
	hello := s.cfg.Hello()
	hello.WireVersion = wireVersion
	if err := WriteFrame(conn, &controlpb.ToGateway{Message: &controlpb.ToGateway_Hello{Hello: hello}}); err != nil {
		return nil, fmt.Errorf("send hello: %w", err)
	}
	var m controlpb.ToSidecar
	if err := ReadFrame(conn, &m); err != nil {
		return nil, fmt.Errorf("await welcome: %w", err)
	}
	w := m.GetWelcome()
	switch {
	case w == nil:
		return nil, errors.New("await welcome: another message came first")
	case w.GetWireVersion() != wireVersion:
		return nil, fmt.Errorf("gateway speaks wire version %d, not %d", w.GetWireVersion(), wireVersion)
	case len(w.GetSessionId()) != len(preface.SessionID{}):
		return nil, fmt.Errorf("session id of %d bytes", len(w.GetSessionId()))
	}
	key, err := preface.KeyFrom(state)
	if err != nil {
		return nil, err
	}
	peer, err := trust.PeerFromState(state)
	if err != nil {
		return nil, err
	}
	session := &Session{
		gateway: g, id: preface.SessionID(w.GetSessionId()), key: key, conn: conn, set: s,
		kicked: make(chan struct{}, 1), markers: make(chan *controlpb.TraceMarker, 64),
		rotate: make(chan struct{}), replace: make(chan struct{}, 1), stable: make(chan struct{}), done: make(chan struct{}), remove: func() {},
	}
	until := peer.NotAfter
	if own := s.cfg.Source.Identity(); own != nil && own.NotAfter.Before(until) {
		until = own.NotAfter
	}
	session.rotateIn = max(until.Sub(s.cfg.Now())/2, time.Second)
	if s.cfg.Enter != nil {
		session.remove = s.cfg.Enter(withdrawal.Subject{
			Peer: peer.ID.TrustDomain(), Identity: peer.ID, Class: withdrawal.LocalSession, Issued: peer.Issued(), NotAfter: until,
		}, peer, session.end)
	}
	return session, nil
}

// serve runs the session until it ends; it returns after its reader has.
func (s *Set) serve(ctx context.Context, session *Session) {
	defer s.leave(session)
	defer session.remove()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.read(session) })
	defer session.end("stopped")

	ping := time.NewTicker(s.cfg.Ping)
	defer ping.Stop()
	rotate := time.NewTimer(session.rotateIn)
	defer rotate.Stop()
	stable := time.NewTimer(5 * time.Second)
	defer stable.Stop()
	rotated := sync.OnceFunc(func() { close(session.rotate) })
	var id uint64
	session.kick()
	for {
		var m *controlpb.ToGateway
		select {
		case <-ctx.Done():
			return
		case <-session.done:
			return
		case <-stable.C:
			close(session.stable)
			continue
		case <-rotate.C:
			rotated()
			continue
		case <-session.replace:
			rotated()
			continue
		case <-ping.C:
			id++
			m = &controlpb.ToGateway{Message: &controlpb.ToGateway_Ping{Ping: &controlpb.Ping{Id: id}}}
		case <-session.kicked:
			h := s.currentHealth()
			if h == nil {
				continue
			}
			m = &controlpb.ToGateway{Message: &controlpb.ToGateway_Health{Health: h}}
		case mark := <-session.markers:
			m = &controlpb.ToGateway{Message: &controlpb.ToGateway_Marker{Marker: mark}}
		}
		session.conn.SetWriteDeadline(time.Now().Add(s.cfg.Dead))
		if err := WriteFrame(session.conn, m); err != nil {
			session.end("write: " + err.Error())
			return
		}
	}
}

func (s *Set) read(session *Session) {
	for {
		session.conn.SetReadDeadline(time.Now().Add(s.cfg.Dead))
		var m controlpb.ToSidecar
		if err := ReadFrame(session.conn, &m); err != nil {
			session.end("read: " + err.Error())
			return
		}
		switch m := m.Message.(type) {
		case *controlpb.ToSidecar_Peers:
			if !s.takePeers(session, m.Peers) {
				return
			}
		case *controlpb.ToSidecar_Drain:
			s.takeDrain(session, m.Drain)
		case *controlpb.ToSidecar_Withdraw:
			if len(m.Withdraw.GetConnections()) > 0 {
				s.cfg.Notice(Notice{
					Session: session, Connections: m.Withdraw.GetConnections(), Withdrawn: true,
					Reason: m.Withdraw.GetReason(),
				})
			}
		}
	}
}

func (s *Set) takePeers(session *Session, p *controlpb.PeersStatus) bool {
	if len(p.GetPeers()) > maxPeers {
		session.end("too many peers")
		return false
	}
	peers := make(map[spiffeid.TrustDomain]Tunnel, len(p.GetPeers()))
	for _, status := range p.GetPeers() {
		td, err := spiffeid.ParseTrustDomain(status.GetTrustDomain())
		if err != nil {
			continue
		}
		peers[td] = Tunnel{
			Up: status.GetState() == "up", Suspect: status.GetState() == "suspect",
			RTT:  time.Duration(status.GetRttSeconds() * float64(time.Second)),
			Loss: status.GetLossRatio(), Transport: status.GetTransport(),
		}
	}
	session.peers.Store(&peers)
	s.cfg.Changed()
	return true
}

func (s *Set) takeDrain(session *Session, d *controlpb.DrainNotice) {
	n := Notice{Session: session, Connections: d.GetConnections(), Reason: "drain"}
	if ms := d.GetDeadlineMs(); ms > 0 {
		n.Deadline = time.UnixMilli(ms)
	}
	if d.GetTrustDomain() == "" {
		session.draining.Store(true)
		s.cfg.Changed()
	} else {
		td, err := spiffeid.ParseTrustDomain(d.GetTrustDomain())
		if err != nil {
			return
		}
		n.Peer = td
	}
	s.cfg.Notice(n)
}
