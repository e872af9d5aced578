// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar"
)

func TestAccessPolicy(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newHTTPApp(t, "checkout-0")
	far := callee(t, c, "checkout-1", http1, []string{app.addr()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	set := func(a *controlpb.Access) {
		t.Helper()
		self := c.self("checkout-1", "checkout")
		p := c.inbound("checkout", "main", http1, app.addr())
		p.Access = a
		self.Inbound = []*controlpb.InboundPort{p}
		if err := far.snap.Put(self); err != nil {
			t.Log(err)
		}
	}
	status := func(path string) int {
		s, _ := get(t, near.up(), path)
		return s
	}
	if s := status("/"); s != 200 {
		t.Fatalf("without a policy: %d", s)
	}
	web := c.id("web").String()
	set(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{
		{Name: "r1", Policy: "shop/p", SpiffeIds: []string{web}, Paths: []string{"/pub/*"}},
	}})
	if s := status("/pub/x"); s != 200 {
		t.Errorf("allowed path: %d", s)
	}
	if s := status("/priv"); s != 403 {
		t.Errorf("another path: %d", s)
	}
	t.Run("a policy that is not understood changes nothing", func(t *testing.T) {
		set(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{{SpiffeIds: []string{"nonsense"}}}})
		if s := status("/pub/x"); s != 200 {
			t.Errorf("allowed path: %d", s)
		}
		if s := status("/priv"); s != 403 {
			t.Errorf("another path: %d", s)
		}
	})
	t.Run("deny by default", func(t *testing.T) {
		set(&controlpb.Access{HasPolicy: true})
		eventually(t, "refused", func() bool { s := status("/pub/x"); return s != 200 })
		served := app.served.Load()
		status("/pub/x")
		if app.served.Load() != served {
			t.Error("the application was reached")
		}
	})
	if n := metricValue(t, far.reg, "strait_authz_total", map[string]string{"action": "deny"}); n == 0 {
		t.Error("no denial was counted")
	}
}

func TestAccessPolicyTCP(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newTCPApp(t, "one")
	far := callee(t, c, "checkout-1", tcp, []string{app.Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	set := func(a *controlpb.Access) {
		self := c.self("checkout-1", "checkout")
		p := c.inbound("checkout", "main", tcp, app.Addr().String())
		p.Access = a
		self.Inbound = []*controlpb.InboundPort{p}
		check(t, far.snap.Put(self))
	}
	open, err := net.Dial("tcp", near.up())
	check(t, err)
	defer open.Close()
	if _, err := sayOn(open, "hi"); err != nil {
		t.Fatal(err)
	}
	set(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{{Methods: []string{"GET"}}}})
	eventually(t, "an open connection ends with its permission", func() bool { _, err := sayOn(open, "still?"); return err != nil })
	if got, err := say(near.up(), "hi"); err == nil {
		t.Errorf("a rule of methods let a TCP connection through: %q", got)
	}
	set(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{{SpiffeIds: []string{c.id("web").String()}}}})
	eventually(t, "allowed by identity", func() bool { _, err := say(near.up(), "hi"); return err == nil })
}

// TestWithdrawnCaller: an identity that is withdrawn loses what it has open at the callee, and gets nothing new.
func TestWithdrawnCaller(t *testing.T) {
	c := newCluster(t, "us-east")
	for name, proto := range map[string]controlpb.Protocol{"tcp": tcp, "http": http1} {
		t.Run(name, func(t *testing.T) {
			var addr string
			if proto == tcp {
				addr = newTCPApp(t, "one").Addr().String()
			} else {
				addr = newHTTPApp(t, "one").addr()
			}
			far := callee(t, c, "checkout-1", proto, []string{addr})
			src := c.source(c.id("web"))
			conn, err := attacker(src, far.addrs.Inbound, c.sni("checkout", "main"))
			check(t, err)
			defer conn.Close()
			if proto == tcp {
				if _, err := sayOn(conn, "hi"); err != nil {
					t.Fatal(err)
				}
			} else if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			check(t, far.snap.Put(&controlpb.Denied{SpiffeId: c.id("web").String(), Reason: "evicted"}))
			began := time.Now()
			if _, err := io.Copy(io.Discard, conn); time.Since(began) > 4*time.Second {
				t.Fatalf("the connection lived on: %v", err)
			}
			again, err := attacker(src, far.addrs.Inbound, c.sni("checkout", "main"))
			if err == nil {
				defer again.Close()
				if got, err := sayOn(again, "GET / HTTP/1.1\r\nHost: x\r\n\r"); err == nil {
					t.Errorf("a new connection was served: %q", got)
				}
			}
		})
	}
}

// sessionsServer takes reports like a control plane.
type sessionsServer struct {
	controlpb.UnimplementedSessionsServer
	mu      sync.Mutex
	reports []*controlpb.SessionReport
	notice  chan string
	refuse  bool
}

func (s *sessionsServer) Report(stream grpc.BidiStreamingServer[controlpb.SessionReport, controlpb.SessionNotice]) error {
	s.mu.Lock()
	refuse := s.refuse
	s.refuse = false
	s.mu.Unlock()
	if refuse {
		return errors.New("not now")
	}
	go func() {
		select {
		case n := <-s.notice:
			stream.Send(&controlpb.SessionNotice{Notice: n})
		case <-stream.Context().Done():
		}
	}()
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.reports = append(s.reports, m)
		s.mu.Unlock()
	}
}

func (s *sessionsServer) find(f func(*controlpb.SessionReport) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.reports {
		if f(m) {
			return true
		}
	}
	return false
}

// reporting is a Snapshot with somebody to report to.
type reporting struct {
	*sidecar.Snapshot
	conn grpc.ClientConnInterface
}

func (r reporting) Conn() grpc.ClientConnInterface { return r.conn }

