// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	nethttp "net/http"
	"slices"
	"sync"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"golang.org/x/net/http2"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/sidecar/http"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// engine is what these tests judge: they see only what a client and a backend see. Another engine gets a row here.
type engine struct {
	name     string
	outbound func(http.OutboundConfig) (outbound, error)
	inbound  func(http.InboundConfig) (inbound, error)
	client   func(net.Conn, http.ConnConfig) (clientConn, error)
}

type outbound interface {
	ServeConn(context.Context, net.Conn)
	Close() error
}

type inbound interface {
	ServeConn(context.Context, net.Conn, spiffeid.ID)
	Close() error
}

type clientConn interface {
	http.ClientConn
	Ready() bool
	Active() int
	Retire()
	Closed() <-chan struct{}
}

var engines = []engine{{
	name:     "nethttp",
	outbound: func(c http.OutboundConfig) (outbound, error) { return http.NewOutbound(c) },
	inbound:  func(c http.InboundConfig) (inbound, error) { return http.NewInbound(c) },
	client:   func(c net.Conn, cfg http.ConnConfig) (clientConn, error) { return http.NewClientConn(c, cfg) },
}}

// each runs a test for every engine.
func each(t *testing.T, test func(*testing.T, engine)) {
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) { test(t, e) })
	}
}

const patience = 10 * time.Second

var (
	callerID = mustID("spiffe://us-east.acme/ns/shop/sa/web")
	calleeID = mustID("spiffe://eu-west.acme/ns/shop/sa/checkout")
	service  = federation.ServiceName{Namespace: "shop", Name: "checkout"}
)

func mustID(s string) spiffeid.ID {
	id, err := spiffeid.Parse(s)
	if err != nil {
		panic(err)
	}
	return id
}

// serverTLS is a throw-away certificate: who is who is judged elsewhere, here only bytes move.
var serverTLS = sync.OnceValue(func() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"},
	}
})

// place is one callee's sidecar as the fake picker knows it.
type place struct {
	cluster  federation.ClusterName
	instance string
	dial     func(ctx context.Context, alpn string) (net.Conn, error)

	mu   sync.Mutex
	conn clientConn
}

// fakePicker behaves like a small sidecar: it goes through its places in order, skips what was tried, and pools one
// connection for each. While every places is set, it starts at the next one for each request.
type fakePicker struct {
	engine engine
	places []*place

	mu       sync.Mutex
	outcomes []http.Outcome
	metas    []http.Meta
	begun    []span.Context
	ended    *sync.Cond
	upgrades []clientConn
}

func newPicker(e engine, places ...*place) *fakePicker {
	p := &fakePicker{engine: e, places: places}
	p.ended = sync.NewCond(&p.mu)
	return p
}

func (p *fakePicker) Pick(ctx context.Context, m http.Meta, tried []http.Tried) (*http.Leg, error) {
	p.mu.Lock()
	p.metas = append(p.metas, m)
	p.mu.Unlock()
	for _, at := range p.places {
		if slices.ContainsFunc(tried, func(t http.Tried) bool { return t.Cluster == at.cluster && t.Instance == at.instance }) {
			continue
		}
		leg := &http.Leg{Cluster: at.cluster, Instance: at.instance, Tier: 1, Reason: federation.PriorityOK, Policy: "shop/checkout",
			Candidates: []string{"us-east 0/4 tripped"}, Remote: at.cluster != "us-east", Scope: "cross_region", PeerID: calleeID}
		leg.Begin = func(c span.Context) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.begun = append(p.begun, c)
		}
		leg.Done = p.done
		var conn clientConn
		if m.Upgrade != "" {
			conn, leg.Err = p.open(ctx, at, "http/1.1")
			p.mu.Lock()
			if conn != nil {
				p.upgrades = append(p.upgrades, conn)
			}
			p.mu.Unlock()
			leg.Done = func(o http.Outcome) {
				if conn != nil {
					conn.Close()
				}
				p.done(o)
			}
		} else {
			conn, leg.Err = p.pooled(ctx, at)
		}
		if leg.Err == nil {
			leg.Conn = conn
		}
		return leg, nil
	}
	return nil, &http.Refusal{Reason: federation.NoEndpoints, Code: "STR-4102", Message: fmt.Sprintf("0/%d healthy", len(p.places))}
}

func (p *fakePicker) done(o http.Outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outcomes = append(p.outcomes, o)
	p.ended.Broadcast()
}

