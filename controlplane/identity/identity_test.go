// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/controlplane/traces"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const within = 20 * time.Second

// door is a listener with everything behind it.
type door struct {
	t        *testing.T
	td       spiffeid.TrustDomain
	ca       *ca.CA
	listener *identity.Listener
	registry *withdrawal.Registry
	denied   *identity.DenyList

	mu      sync.Mutex
	refused map[string]int
	arrived int // registrations
}

func openDoor(t *testing.T, change func(*identity.ListenerConfig)) *door {
	t.Helper()
	d := &door{t: t, refused: map[string]int{}, registry: withdrawal.New(withdrawal.Config{})}
	var err error
	d.td, err = spiffeid.ParseTrustDomain("us-east.acme")
	must(t, err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	d.ca, err = ca.Create(dir, ca.Config{TrustDomain: d.td})
	must(t, err)
	d.denied, err = identity.OpenDenyList(dir, nil)
	must(t, err)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	cfg := identity.ListenerConfig{
		Source: d.source(spiffeid.ControlPlane(d.td)), TrustDomain: d.td, Withdrawals: d.registry, Denied: d.denied.Denied,
		Register: func(_ context.Context, c *tls.Conn) {
			d.mu.Lock()
			d.arrived++
			d.mu.Unlock()
			_, _ = io.Copy(io.Discard, c)
		},
		Refused: func(reason string) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.refused[reason]++
		},
	}
	if change != nil {
		change(&cfg)
	}
	d.listener, err = identity.Open(inner, cfg)
	must(t, err)
	ids, err := identity.New(identity.Config{Signer: d.ca, Bundle: d.ca.Bundle, JWT: d.ca, Denied: d.denied.Denied})
	must(t, err)
	g := grpc.NewServer(identity.ServerOptions()...)
	ids.Register(g)
	controlpb.RegisterSessionsServer(g, echoSessions{})
	controlpb.RegisterOperatorServer(g, controlpb.UnimplementedOperatorServer{})
	controlpb.RegisterGatewaysServer(g, controlpb.UnimplementedGatewaysServer{})
	controlpb.RegisterADSServer(g, noDiscovery{})
	spans, err := traces.NewReceiver(traces.ReceiverConfig{
		Store: traces.NewStore(traces.StoreConfig{}), Cluster: "us-east", Peer: identity.IDFromContext,
	})
	must(t, err)
	spans.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(d.listener) }()
	t.Cleanup(func() {
		g.Stop()
		must(t, d.listener.Close())
		<-served
		if n := d.registry.Len(); n != 0 {
			t.Errorf("%d connections are left in the registry", n)
		}
	})
	return d
}

// echoSessions answers every report with the caller's ID.
type echoSessions struct {
	controlpb.UnimplementedSessionsServer
}

func (echoSessions) Report(s grpc.BidiStreamingServer[controlpb.SessionReport, controlpb.SessionNotice]) error {
	for {
		if _, err := s.Recv(); err != nil {
			return nil
		}
		id, err := identity.IDFromContext(s.Context())
		if err != nil {
			return err
		}
		if err := s.Send(&controlpb.SessionNotice{Notice: id.String()}); err != nil {
			return err
		}
	}
}

// noDiscovery ends every stream.
type noDiscovery struct{}

func (noDiscovery) StreamAggregatedResources(grpc.BidiStreamingServer[controlpb.DiscoveryRequest, controlpb.DiscoveryResponse]) error {
	return status.Error(codes.Unimplemented, "not here")
}

func (noDiscovery) DeltaAggregatedResources(grpc.BidiStreamingServer[controlpb.DeltaDiscoveryRequest, controlpb.DeltaDiscoveryResponse]) error {
	return status.Error(codes.Unimplemented, "not here")
}

func (d *door) source(id spiffeid.ID) *trust.Source {
	d.t.Helper()
	s := trust.NewSource(trust.SourceConfig{})
	bundles, err := trust.NewBundles(d.ca.Bundle())
	must(d.t, err)
	s.SetBundles(bundles)
	svid, err := d.ca.IssueKey(id, time.Hour)
	must(d.t, err)
	s.SetIdentity(svid)
	return s
}

