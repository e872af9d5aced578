// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/federation/gossip"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/drain"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// Gateway is one east-west gateway.
type Gateway struct {
	cfg        Config
	log        *slog.Logger
	td         spiffeid.TrustDomain
	cluster    federation.ClusterName
	federation federation.FederationName

	view     atomic.Pointer[view]
	registry *withdrawal.Registry
	pairs    drain.Group // relayed connections, both ways
	conns    drain.Group // connections that are not (yet) relayed pairs: handshakes, local sessions
	handles  handleKeys
	health   localHealth
	failures dialFailures
	locals   localSessions
	metrics  *metrics
	marks    openMarks

	tun      *tunnel.Endpoint
	offers   *catalog.Cache // ours, by consumer
	imports  *catalog.Cache // peers', by origin
	gossip   *gossip.Gossip
	link     *link
	local    net.Listener
	web      *web
	draining atomic.Bool  // everybody was told to go elsewhere
	closing  atomic.Bool  // nothing new is taken
	suspects sync.Map     // *tunnel.Session → true: suspect, and the sidecars were told
	deadline atomic.Int64 // of the drain, Unix milliseconds

	pullMu  sync.Mutex
	pulls   map[spiffeid.TrustDomain]*pull
	perPeer peerLimits

	watchMu sync.Mutex
	stopped bool // no change of discovery is adopted any more

	wg sync.WaitGroup
}

// New judges the configuration; it starts nothing.
func New(cfg Config) (*Gateway, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	info := cfg.Client.Info()
	g := &Gateway{
		cfg: cfg, log: cfg.Logger, td: info.TrustDomain, cluster: info.Cluster, federation: info.Federation,
		registry: withdrawal.New(withdrawal.Config{Now: cfg.Now}), offers: catalog.NewCache(0, 0),
		imports: catalog.NewCache(0, 0), pulls: make(map[spiffeid.TrustDomain]*pull),
	}
	g.view.Store(newView())
	cfg.Client.Source().SetWithdrawn(g.judgePeer)
	_, _ = rand.Read(g.handles.secret[:])
	g.handles.now = cfg.Now
	g.metrics = newMetrics(cfg.Metrics, string(g.cluster), cfg.Name)
	g.link = newLink(g)
	g.loadOffers()
	return g, nil
}

// Run listens, serves until ctx ends, drains, and returns after everything it started has ended.
func (g *Gateway) Run(ctx context.Context) error {
	if err := g.listen(); err != nil {
		g.closeListeners()
		return fmt.Errorf("gateway: %w", err)
	}
	var err error
	g.gossip, err = gossip.New(gossip.Config{
		Name: g.cfg.Name + "." + string(g.cluster), Federation: g.federation, Link: g.tun.Gossip(), Logger: g.log,
	})
	if err != nil {
		g.closeListeners()
		return fmt.Errorf("gateway: %w", err)
	}
	// What serves lives on until the drain is over; only then does work end.
	work, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	errs := make(chan error, 4)
	g.start(work, errs)
	stopWatch := g.watch(work)
	if g.cfg.Bound != nil {
		g.cfg.Bound(g.addrs())
	}
	select {
	case <-ctx.Done():
		g.drain(context.WithoutCancel(ctx))
	case err = <-errs:
	}
	stopWatch()
	g.watchMu.Lock()
	g.stopped = true
	g.watchMu.Unlock()
	end()
	g.closeListeners()
	g.conns.Cut()
	g.pairs.Cut()
	g.wg.Wait()
	return err
}

func (g *Gateway) listen() (err error) {
	g.tun, err = tunnel.Listen(tunnel.Config{
		Name: g.cfg.Name, Cluster: string(g.cluster), Listen: g.cfg.Listen, Source: g.cfg.Client.Source(), Logger: g.log,
		Now: g.cfg.Now, DisableUDP: g.cfg.DisableUDP, HeadStart: g.cfg.HeadStart, Dialable: len(g.cfg.Advertise) > 0, Stream: g.serveStream, Catalog: g.serveCatalog, Query: g.serveQuery,
		Join: g.serveJoin, Marker: g.remoteMarker, Draining: g.farDraining, Changed: g.tunnelsChanged,
		Gossip: func(from string, c net.Conn) { g.gossip.DeliverStream(from, c) },
		Packet: func(from string, b []byte) { g.gossip.Deliver(from, b) },
		Failed: g.metrics.handshakeFailed,
	})
	if err != nil {
		return err
	}
	if g.local, err = net.Listen("tcp", g.cfg.LocalListen); err != nil {
		return fmt.Errorf("listen for sidecars: %w", err)
	}
	g.web, err = listenWeb(g)
	return err
}

