// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// fakeGateway is one cluster's gateway.
type fakeGateway struct {
	c     *cluster
	m     *federate.Manager
	name  spiffeid.ID
	id    func() *trust.Identity
	lis   *bufconn.Listener
	cache *catalog.Cache
	wg    sync.WaitGroup

	mu     sync.Mutex
	stream grpc.BidiStreamingClient[controlpb.GatewayMessage, controlpb.ControlMessage]
	nextID uint64
	convs  map[string]*fakeConv // "id inbound"
	asked  map[uint64]chan *controlpb.Answer
	marks  map[string][2]uint64
	report string
}

// fakeConv is one end of a conversation.
type fakeConv struct {
	id      uint64
	inbound bool
	far     *fakeGateway
	farConv *fakeConv
}

func newFakeGateway(c *cluster, m *federate.Manager, name spiffeid.ID, id func() *trust.Identity, lis *bufconn.Listener) *fakeGateway {
	return &fakeGateway{
		c: c, m: m, name: name, id: id, lis: lis, cache: catalog.NewCache(0, 0), convs: map[string]*fakeConv{},
		asked: map[uint64]chan *controlpb.Answer{}, marks: map[string][2]uint64{},
	}
}

// link keeps a stream to the control plane until ctx ends.
func (g *fakeGateway) link(ctx context.Context) {
	cc, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return g.lis.DialContext(ctx) }))
	if err != nil {
		g.c.w.t.Error(err)
		return
	}
	defer cc.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "test-id", g.name.String())
	s, err := controlpb.NewGatewaysClient(cc).Link(ctx)
	if err != nil {
		return
	}
	hello := &controlpb.GatewayHello{Name: "gateway-1", LocalAddress: "127.0.0.1:7444", Advertise: []string{g.c.name + ".example:7443"}, Version: "v0.1.0"}
	if s.Send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Hello{Hello: hello}}) != nil {
		return
	}
	g.mu.Lock()
	g.stream = s
	g.mu.Unlock()
	g.c.w.sync()
	for {
		msg, err := s.Recv()
		if err != nil {
			g.ended()
			return
		}
		g.handle(msg)
	}
}

// ended closes the far ends of conversations, as a gateway does when its control plane goes away.
func (g *fakeGateway) ended() {
	g.mu.Lock()
	g.stream = nil
	convs := g.convs
	g.convs = map[string]*fakeConv{}
	g.mu.Unlock()
	for _, c := range convs {
		if c.farConv != nil {
			c.far.up(&controlpb.JoinFrame{Id: c.farConv.id, Inbound: c.farConv.inbound, Close: true})
		}
	}
	g.c.w.sync()
}

func (g *fakeGateway) send(m *controlpb.GatewayMessage) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stream != nil {
		_ = g.stream.Send(m)
	}
}

func (g *fakeGateway) up(f *controlpb.JoinFrame) {
	g.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Join{Join: f}})
}

func (g *fakeGateway) handle(msg *controlpb.ControlMessage) {
	switch v := msg.GetMessage().(type) {
	case *controlpb.ControlMessage_JoinDial:
		g.dial(v.JoinDial)
	case *controlpb.ControlMessage_Join:
		g.relay(v.Join)
	case *controlpb.ControlMessage_Query:
		g.wg.Go(func() { g.query(v.Query) })
	case *controlpb.ControlMessage_Answer:
		g.mu.Lock()
		ch := g.asked[v.Answer.GetId()]
		delete(g.asked, v.Answer.GetId())
		g.mu.Unlock()
		if ch != nil {
			ch <- v.Answer
		}
	case *controlpb.ControlMessage_Offer:
		td, _ := spiffeid.ParseTrustDomain(v.Offer.GetConsumerTrustDomain())
		if v.Offer.GetWithdrawn() {
			g.cache.Drop(td)
			return
		}
		if _, err := g.cache.Apply(td, v.Offer.GetUpdate()); err != nil {
			g.c.w.t.Errorf("%s: offer for %s: %v", g.c.name, td, err)
		}
		g.c.w.deliver(g.c.name)
	case *controlpb.ControlMessage_Mark:
		at := [2]uint64{v.Mark.GetEpoch(), v.Mark.GetSeq()}
		if v.Mark.GetResync() {
			at = [2]uint64{}
		}
		g.mu.Lock()
		g.marks[v.Mark.GetOriginTrustDomain()] = at
		g.mu.Unlock()
		g.c.w.deliverTo(g.c.name)
	}
}

