// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const fed = federation.FederationName("acme")

func logger(t *testing.T) *slog.Logger {
	if os.Getenv("STRAIT_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// within polls cond, which some other goroutine makes true.
func within(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	end := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// cluster is one trust domain with its CA and what its discovery says.
type cluster struct {
	t      *testing.T
	name   federation.ClusterName
	td     spiffeid.TrustDomain
	ca     *ca.CA
	client *fakeClient
	gw     *gateway.Gateway
	addrs  gateway.Addrs
	stop   func() error
}

func newCluster(t *testing.T, name string) *cluster {
	t.Helper()
	dir := must(datadir.Create(t.TempDir() + "/" + name))
	t.Cleanup(func() { dir.Close() })
	td := must(spiffeid.ParseTrustDomain(name + ".acme"))
	c := &cluster{t: t, name: federation.ClusterName(name), td: td}
	c.ca = must(ca.Create(dir, ca.Config{TrustDomain: td}))
	c.client = newFakeClient(c, must(spiffeid.Gateway(td, "gw-1")))
	return c
}

// source is an identity of the cluster that trusts the bundles of others, too.
func (c *cluster) source(id spiffeid.ID, others ...*cluster) *trust.Source {
	s := trust.NewSource(trust.SourceConfig{})
	s.SetIdentity(must(c.ca.IssueKey(id, time.Hour)))
	bundles := []*trust.Bundle{c.ca.Bundle()}
	for _, o := range others {
		bundles = append(bundles, o.ca.Bundle())
	}
	s.SetBundles(must(trust.NewBundles(bundles...)))
	return s
}

func (c *cluster) workload(name string) spiffeid.ID {
	return must(spiffeid.Workload(c.td, "shop", name))
}

// start runs the cluster's gateway.
func (c *cluster) start(change ...func(*gateway.Config)) {
	c.t.Helper()
	bound := make(chan gateway.Addrs, 1)
	cfg := gateway.Config{Listen: "127.0.0.1:0", LocalListen: "127.0.0.1:0", MetricsListen: "127.0.0.1:0", Client: c.client,
		Logger: logger(c.t).With("cluster", string(c.name)), Bound: func(a gateway.Addrs) { bound <- a },
		DrainGrace: 200 * time.Millisecond, HeadStart: 10 * time.Second} // no TCP because this machine is busy
	for _, f := range change {
		f(&cfg)
	}
	c.gw = must(gateway.New(cfg))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.gw.Run(ctx) }()
	c.stop = sync.OnceValue(func() error { cancel(); return <-done })
	c.t.Cleanup(func() {
		if err := c.stop(); err != nil {
			c.t.Errorf("gateway of %s: %v", c.name, err)
		}
	})
	select {
	case c.addrs = <-bound:
	case err := <-done:
		c.t.Fatalf("gateway of %s did not start: %v", c.name, err)
	}
}

// knows makes o a ready peer of c; addresses are where c may dial it.
func (c *cluster) knows(o *cluster, addresses ...string) {
	c.client.set(controlpb.TypePeer, o.td.String(), &controlpb.Peer{
		TrustDomain: o.td.String(), Cluster: string(o.name), Federation: string(fed), State: controlpb.PeerState_PEER_STATE_READY,
		BundleJwks: o.ca.Bundle().Marshal(), BundleSequence: 1,
		Gateways: []*controlpb.GatewayRecord{{Name: "gw-1", Addresses: addresses}},
	})
}

// exports lets peer o reach a port of shop/<name>.
func (c *cluster) exports(o *cluster, name string, ports ...string) {
	g := &controlpb.Grant{PeerTrustDomain: o.td.String(), Service: &controlpb.ServiceRef{Namespace: "shop", Name: name},
		ExportId: "export-" + name}
	for _, p := range ports {
		g.Ports = append(g.Ports, &controlpb.ServicePort{Name: p, Number: 80})
	}
	c.client.set(controlpb.TypeGrant, o.td.String()+"/shop/"+name, g)
}

func (c *cluster) unexports(o *cluster, name string) {
	c.client.set(controlpb.TypeGrant, o.td.String()+"/shop/"+name, nil)
}

// serves says which sidecars stand before shop/<name>.
func (c *cluster) serves(name string, endpoints ...*controlpb.LocalEndpoint) {
	c.client.set(controlpb.TypeService, "shop/"+name, &controlpb.Service{Namespace: "shop", Name: name, Local: endpoints,
		Ports: []*controlpb.ServicePort{{Name: "http", Number: 80}}})
}

func (c *cluster) sni(name string) string {
	return federation.SNI("http", federation.ServiceName{Namespace: "shop", Name: name}, c.name, fed)
}

// fakeClient is a control plane that says what the test sets, with the behaviour of proxyclient: watchers hear what is
// known and each change, from one goroutine at a time, and the bundles of peers are kept in the source.
type fakeClient struct {
	c      *cluster
	info   proxyclient.Info
	source *trust.Source
	conn   grpc.ClientConnInterface

	mu         sync.Mutex
	resources  map[string]map[string]proto.Message
	subscribed map[string]map[string]bool
	watchers   map[int]func(proxyclient.Change) error
	next       int
}

func newFakeClient(c *cluster, id spiffeid.ID) *fakeClient {
	name, _ := id.Gateway()
	return &fakeClient{c: c, source: c.source(id), info: proxyclient.Info{Name: name, ID: id, TrustDomain: c.td, Cluster: c.name,
		Federation: fed, Locality: federation.Locality{Region: "r", Zone: "z"}},
		resources: map[string]map[string]proto.Message{}, subscribed: map[string]map[string]bool{},
		watchers: map[int]func(proxyclient.Change) error{}}
}

func (f *fakeClient) Source() *trust.Source          { return f.source }
func (f *fakeClient) Info() proxyclient.Info         { return f.info }
func (f *fakeClient) Conn() grpc.ClientConnInterface { return f.conn }

func (f *fakeClient) SubscribeAll(typeURL string) { f.Subscribe(typeURL, "*") }

func (f *fakeClient) Subscribe(typeURL string, names ...string) {
	// proxyclient answers from its own goroutine, also when the subscriber is inside a watcher.
	f.c.t.Helper()
	if f.subscribed[typeURL] == nil {
		f.subscribed[typeURL] = map[string]bool{}
	}
	for _, n := range names {
		f.subscribed[typeURL][n] = true
	}
}

func (f *fakeClient) Unsubscribe(typeURL string, names ...string) {
	for _, n := range names {
		delete(f.subscribed[typeURL], n)
	}
}

func (f *fakeClient) List(typeURL string) map[string]proto.Message {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.resources[typeURL])
}

func (f *fakeClient) Watch(w func(proxyclient.Change) error) (cancel func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	n := f.next
	f.watchers[n] = w
	for typeURL, all := range f.resources {
		for name, m := range all {
			if err := w(proxyclient.Change{TypeURL: typeURL, Name: name, Message: m}); err != nil {
				f.c.t.Errorf("watcher refused %s: %v", name, err)
			}
		}
	}
	return func() { f.mu.Lock(); delete(f.watchers, n); f.mu.Unlock() }
}

// set changes one resource; nil removes it.
func (f *fakeClient) set(typeURL, name string, m proto.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.resources[typeURL] == nil {
		f.resources[typeURL] = map[string]proto.Message{}
	}
	if m == nil {
		delete(f.resources[typeURL], name)
	} else {
		f.resources[typeURL][name] = m
	}
	if typeURL == controlpb.TypePeer {
		td := must(spiffeid.ParseTrustDomain(name))
		if p, ok := m.(*controlpb.Peer); ok {
			f.source.SetBundles(f.source.Bundles().With(must(trust.ParseBundle(td, p.BundleJwks))))
		} else {
			f.source.SetBundles(f.source.Bundles().Without(td))
		}
	}
	for _, w := range f.watchers {
		if err := w(proxyclient.Change{TypeURL: typeURL, Name: name, Message: m}); err != nil {
			f.c.t.Errorf("watcher refused %s: %v", name, err)
		}
	}
}

// callee is a sidecar in front of an echo: it answers each connection with what it read, after "hello".
type callee struct {
	ln     net.Listener
	id     spiffeid.ID
	proxy  string
	closed chan error // how each connection's reading ended
	wg     sync.WaitGroup
}

func (c *cluster) callee(name string, others ...*cluster) *callee {
	c.t.Helper()
	s := &callee{ln: must(net.Listen("tcp", "127.0.0.1:0")), id: c.workload(name), proxy: "shop/" + name,
		closed: make(chan error, 64)}
	config := c.source(s.id, others...).ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny()})
	s.wg.Go(func() { s.serve(config) })
	c.t.Cleanup(func() { s.ln.Close(); s.wg.Wait() })
	return s
}

