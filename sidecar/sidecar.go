// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/drain"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar/health"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/withdrawal"
	"github.com/strait-mesh/strait/trust/workloadapi"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

// Sidecar is one sidecar. See the package comment.
type Sidecar struct {
	cfg     Config
	log     *slog.Logger
	source  *trust.Source
	metrics *metrics
	budget  *sidecarhttp.Budget

	ledger    *ledger
	health    *health.Tracker
	locals    *local.Set
	services  *services
	dialer    *inner.Dialer
	in        *inbound
	report    *reporter
	workloads *workloadapi.Server // nil: no Workload API

	self      atomic.Pointer[controlpb.Self]
	place     atomic.Pointer[place]
	selfOnce  sync.Once
	selfReady chan struct{}
	denied    atomic.Pointer[withdrawal.Denials]
	gateways  atomic.Pointer[map[string]local.Gateway]
	peers     atomic.Pointer[map[string]string] // cluster by trust domain
	audited   atomic.Int64                      // when an audited denial was last logged, Unix nanoseconds
	draining  atomic.Bool
	turn      atomic.Uint64
	advertise string

	// Bytes live on connCtx, which ends last; engines end gracefully when graceCtx does.
	connCtx    context.Context
	cutConns   context.CancelFunc
	graceCtx   context.Context
	endGently  context.CancelFunc
	apps       drain.Group // connections of the applications
	callers    drain.Group // connections of other sidecars
	loops      sync.WaitGroup
	judgeWake  chan struct{} // cap 1
	healthWake chan struct{} // cap 1
	stop       chan struct{} // the control plane asked for an end
	stopOnce   sync.Once

	enginesOnce sync.Once
	enginesErr  error
	proxy       *sidecarhttp.Outbound
	upstreams   []*sidecarhttp.Outbound

	mu     sync.Mutex
	inners map[*inner.Conn]struct{} // through gateways
}

// New checks the configuration; it starts nothing.
func New(cfg Config) (*Sidecar, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Sidecar{
		cfg: cfg, log: cfg.Logger, source: cfg.Client.Source(), metrics: newMetrics(cfg.Metrics),
		budget: sidecarhttp.NewBudget(cfg.Now), selfReady: make(chan struct{}),
		judgeWake: make(chan struct{}, 1), healthWake: make(chan struct{}, 1), stop: make(chan struct{}),
		inners: map[*inner.Conn]struct{}{},
	}
	s.denied.Store(&withdrawal.Denials{})
	s.source.SetWithdrawn(func(p *trust.Peer) (string, bool) { return s.isDenied(p.ID, p.Issued()) })
	s.gateways.Store(&map[string]local.Gateway{})
	s.peers.Store(&map[string]string{})
	s.connCtx, s.cutConns = context.WithCancel(context.Background())
	s.graceCtx, s.endGently = context.WithCancel(s.connCtx)
	s.ledger = newLedger(s.source, cfg.Now)
	s.health = health.New(health.Config{
		Every: cfg.CheckEvery, Now: cfg.Now, Changed: func() { wake(s.healthWake) }, Ejected: s.instanceEjected,
	})
	s.dialer = &inner.Dialer{Source: s.source, Enter: s.ledger.enter, Timeout: cfg.DialTimeout}
	s.services = newServices(cfg.Client, cfg.ServiceIdle, cfg.Now)
	s.services.newLoop = func(svc *service) { s.loops.Go(func() { s.runService(svc) }) }
	s.in = newInbound(s)
	s.report = newReporter(s, cfg.Client.Conn(), cfg.ReportEvery, s.askStop)
	s.locals = local.New(local.Config{
		Source: s.source, Enter: s.ledger.enter, Now: cfg.Now, Logger: cfg.Logger,
		Hello: func() *controlpb.LocalHello {
			return &controlpb.LocalHello{Proxy: cfg.Proxy, InboundAddress: s.advertise}
		},
		Changed: s.services.kickAll, Notice: s.notice,
	})
	if s.workloads, err = newWorkloadAPI(s); err != nil {
		return nil, err
	}
	return s, nil
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *Sidecar) askStop() { s.stopOnce.Do(func() { close(s.stop) }) }

// listeners are what Run binds.
type listeners struct {
	inbound, proxy *listener
	upstreams      []*listener
	metrics        net.Listener
	workloads      *workloadapi.Listener
}

func (l *listeners) close() {
	for _, x := range append([]*listener{l.inbound, l.proxy}, l.upstreams...) {
		if x != nil {
			x.Close()
		}
	}
}

