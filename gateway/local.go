// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/crowd"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

const (
	maxLocalFrame     = 64 << 10
	maxUnproven       = 1024 // connections from sidecars that have not proven anything yet; the oldest gives way
	maxLocalSessions  = 8192
	sessionsEach      = 64 // of one identity that are never refused for others'; beyond them it gets what the first half of all leaves
	handshakeTimeout  = 5 * time.Second
	peersEvery        = 2 * time.Second
	localWriteTimeout = 5 * time.Second
	localSilence      = 15 * time.Second // sidecars ping every second; what one said last counts no longer
	localWireVersion  = 1
)

// acceptLocal serves 7444: the first byte decides what a connection is.
func (g *Gateway) acceptLocal(ctx context.Context) error {
	config := g.cfg.Client.Source().ServerTLS(trust.TLSOptions{Authorize: g.authorizeLocal, ALPN: []string{preface.ALPN}})
	unproven := crowd.New(maxUnproven, func() { g.metrics.refused("local", "too_many_pending") })
	for {
		c, err := g.local.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			select { // out of descriptors, most likely
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		proven := unproven.Add(c.RemoteAddr(), func() { c.Close() })
		g.wg.Go(func() {
			defer proven()
			g.serveLocal(ctx, c.(*net.TCPConn), config, proven)
		})
	}
}

func (g *Gateway) serveLocal(ctx context.Context, c *net.TCPConn, config *tls.Config, proven func()) {
	defer c.Close()
	done, ok := g.conns.Add(func() { c.Close() })
	if !ok {
		return
	}
	defer done()
	defer g.recovered("connection from a sidecar")
	accepted := time.Now()
	_ = c.SetDeadline(accepted.Add(preface.Timeout))
	first := make([]byte, 4096)
	n, err := c.Read(first)
	if err != nil {
		return
	}
	first = first[:n]
	switch first[0] {
	case preface.Signature[0]:
		g.servePreface(ctx, c, first, proven)
	case 22: // TLS handshake record
		_ = c.SetDeadline(accepted.Add(handshakeTimeout))
		tc := tls.Server(&prefixed{Conn: c, prefix: first}, config)
		if err := tc.HandshakeContext(ctx); err != nil {
			g.log.Debug("local session refused", "address", c.RemoteAddr().String(), "error", err.Error())
			return
		}
		proven()
		_ = c.SetDeadline(time.Now().Add(handshakeTimeout)) // for the hello
		if err := g.serveSession(ctx, tc); err != nil {
			g.log.Debug("local session ended", "address", c.RemoteAddr().String(), "error", err.Error())
		}
	}
}

// authorizeLocal admits workloads of this cluster. Those that are withdrawn have been refused before (judgePeer).
func (g *Gateway) authorizeLocal(id spiffeid.ID) error {
	if _, _, ok := id.Workload(); !ok || id.TrustDomain() != g.td {
		return fmt.Errorf("%s is not a workload of this cluster", id)
	}
	return nil
}

// prefixed gives back bytes that were read ahead.
type prefixed struct {
	net.Conn
	prefix []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

func (p *prefixed) NetConn() net.Conn { return p.Conn }

// localSession is the session of one sidecar.
type localSession struct {
	g        *Gateway
	id       preface.SessionID
	identity spiffeid.ID
	issued   time.Time // its certificate
	proxy    string
	inbound  string
	key      []byte
	window   preface.Window
	conn     *tls.Conn
	out      chan *controlpb.ToSidecar
	dirty    chan struct{} // peers' status changed
	ended    atomic.Bool

	mu    sync.Mutex
	conns map[uint64]*outbound // by preface counter
}

// localSessions are the live ones.
type localSessions struct {
	mu     sync.RWMutex
	byID   map[preface.SessionID]*localSession
	counts map[spiffeid.ID]int // by identity, with those that have not said hello yet
	total  int
}

// enter counts a session that is being made until leave is called. Many sidecars may share one identity, and yet one identity must not
// take all sessions: the second half of them is for those that hold few.
func (l *localSessions) enter(id spiffeid.ID) (leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.total >= maxLocalSessions:
		return nil, errors.New("too many local sessions")
	case l.counts[id] >= sessionsEach && l.total >= maxLocalSessions/2:
		return nil, fmt.Errorf("too many local sessions of %s", id)
	}
	if l.counts == nil {
		l.counts = make(map[spiffeid.ID]int)
	}
	l.counts[id]++
	l.total++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.total--
		if l.counts[id]--; l.counts[id] == 0 {
			delete(l.counts, id)
		}
	}, nil
}