// await waits until n attempts have ended and returns their outcomes.
func (p *fakePicker) await(t *testing.T, n int) []http.Outcome {
	t.Helper()
	timer := time.AfterFunc(patience, func() { p.ended.Broadcast() })
	defer timer.Stop()
	deadline := time.Now().Add(patience)
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.outcomes) < n && time.Now().Before(deadline) {
		p.ended.Wait()
	}
	if len(p.outcomes) < n {
		t.Fatalf("%d attempts ended, want %d", len(p.outcomes), n)
	}
	return slices.Clone(p.outcomes)
}

func (p *fakePicker) pooled(ctx context.Context, at *place) (clientConn, error) {
	at.mu.Lock()
	defer at.mu.Unlock()
	if at.conn != nil && at.conn.Ready() {
		return at.conn, nil
	}
	conn, err := p.open(ctx, at, "h2")
	if err != nil {
		return nil, err
	}
	if at.conn != nil {
		at.conn.Retire()
	}
	at.conn = conn
	return conn, nil
}

func (p *fakePicker) open(ctx context.Context, at *place, alpn string) (clientConn, error) {
	raw, err := at.dial(ctx, alpn)
	if err != nil {
		return nil, err
	}
	return p.engine.client(raw, http.ConnConfig{})
}

func (p *fakePicker) close() {
	p.mu.Lock()
	upgrades := p.upgrades
	p.mu.Unlock()
	for _, c := range upgrades {
		c.Close()
	}
	for _, at := range p.places {
		at.mu.Lock()
		if at.conn != nil {
			at.conn.Close()
		}
		at.mu.Unlock()
	}
}

// rig is application → outbound → (TLS, h2 or http/1.1) → inbound → backend over real sockets.
type rig struct {
	t        *testing.T
	engine   engine
	address  string // where the application connects
	picker   *fakePicker
	spans    *span.Recorder
	exported chan *tracepb.TracesData
	seen     []*tracepb.Span
	metrics  *metric.Registry
	cancel   context.CancelFunc // ends the context of outbound connections

	inboundAddress string

	mu     sync.Mutex
	allow  func(http.Call) *http.Refusal
	app    []http.Outcome // of the inbound's instances
	picked []http.Call
}

type rigOptions struct {
	backends []string // addresses; the inbound tries them in order
	protocol http.AppProtocol
	places   []*place // instead of the inbound
	budget   *http.Budget
	limits   http.Limits
	resolve  http.Resolve
	attempts int
	loosely  bool // no policy judges paths
}

func newRig(t *testing.T, e engine, o rigOptions) *rig {
	t.Helper()
	r := &rig{t: t, engine: e, metrics: metric.New(metric.Config{}), exported: make(chan *tracepb.TracesData, 1000)}
	r.recordSpans()
	requests := metric.NewRequests(r.metrics)
	places := o.places
	if places == nil {
		places = []*place{r.callee(o, requests)}
	}
	r.picker = newPicker(e, places...)
	t.Cleanup(r.picker.close)
	if o.resolve == nil {
		o.resolve = func(host, port string) (http.Target, error) {
			if host != "checkout.shop" {
				return http.Target{}, errors.New("no service " + host)
			}
			return http.Target{Service: service, Port: "http"}, nil
		}
	}
	out, err := e.outbound(http.OutboundConfig{
		Name: "us-east/shop/web", Self: http.Local{Service: "shop/web", Cluster: "us-east", Region: "use1"}, Picker: r.picker, Resolve: o.resolve,
		Budget: o.budget, Recorder: r.spans, Metrics: requests, Limits: o.limits, Attempts: o.attempts,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.address = listen(t, func(c net.Conn) { out.ServeConn(ctx, c) }, func() { out.Close(); cancel() })
	return r
}

// recordSpans runs a recorder until the test ends.
func (r *rig) recordSpans() {
	r.spans = span.NewRecorder(span.Config{Batch: 1, Export: func(_ context.Context, data *tracepb.TracesData) error {
		select {
		case r.exported <- data:
		default: // a test that does not look
		}
		return nil
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() { r.spans.Run(ctx) })
	r.t.Cleanup(func() {
		cancel()
		wait.Wait()
	})
}

// callee starts an inbound in front of the backends and returns the place that leads to it.
func (r *rig) callee(o rigOptions, requests *metric.Requests) *place {
	in, err := r.engine.inbound(http.InboundConfig{
		Name: "eu-west/shop/checkout", Self: http.Local{Service: "shop/checkout", Cluster: "eu-west"}, SelfID: func() spiffeid.ID { return calleeID },
		Service: service, Port: "http", Protocol: o.protocol, Recorder: r.spans, Metrics: requests, Limits: o.limits,
		Authorize: func(c http.Call) *http.Refusal {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.picked = append(r.picked, c)
			if r.allow != nil {
				return r.allow(c)
			}
			return nil
		},
		JudgesPaths: func() bool { return !o.loosely },
		PeerCluster: func(spiffeid.ID) string { return "us-east" },
		PickInstance: func(_ context.Context, tried []string) (*http.Instance, error) {
			for i, address := range o.backends {
				if name := fmt.Sprintf("checkout-%d", i); !slices.Contains(tried, name) {
					return &http.Instance{Name: name, Address: address, Done: r.appDone}, nil
				}
			}
			return nil, nil
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	address := listen(r.t, func(c net.Conn) {
		secured := tls.Server(c, serverTLS())
		if err := secured.Handshake(); err != nil {
			c.Close()
			return
		}
		in.ServeConn(context.Background(), secured, callerID)
	}, func() { in.Close() })
	r.inboundAddress = address
	return &place{cluster: "eu-west", instance: "a1", dial: dialTLS(address)}
}

func (r *rig) appDone(o http.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.app = append(r.app, o)
}

func dialTLS(address string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, alpn string) (net.Conn, error) {
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}, MinVersion: tls.VersionTLS13}} // see serverTLS
		return d.DialContext(ctx, "tcp", address)
	}
}

// listen serves connections until the test ends; stop must make serve return, and is waited for.
func listen(t *testing.T, serve func(net.Conn), stop func()) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wait.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		stop()
		wait.Wait()
	})
	return l.Addr().String()
}

