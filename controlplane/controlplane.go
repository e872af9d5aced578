// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/configapi"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/objects"
	"github.com/strait-mesh/strait/controlplane/sessions"
	"github.com/strait-mesh/strait/controlplane/traces"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/version"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// Config of a control plane.
type Config struct {
	DataDir       string   // that Init made; required
	Listen        string   // gRPC over SPIFFE mTLS; ":7400"
	APIListen     string   // configuration API; "127.0.0.1:7401"
	MetricsListen string   // ":7402"; "off" = none
	Advertise     []string // addresses of Listen that tokens name; default: the bound one
	CatalogTTL    time.Duration
	SVIDTTL       time.Duration // 36 h
	JoinExpiry    time.Duration // 24 h
	RenewGrace    time.Duration // how long after its end an identity may still be renewed; 0: not at all
	AllowLoopback bool          // accept loopback addresses of peers' gateways: federations on one machine
	ExternalCA    string        // directory with tls.crt, tls.key and ca.crt that takes the place of the own root; "": own root
	WorkloadAPI   string        // unix:///path where identities come from, if Init was told so; empty otherwise
	Bundles       BundlesConfig // federation with trust domains of no members
	Forward       func([]*tracepb.ResourceSpans)
	Now           func() time.Time
	Logger        *slog.Logger
}

// Addrs are the bound addresses; they are also written to run/addrs.json.
type Addrs struct {
	Listen  string
	API     string
	Metrics string
	Bundle  string `json:",omitempty"`
}

// ControlPlane is one replica. Make it with New, then Run it.
type ControlPlane struct {
	cfg   Config
	log   *slog.Logger
	now   func() time.Time
	facts Facts
	self  parsed

	dir      *datadir.Dir
	ca       *ca.CA    // nil where identities come from a Workload API: ask issuer, or look first
	apiCA    *ca.API   // of the configuration API, ours in any case
	issuer   authority // ca, or elsewhere
	source   *trust.Source
	signer   atomic.Pointer[trust.Identity]
	tokens   *register.Tokens
	denied   *identity.DenyList
	registry *withdrawal.Registry
	metrics  *metric.Registry
	rotation rotationState
	foreign  foreignTrust

	api       *configapi.Server
	objects   *objects.Store
	discovery *discovery.Server
	sessions  *sessions.Server
	federate  *federate.Manager
	traces    *traces.Store

	addrs    Addrs
	compiled atomic.Pointer[compile.Output]
	inputs   atomic.Pointer[compile.Input]
	owners   atomic.Pointer[map[string]spiffeid.ID] // proxy → the one identity that it may have
	revision atomic.Uint64
	roles    operatorRoles

	elsewhere *workloadAPI // where identities come from; nil with a CA
}

// New opens the data directory and its keys. It listens to nothing.
func New(cfg Config) (*ControlPlane, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	for v, def := range map[*string]string{&cfg.Listen: ":7400", &cfg.APIListen: "127.0.0.1:7401", &cfg.MetricsListen: ":7402"} {
		if *v == "" {
			*v = def
		}
	}
	dir, err := datadir.Open(cfg.DataDir, datadir.Options{Lock: true})
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{cfg: cfg, log: cfg.Logger, now: cfg.Now, dir: dir}
	if err := c.open(); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return c, nil
}

func (c *ControlPlane) open() (err error) {
	if c.facts, err = ReadFacts(c.dir); err != nil {
		return err
	}
	if c.self, err = c.facts.parse(); err != nil {
		return err
	}
	if err := c.openAuthority(); err != nil {
		return err
	}
	if c.tokens, err = register.OpenTokens(c.dir, c.now); err != nil {
		return err
	}
	if c.denied, err = identity.OpenDenyList(c.dir, c.now); err != nil {
		return err
	}
	if err := c.roles.open(c.dir); err != nil {
		return err
	}
	if err := c.openRotation(); err != nil {
		return err
	}
	if err := c.openBundles(); err != nil {
		return err
	}
	c.metrics = metric.New(metric.Config{Role: "controlplane", Version: version.String(), Process: true})
	c.registry = withdrawal.New(withdrawal.Config{Now: c.now})
	c.source = trust.NewSource(trust.SourceConfig{Now: c.now, Logger: c.log})
	c.source.SetWithdrawn(c.judgePeer)
	c.owners.Store(&map[string]spiffeid.ID{})
	if c.elsewhere != nil {
		return nil // the rest needs an identity, and Run waits for that
	}
	bundles, err := trust.NewBundles(c.issuer.Bundle())
	if err != nil {
		return err
	}
	c.source.SetBundles(bundles)
	if err := c.issueOwn(); err != nil {
		return err
	}
	return c.parts()
}

