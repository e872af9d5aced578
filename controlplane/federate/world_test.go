// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// world is a few clusters, each a Manager on a data directory of its own with one gateway that behaves: it relays join frames and
// queries, serves offers on, and has a tunnel to a peer while both sides' views name each other. No socket is involved.
type world struct {
	t         *testing.T
	reporting sync.Mutex // keeps reports in the order in which they were made up
	passing   sync.Mutex // the same for catalogs: a gateway's subscription is one stream
	mu        sync.Mutex

	clusters map[string]*cluster
	cut      map[string]bool // "a b": no tunnel and no dial between them
	skew     map[string]time.Duration
	tunnels  map[string]bool
}

type cluster struct {
	raise  atomic.Pointer[func(uint64) error] // what RaiseSequence does; nil: nothing
	w      *world
	name   string
	td     spiffeid.TrustDomain
	path   string
	dir    *datadir.Dir
	ca     authority
	change func(*federate.Config) // of the test

	m    *federate.Manager
	gw   *fakeGateway
	stop func() // ends everything of the running process and waits

	trust struct { // what it says of others and of its own
		sync.Mutex
		acks    map[spiffeid.TrustDomain]uint64 // nil: every bundle is acknowledged as soon as it is held
		denied  []catalog.Denial
		changed chan struct{}
	}
}

// say changes what the cluster acknowledges and withdraws.
func (c *cluster) say(f func()) {
	c.trust.Lock()
	defer c.trust.Unlock()
	f()
	close(c.trust.changed)
	c.trust.changed = make(chan struct{})
}

func (c *cluster) trustChanged() <-chan struct{} {
	c.trust.Lock()
	defer c.trust.Unlock()
	return c.trust.changed
}

func (c *cluster) acked(td spiffeid.TrustDomain) (uint64, bool) {
	c.trust.Lock()
	defer c.trust.Unlock()
	if c.trust.acks != nil {
		sequence, ok := c.trust.acks[td]
		return sequence, ok
	}
	c.w.mu.Lock()
	m := c.m
	c.w.mu.Unlock()
	if m == nil {
		return 0, false
	}
	p := m.View().Peer(td)
	if p == nil || p.Bundle == nil {
		return 0, false
	}
	return p.Bundle.Sequence(), true
}

func (c *cluster) denied() []catalog.Denial {
	c.trust.Lock()
	defer c.trust.Unlock()
	return c.trust.denied
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
	c := &cluster{w: w, name: name, td: td, path: path, dir: dir, change: func(*federate.Config) {}}
	c.trust.changed = make(chan struct{})
	c.ca, err = ca.Create(dir, ca.Config{TrustDomain: td, Now: c.now})
	must(w.t, err)
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

// now is the cluster's clock.
func (c *cluster) now() time.Time {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	return time.Now().Add(c.w.skew[c.name])
}

// identity renews with every change of the bundle, and of what is issued.
func (c *cluster) identity(id spiffeid.ID) func() *trust.Identity {
	var mu sync.Mutex
	var v *trust.Identity
	var of *trust.Bundle
	f := func() *trust.Identity {
		mu.Lock()
		defer mu.Unlock()
		if b := c.ca.Bundle(); v == nil || of != b {
			next, err := c.ca.IssueKey(id, 0)
			must(c.w.t, err)
			v, of = next, b
		}
		return v
	}
	f() // now: a CA asks for the time, which nobody may who holds the world's lock
	return f
}

// rotates gives the cluster a root that the test rotates.
func (c *cluster) rotates() *rotor {
	r := newRotor(c.w.t, c.td)
	c.ca = r
	return r
}

func (c *cluster) start() {
	t := c.w.t
	t.Helper()
	gatewayID, err := spiffeid.Gateway(c.td, "gateway-1")
	must(t, err)
	cfg := federate.Config{
		Federation: "acme", Cluster: federation.ClusterName(c.name), TrustDomain: c.td, Region: c.name + "-1", Dir: c.dir,
		Identity: c.identity(spiffeid.ControlPlane(c.td)), Signer: c.identity(spiffeid.CatalogSigner(c.td)),
		RaiseSequence: func(seen uint64) error {
			if raise := c.raise.Load(); raise != nil {
				return (*raise)(seen)
			}
			return nil
		},
		Bundle: c.ca.Bundle, Acked: c.acked, AckedChanged: c.trustChanged, Denied: c.denied, DeniedChanged: c.trustChanged,
		PeerID: func(ctx context.Context) (spiffeid.ID, bool) {
			md, _ := metadata.FromIncomingContext(ctx)
			id, err := spiffeid.Parse(strings.Join(md.Get("test-id"), ""))
			return id, err == nil
		},
		ProbeEvery: 20 * time.Millisecond, IntroduceEvery: 30 * time.Millisecond, EpochWait: 200 * time.Millisecond,
		AllowLoopback: true, Version: "v0.1.0",
		Now: c.now,
	}
	if r, ok := c.ca.(*rotor); ok {
		cfg.BundleChanged = r.Changed
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
	gw := newFakeGateway(c, m, gatewayID, c.identity(gatewayID), lis)
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

// upLocked: both gateways run, what each control plane gave its own of the other's bundle verifies the other's gateway, and nobody
// withdrew it.
func (w *world) upLocked(a, b *cluster) bool {
	if a.gw == nil || b.gw == nil || w.cutLocked(a.name, b.name) {
		return false
	}
	for _, side := range [][2]*cluster{{a, b}, {b, a}} {
		p := side[0].gw.m.View().Peer(side[1].td)
		if p == nil || p.Resource() == nil {
			return false
		}
		set, err := trust.NewBundles(p.Bundle)
		if err != nil {
			return false
		}
		proven, err := trust.Verify(side[1].gw.id().Chain, set, time.Now().Add(w.skew[side[0].name]))
		if err != nil || slices.ContainsFunc(p.Denied, func(d catalog.Denial) bool { return d.ID == proven.ID && d.IssuedBefore.IsZero() }) {
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
	w.passing.Lock()
	defer w.passing.Unlock()
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
