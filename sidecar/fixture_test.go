// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const fed = "acme"

// testCluster is a cluster's trust: a CA and its names.
type testCluster struct {
	t    testing.TB
	name string
	td   spiffeid.TrustDomain
	ca   *ca.CA
}

func newCluster(t testing.TB, name string) *testCluster {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(name + "." + fed)
	check(t, err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "data"))
	check(t, err)
	t.Cleanup(func() { dir.Close() })
	c, err := ca.Create(dir, ca.Config{TrustDomain: td})
	check(t, err)
	return &testCluster{t: t, name: name, td: td, ca: c}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *testCluster) id(sa string) spiffeid.ID {
	id, err := spiffeid.Workload(c.td, "shop", sa)
	check(c.t, err)
	return id
}

// source holds the identity of sa and the bundles of c and others.
func (c *testCluster) source(id spiffeid.ID, others ...*testCluster) *trust.Source {
	c.t.Helper()
	s := trust.NewSource(trust.SourceConfig{})
	identity, err := c.ca.IssueKey(id, time.Hour)
	check(c.t, err)
	s.SetIdentity(identity)
	list := []*trust.Bundle{c.ca.Bundle()}
	for _, o := range others {
		list = append(list, o.ca.Bundle())
	}
	bundles, err := trust.NewBundles(list...)
	check(c.t, err)
	s.SetBundles(bundles)
	return s
}

// self is a Self without inbound ports.
func (c *testCluster) self(proxy, sa string) *controlpb.Self {
	return &controlpb.Self{
		Name: "shop/" + proxy, SpiffeId: c.id(sa).String(), Federation: fed, Cluster: c.name, TrustDomain: c.td.String(),
		Locality: &controlpb.Locality{Region: c.name, Zone: "a"},
	}
}

func (c *testCluster) sni(service, port string) string {
	return port + "." + service + ".shop.svc." + c.name + "." + fed
}

// inbound is one port with its instances.
func (c *testCluster) inbound(service, port string, proto controlpb.Protocol, addrs ...string) *controlpb.InboundPort {
	p := &controlpb.InboundPort{
		Service:  &controlpb.ServiceRef{Namespace: "shop", Name: service},
		PortName: port, PortNumber: 80, Sni: c.sni(service, port), Protocol: proto,
		Access: &controlpb.Access{DefaultTrustDomains: []string{c.td.String()}},
	}
	for i, a := range addrs {
		p.Instances = append(p.Instances, &controlpb.Instance{Workload: service + "-" + strconv.Itoa(i), Address: a})
	}
	return p
}

// running is one sidecar under test.
type running struct {
	t     testing.TB
	addrs sidecar.Addrs
	snap  *sidecar.Snapshot
	reg   *metric.Registry
	stop  context.CancelFunc
	done  chan struct{}
	err   error
}

// start runs a sidecar with what snap holds and waits until it is ready.
func start(t testing.TB, proxy string, snap *sidecar.Snapshot, adjust func(*sidecar.Config)) *running {
	t.Helper()
	r := &running{t: t, snap: snap, reg: metric.New(metric.Config{}), done: make(chan struct{})}
	bound := make(chan sidecar.Addrs, 1)
	cfg := sidecar.Config{
		Proxy: "shop/" + proxy, Client: snap, InboundListen: "127.0.0.1:0", MetricsListen: "127.0.0.1:0", Metrics: r.reg,
		CheckEvery: 50 * time.Millisecond, ReportEvery: 200 * time.Millisecond, DrainDelay: time.Millisecond, DrainGrace: time.Second,
		Bound: func(a sidecar.Addrs) { bound <- a }, Logger: testLogger(t),
	}
	if adjust != nil {
		adjust(&cfg)
	}
	s, err := sidecar.New(cfg)
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() { defer close(r.done); r.err = s.Run(ctx) }()
	t.Cleanup(r.end)
	select {
	case r.addrs = <-bound:
	case <-r.done:
		t.Fatal(r.err)
	}
	return r
}

func (r *running) end() {
	r.stop()
	select {
	case <-r.done:
		if r.err != nil {
			r.t.Error(r.err)
		}
	case <-time.After(20 * time.Second):
		r.t.Error("the sidecar did not end")
	}
}

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("STRAIT_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("test", t.Name())
}

// endpoint is a sidecar as the Service resource lists it.
func endpoint(r *running, proxy string, id spiffeid.ID, healthy uint32) *controlpb.LocalEndpoint {
	return &controlpb.LocalEndpoint{
		Proxy: "shop/" + proxy, InboundAddress: r.addrs.Inbound, SpiffeId: id.String(),
		Health: &controlpb.HealthCounts{Healthy: healthy}, Locality: &controlpb.Locality{Zone: "a"},
	}
}

func service(name, port string, proto controlpb.Protocol, eps ...*controlpb.LocalEndpoint) *controlpb.Service {
	return &controlpb.Service{
		Namespace: "shop", Name: name, Ports: []*controlpb.ServicePort{{Name: port, Number: 80, Protocol: proto}}, Local: eps,
	}
}

