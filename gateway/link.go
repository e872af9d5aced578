// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	reportEvery    = 5 * time.Second
	linkBackoffMin = 100 * time.Millisecond
	linkBackoffMax = 5 * time.Second
	linkStable     = time.Second // a link that lived so long is tried again at once
	linkQueue      = 256
)

var errNoControlPlane = errors.New("no link to the control plane")

// link is the gateway's stream to its control plane: tunnels and catalogs up, offers down, queries and join conversations
// both ways. Without it the gateway goes on with what it has.
type link struct {
	g       *Gateway
	changed chan struct{} // tunnels changed
	queries waiting
	joins   conversations

	mu  sync.Mutex
	cur *linkStream
	up  chan struct{} // closed while cur is set
}

// linkStream is one life of the link.
type linkStream struct {
	ctx  context.Context
	out  chan *controlpb.GatewayMessage
	wake chan struct{} // imports changed, or a mark came

	mu    sync.Mutex
	marks map[spiffeid.TrustDomain]mark     // what the control plane holds of each origin
	sent  map[spiffeid.TrustDomain][32]byte // sum of the head last sent
}

type mark struct{ epoch, seq uint64 }

func newLink(g *Gateway) *link {
	return &link{g: g, changed: make(chan struct{}, 1), up: make(chan struct{})}
}

// run keeps the stream open until ctx ends.
func (l *link) run(ctx context.Context) error {
	backoff := linkBackoffMin
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.joins.closeAll()
	for ctx.Err() == nil {
		began := time.Now()
		err := l.stream(ctx, &wg)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > linkStable {
			backoff = linkBackoffMin
		}
		l.g.log.Debug("link to the control plane ended", "error", errString(err))
		select {
		case <-ctx.Done():
		case <-time.After(backoff/2 + rand.N(backoff)):
		}
		backoff = min(2*backoff, linkBackoffMax)
	}
	return nil
}

// await returns the stream, once there is one.
func (l *link) await(ctx context.Context) *linkStream {
	for {
		l.mu.Lock()
		s, up := l.cur, l.up
		l.mu.Unlock()
		if s != nil {
			return s
		}
		select {
		case <-up:
		case <-ctx.Done():
			return nil
		}
	}
}

func (l *link) stream(ctx context.Context, wg *sync.WaitGroup) error {
	conn := l.g.cfg.Client.Conn()
	if conn == nil {
		<-ctx.Done()
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := controlpb.NewGatewaysClient(conn).Link(ctx, grpc.WaitForReady(true)) // back as soon as the connection is
	if err != nil {
		return err
	}
	g := l.g
	err = stream.Send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Hello{Hello: &controlpb.GatewayHello{
		Name: g.cfg.Name, LocalAddress: g.localAddress(), Advertise: g.cfg.Advertise, Zone: g.cfg.Client.Info().Locality.Zone,
		Version: g.cfg.Version}}})
	if err != nil {
		return err
	}
	s := &linkStream{ctx: ctx, out: make(chan *controlpb.GatewayMessage, linkQueue), wake: make(chan struct{}, 1),
		marks: make(map[spiffeid.TrustDomain]mark), sent: make(map[spiffeid.TrustDomain][32]byte)}
	l.mu.Lock()
	l.cur = s
	close(l.up)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.cur, l.up = nil, make(chan struct{})
		l.mu.Unlock()
		cancel()
		l.joins.closeAll() // the conversations' other half is gone
	}()
	l.tunnelsChanged()
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	parts.Go(func() { l.sendAll(s, stream, cancel) })
	parts.Go(func() { l.report(s) })
	parts.Go(func() { l.pushImports(s) })
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		l.handle(s, m, wg)
	}
}

func (l *link) sendAll(s *linkStream, stream grpc.BidiStreamingClient[controlpb.GatewayMessage, controlpb.ControlMessage], cancel func()) {
	defer cancel()
	for {
		select {
		case <-s.ctx.Done():
			_ = stream.CloseSend()
			return
		case m := <-s.out:
			if err := stream.Send(m); err != nil {
				return
			}
		}
	}
}

// send queues m on the stream that lives now; it waits while the queue is full.
func (l *link) send(ctx context.Context, m *controlpb.GatewayMessage) error {
	l.mu.Lock()
	s := l.cur
	l.mu.Unlock()
	if s == nil {
		return errNoControlPlane
	}
	return s.send(ctx, m)
}

func (s *linkStream) send(ctx context.Context, m *controlpb.GatewayMessage) error {
	select {
	case s.out <- m:
		return nil
	case <-s.ctx.Done():
		return errNoControlPlane
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *link) tunnelsChanged() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// importsChanged wakes the pusher of peers' catalogs.
func (l *link) importsChanged() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cur != nil {
		l.cur.poke()
	}
}