func (g *Gateway) closeListeners() {
	if g.local != nil {
		g.local.Close()
	}
	if g.web != nil {
		g.web.close()
	}
	if g.tun != nil {
		g.tun.Close()
	}
}

func (g *Gateway) addrs() Addrs {
	a := Addrs{Listen: g.tun.Addr().String(), Local: g.local.Addr().String()}
	if g.web != nil {
		a.Metrics = g.web.addr()
	}
	return a
}

// localAddress is where sidecars are told to connect.
func (g *Gateway) localAddress() string {
	if g.cfg.LocalAddress != "" {
		return g.cfg.LocalAddress
	}
	bound := g.local.Addr().(*net.TCPAddr)
	if !bound.IP.IsUnspecified() {
		return bound.String()
	}
	host := "127.0.0.1"
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			host = n.IP.String()
			break
		}
	}
	return net.JoinHostPort(host, strconv.Itoa(bound.Port))
}

// start runs the parts; one that fails before ctx ends makes Run return its error.
func (g *Gateway) start(ctx context.Context, errs chan<- error) {
	run := func(name string, f func(context.Context) error) {
		g.wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, context.Canceled) {
				select {
				case errs <- fmt.Errorf("gateway: %s: %w", name, err):
				default:
				}
			}
		})
	}
	run("tunnels", g.tun.Run)
	run("gossip", g.gossip.Run)
	run("withdrawal", g.registry.Run)
	run("trust", g.followTrust)
	run("local listener", g.acceptLocal)
	run("link", g.link.run)
	run("hints", g.followHints)
	run("introductions", g.meet)
	run("figures", g.observe)
	if g.web != nil {
		run("metrics", g.web.run)
	}
}

// followTrust has the tunnels judged whenever identity or bundles change.
func (g *Gateway) followTrust(ctx context.Context) error {
	for {
		changed := g.cfg.Client.Source().Changed()
		g.tun.Judge()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// watch follows discovery: each batch of changes becomes one new view.
func (g *Gateway) watch(ctx context.Context) (cancel func()) {
	c := g.cfg.Client
	for _, t := range []string{controlpb.TypePeer, controlpb.TypeGrant, controlpb.TypeDenied} {
		c.SubscribeAll(t)
	}
	var next *view
	var touched changes
	return c.Watch(func(ch proxyclient.Change) error {
		g.watchMu.Lock()
		defer g.watchMu.Unlock()
		if g.stopped {
			return nil
		}
		if next == nil {
			n := *g.view.Load()
			next, touched = &n, changes{}
		}
		next.apply(ch, g.cluster, &touched)
		if ch.More {
			return nil
		}
		g.adopt(ctx, next, touched)
		next = nil
		return nil
	})
}

// adopt makes v the view that decides from now on, and judges what is open by it.
func (g *Gateway) adopt(ctx context.Context, v *view, touched changes) {
	old := g.view.Swap(v)
	if touched.peers {
		g.tun.SetPeers(v.tunnelPeers())
		g.syncPulls(ctx, v)
		for td := range old.peers {
			if v.peers[td] == nil {
				g.offers.Drop(td)
				g.imports.Drop(td)
				g.forgetOffer(td)
			}
		}
	}
	if touched.grants {
		g.subscribeServices(old, v)
	}
	if touched.denied {
		g.tun.Judge()
	}
	if touched.trust() {
		if n := g.registry.Judge(v.judge); n > 0 {
			g.log.Info("trust withdrawn", "ended", n)
		}
	}
	if touched.peers {
		g.tunnelsChanged()
	}
}

// subscribeServices keeps a subscription for each service that some peer may reach.
func (g *Gateway) subscribeServices(old, v *view) {
	have, want := map[string]bool{}, map[string]bool{}
	for k := range old.grants {
		have[k.service.String()] = true
	}
	for k := range v.grants {
		want[k.service.String()] = true
	}
	for s := range want {
		if !have[s] {
			g.cfg.Client.Subscribe(controlpb.TypeService, s)
		}
	}
	for s := range have {
		if !want[s] {
			g.cfg.Client.Unsubscribe(controlpb.TypeService, s)
		}
	}
}

// lameDuck is how long a draining gateway goes on taking what comes, at most half of its grace: those who were told to go elsewhere need
// a moment, and some know nowhere else yet.
const lameDuck = 2 * time.Second

// drain is the first phase of stopping: say so everywhere, soon take nothing new, wait for what is open.
func (g *Gateway) drain(ctx context.Context) {
	g.deadline.Store(g.cfg.Now().Add(g.cfg.DrainGrace).UnixMilli())
	g.draining.Store(true)
	g.log.Info("draining", "open", g.pairs.Len(), "grace", g.cfg.DrainGrace.String())
	g.tun.Drain(g.cfg.DrainGrace)
	g.locals.each(func(s *localSession) {
		s.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{DeadlineMs: g.deadline.Load()}}})
	})
	grace := g.cfg.DrainGrace - min(lameDuck, g.cfg.DrainGrace/2)
	t := time.NewTimer(g.cfg.DrainGrace - grace)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	g.closing.Store(true)
	if n := g.pairs.Drain(ctx, grace); n > 0 {
		g.log.Info("drained", "cut", n)
	}
}

