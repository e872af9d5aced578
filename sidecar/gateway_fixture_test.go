// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// fakeGateway stands for both gateways and the tunnel between them: it speaks local sessions and prefaces as a sidecar's
// own gateway does, and leads each inner connection to one of the far instances, avoiding the handles it is told to.
type fakeGateway struct {
	t    testing.TB
	name string
	id   spiffeid.ID
	l    net.Listener
	tls  *tls.Config
	wg   sync.WaitGroup
	ctx  context.Context
	stop context.CancelFunc

	mu       sync.Mutex
	far      []farInstance
	refuse   preface.Status // when its Code is set
	state    string         // of the tunnel
	sessions map[preface.SessionID]*fakeSession
	conns    map[net.Conn]bool
	health   []*controlpb.ServiceHealth
	markers  []*controlpb.TraceMarker
	opened   int
	turn     int
	ids      byte
	peer     string
}

type farInstance struct {
	handle preface.Handle
	addr   string
}

type fakeSession struct {
	key  []byte
	conn *tls.Conn
	wmu  sync.Mutex
	seen preface.Window
}

func newGateway(t testing.TB, c *testCluster, name string, peer *testCluster, far ...farInstance) *fakeGateway {
	id, err := spiffeid.Gateway(c.td, name)
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	g := &fakeGateway{
		t: t, name: name, id: id, l: l, far: far, state: "up", peer: peer.td.String(),
		sessions: map[preface.SessionID]*fakeSession{}, conns: map[net.Conn]bool{},
		tls: c.source(id).ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeTrustDomain(c.td), ALPN: []string{preface.ALPN}}),
	}
	g.ctx, g.stop = context.WithCancel(context.Background())
	g.wg.Go(g.accept)
	t.Cleanup(g.kill)
	return g
}

func (g *fakeGateway) resource() *controlpb.Gateway {
	return &controlpb.Gateway{Name: g.name, LocalAddress: g.l.Addr().String(), SpiffeId: g.id.String()}
}

func (g *fakeGateway) kill() {
	g.stop()
	g.l.Close()
	g.mu.Lock()
	for c := range g.conns {
		relay.Abort(c)
	}
	g.mu.Unlock()
	g.wg.Wait()
}

func (g *fakeGateway) accept() {
	for {
		c, err := g.l.Accept()
		if err != nil {
			return
		}
		g.mu.Lock()
		g.conns[c] = true
		g.mu.Unlock()
		g.wg.Go(func() {
			g.serve(c)
			c.Close()
			g.mu.Lock()
			delete(g.conns, c)
			g.mu.Unlock()
		})
	}
}

func (g *fakeGateway) serve(c net.Conn) {
	r := bufio.NewReader(c)
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	if first[0] == 0x16 {
		g.session(tls.Server(&peekedConn{Conn: c, r: r}, g.tls))
		return
	}
	g.inner(c, r)
}

type peekedConn struct {
	net.Conn
	r io.Reader
}

func (c *peekedConn) Read(b []byte) (int, error) { return c.r.Read(b) }

func (g *fakeGateway) session(c *tls.Conn) {
	if c.Handshake() != nil {
		return
	}
	key, err := preface.KeyFrom(c.ConnectionState())
	if err != nil {
		return
	}
	var m controlpb.ToGateway
	if local.ReadFrame(c, &m) != nil || m.GetHello().GetWireVersion() != 1 {
		return
	}
	s := &fakeSession{key: key, conn: c}
	g.mu.Lock()
	g.ids++
	id := preface.SessionID{g.ids, 0xaa}
	g.sessions[id] = s
	g.mu.Unlock()
	s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Welcome{Welcome: &controlpb.LocalWelcome{
		WireVersion: 1, SessionId: id[:], Gateway: g.name,
	}}})
	g.tell(s)
	for {
		var m controlpb.ToGateway
		if local.ReadFrame(c, &m) != nil {
			break
		}
		switch m := m.Message.(type) {
		case *controlpb.ToGateway_Ping:
			s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Pong{Pong: m.Ping}})
		case *controlpb.ToGateway_Health:
			g.mu.Lock()
			g.health = m.Health.GetServices()
			g.mu.Unlock()
		case *controlpb.ToGateway_Marker:
			g.mu.Lock()
			g.markers = append(g.markers, m.Marker)
			g.mu.Unlock()
		}
	}
	g.mu.Lock()
	delete(g.sessions, id)
	g.mu.Unlock()
}