func (d *door) dial(source *trust.Source) *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient(d.listener.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(
		source.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeControlPlane(d.td), ALPN: []string{"h2"}}))))
	must(d.t, err)
	d.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (d *door) count(reason string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.refused[reason]
}

func (d *door) workload(sa string) spiffeid.ID {
	id, err := spiffeid.Workload(d.td, "shop", sa)
	must(d.t, err)
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(within)
	for !cond() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("%s: not within %v", what, within)
		}
	}
}

func request(t *testing.T, names ...string) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.CertificateRequest{}
	for _, n := range names {
		u, err := url.Parse(n)
		must(t, err)
		template.URIs = append(template.URIs, u)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	must(t, err)
	return csr, key
}

// TestRenewIssuesTheCallersOwnID is half of T9: whatever the request asks for, the certificate is for the caller.
func TestRenewIssuesTheCallersOwnID(t *testing.T) {
	d := openDoor(t, nil)
	web := d.workload("web")
	client := controlpb.NewIdentityClient(d.dial(d.source(web)))
	csr, key := request(t, spiffeid.ControlPlane(d.td).String(), "spiffe://us-east.acme/ns/kube-system/sa/root")
	r, err := client.Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr})
	must(t, err)
	id, err := trust.NewIdentity(r.GetChainDer(), key)
	must(t, err)
	if id.ID != web {
		t.Fatalf("issued %s, want %s", id.ID, web)
	}
	if left := time.Until(id.NotAfter); left < 35*time.Hour || left > 37*time.Hour || r.GetNotAfterUnix() != id.NotAfter.Unix() {
		t.Fatalf("lives for %v", left)
	}
	bundle, err := trust.ParseBundle(d.td, r.GetBundleJwks())
	must(t, err)
	if bundle.Hash() != d.ca.Bundle().Hash() {
		t.Fatal("another bundle")
	}
	for name, csr := range map[string][]byte{"none": nil, "garbage": []byte("garbage"), "huge": make([]byte, 1<<20)} {
		if _, err := client.Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// services are all that 7400 serves: those of the protos, and the two that are registered under other projects' names.
func services() map[string][]string {
	all := map[string][]string{
		controlpb.ADSServiceName:                              {"StreamAggregatedResources", "DeltaAggregatedResources"},
		"opentelemetry.proto.collector.trace.v1.TraceService": {"Export"},
	}
	for _, file := range []protoreflect.FileDescriptor{
		controlpb.File_proxy_proto, controlpb.File_operator_proto, controlpb.File_discovery_proto, controlpb.File_resources_proto,
		controlpb.File_localsession_proto,
	} {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				all[string(s.FullName())] = append(all[string(s.FullName())], string(s.Methods().Get(j).Name()))
			}
		}
	}
	return all
}

// TestRolesMatrix is T9: every kind of caller against every RPC of the protos. An RPC without a row fails here.
func TestRolesMatrix(t *testing.T) {
	d := openDoor(t, nil)
	gateway, err := spiffeid.Gateway(d.td, "gw-1")
	must(t, err)
	operator, err := spiffeid.Operator(d.td, "ann")
	must(t, err)
	callers := map[identity.Kind]*grpc.ClientConn{
		identity.Workload: d.dial(d.source(d.workload("web"))), identity.Gateway: d.dial(d.source(gateway)),
		identity.Operator: d.dial(d.source(operator)), identity.ControlPlane: d.dial(d.source(spiffeid.ControlPlane(d.td))),
	}
	cells := 0
	for service, methods := range services() {
		for _, m := range methods {
			full := "/" + service + "/" + m
			allowed := identity.Callers(full)
			if allowed == 0 {
				t.Errorf("%s has no row in the table of roles", full)
			}
			if allowed&identity.ControlPlane != 0 || allowed&identity.Operator != 0 && allowed != identity.Operator ||
				(allowed == identity.Operator) != strings.HasPrefix(service, "strait.v1.Operator") {
				t.Errorf("%s is for %s", full, allowed)
			}
			for kind, conn := range callers {
				cells++
				err := conn.Invoke(t.Context(), full, &emptypb.Empty{}, &emptypb.Empty{})
				refused := problem.Is(wire.FromStatus(err), problem.AccessDenied)
				if status.Code(err) == codes.Unimplemented && strings.Contains(err.Error(), "unknown service") {
					t.Errorf("%s is not served by this test", full)
				}
				if refused != (allowed&kind == 0) {
					t.Errorf("%s by %s: %v; it is for %s", full, kind, err, allowed)
				}
			}
		}
	}
	if cells < 4*20 {
		t.Errorf("only %d cells", cells)
	}
}