func (s *linkStream) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// report sends the tunnels on change, at most every 50 ms, and every 5 s.
func (l *link) report(s *linkStream) {
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-l.changed:
		case <-t.C:
		}
		if s.send(s.ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Tunnels{Tunnels: l.g.tunnelsReport()}}) != nil {
			return
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// tunnelsReport lists the sessions, and for each peer without one why there is none.
func (g *Gateway) tunnelsReport() *controlpb.TunnelsReport {
	out := &controlpb.TunnelsReport{}
	have := make(map[spiffeid.TrustDomain]bool)
	for _, s := range g.tun.Sessions() {
		have[s.Peer()] = true
		address, dialled := s.Address()
		udp, tcp := s.Probed()
		out.Tunnels = append(out.Tunnels, &controlpb.Tunnel{
			PeerTrustDomain: s.Peer().String(), PeerGateway: s.Gateway(), Transport: s.Transport(), State: s.State().String(),
			RttSeconds: s.RTT().Seconds(), LossRatio: s.Loss(), Streams: uint32(s.Streams()), Address: address,
			SinceMs: s.Since().UnixMilli(), Id: s.ID(), Dialled: dialled, UdpOk: udp, TcpOk: tcp,
		})
	}
	for td, p := range g.view.Load().peers {
		if have[td] {
			continue
		}
		t := &controlpb.Tunnel{PeerTrustDomain: td.String(), State: "connecting", LastError: cut(g.tun.LastError(td), 512)}
		for _, gw := range p.gateways {
			t.PeerGateway = gw.Name
			if len(gw.Addresses) > 0 {
				t.Address = gw.Addresses[0]
				break
			}
		}
		if t.LastError != "" {
			t.State = tunnel.StateDown.String()
		}
		out.Tunnels = append(out.Tunnels, t)
	}
	return out
}

// handle takes one message of the control plane. What may block runs on a goroutine that wg counts.
func (l *link) handle(s *linkStream, m *controlpb.ControlMessage, wg *sync.WaitGroup) {
	switch v := m.Message.(type) {
	case *controlpb.ControlMessage_Offer:
		l.g.takeOffer(v.Offer)
	case *controlpb.ControlMessage_Mark:
		l.takeMark(s, v.Mark)
	case *controlpb.ControlMessage_Query:
		wg.Go(func() { l.ask(s, v.Query) })
	case *controlpb.ControlMessage_Answer:
		l.queries.answer(v.Answer)
	case *controlpb.ControlMessage_JoinDial:
		wg.Go(func() { l.dialJoin(s, v.JoinDial) })
	case *controlpb.ControlMessage_Join:
		l.joins.deliver(v.Join)
	case *controlpb.ControlMessage_Notice:
		l.g.log.Info("notice from the control plane", "notice", v.Notice)
	}
}

func (l *link) takeMark(s *linkStream, m *controlpb.CatalogMark) {
	td, err := spiffeid.ParseTrustDomain(m.OriginTrustDomain)
	if err != nil {
		return
	}
	if m.Resync {
		l.g.imports.Drop(td)
		l.g.resync(td)
	}
	s.mu.Lock()
	s.marks[td] = mark{m.Epoch, m.Seq}
	delete(s.sent, td)
	s.mu.Unlock()
	s.poke()
}

// pushImports sends up what peers' catalogs have beyond the control plane's marks.
func (l *link) pushImports(s *linkStream) {
	for {
		for _, td := range l.g.imports.Keys() {
			u := l.nextImport(s, td)
			if u == nil {
				continue
			}
			err := s.send(s.ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Catalog{Catalog: &controlpb.PeerCatalog{
				OriginTrustDomain: td.String(), Update: u}}})
			if err != nil {
				return
			}
		}
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		}
	}
}

// nextImport is what to send of td's catalog, nil for nothing new. The mark moves on at once: a control plane that refuses
// the update says so by a mark of its own.
func (l *link) nextImport(s *linkStream, td spiffeid.TrustDomain) *controlpb.CatalogUpdate {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.marks[td]
	u := l.g.imports.Update(td, m.epoch, m.seq)
	if u == nil {
		return nil
	}
	sum := headSum(u)
	if s.sent[td] == sum {
		return nil
	}
	if h, err := catalog.ParseHead(u.GetHead().GetHead()); err == nil {
		s.sent[td], s.marks[td] = sum, mark{h.Epoch, h.Seq}
	}
	return u
}

// ask passes a question of our control plane to a gateway of the peer, and the answer back.
func (l *link) ask(s *linkStream, q *controlpb.Query) {
	a := l.g.query(s.ctx, q)
	a.Id = q.Id
	_ = s.send(s.ctx, &controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Answer{Answer: a}})
}

func errString(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// cut is text for the control plane, at most n bytes of s: what others say of themselves is in many errors, and a byte that is
// not UTF-8 would end the link, again and again.
func cut(s string, n int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s[:min(len(s), n)], "?"))
}

func answerError(code problem.Code, what string) *controlpb.Answer {
	return &controlpb.Answer{ErrorCode: string(code), ErrorMessage: cut(what, 512)}
}