func (l *localSessions) add(s *localSession) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID == nil {
		l.byID = make(map[preface.SessionID]*localSession)
	}
	l.byID[s.id] = s
}

func (l *localSessions) remove(s *localSession) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.byID, s.id)
}

func (l *localSessions) get(id preface.SessionID) *localSession {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.byID[id]
}

func (l *localSessions) key(id preface.SessionID) ([]byte, bool) {
	if s := l.get(id); s != nil {
		return s.key, true
	}
	return nil, false
}

func (l *localSessions) each(f func(*localSession)) {
	l.mu.RLock()
	all := make([]*localSession, 0, len(l.byID))
	for _, s := range l.byID {
		all = append(all, s)
	}
	l.mu.RUnlock()
	for _, s := range all {
		f(s)
	}
}

// serveSession runs one local session until it ends.
func (g *Gateway) serveSession(ctx context.Context, tc *tls.Conn) error {
	if tc.ConnectionState().NegotiatedProtocol != preface.ALPN {
		return errors.New("no local session protocol negotiated")
	}
	peer, err := trust.PeerFromState(tc.ConnectionState())
	if err != nil {
		return err
	}
	leave, err := g.locals.enter(peer.ID)
	if err != nil {
		g.metrics.refused("local", "too_many_sessions")
		return err
	}
	defer leave()
	key, err := preface.KeyFrom(tc.ConnectionState())
	if err != nil {
		return err
	}
	s := &localSession{g: g, identity: peer.ID, issued: peer.Issued(), key: key, conn: tc, out: make(chan *controlpb.ToSidecar, 64),
		dirty: make(chan struct{}, 1), conns: make(map[uint64]*outbound)}
	_, _ = rand.Read(s.id[:])
	hello, err := s.readHello()
	if err != nil {
		return err
	}
	s.proxy, s.inbound = hello.Proxy, hello.InboundAddress
	// In the registry before the view is asked: a withdrawal in between is seen by one of the two.
	until := peer.NotAfter
	if own := g.cfg.Client.Source().Identity(); own != nil && own.NotAfter.Before(until) {
		until = own.NotAfter // neither end outlives what it has proven
	}
	remove := g.registry.Add(withdrawal.Subject{Peer: g.td, Identity: s.identity, Issued: s.issued, Class: classLocal, NotAfter: until},
		func(string) { tc.NetConn().Close() })
	defer remove()
	if reason, withdrawn := g.judgePeer(peer); withdrawn {
		return fmt.Errorf("%s is withdrawn: %s", s.identity, reason)
	}
	_ = tc.SetDeadline(time.Time{})
	s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Welcome{Welcome: &controlpb.LocalWelcome{
		WireVersion: localWireVersion, SessionId: s.id[:], Gateway: g.cfg.Name}}})
	s.peersChanged()
	g.locals.add(s)
	defer g.locals.remove(s)
	defer g.health.forget(s)
	if g.draining.Load() {
		s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{DeadlineMs: g.deadline.Load()}}})
	}
	wctx, stop := context.WithCancel(ctx)
	written := make(chan struct{})
	g.wg.Go(func() { s.write(wctx, written) })
	err = s.read()
	stop()
	tc.NetConn().Close()
	<-written
	return err
}

func (s *localSession) readHello() (*controlpb.LocalHello, error) {
	var m controlpb.ToGateway
	if err := s.readMessage(&m); err != nil {
		return nil, err
	}
	h := m.GetHello()
	if h == nil || h.WireVersion != localWireVersion {
		return nil, fmt.Errorf("local session hello: version %d", h.GetWireVersion())
	}
	return h, nil
}