func startSessions(t *testing.T) (*sessionsServer, grpc.ClientConnInterface) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	srv, impl := grpc.NewServer(), &sessionsServer{notice: make(chan string), refuse: true}
	controlpb.RegisterSessionsServer(srv, impl)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	return impl, conn
}

func TestReports(t *testing.T) {
	srv, conn := startSessions(t)
	c := newCluster(t, "us-east")
	app := newHTTPApp(t, "one")
	far := callee(t, c, "checkout-1", http1, []string{app.addr()})
	snap := sidecar.NewSnapshot(c.source(c.id("web")))
	own := newTCPApp(t, "web")
	self := c.self("web", "web")
	self.Inbound = []*controlpb.InboundPort{c.inbound("web", "main", tcp, own.Addr().String())}
	svc := service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1))
	check(t, snap.Put(self, svc))
	near := start(t, "web", snap, func(cfg *sidecar.Config) {
		cfg.Client = reporting{snap, conn}
		cfg.Version = "v0.0.0-test"
		cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}}
	})
	eventually(t, "a hello with what was bound", func() bool {
		return srv.find(func(m *controlpb.SessionReport) bool {
			h := m.GetHello()
			return h.GetProxy() == "shop/web" && h.GetInboundAddress() == near.addrs.Inbound && h.GetVersion() == "v0.0.0-test" &&
				h.GetIntervalMs() == 200 && m.GetInstancesPresent()
		})
	})
	verdict := func(want controlpb.Health) func() bool {
		return func() bool {
			return srv.find(func(m *controlpb.SessionReport) bool {
				for _, in := range m.GetInstances() {
					if in.GetWorkload() == "web-0" && in.GetPortName() == "main" && in.GetHealth() == want {
						return true
					}
				}
				return false
			})
		}
	}
	eventually(t, "its instance is healthy", verdict(controlpb.Health_HEALTH_HEALTHY))
	own.kill()
	eventually(t, "its instance is unhealthy", verdict(controlpb.Health_HEALTH_UNHEALTHY))
	eventually(t, "the decision, with what it was made of", func() bool {
		return srv.find(func(m *controlpb.SessionReport) bool {
			for _, d := range m.GetDecisions() {
				if d.GetService().GetName() == "checkout" && d.GetReason() == federation.LocalOK.String() && len(d.GetTiers()) == 1 &&
					len(d.GetStateJson()) > 0 && len(d.GetInputsJson()) > 0 && d.GetTiers()[0].GetMembers()[0].GetShare() == 1 {
					return true
				}
			}
			return false
		})
	})
	t.Run("changes come at most once a second", func(t *testing.T) {
		count := func() (n int) {
			srv.mu.Lock()
			defer srv.mu.Unlock()
			for _, m := range srv.reports {
				n += len(m.GetDecisions())
			}
			return n
		}
		began, before := time.Now(), count()
		for i := range 40 {
			m := proto.Clone(svc).(*controlpb.Service)
			m.Local[0].Health.Healthy = uint32(2 + i)
			check(t, snap.Put(m))
		}
		eventually(t, "the last of them", func() bool {
			return srv.find(func(m *controlpb.SessionReport) bool {
				for _, d := range m.GetDecisions() {
					if d.GetTiers()[0].GetMembers()[0].GetHealthy() == 41 {
						return true
					}
				}
				return false
			})
		})
		if n, most := count()-before, 2+int(time.Since(began)/time.Second); n > most {
			t.Errorf("%d reports in %v", n, time.Since(began))
		}
	})
	t.Run("asked to drain", func(t *testing.T) {
		srv.notice <- "drain"
		select {
		case <-near.done:
		case <-time.After(10 * time.Second):
			t.Fatal("did not end")
		}
		if !srv.find(func(m *controlpb.SessionReport) bool { return m.GetDraining() }) {
			t.Error("draining was not reported")
		}
	})
}

// TestDrain: what is under way ends, nothing new begins, and Run returns.
func TestDrain(t *testing.T) {
	c := newCluster(t, "us-east")
	release := make(chan struct{})
	mux := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		<-release
		io.WriteString(w, "done")
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	app := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() { defer close(served); app.Serve(l) }()
	t.Cleanup(func() { app.Close(); <-served })

	far := callee(t, c, "checkout-1", http1, []string{l.Addr().String()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+near.up()+"/", nil)
	check(t, err)
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	check(t, err)
	defer resp.Body.Close()
	far.stop()
	eventually(t, "the listener is closed", func() bool {
		c, err := net.Dial("tcp", far.addrs.Inbound)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(release)
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "done" {
		t.Errorf("the request under way ended with %q, %v", b, err)
	}
	select {
	case <-far.done:
	case <-time.After(10 * time.Second):
		t.Error("Run did not return")
	}
}

// TestGarbage: nothing that a stranger sends costs more than its connection.
func TestGarbage(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newHTTPApp(t, "one")
	far := callee(t, c, "checkout-1", http1, []string{app.addr()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	for name, b := range map[string]string{
		"random":       "\x00\xff\x13\x37 nothing that anybody speaks \x80\x81",
		"http":         "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"half a hello": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"h2":           "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		for _, addr := range []string{far.addrs.Inbound, near.addrs.HTTPProxy, near.up(), far.addrs.Metrics} {
			nc, err := net.Dial("tcp", addr)
			check(t, err)
			io.WriteString(nc, b)
			nc.(*net.TCPConn).CloseWrite()
			nc.SetReadDeadline(time.Now().Add(8 * time.Second))
			if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s to %s: still open", name, addr)
			}
			nc.Close()
		}
	}
	if s, _ := get(t, near.up(), "/"); s != 200 {
		t.Errorf("afterwards: %d", s)
	}
}