func (s *callee) serve(config *tls.Config) {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() {
			defer c.Close()
			tc := tls.Server(c, config)
			_ = tc.SetDeadline(time.Now().Add(20 * time.Second))
			if err := tc.Handshake(); err != nil {
				s.closed <- err
				return
			}
			_, err := io.Copy(tc, tc)
			if err == nil {
				_, err = tc.Write([]byte("-end"))
			}
			_ = tc.CloseWrite()
			s.closed <- err
		})
	}
}

func (s *callee) endpoint(healthy uint32) *controlpb.LocalEndpoint {
	return &controlpb.LocalEndpoint{Proxy: s.proxy, InboundAddress: s.ln.Addr().String(), SpiffeId: s.id.String(),
		Health: &controlpb.HealthCounts{Healthy: healthy, Unhealthy: 1}}
}

// caller is a sidecar with a local session.
type caller struct {
	c       *cluster
	source  *trust.Source
	session preface.SessionID
	key     []byte
	conn    *tls.Conn
	counter uint64
	notices chan *controlpb.ToSidecar
	wg      sync.WaitGroup
}

var errSessionRefused = errors.New("local session refused")

func (c *cluster) caller(name string, others ...*cluster) *caller {
	c.t.Helper()
	s, err := c.dialLocal(c.source(c.workload(name), others...), c)
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// dialLocal opens a local session with any identity.
func (c *cluster) dialLocal(source *trust.Source, server *cluster) (*caller, error) {
	raw := must(net.Dial("tcp", c.addrs.Local))
	tc := tls.Client(raw, source.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeTrustDomain(server.td), ALPN: []string{preface.ALPN}}))
	_ = tc.SetDeadline(time.Now().Add(5 * time.Second))
	s := &caller{c: c, source: source, conn: tc, notices: make(chan *controlpb.ToSidecar, 256)}
	err := tc.Handshake()
	if err == nil {
		err = tunnel.WriteFrame(tc, must(proto.Marshal(&controlpb.ToGateway{Message: &controlpb.ToGateway_Hello{
			Hello: &controlpb.LocalHello{WireVersion: 1, Proxy: "shop/web"}}})))
	}
	var m *controlpb.ToSidecar
	if err == nil {
		m, err = s.read()
	}
	if err != nil {
		raw.Close()
		return nil, errors.Join(errSessionRefused, err)
	}
	_ = tc.SetDeadline(time.Time{})
	s.session = preface.SessionID(m.GetWelcome().SessionId)
	s.key = must(preface.KeyFrom(tc.ConnectionState()))
	s.wg.Go(func() {
		defer close(s.notices)
		for {
			m, err := s.read()
			if err != nil {
				return
			}
			s.notices <- m
		}
	})
	c.t.Cleanup(func() {
		raw.Close()
		for range s.notices {
		}
		s.wg.Wait()
	})
	return s, nil
}