func convName(id uint64, inbound bool) string { return fmt.Sprint(id, inbound) }

func (g *fakeGateway) dial(d *controlpb.JoinDial) {
	refuse := func(code problem.Code, why string) {
		g.up(&controlpb.JoinFrame{Id: d.GetId(), Close: true, ErrorCode: string(code), ErrorMessage: why})
	}
	far := g.c.w.at(d.GetAddresses(), g.c.name)
	if far == nil {
		refuse(problem.GatewayNotReachable, "quic "+strings.Join(d.GetAddresses(), " ")+" no answer in 5s")
		return
	}
	pinned := join.Pinned(far.c.ca.Bundle(), [32]byte(d.GetBundleSha256()))
	if pinned == nil || !slices.Contains(d.GetGatewayIds(), far.name.String()) {
		refuse(problem.IdentityMismatch, "the server did not prove an accepted identity")
		return
	}
	exporter := make([]byte, 32)
	_, _ = rand.Read(exporter)
	near := &fakeConv{id: d.GetId(), far: far}
	far.mu.Lock()
	far.nextID++
	remote := &fakeConv{id: far.nextID, inbound: true, far: g, farConv: near}
	far.convs[convName(remote.id, true)] = remote
	far.mu.Unlock()
	near.farConv = remote
	g.mu.Lock()
	g.convs[convName(near.id, false)] = near
	g.mu.Unlock()
	chain := func(id *trust.Identity) (out [][]byte) {
		for _, c := range id.Chain {
			out = append(out, c.Raw)
		}
		return out
	}
	far.up(&controlpb.JoinFrame{Id: remote.id, Inbound: true, Opened: &controlpb.JoinOpened{
		Exporter: exporter, PeerChainDer: chain(g.id()), Transport: "quic", Address: g.c.name,
	}})
	g.up(&controlpb.JoinFrame{Id: near.id, Opened: &controlpb.JoinOpened{
		Exporter: exporter, PeerChainDer: chain(far.id()), PeerBundleJwks: pinned.Marshal(), Transport: "quic",
		Address: d.GetAddresses()[0], RttSeconds: 0.078, Mtu: 1350, UdpOk: true, TcpOk: true,
	}})
}

func (g *fakeGateway) relay(f *controlpb.JoinFrame) {
	key := convName(f.GetId(), f.GetInbound())
	g.mu.Lock()
	c := g.convs[key]
	if f.GetClose() {
		delete(g.convs, key)
	}
	g.mu.Unlock()
	if c == nil {
		return
	}
	c.far.up(&controlpb.JoinFrame{Id: c.farConv.id, Inbound: c.farConv.inbound, Body: f.GetBody(), Close: f.GetClose()})
}

func (g *fakeGateway) query(q *controlpb.Query) {
	began := time.Now()
	far := g.c.w.peerGateway(g.c, q.GetPeerTrustDomain())
	a := &controlpb.Answer{ErrorCode: string(problem.ClusterUnreachable), ErrorMessage: "no tunnel"}
	if far != nil {
		if got := far.ask(g.c.td, q); got != nil {
			a = got
		}
	}
	g.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Answer{Answer: &controlpb.Answer{
		Id: q.GetId(), ErrorCode: a.GetErrorCode(), ErrorMessage: a.GetErrorMessage(), Body: a.GetBody(),
		ElapsedSeconds: time.Since(began).Seconds(), Transport: "quic",
	}}})
}

func (g *fakeGateway) ask(from spiffeid.TrustDomain, q *controlpb.Query) *controlpb.Answer {
	ch := make(chan *controlpb.Answer, 1)
	g.mu.Lock()
	g.nextID++
	id := g.nextID
	g.asked[id] = ch
	live := g.stream
	g.mu.Unlock()
	if live == nil {
		return nil
	}
	g.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Query{Query: &controlpb.Query{
		Id: id, PeerTrustDomain: from.String(), Method: q.GetMethod(), Body: q.GetBody(), TimeoutMs: q.GetTimeoutMs(),
	}}})
	select {
	case a := <-ch:
		return a
	case <-live.Context().Done():
		return nil
	}
}

// watch reports tunnels whenever any view may have changed them.
func (g *fakeGateway) watch(ctx context.Context) {
	for {
		changed := g.m.Changed()
		g.c.w.sync()
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