// parts makes everything that is started by Run.
func (c *ControlPlane) parts() (err error) {
	peer := identity.IDFromContext
	c.discovery, err = discovery.New(discovery.Config{
		Peer: peer, Authorize: discovery.RoleAuthorize(c.self.trustDomain, c.owner),
		VerifyNode: c.verifyNode, Now: c.now, Logger: c.log,
	})
	if err != nil {
		return err
	}
	c.sessions, err = sessions.New(sessions.Config{
		Peer: peer, Authorize: sessions.Owner(c.owner), Dir: c.dir, Now: c.now, Logger: c.log,
	})
	if err != nil {
		return err
	}
	c.traces = traces.NewStore(traces.StoreConfig{})
	c.federate, err = federate.New(federate.Config{
		Federation: c.self.federation, Cluster: c.self.cluster, TrustDomain: c.self.trustDomain, Region: c.self.locality.Region,
		Dir: c.dir, Identity: c.source.Identity, Signer: c.signer.Load, Bundle: c.issuer.Bundle,
		PeerID: func(ctx context.Context) (spiffeid.ID, bool) {
			p, ok := identity.PeerFromContext(ctx)
			return p.ID, ok
		},
		RaiseSequence: c.raiseSequence, BundleChanged: c.authorityChanged, Acked: c.acked, AckedChanged: c.discovery.Changed, Denied: c.ownDenials, DeniedChanged: c.denied.Changed,
		Objects: peerObjects{c}, GatewayAddresses: c.gatewayAddresses, Introducers: c.introducers,
		CatalogTTL: c.cfg.CatalogTTL, JoinExpiry: c.cfg.JoinExpiry, AllowLoopback: c.cfg.AllowLoopback,
		Version: version.String(), Now: c.now, Logger: c.log,
	})
	if err != nil {
		return err
	}
	c.federate.Handle(traceQuery, c.handleTrace)
	c.federate.Handle(withdrawnQuery, c.handleWithdrawn)
	return nil
}

// owner is the identity that a proxy must prove: its registration's, or the workload's that it stands in front of.
func (c *ControlPlane) owner(proxy string) (spiffeid.ID, bool) {
	id, ok := (*c.owners.Load())[proxy]
	return id, ok
}

// issueOwn makes the control plane's own identities, where there is a CA.
func (c *ControlPlane) issueOwn() error {
	if c.ca == nil {
		return nil
	}
	own, err := c.ca.IssueKey(spiffeid.ControlPlane(c.self.trustDomain), c.cfg.SVIDTTL)
	if err != nil {
		return err
	}
	signer, err := c.ca.IssueKey(spiffeid.CatalogSigner(c.self.trustDomain), c.cfg.SVIDTTL)
	if err != nil {
		return err
	}
	c.source.SetIdentity(own)
	c.signer.Store(signer)
	return nil
}

// Run serves until ctx ends, and returns after everything it started has ended.
func (c *ControlPlane) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, c.dir.Close()) }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if c.elsewhere != nil {
		if err := c.awaitIdentity(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.elsewhere.Close()) }()
		if err := c.parts(); err != nil {
			return err
		}
	}
	if err := c.startAPI(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.objects.Close(), c.api.Close()) }()
	servers, err := c.listen(ctx)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for name, run := range map[string]func(context.Context) error{
		"sessions": c.sessions.Run, "federate": c.federate.Run, "withdrawal": c.registry.Run,
		"compile": c.compileLoop, "identity": c.renewLoop, "peers": c.samenessLoop, "status": c.statusLoop, "denied": c.denyLoop,
		"bundles": c.bundlesLoop, "expiry": c.expiryLoop,
		"external": c.externalLoop, "rotation": c.rotationLoop, "renewed": c.rotation.Run,
	} {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	for _, s := range servers {
		wg.Go(func() {
			if err := s.serve(); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", s.name, err))
			}
		})
	}
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-c.api.Failed():
			cancel(fmt.Errorf("configuration API: %w", c.api.Err()))
		}
	})
	if err := c.publish(); err != nil {
		cancel(err)
	}
	c.log.Info("control plane ready", "cluster", c.facts.Cluster, "federation", c.facts.Federation, "listen", c.addrs.Listen, "api", c.addrs.API)
	<-ctx.Done()
	for _, s := range servers {
		s.stop()
	}
	wg.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// startAPI starts the embedded configuration API and the informers on it.
func (c *ControlPlane) startAPI(ctx context.Context) error {
	store, err := c.dir.Sub("store")
	if err != nil {
		return err
	}
	cert, key, err := c.servingCertificate()
	if err != nil {
		return err
	}
	c.api, err = configapi.Start(ctx, configapi.Config{
		Dir: store.Path(), SocketDir: c.dir.Path("run"), Listen: c.cfg.APIListen, ServingCertPEM: cert, ServingKeyPEM: key,
		ClientCAPEM: c.apiCA.APIRootPEM(), Allow: c.allowAPIClient, Logger: c.log,
	})
	if err != nil {
		return fmt.Errorf("configuration API: %w", err)
	}
	c.addrs.API = c.api.Addr().String()
	c.objects, err = objects.Open(ctx, objects.Config{REST: c.api.RESTConfig(), Logger: c.log})
	if err != nil {
		return errors.Join(fmt.Errorf("configuration API: %w", err), c.api.Close())
	}
	return c.describeSelf(ctx)
}