func (s *caller) read() (*controlpb.ToSidecar, error) {
	b, err := tunnel.ReadFrame(s.conn, 64<<10)
	if err != nil {
		return nil, err
	}
	m := &controlpb.ToSidecar{}
	return m, proto.Unmarshal(b, m)
}

// await reads notices until one satisfies f.
func (s *caller) await(what string, f func(*controlpb.ToSidecar) bool) {
	s.c.t.Helper()
	limit := time.After(10 * time.Second)
	for {
		select {
		case m, ok := <-s.notices:
			if !ok {
				s.c.t.Fatalf("session ended before %s", what)
			}
			if f(m) {
				return
			}
		case <-limit:
			s.c.t.Fatalf("no notice: %s", what)
		}
	}
}

// awaitPeer waits until the gateway says that the peer is up.
func (s *caller) awaitPeer(o *cluster, transport string) {
	s.c.t.Helper()
	s.await("peer "+string(o.name)+" up over "+transport, func(m *controlpb.ToSidecar) bool {
		for _, p := range m.GetPeers().GetPeers() {
			if p.TrustDomain == o.td.String() && p.State == "up" && p.Transport == transport {
				return true
			}
		}
		return false
	})
}

func (s *caller) preface(sni string) preface.Preface {
	s.counter++
	return preface.Preface{Session: s.session, Counter: s.counter, Authority: sni, Class: preface.ClassInteractive,
		Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
}

// dial makes one inner connection; the handshake is end to end with the far sidecar.
func (s *caller) dial(sni string, p preface.Preface, callee spiffeid.ID) (*tls.Conn, *preface.Conn, error) {
	raw := must(net.Dial("tcp", s.c.addrs.Local))
	pc := preface.NewConn(raw, p, s.key)
	tc := tls.Client(pc, s.source.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(callee), ServerName: sni}))
	_ = tc.SetDeadline(time.Now().Add(10 * time.Second))
	if err := tc.Handshake(); err != nil {
		raw.Close()
		return nil, nil, err
	}
	s.c.t.Cleanup(func() { raw.Close() })
	return tc, pc, nil
}

// call dials and sends one message, and wants the echo.
func (s *caller) call(o *cluster, service string) (*tls.Conn, *preface.Conn, error) {
	sni := o.sni(service)
	tc, pc, err := s.dial(sni, s.preface(sni), o.workload(service))
	if err != nil {
		return nil, nil, err
	}
	if _, err := tc.Write([]byte("ping")); err != nil {
		return nil, nil, err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(tc, b); err != nil || string(b) != "ping" {
		return nil, nil, errors.Join(errors.New("echo is "+string(b)), err)
	}
	return tc, pc, nil
}

// pair is two clusters whose gateways know each other; east may call west's shop/checkout.
func pair(t *testing.T, change ...func(*gateway.Config)) (east, west *cluster, web *caller, checkout *callee) {
	t.Helper()
	east, west = newCluster(t, "us-east"), newCluster(t, "eu-west")
	checkout = west.callee("checkout", east)
	west.start(change...)
	east.start(change...)
	west.exports(east, "checkout", "http")
	west.serves("checkout", checkout.endpoint(1))
	west.knows(east) // dial-out only: east has to dial
	east.knows(west, west.addrs.Listen)
	web = east.caller("web", west)
	return east, west, web, checkout
}

func code(err error) string {
	var r *preface.Refused
	if errors.As(err, &r) {
		return strings.TrimSuffix(r.Code.String()+" "+r.Reason, " ")
	}
	if err == nil {
		return "ok"
	}
	return err.Error()
}