func (s *Sidecar) bind() (*listeners, error) {
	l := &listeners{}
	fail := func(what string, err error) (*listeners, error) {
		l.close()
		if l.metrics != nil {
			l.metrics.Close()
		}
		if l.workloads != nil {
			l.workloads.Close()
		}
		return nil, fmt.Errorf("sidecar: listen for %s: %w", what, err)
	}
	var err error
	if l.inbound, err = listen(s.cfg.InboundListen, s.cfg.MaxConnections); err != nil {
		return fail("other sidecars", err)
	}
	if l.metrics, err = net.Listen("tcp", s.cfg.MetricsListen); err != nil {
		return fail("metrics", err)
	}
	addrs := Addrs{Inbound: l.inbound.Addr().String(), Metrics: l.metrics.Addr().String()}
	if s.cfg.HTTPProxyListen != "" {
		if l.proxy, err = listen(s.cfg.HTTPProxyListen, s.cfg.MaxConnections); err != nil {
			return fail("HTTP by host", err)
		}
		addrs.HTTPProxy = l.proxy.Addr().String()
		l.proxy.serve = s.serveProxy
	}
	for i, u := range s.cfg.Upstreams {
		x, err := listen(u.Listen, s.cfg.MaxConnections)
		if err != nil {
			return fail("upstream "+u.Service.String(), err)
		}
		x.serve = func(c net.Conn) { s.serveApp(c, i) }
		l.upstreams = append(l.upstreams, x)
		addrs.Upstreams = append(addrs.Upstreams, x.Addr().String())
	}
	if s.workloads != nil {
		if l.workloads, err = workloadapi.Listen(s.cfg.WorkloadAPI, s.log); err != nil {
			return fail("the SPIFFE Workload API", err)
		}
		addrs.WorkloadAPI = "unix://" + l.workloads.Addr().String()
	}
	l.inbound.serve = s.in.serve
	s.advertise = advertised(s.cfg.InboundAdvertise, l.inbound.Addr())
	s.cfg.Bound(addrs)
	return l, nil
}

// Run binds, serves, and when ctx ends drains: it returns after every goroutine and connection has ended. It may be called once.
func (s *Sidecar) Run(ctx context.Context) error {
	defer s.cutConns()
	l, err := s.bind()
	if err != nil {
		return err
	}
	back, stopBack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBack()
	var background, serving sync.WaitGroup
	background.Go(func() { s.ledger.run(back) })
	background.Go(func() { s.health.Run(back) })
	background.Go(func() { s.locals.Run(back) })
	background.Go(func() { s.report.run(back) })
	background.Go(func() { s.housekeep(back) })
	background.Go(func() { s.followTrust(back) })
	if l.workloads != nil {
		background.Go(func() { s.serveWorkloadAPI(back, l.workloads) })
	}

	unwatch := s.cfg.Client.Watch(s.apply)
	s.cfg.Client.Subscribe(controlpb.TypeSelf, s.cfg.Proxy)
	s.cfg.Client.SubscribeAll(controlpb.TypeGateway)
	s.cfg.Client.SubscribeAll(controlpb.TypeBundle)
	s.cfg.Client.SubscribeAll(controlpb.TypeDenied)
	for _, u := range s.cfg.Upstreams {
		if _, err := s.services.get(u.Service, true); err != nil {
			s.log.Error("upstream not subscribed", "service", u.Service, "error", err)
		}
	}

	status := s.statusServer()
	serving.Go(func() {
		if err := status.Serve(l.metrics); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("metrics not served", "error", err)
		}
	})
	for _, x := range append([]*listener{l.inbound, l.proxy}, l.upstreams...) {
		if x != nil {
			serving.Go(x.run)
		}
	}

	select {
	case <-ctx.Done():
	case <-s.stop:
		s.log.Info("the control plane asked this sidecar to end")
	}
	s.drain(l)
	unwatch()
	s.services.close()
	s.loops.Wait()
	s.in.close()
	s.closeEngines()
	s.cutConns()
	stopBack()
	background.Wait()
	status.Close()
	serving.Wait()
	return nil
}

// drain tells callers, stops accepting, lets what is open end and cuts the rest.
func (s *Sidecar) drain(l *listeners) {
	s.draining.Store(true)
	s.report.changed()
	s.log.Info("draining", "connections", s.callers.Len()+s.apps.Len())
	t := time.NewTimer(s.cfg.DrainDelay)
	<-t.C
	l.close()
	s.endGently()
	var wg sync.WaitGroup
	ctx := context.Background()
	wg.Go(func() { s.callers.Drain(ctx, s.cfg.DrainGrace) })
	wg.Go(func() { s.apps.Drain(ctx, s.cfg.DrainGrace) })
	wg.Wait()
}