func (c *ControlPlane) servingCertificate() (cert, key []byte, err error) {
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	names := []string{"localhost", c.facts.Cluster + "." + c.facts.Federation}
	if host, _, err := net.SplitHostPort(c.cfg.APIListen); err == nil && host != "" {
		if ip := net.ParseIP(host); ip != nil {
			ips = append(ips, ip)
		} else {
			names = append(names, host)
		}
	}
	return c.apiCA.IssueServing(names, ips, 365*24*time.Hour)
}

// server is one listener with its loop.
type server struct {
	name  string
	serve func() error
	stop  func()
}

func (c *ControlPlane) listen(ctx context.Context) ([]server, error) {
	var servers []server
	fail := func(err error) ([]server, error) {
		for _, s := range servers {
			s.stop()
		}
		return nil, err
	}
	s, err := c.listenGRPC(ctx)
	if err != nil {
		return fail(err)
	}
	servers = append(servers, s)
	local, err := c.listenLocal()
	servers = append(servers, local...)
	if err != nil {
		return fail(err)
	}
	bundles, err := c.listenBundles()
	if err != nil {
		return fail(err)
	}
	servers = append(servers, bundles...)
	if c.cfg.MetricsListen != "off" {
		m, err := c.listenMetrics()
		if err != nil {
			return fail(err)
		}
		servers = append(servers, m)
	}
	return servers, nil
}

func (c *ControlPlane) listenGRPC(ctx context.Context) (server, error) {
	inner, err := net.Listen("tcp", c.cfg.Listen)
	if err != nil {
		return server{}, err
	}
	c.addrs.Listen = inner.Addr().String()
	reg := &register.Server{
		Tokens: c.tokens, Bundle: c.issuer.Bundle, Cluster: c.facts.Cluster, Federation: c.facts.Federation, Logger: c.log, Now: c.now, Refused: c.registrationRefused(),
		Sign: c.issueAtRegistration,
	}
	refused := c.metrics.Counter("strait_handshakes_refused_total", "Connections to the control plane that were turned away.", "reason")
	ids, err := identity.New(identity.Config{Signer: guardedIssuer{c, "itself"}, Bundle: c.issuer.Bundle, JWT: c.jwtSigner(), Denied: c.denied.Denied, Renewed: c.renewed, TTL: c.cfg.SVIDTTL, Logger: c.log})
	if err != nil {
		return server{}, errors.Join(err, inner.Close())
	}
	l, err := identity.Open(inner, identity.ListenerConfig{
		Source: c.source, TrustDomain: c.self.trustDomain, Denied: c.denied.Denied, Withdrawals: c.registry, Logger: c.log,
		Register: func(ctx context.Context, conn *tls.Conn) { reg.ServeConn(ctx, conn) },
		Refused:  func(reason string) { refused.With(reason).Inc() },
		Renew:    ids.RenewExpired(c.source, c.self.trustDomain, c.cfg.RenewGrace, c.now), RenewGrace: c.cfg.RenewGrace,
	})
	if err != nil {
		return server{}, errors.Join(err, inner.Close())
	}
	receiver, err := traces.NewReceiver(traces.ReceiverConfig{
		Store: c.traces, Cluster: c.self.cluster, Peer: identity.IDFromContext, Forward: c.cfg.Forward, Logger: c.log,
	})
	if err != nil {
		return server{}, errors.Join(err, l.Close())
	}
	g := grpc.NewServer(append(identity.ServerOptions(), grpc.ChainUnaryInterceptor(c.needsCA, c.operatorUnary), grpc.ChainStreamInterceptor(c.operatorStream))...)
	ids.Register(g)
	c.discovery.Register(g)
	c.sessions.Register(g)
	receiver.Register(g)
	controlpb.RegisterGatewaysServer(g, c.federate)
	controlpb.RegisterOperatorServer(g, &operator{c: c})
	return server{"grpc", func() error { return g.Serve(l) }, func() { stopGRPC(g) }}, nil
}

// stopGRPC gives calls a moment to end: streams to proxies never do by themselves.
func stopGRPC(g *grpc.Server) {
	t := time.AfterFunc(500*time.Millisecond, g.Stop)
	g.GracefulStop()
	t.Stop()
}

// publish writes the bound addresses to run/addrs.json.
func (c *ControlPlane) publish() error {
	data, err := json.Marshal(c.addrs)
	if err != nil {
		return err
	}
	return c.dir.WriteFile(filepath.Join("run", "addrs.json"), append(data, '\n'))
}