// backend starts an HTTP/1.1 application.
func backend(t *testing.T, h nethttp.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &nethttp.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return l.Addr().String()
}

// backendH2C starts an application that speaks HTTP/2 without TLS.
func backendH2C(t *testing.T, h nethttp.HandlerFunc) string {
	return listenTracked(t, func(c net.Conn) {
		(&http2.Server{}).ServeConn(c, &http2.ServeConnOpts{Handler: h})
	})
}

// listenTracked serves connections and cuts them at the test's end.
func listenTracked(t *testing.T, serve func(net.Conn)) string {
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	return listen(t, func(c net.Conn) {
		mu.Lock()
		conns[c] = true
		mu.Unlock()
		serve(c)
		c.Close()
	}, func() {
		mu.Lock()
		defer mu.Unlock()
		for c := range conns {
			c.Close()
		}
	})
}

// client is an HTTP/1.1 application in front of the rig.
func (r *rig) client() *nethttp.Client {
	tr := &nethttp.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", r.address)
	}, ExpectContinueTimeout: patience}
	r.t.Cleanup(tr.CloseIdleConnections)
	return &nethttp.Client{Transport: tr, Timeout: 2 * patience, CheckRedirect: func(*nethttp.Request, []*nethttp.Request) error { return nethttp.ErrUseLastResponse }}
}

// clientH2 is an application that speaks HTTP/2 with prior knowledge.
func (r *rig) clientH2() *nethttp.Client {
	tr := &http2.Transport{AllowHTTP: true, DisableCompression: true, DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", r.address)
	}}
	r.t.Cleanup(tr.CloseIdleConnections)
	return &nethttp.Client{Transport: tr, Timeout: 2 * patience, CheckRedirect: func(*nethttp.Request, []*nethttp.Request) error { return nethttp.ErrUseLastResponse }}
}

func (r *rig) dial() net.Conn {
	r.t.Helper()
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		r.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(2 * patience))
	r.t.Cleanup(func() { c.Close() })
	return c
}

// recorded waits until want spans have ended and returns all so far.
func (r *rig) recorded(want int) []*tracepb.Span {
	r.t.Helper()
	late := time.After(patience)
	for len(r.seen) < want {
		select {
		case data := <-r.exported:
			r.seen = append(r.seen, data.ResourceSpans[0].ScopeSpans[0].Spans...)
		case <-late:
			r.t.Fatalf("%d spans, want %d: %v", len(r.seen), want, r.seen)
		}
	}
	return r.seen
}

func attribute(s *tracepb.Span, key string) *commonpb.AnyValue {
	for _, kv := range s.Attributes {
		if kv.Key == key {
			return kv.Value
		}
	}
	return &commonpb.AnyValue{}
}

func appProtocol(p int) http.AppProtocol { return http.AppProtocol(p) }

// awaitMetric waits until a series with (at least) these labels is above zero and returns its value.
func (r *rig) awaitMetric(name string, labels map[string]string) float64 {
	r.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-time.After(time.Millisecond) {
		if v := r.metric(name, labels); v > 0 {
			return v
		}
	}
	r.t.Fatalf("no %s%v", name, labels)
	return 0
}

func (r *rig) metric(name string, labels map[string]string) (sum float64) {
	families, err := r.metrics.Gather().Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.Metric {
			have := map[string]string{}
			for _, l := range m.Label {
				have[l.GetName()] = l.GetValue()
			}
			for k, v := range labels {
				if have[k] != v {
					continue series
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}