func TestWhoGetsIn(t *testing.T) {
	d := openDoor(t, nil)
	other := openDoor(t, nil) // the same trust domain's name, another root
	foreign, err := spiffeid.ParseTrustDomain("eu-west.acme")
	must(t, err)
	denied := d.workload("denied")
	must(t, d.denied.Add(denied, "laptop lost"))
	try := func(source *trust.Source) error {
		conn := d.dial(source)
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		csr, _ := request(t)
		_, err := controlpb.NewIdentityClient(conn).Renew(ctx, &controlpb.RenewRequest{CsrDer: csr})
		return err
	}
	must(t, try(d.source(d.workload("web"))))

	forged := other.source(other.workload("web"))
	bundles, err := trust.NewBundles(d.ca.Bundle()) // it believes the server, the server does not believe it
	must(t, err)
	forged.SetBundles(bundles)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	must(t, err)
	foreignCA, err := ca.Create(dir, ca.Config{TrustDomain: foreign})
	must(t, err)
	stranger := trust.NewSource(trust.SourceConfig{})
	stranger.SetBundles(bundles)
	strangerID, err := spiffeid.Workload(foreign, "shop", "web")
	must(t, err)
	svid, err := foreignCA.IssueKey(strangerID, 0)
	must(t, err)
	stranger.SetIdentity(svid)
	for _, tt := range []struct {
		name   string
		source *trust.Source
		reason string
	}{
		{"another root", forged, "untrusted"},
		{"another trust domain", stranger, "unknown_trust_domain"},
		{"a withdrawn identity", d.source(denied), "not_authorized"},
		{"a catalog signer", d.source(spiffeid.CatalogSigner(d.td)), "not_authorized"},
	} {
		before := d.count(tt.reason)
		if err := try(tt.source); err == nil {
			t.Errorf("%s got in", tt.name)
		}
		eventually(t, tt.name+": the reason is counted", func() bool { return d.count(tt.reason) > before })
	}
}

func TestWithdrawalEndsConnections(t *testing.T) {
	d := openDoor(t, nil)
	web := d.workload("web")
	stream, err := controlpb.NewSessionsClient(d.dial(d.source(web))).Report(t.Context())
	must(t, err)
	must(t, stream.Send(&controlpb.SessionReport{}))
	n, err := stream.Recv()
	must(t, err)
	if n.GetNotice() != web.String() {
		t.Fatalf("the server sees %s", n.GetNotice())
	}
	if s := d.registry.Snapshot(); len(s) != 1 || s[0].Identity != web || s[0].Class != identity.Class || time.Until(s[0].NotAfter) > time.Hour {
		t.Fatalf("registry %+v", s)
	}
	changed := d.denied.Changed()
	must(t, d.denied.Add(web, "test"))
	<-changed
	d.registry.Judge(func(s withdrawal.Subject) (string, bool) {
		reason, denied := d.denied.Denied(s.Identity, s.Issued)
		return reason, !denied
	})
	if _, err := stream.Recv(); err == nil {
		t.Fatal("the stream goes on")
	}
	eventually(t, "the registry is empty", func() bool { return d.registry.Len() == 0 })
}

