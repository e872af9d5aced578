// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of one link.
const (
	sendQueue     = 256 // messages; whoever sends more waits
	catalogQueue  = 16  // updates to be judged; then reading stops
	maxQueries    = 64  // of peers, being answered
	maxInbound    = 16  // join conversations that peers opened
	helloDeadline = 10 * time.Second
)

var errLinkEnded = errors.New("the gateway's link ended")

type stream = grpc.BidiStreamingServer[controlpb.GatewayMessage, controlpb.ControlMessage]

// link is the stream of one own gateway. Link's goroutine owns it; read, write, feed and judge are its other goroutines, and what
// they start. All but read end before Link returns; read ends when gRPC ends the stream, which it does then.
type link struct {
	m      *Manager
	name   string
	stream stream
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	send     chan *controlpb.ControlMessage
	catalogs chan *controlpb.PeerCatalog
	wake     chan struct{} // something for feed
	queries  chan struct{} // slots

	mu      sync.Mutex
	closed  bool
	lastID  uint64
	pending map[uint64]chan *controlpb.Answer
	convs   map[convKey]*conv
}

type convKey struct {
	id      uint64
	inbound bool
}

// Link serves one own gateway until its stream, or the Manager, ends. A newer link of the same gateway ends the older one.
func (m *Manager) Link(s stream) error {
	id, ok := m.cfg.PeerID(s.Context())
	name, isGateway := id.Gateway()
	if !ok || !isGateway || id.TrustDomain() != m.cfg.TrustDomain {
		return status.Error(codes.PermissionDenied, "only gateways of this cluster may open a link")
	}
	ctx, cancel := context.WithCancelCause(s.Context())
	defer cancel(nil)
	stop := context.AfterFunc(m.ctx, func() { cancel(errLinkEnded) })
	defer stop()
	l := &link{
		m: m, name: name, stream: s, ctx: ctx, cancel: cancel,
		send: make(chan *controlpb.ControlMessage, sendQueue), catalogs: make(chan *controlpb.PeerCatalog, catalogQueue),
		wake: make(chan struct{}, 1), queries: make(chan struct{}, maxQueries),
		pending: map[uint64]chan *controlpb.Answer{}, convs: map[convKey]*conv{},
	}
	first, err := l.hello()
	if err != nil {
		return err
	}
	if !m.linkUp(l, first) {
		return status.Error(codes.Unavailable, "the control plane is stopping")
	}
	m.log.Info("gateway linked", "gateway", name, "version", first.GetVersion())
	l.start(l.write)
	l.start(l.feed)
	l.start(l.judge)
	l.signal()
	go l.read() // ends with the stream, at the latest when this method returns
	<-ctx.Done()
	l.end()
	m.linkDown(l)
	l.wg.Wait()
	m.log.Info("gateway's link ended", "gateway", name, "cause", context.Cause(ctx))
	if m.ctx.Err() != nil {
		return status.Error(codes.Unavailable, "the control plane is stopping")
	}
	return status.FromContextError(s.Context().Err()).Err()
}

func (l *link) hello() (*controlpb.GatewayHello, error) {
	type result struct {
		msg *controlpb.GatewayMessage
		err error
	}
	got := make(chan result, 1)
	go func() { // ends with the stream
		msg, err := l.stream.Recv()
		got <- result{msg, err}
	}()
	timer := time.NewTimer(helloDeadline)
	defer timer.Stop()
	select {
	case r := <-got:
		if r.err != nil {
			return nil, r.err
		}
		h := r.msg.GetHello()
		if h == nil || h.GetName() != l.name {
			return nil, status.Error(codes.InvalidArgument, "the first message of a link is the hello of the gateway that the certificate names")
		}
		return h, nil
	case <-timer.C:
		return nil, status.Error(codes.DeadlineExceeded, "no hello")
	case <-l.ctx.Done():
		return nil, status.FromContextError(l.ctx.Err()).Err()
	}
}