func (s *localSession) readMessage(m *controlpb.ToGateway) error {
	b, err := tunnel.ReadFrame(s.conn, maxLocalFrame)
	if err != nil {
		return err
	}
	return proto.Unmarshal(b, m)
}

func (s *localSession) read() error {
	for {
		_ = s.conn.SetReadDeadline(time.Now().Add(localSilence))
		var m controlpb.ToGateway
		if err := s.readMessage(&m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		switch v := m.Message.(type) {
		case *controlpb.ToGateway_Health:
			s.g.health.set(s, v.Health)
		case *controlpb.ToGateway_Marker:
			s.g.localMarker(s, v.Marker)
		case *controlpb.ToGateway_Ping:
			s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Pong{Pong: v.Ping}})
		}
	}
}

// send queues a message. A sidecar that does not read them loses its session, and comes back to a fresh one.
func (s *localSession) send(m *controlpb.ToSidecar) {
	select {
	case s.out <- m:
	default:
		if s.ended.CompareAndSwap(false, true) {
			s.conn.NetConn().Close()
		}
	}
}

// peersChanged has the peers' status sent; bursts become one message.
func (s *localSession) peersChanged() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

func (s *localSession) write(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	defer s.conn.NetConn().Close()
	t := time.NewTicker(peersEvery)
	defer t.Stop()
	for {
		var m *controlpb.ToSidecar
		select { // what was queued first goes first: the welcome before the peers
		case m = <-s.out:
		default:
			select {
			case <-ctx.Done():
				return
			case m = <-s.out:
			case <-s.dirty:
				m = s.g.peersStatus()
			case <-t.C:
				m = s.g.peersStatus()
			}
		}
		b, err := proto.Marshal(m)
		if err != nil || len(b) > maxLocalFrame {
			continue
		}
		_ = s.conn.SetWriteDeadline(time.Now().Add(localWriteTimeout))
		if err := tunnel.WriteFrame(s.conn, b); err != nil {
			return
		}
	}
}

// peersStatus is the state of each peer as the best tunnel to it has it.
func (g *Gateway) peersStatus() *controlpb.ToSidecar {
	best := make(map[spiffeid.TrustDomain]*controlpb.PeerStatus)
	v := g.view.Load()
	for td, p := range v.peers {
		if p.ready {
			best[td] = &controlpb.PeerStatus{TrustDomain: td.String(), State: tunnel.StateDown.String()}
		}
	}
	for td, st := range best {
		if s := g.tun.Pick(td); s != nil {
			st.State, st.RttSeconds, st.LossRatio, st.Transport = s.State().String(), s.RTT().Seconds(), s.Loss(), s.Transport()
		}
	}
	out := &controlpb.PeersStatus{}
	for _, st := range best {
		out.Peers = append(out.Peers, st)
	}
	slices.SortFunc(out.Peers, func(a, b *controlpb.PeerStatus) int {
		switch {
		case a.TrustDomain < b.TrustDomain:
			return -1
		case a.TrustDomain > b.TrustDomain:
			return 1
		}
		return 0
	})
	return &controlpb.ToSidecar{Message: &controlpb.ToSidecar_Peers{Peers: out}}
}

func (s *localSession) enter(counter uint64, o *outbound) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[counter] = o
}

func (s *localSession) leave(counter uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, counter)
}

func (s *localSession) connection(counter uint64) *outbound {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns[counter]
}

// connectionsOn lists the counters of the connections that run through t.
func (s *localSession) connectionsOn(t *tunnel.Session) []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []uint64
	for c, o := range s.conns {
		if o.stream.Session == t {
			out = append(out, c)
		}
	}
	slices.Sort(out)
	return out
}

// recovered keeps a panic in one connection from ending the process.
func (g *Gateway) recovered(where string) {
	if r := recover(); r != nil {
		g.log.Error("panic", "where", where, "error", fmt.Sprint(r))
	}
}