func (s *fakeSession) send(m *controlpb.ToSidecar) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	_ = local.WriteFrame(s.conn, m) // an end is seen by the reader
}

func (g *fakeGateway) tell(s *fakeSession) {
	g.mu.Lock()
	state := g.state
	g.mu.Unlock()
	s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Peers{Peers: &controlpb.PeersStatus{
		Peers: []*controlpb.PeerStatus{{TrustDomain: g.peer, State: state, RttSeconds: 0.08, Transport: "quic"}},
	}}})
}

// tunnel sets the state of the tunnel and tells everybody.
func (g *fakeGateway) tunnel(state string) {
	g.mu.Lock()
	g.state = state
	g.mu.Unlock()
	for _, s := range g.all() {
		g.tell(s)
	}
}

func (g *fakeGateway) all() []*fakeSession {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*fakeSession
	for _, s := range g.sessions {
		all = append(all, s)
	}
	return all
}

func (g *fakeGateway) notify(m *controlpb.ToSidecar) {
	for _, s := range g.all() {
		s.send(m)
	}
}

func (g *fakeGateway) set(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

func (g *fakeGateway) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.opened
}

// inner judges a preface and leads the connection on.
func (g *fakeGateway) inner(c net.Conn, r *bufio.Reader) {
	c.SetReadDeadline(time.Now().Add(preface.Timeout))
	var session *fakeSession
	p, hello, err := preface.Read(r, nil, func(id preface.SessionID) ([]byte, bool) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if session = g.sessions[id]; session == nil {
			return nil, false
		}
		return session.key, true
	})
	c.SetReadDeadline(time.Time{})
	if err != nil {
		if g.ctx.Err() == nil && session != nil {
			g.t.Errorf("preface: %v", err)
		}
		return
	}
	if !session.seen.Accept(p.Counter) {
		g.t.Errorf("counter %d came twice", p.Counter)
		return
	}
	g.mu.Lock()
	g.opened++
	st := g.refuse
	var to farInstance
	found := false
	for range g.far {
		g.turn++
		if to = g.far[g.turn%len(g.far)]; !slices.Contains(p.Avoid, to.handle) {
			found = true
			break
		}
	}
	if !found && st.Code == preface.CodeOK {
		st = preface.Status{Code: preface.CodeNoHealthyInstance, Reason: "all_avoided"}
	}
	g.mu.Unlock()
	if st.Code != preface.CodeOK {
		c.Write(preface.AppendStatus(nil, st))
		return
	}
	up, err := net.Dial("tcp", to.addr)
	if err != nil {
		c.Write(preface.AppendStatus(nil, preface.Status{Code: preface.CodeInternal, Reason: "instance not reached", Handle: to.handle}))
		return
	}
	c.Write(preface.AppendStatus(nil, preface.Status{Handle: to.handle}))
	up.Write(hello.Raw)
	g.mu.Lock()
	g.conns[up] = true
	g.mu.Unlock()
	relay.Pair(relay.Wrap(&bufferedConn{TCPConn: c.(*net.TCPConn), r: r}), relay.Wrap(up), nil)
	g.mu.Lock()
	delete(g.conns, up)
	g.mu.Unlock()
}

// bufferedConn reads what bufio took first.
type bufferedConn struct {
	*net.TCPConn
	r *bufio.Reader
}

func (c *bufferedConn) Read(b []byte) (int, error) { return c.r.Read(b) }

// NetConn lets a reset reach the socket.
func (c *bufferedConn) NetConn() net.Conn { return c.TCPConn }