func (m *Manager) linkUp(l *link, h *controlpb.GatewayHello) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped || m.ctx.Err() != nil {
		return false
	}
	if old := m.links[l.name]; old != nil {
		old.cancel(errors.New("a newer link of the same gateway took its place"))
	}
	m.links[l.name] = l
	g := &gateway{hello: h, connected: true}
	if old := m.gateways[l.name]; old != nil {
		g.tunnels = old.tunnels // until the first report, a moment from now
	}
	m.gateways[l.name] = g
	m.writeGatewaysLocked()
	m.changedLocked()
	return true
}

func (m *Manager) linkDown(l *link) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.links[l.name] != l {
		return
	}
	delete(m.links, l.name)
	if g := m.gateways[l.name]; g != nil {
		c := *g
		c.connected, c.lastSeen, c.tunnels = false, m.now(), nil
		m.gateways[l.name] = &c
	}
	m.changedLocked()
}

// linkLocked returns the link of a gateway, or any for "".
func (m *Manager) linkLocked(name string) *link {
	if name != "" {
		return m.links[name]
	}
	for _, n := range sortedKeys(m.links) {
		return m.links[n]
	}
	return nil
}

func (m *Manager) allLinks() []*link {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*link, 0, len(m.links))
	for _, n := range sortedKeys(m.links) {
		out = append(out, m.links[n])
	}
	return out
}

func (m *Manager) wakeLinksLocked() {
	for _, l := range m.links {
		l.signal()
	}
}

func (l *link) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// start runs f as one of the link's goroutines, unless the link has ended.
func (l *link) start(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.wg.Add(1)
	go l.run(f)
}

func (l *link) run(f func()) {
	defer l.wg.Done()
	f()
}

// end refuses new work and ends what waits for the gateway.
func (l *link) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for key, c := range l.convs {
		c.finish(errLinkEnded)
		delete(l.convs, key)
	}
}

// put queues a message; it waits while the queue is full.
func (l *link) put(ctx context.Context, msg *controlpb.ControlMessage) error {
	select {
	case l.send <- msg:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-l.ctx.Done():
		return errLinkEnded
	}
}

func (l *link) write() {
	for {
		select {
		case msg := <-l.send:
			if err := l.stream.Send(msg); err != nil {
				l.cancel(err)
				return
			}
		case <-l.ctx.Done():
			return
		}
	}
}

func (l *link) read() {
	for {
		msg, err := l.stream.Recv()
		if err != nil {
			l.cancel(err)
			return
		}
		switch {
		case msg.GetTunnels() != nil:
			l.m.setTunnels(l, msg.GetTunnels().GetTunnels())
		case msg.GetCatalog() != nil:
			select {
			case l.catalogs <- msg.GetCatalog():
			case <-l.ctx.Done():
				return
			}
		case msg.GetQuery() != nil:
			l.question(msg.GetQuery())
		case msg.GetAnswer() != nil:
			l.answered(msg.GetAnswer())
		case msg.GetJoin() != nil:
			l.frame(msg.GetJoin())
		}
	}
}

// setTunnels takes a gateway's report. Small changes of measured values are kept back until the next real one.
func (m *Manager) setTunnels(l *link, tunnels []*controlpb.Tunnel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := m.gateways[l.name]
	if m.links[l.name] != l || g == nil || len(tunnels) > 4096 || sameTunnels(g.tunnels, tunnels) {
		return
	}
	c := *g
	c.tunnels = tunnels
	m.gateways[l.name] = &c
	m.changedLocked()
}

func sameTunnels(a, b []*controlpb.Tunnel) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		if x.GetPeerTrustDomain() != y.GetPeerTrustDomain() || x.GetPeerGateway() != y.GetPeerGateway() || x.GetTransport() != y.GetTransport() ||
			x.GetState() != y.GetState() || x.GetAddress() != y.GetAddress() || x.GetId() != y.GetId() || x.GetLastError() != y.GetLastError() ||
			math.Abs(x.GetRttSeconds()-y.GetRttSeconds()) > max(0.002, 0.1*x.GetRttSeconds()) ||
			math.Abs(x.GetLossRatio()-y.GetLossRatio()) > 0.005 {
			return false
		}
	}
	return true
}

func parseTD(s string) (spiffeid.TrustDomain, bool) {
	td, err := spiffeid.ParseTrustDomain(s)
	return td, err == nil
}
