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
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// world is a few clusters, each a Manager on a data directory of its own with one gateway that behaves: it relays join frames and
// queries, serves offers on, and has a tunnel to a peer while both sides' views name each other. No socket is involved.
type world struct {
	t         *testing.T
	reporting sync.Mutex // keeps reports in the order in which they were made up
	mu        sync.Mutex

	clusters map[string]*cluster
	cut      map[string]bool // "a b": no tunnel and no dial between them
	skew     map[string]time.Duration
	tunnels  map[string]bool
}

type cluster struct {
	w      *world
	name   string
	td     spiffeid.TrustDomain
	path   string
	dir    *datadir.Dir
	ca     *ca.CA
	change func(*federate.Config) // of the test

	m    *federate.Manager
	gw   *fakeGateway
	stop func() // ends everything of the running process and waits
}

func newWorld(t *testing.T, names ...string) *world {
	t.Helper()
	w := &world{t: t, clusters: map[string]*cluster{}, cut: map[string]bool{}, skew: map[string]time.Duration{}, tunnels: map[string]bool{}}
	for _, name := range names {
		w.add(name, name+".acme")
	}
	return w
}

func (w *world) add(name, domain string) *cluster {
	w.t.Helper()
	td, err := spiffeid.ParseTrustDomain(domain)
	must(w.t, err)
	path := w.t.TempDir()
	dir, err := datadir.Create(path)
	must(w.t, err)
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td})
	must(w.t, err)
	c := &cluster{w: w, name: name, td: td, path: path, dir: dir, ca: authority, change: func(*federate.Config) {}}
	w.mu.Lock()
	w.clusters[name] = c
	w.mu.Unlock()
	return c
}