// TestGarbage is what a port of the mesh hears from the world: it costs a refusal, and nothing stays.
func TestGarbage(t *testing.T) {
	d := openDoor(t, func(c *identity.ListenerConfig) { c.HandshakeTimeout = 300 * time.Millisecond })
	noise := make([]byte, 10<<20)
	_, _ = rand.Read(noise)
	for name, send := range map[string]func(net.Conn){
		"silence":           func(net.Conn) {},
		"random bytes":      func(c net.Conn) { _, _ = c.Write(noise[:64<<10]) },
		"HTTP":              func(c net.Conn) { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") },
		"half a hello":      func(c net.Conn) { _, _ = c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}) },
		"a 10 MB header":    func(c net.Conn) { _, _ = c.Write(noise) },
		"opened and closed": func(c net.Conn) { _ = c.Close() },
	} {
		c, err := net.Dial("tcp", d.listener.Addr().String())
		must(t, err)
		begin := time.Now()
		_ = c.SetDeadline(begin.Add(within))
		send(c)
		got, _ := io.ReadAll(io.LimitReader(c, 1<<20))
		if len(got) > 64 { // an alert at most
			t.Errorf("%s: %d bytes came back", name, len(got))
		}
		if took := time.Since(begin); took > within/2 {
			t.Errorf("%s: the connection was held for %v", name, took)
		}
		_ = c.Close()
	}
	// TLS without a certificate, without a protocol, and with a wrong one.
	pool := d.source(d.workload("web"))
	for name, cfg := range map[string]*tls.Config{
		"no protocol":    pool.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny()}),
		"wrong protocol": pool.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"http/1.1"}}),
		"no certificate": {InsecureSkipVerify: true, NextProtos: []string{"h2"}}, // a client that does not care
	} {
		c, err := tls.Dial("tcp", d.listener.Addr().String(), cfg)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(within))
			_, err = c.Read(make([]byte, 1))
			_ = c.Close()
		}
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v, want an alert", name, err)
		}
	}
	csr, _ := request(t)
	_, err := controlpb.NewIdentityClient(d.dial(pool)).Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr})
	must(t, err)
	if d.count("timeout") == 0 || d.count("not_tls") == 0 {
		t.Errorf("reasons %v", d.refused)
	}
}

// TestSilentCrowd fills the places for pending connections: the oldest gives way, so that an honest caller gets in at once.
func TestSilentCrowd(t *testing.T) {
	d := openDoor(t, func(c *identity.ListenerConfig) { c.MaxPending, c.HandshakeTimeout = 8, time.Minute })
	var crowd []net.Conn
	for range 20 {
		c, err := net.Dial("tcp", d.listener.Addr().String())
		must(t, err)
		defer c.Close()
		crowd = append(crowd, c)
	}
	_ = crowd[0].SetReadDeadline(time.Now().Add(within))
	if _, err := crowd[0].Read(make([]byte, 1)); err == nil {
		t.Error("the oldest silent connection is still open")
	}
	csr, _ := request(t)
	_, err := controlpb.NewIdentityClient(d.dial(d.source(d.workload("web")))).Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr})
	must(t, err)
	if d.count("too_many_pending") < 12 {
		t.Errorf("%d gave way", d.count("too_many_pending"))
	}
}

func TestRegistrationProtocol(t *testing.T) {
	d := openDoor(t, nil)
	pin := d.ca.Bundle().Hash()
	cfg := trust.PinnedClientTLS(pin, nil, nil, trust.TLSOptions{Authorize: trust.AuthorizeControlPlane(d.td), ALPN: []string{"strait-register/1"}}, nil)
	c, err := tls.Dial("tcp", d.listener.Addr().String(), cfg)
	must(t, err)
	eventually(t, "it is handed over", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return d.arrived == 1 })
	_ = c.Close()

	closed := openDoor(t, func(c *identity.ListenerConfig) { c.Register = nil })
	if c, err := tls.Dial("tcp", closed.listener.Addr().String(), cfg); err == nil {
		_ = c.Close()
		t.Fatal("registration is not served there")
	}
}