// housekeep does what is due every second, and passes verdicts on when they change.
func (s *Sidecar) housekeep(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	known := s.locals.Known()
	for n := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-s.healthWake:
			s.locals.SetHealth(s.localHealth())
			s.report.changed()
			continue
		case <-s.judgeWake:
			s.judgeAll()
			continue
		case <-tick.C:
		}
		if k := s.locals.Known(); k != known {
			known = k
			s.services.kickAll()
		}
		if n++; n%30 != 0 {
			continue
		}
		s.services.forgetIdle()
		now := s.cfg.Now()
		s.retire(func(c *inner.Conn) bool { return now.After(c.Made.Add(c.Until.Sub(c.Made) * 8 / 10)) })
	}
}

// followTrust judges again whenever identity or bundles change, and when the grace of what lost its root has passed.
func (s *Sidecar) followTrust(ctx context.Context) {
	var before *trust.Bundles
	for {
		changed := s.source.Changed()
		now := s.source.Bundles()
		s.replaceRootless(before, now)
		before = now
		n, next := s.ledger.judgeChains()
		if n > 0 {
			s.log.Info("connections ended with the trust in them", "connections", n)
		}
		wake(s.judgeWake)
		var due <-chan time.Time
		if next > 0 {
			due = time.After(next)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-due:
		}
	}
}

// awaitPlace waits for the first Self.
func (s *Sidecar) awaitPlace(ctx context.Context) (*place, error) {
	select {
	case <-s.selfReady:
		return s.place.Load(), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// engines makes the HTTP engines once Self is known: nothing is served before its first configuration has arrived.
func (s *Sidecar) engines() error {
	ctx, cancel := context.WithTimeout(s.connCtx, firstWait)
	defer cancel()
	if _, err := s.awaitPlace(ctx); err != nil {
		return errors.New("no configuration yet")
	}
	s.enginesOnce.Do(func() {
		if s.proxy, s.enginesErr = s.newEngine(s.resolveHost); s.enginesErr != nil {
			return
		}
		for _, u := range s.cfg.Upstreams {
			target := sidecarhttp.Target{Service: u.Service, Port: federation.PortName(u.Port), Pinned: u.Pinned}
			e, err := s.newEngine(func(string, string) (sidecarhttp.Target, error) { return target, nil })
			if err != nil {
				s.enginesErr = err
				return
			}
			s.upstreams = append(s.upstreams, e)
		}
	})
	return s.enginesErr
}

func (s *Sidecar) closeEngines() {
	s.enginesOnce.Do(func() { s.enginesErr = errors.New("stopped") })
	if s.proxy != nil {
		s.proxy.Close()
	}
	for _, e := range s.upstreams {
		e.Close()
	}
}

func (s *Sidecar) serveProxy(c net.Conn) {
	done, ok := s.apps.Add(func() { relay.Abort(c) })
	if !ok {
		relay.Abort(c)
		return
	}
	defer done()
	if err := s.engines(); err != nil {
		s.log.Debug("connection not served", "error", err)
		relay.Abort(c)
		return
	}
	s.proxy.ServeConn(s.graceCtx, c)
}

func (s *Sidecar) serveApp(c net.Conn, i int) {
	done, ok := s.apps.Add(func() { relay.Abort(c) })
	if !ok {
		relay.Abort(c)
		return
	}
	defer done()
	if err := s.engines(); err != nil {
		s.log.Debug("connection not served", "error", err)
		relay.Abort(c)
		return
	}
	s.serveUpstream(s.cfg.Upstreams[i], s.upstreams[i], c)
}

// instanceEjected is told by the tracker.
func (s *Sidecar) instanceEjected(k health.Key) {
	if p := (*s.in.ports.Load())[k.Port]; p != nil {
		s.metrics.ejected(federation.OutlierEjected, p.service, federation.ClusterName(s.clusterName()))
	}
}

// decided reports a decision that is not the one before.
func (s *Sidecar) decided(svc *service, old, r *route) {
	s.metrics.decided(svc.name, r.inputs.Cluster, old, r)
	report, err := wire.DecisionToProto(r.at, r.inputs, r.state, r.decision, ejections(svc.evidence()))
	if err != nil {
		s.log.Error("decision not reported", "service", svc.name, "error", err)
	} else {
		s.report.decided(svc.name, report)
	}
	if old != nil && old.svc != nil && active(old.decision) != active(r.decision) {
		s.log.Info("traffic moves", "service", svc.name, "from", active(old.decision), "to", active(r.decision), "reason", r.decision.Reason)
	}
}