// start runs all clusters.
func (w *world) start() {
	w.t.Helper()
	for _, c := range w.clusters {
		c.start()
	}
	w.t.Cleanup(func() {
		for _, c := range w.clusters {
			c.kill()
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) identity(id spiffeid.ID) func() *trust.Identity {
	v, err := c.ca.IssueKey(id, 0)
	must(c.w.t, err)
	return func() *trust.Identity { return v }
}

func (c *cluster) start() {
	t := c.w.t
	t.Helper()
	gatewayID, err := spiffeid.Gateway(c.td, "gateway-1")
	must(t, err)
	bundle := c.ca.Bundle()
	cfg := federate.Config{
		Federation: "acme", Cluster: federation.ClusterName(c.name), TrustDomain: c.td, Region: c.name + "-1", Dir: c.dir,
		Identity: c.identity(spiffeid.ControlPlane(c.td)), Signer: c.identity(spiffeid.CatalogSigner(c.td)),
		Bundle: func() *trust.Bundle { return bundle },
		PeerID: func(ctx context.Context) (spiffeid.ID, bool) {
			md, _ := metadata.FromIncomingContext(ctx)
			id, err := spiffeid.Parse(strings.Join(md.Get("test-id"), ""))
			return id, err == nil
		},
		ProbeEvery: 20 * time.Millisecond, IntroduceEvery: 30 * time.Millisecond, EpochWait: 200 * time.Millisecond,
		AllowLoopback: true, Version: "v0.1.0",
		Now: func() time.Time {
			c.w.mu.Lock()
			defer c.w.mu.Unlock()
			return time.Now().Add(c.w.skew[c.name])
		},
	}
	c.change(&cfg)
	m, err := federate.New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.Run(ctx); err != nil {
			t.Errorf("%s: run: %v", c.name, err)
		}
	})
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer()
	controlpb.RegisterGatewaysServer(srv, m)
	wg.Go(func() { _ = srv.Serve(lis) })
	gw := newFakeGateway(c, m, c.identity(gatewayID)(), lis)
	c.w.mu.Lock()
	c.m, c.gw = m, gw
	c.w.mu.Unlock()
	wg.Go(func() { gw.link(ctx) })
	wg.Go(func() { gw.watch(ctx) })
	c.stop = func() {
		cancel()
		srv.Stop()
		wg.Wait()
		gw.wg.Wait()
	}
}

// kill ends the process without a word; restart begins it again on the same directory.
func (c *cluster) kill() {
	c.w.mu.Lock()
	stop := c.stop
	c.stop = nil
	c.gw = nil
	c.w.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (c *cluster) restart() {
	c.kill()
	c.start()
}

// fakeGateway is one cluster's gateway.
type fakeGateway struct {
	c     *cluster
	m     *federate.Manager
	id    *trust.Identity
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

func newFakeGateway(c *cluster, m *federate.Manager, id *trust.Identity, lis *bufconn.Listener) *fakeGateway {
	return &fakeGateway{
		c: c, m: m, id: id, lis: lis, cache: catalog.NewCache(0, 0), convs: map[string]*fakeConv{},
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
	ctx = metadata.AppendToOutgoingContext(ctx, "test-id", g.id.ID.String())
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
	hash := far.c.ca.Bundle().Hash()
	if string(hash[:]) != string(d.GetBundleSha256()) || !slices.Contains(d.GetGatewayIds(), far.id.ID.String()) {
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
		Exporter: exporter, PeerChainDer: chain(g.id), Transport: "quic", Address: g.c.name,
	}})
	g.up(&controlpb.JoinFrame{Id: near.id, Opened: &controlpb.JoinOpened{
		Exporter: exporter, PeerChainDer: chain(far.id), PeerBundleJwks: far.c.ca.Bundle().Marshal(), Transport: "quic",
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

// at is the gateway that answers at one of the addresses.
func (w *world) at(addresses []string, from string) *fakeGateway {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, c := range w.clusters {
		if c.gw != nil && slices.Contains(addresses, name+".example:7443") && !w.cutLocked(from, name) {
			return c.gw
		}
	}
	return nil
}

func (w *world) cutLocked(a, b string) bool { return w.cut[a+" "+b] || w.cut[b+" "+a] }

func (w *world) setCut(a, b string, cut bool) {
	w.mu.Lock()
	w.cut[a+" "+b] = cut
	w.mu.Unlock()
	w.sync()
}

// upLocked: both gateways run and both control planes gave them each other's bundle.
func (w *world) upLocked(a, b *cluster) bool {
	if a.gw == nil || b.gw == nil || w.cutLocked(a.name, b.name) {
		return false
	}
	for _, side := range [][2]*cluster{{a, b}, {b, a}} {
		p := side[0].gw.m.View().Peer(side[1].td)
		if p == nil || p.Resource() == nil || p.BundleHash != side[1].ca.Bundle().Hash() {
			return false
		}
	}
	return true
}

func (w *world) peerGateway(from *cluster, td string) *fakeGateway {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.clusters {
		if c.td.String() == td && w.upLocked(from, c) {
			return c.gw
		}
	}
	return nil
}

// sync tells every gateway's control plane which tunnels it has.
func (w *world) sync() {
	for _, name := range w.report() {
		w.deliverTo(name)
	}
}

func (w *world) report() (fresh []string) {
	w.reporting.Lock()
	defer w.reporting.Unlock()
	reports := map[*fakeGateway][]*controlpb.Tunnel{}
	w.mu.Lock()
	for _, a := range w.clusters {
		if a.gw == nil {
			continue
		}
		reports[a.gw] = nil
		for _, b := range w.clusters {
			if a != b && w.upLocked(a, b) {
				reports[a.gw] = append(reports[a.gw], &controlpb.Tunnel{
					PeerTrustDomain: b.td.String(), PeerGateway: "gateway-1", State: "up", Transport: "quic", RttSeconds: 0.08, Id: b.name,
				})
			}
		}
	}
	w.mu.Unlock()
	for g, tunnels := range reports {
		slices.SortFunc(tunnels, func(a, b *controlpb.Tunnel) int { return strings.Compare(a.GetId(), b.GetId()) })
		text := fmt.Sprint(len(tunnels))
		for _, t := range tunnels {
			text += " " + t.GetId()
		}
		g.mu.Lock()
		if g.stream != nil && g.report != text {
			g.report = text
			_ = g.stream.Send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Tunnels{Tunnels: &controlpb.TunnelsReport{Tunnels: tunnels}}})
			fresh = append(fresh, g.c.name)
		}
		g.mu.Unlock()
	}
	return fresh
}

// deliver gives what origin's gateway serves to every consumer it has a tunnel to; deliverTo gives one consumer everything.
func (w *world) deliver(origin string) {
	for _, name := range w.names() {
		if name != origin {
			w.pass(origin, name)
		}
	}
}

func (w *world) deliverTo(consumer string) {
	for _, name := range w.names() {
		if name != consumer {
			w.pass(name, consumer)
		}
	}
}

func (w *world) names() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for name := range w.clusters {
		out = append(out, name)
	}
	return out
}

func (w *world) pass(origin, consumer string) {
	w.mu.Lock()
	o, c := w.clusters[origin], w.clusters[consumer]
	up := w.upLocked(o, c)
	og, cg := o.gw, c.gw
	w.mu.Unlock()
	if !up {
		return
	}
	op, cp := og.m.View().Peer(c.td), cg.m.View().Peer(o.td)
	if op == nil || cp == nil || !op.Ready() || !cp.Ready() {
		return
	}
	cg.mu.Lock()
	at := cg.marks[o.td.String()]
	cg.mu.Unlock()
	if u := og.cache.Update(c.td, at[0], at[1]); u != nil {
		cg.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Catalog{Catalog: &controlpb.PeerCatalog{OriginTrustDomain: o.td.String(), Update: u}}})
	}
}

// eventually waits on the view until ok holds.
func (c *cluster) eventually(what string, ok func(*federate.View) bool) {
	c.w.t.Helper()
	timer := time.NewTimer(20 * time.Second)
	defer timer.Stop()
	for {
		changed := c.m.Changed()
		if ok(c.m.View()) {
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			c.w.t.Fatalf("%s: not seen: %s; peers %v", c.name, what, describe(c.m.View()))
		}
	}
}

func describe(v *federate.View) []string {
	var out []string
	for _, p := range v.Peers {
		out = append(out, fmt.Sprintf("%s %s (%s) up=%v stages=%v", p.Cluster, p.State, p.Reason, p.TunnelUp, p.Stages))
	}
	return out
}

func (c *cluster) waitState(peer string, s federate.State) {
	c.w.t.Helper()
	c.eventually(peer+" "+string(s), func(v *federate.View) bool {
		p := v.ByCluster(federation.ClusterName(peer))
		return p != nil && p.State == s
	})
}

func (c *cluster) waitGateway() {
	c.w.t.Helper()
	c.eventually("a gateway", func(v *federate.View) bool { return len(v.Gateways) > 0 && v.Gateways[0].Connected })
}

func (c *cluster) issue(req *controlpb.TokenIssueRequest) string {
	c.w.t.Helper()
	c.waitGateway()
	r, err := c.m.TokenIssue(context.Background(), req)
	must(c.w.t, err)
	return r.GetToken()
}

func (c *cluster) join(token string, sameness ...string) ([]*controlpb.JoinProgress, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var steps []*controlpb.JoinProgress
	err := c.m.Join(ctx, token, sameness, false, func(p *controlpb.JoinProgress) { steps = append(steps, p) })
	return steps, err
}