// farDraining tells the sidecars whose connections run through a far gateway that goes away.
func (g *Gateway) farDraining(s *tunnel.Session, grace time.Duration) {
	g.retireConnections(s, g.cfg.Now().Add(min(grace, time.Hour)).UnixMilli())
}

// retireConnections has the sidecars give nothing new to the connections that run through s; what is open may end. deadline is when they
// will be cut, in Unix milliseconds; 0: not said.
func (g *Gateway) retireConnections(s *tunnel.Session, deadline int64) {
	g.locals.each(func(l *localSession) {
		counters := l.connectionsOn(s)
		if len(counters) == 0 {
			return
		}
		l.send(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{
			TrustDomain: s.Peer().String(), Connections: counters, DeadlineMs: deadline}}})
	})
}

// tunnelsChanged passes the state of the tunnels on, to sidecars and to the control plane.
func (g *Gateway) tunnelsChanged() {
	g.retireSuspects()
	g.locals.each((*localSession).peersChanged)
	g.link.tunnelsChanged()
}

// retireSuspects moves new work away from tunnels that have become suspect, once each, while another tunnel to the same peer is up: a far
// gateway that died silently then costs a second's requests, and not what comes until the tunnel is down.
func (g *Gateway) retireSuspects() {
	sessions := g.tun.Sessions()
	up := make(map[spiffeid.TrustDomain]bool)
	for _, s := range sessions {
		if s.State() == tunnel.StateUp && !s.Draining() {
			up[s.Peer()] = true
			g.suspects.Delete(s)
		}
	}
	for _, s := range sessions {
		if s.State() != tunnel.StateSuspect || !up[s.Peer()] {
			continue
		}
		if _, known := g.suspects.LoadOrStore(s, true); !known {
			g.retireConnections(s, 0)
		}
	}
	g.suspects.Range(func(s, _ any) bool {
		if s.(*tunnel.Session).State() == tunnel.StateDown {
			g.suspects.Delete(s)
		}
		return true
	})
}

// meet has gossip make contact with each gateway that a session came up with.
func (g *Gateway) meet(ctx context.Context) error {
	met := make(map[string]bool)
	for {
		changed := g.tun.Changed()
		now := make(map[string]bool)
		for _, name := range g.tun.Gossip().Peers() {
			if now[name] = true; !met[name] {
				g.gossip.Join(name)
			}
		}
		met = now
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// observe writes the tunnels' figures into the metrics.
func (g *Gateway) observe(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			g.metrics.tunnels(g.tun.Sessions(), g.view.Load())
		}
	}
}