// eventually waits for a condition that something else brings about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not seen in 10 s: %s", what)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func ready(r *running) func() bool {
	return func() bool {
		resp, err := http.Get("http://" + r.addrs.Metrics + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
}

// httpApp is an application that says its name.
type httpApp struct {
	*httptest.Server
	name   string
	status atomic.Int32
	served atomic.Int32
}

func newHTTPApp(t testing.TB, name string) *httpApp {
	a := &httpApp{name: name}
	a.status.Store(200)
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.served.Add(1)
		w.WriteHeader(int(a.status.Load()))
		io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, name)
	}))
	t.Cleanup(a.Close)
	return a
}

func (a *httpApp) addr() string { return a.Listener.Addr().String() }

// get calls through an upstream listener on a connection of its own.
func get(t testing.TB, addr, path string) (status int, body string) {
	t.Helper()
	status, body, err := tryGet(addr, path)
	if err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
	return status, body
}

func tryGet(addr, path string) (status int, body string, err error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := c.Get("http://" + addr + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// tcpApp echoes lines behind its name, and after the end of its input says "end".
type tcpApp struct {
	net.Listener
	name  string
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns map[net.Conn]bool
	got   chan error // how each connection's input ended
}

func newTCPApp(t testing.TB, name string) *tcpApp {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	a := &tcpApp{Listener: l, name: name, conns: map[net.Conn]bool{}, got: make(chan error, 1000)}
	a.wg.Go(a.accept)
	t.Cleanup(a.kill)
	return a
}

func (a *tcpApp) accept() {
	for {
		c, err := a.Accept()
		if err != nil {
			return
		}
		a.mu.Lock()
		a.conns[c] = true
		a.mu.Unlock()
		a.wg.Go(func() { a.serve(c) })
	}
}

func (a *tcpApp) serve(c net.Conn) {
	defer func() {
		a.mu.Lock()
		delete(a.conns, c)
		a.mu.Unlock()
		c.Close()
	}()
	r := bufio.NewReader(c)
	spoken := false // a check connects and says nothing
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			spoken = true
			if strings.TrimSpace(line) == "reset" {
				relay.Abort(c)
				return
			}
			fmt.Fprintf(c, "%s:%s", a.name, line)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				fmt.Fprintf(c, "%s:end\n", a.name)
				err = nil
			}
			if spoken {
				a.got <- err
			}
			return
		}
	}
}

// kill ends the application with all its connections.
func (a *tcpApp) kill() {
	a.Close()
	a.mu.Lock()
	for c := range a.conns {
		relay.Abort(c)
	}
	a.mu.Unlock()
	a.wg.Wait()
}

// say sends a line on a new connection and returns the answer.
func say(addr, line string) (string, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return sayOn(c, line)
}

func sayOn(c net.Conn, line string) (string, error) {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(answer), err
}

// attacker dials an inbound port as whoever it says it is.
func attacker(src *trust.Source, addr, sni string, alpn ...string) (*tls.Conn, error) {
	raw, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	var cfg *tls.Config
	if src != nil {
		cfg = src.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: alpn, ServerName: sni})
	} else {
		cfg = &tls.Config{MinVersion: tls.VersionTLS13, ServerName: sni, InsecureSkipVerify: true, NextProtos: alpn}
	}
	c := tls.Client(raw, cfg)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if err := c.Handshake(); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// metricValue sums the series of a metric whose labels contain all of want.
func metricValue(t testing.TB, reg *metric.Registry, name string, want map[string]string) float64 {
	t.Helper()
	families, err := reg.Gather().Gather()
	check(t, err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			for k, v := range want {
				if have[k] != v {
					continue series
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

var checkout = federation.ServiceName{Namespace: "shop", Name: "checkout"}

func itoa(n int) string { return strconv.Itoa(n) }

// splitHello sends a ClientHello in two segments, cut at every byte, and expects each to be served like a whole one.
func splitHello(t *testing.T, src *trust.Source, addr, sni string) {
	var hello []byte
	client, server := net.Pipe()
	go func() {
		tls.Client(client, src.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: sni})).Handshake()
	}()
	buf := make([]byte, 16<<10)
	n, err := server.Read(buf)
	check(t, err)
	hello = buf[:n]
	client.Close()
	server.Close()
	for cut := 1; cut < len(hello); cut += 97 {
		c, err := net.Dial("tcp", addr)
		check(t, err)
		raw := &splitConn{Conn: c, cut: cut}
		tc := tls.Client(raw, src.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: sni}))
		tc.SetDeadline(time.Now().Add(5 * time.Second))
		if got, err := sayOn(tc, "hello"); err != nil || got != "one:hello" {
			t.Fatalf("cut at %d: %q, %v", cut, got, err)
		}
		tc.Close()
	}
}

type splitConn struct {
	net.Conn
	cut  int
	once bool
}

func (c *splitConn) Write(b []byte) (int, error) {
	if c.once || len(b) <= c.cut {
		return c.Conn.Write(b)
	}
	c.once = true
	n, err := c.Conn.Write(b[:c.cut])
	if err != nil {
		return n, err
	}
	m, err := c.Conn.Write(b[c.cut:])
	return n + m, err
}
