// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"encoding/json"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar"
)

// wire passes bytes on until it is cut: then it swallows them and answers nothing, like a host that is gone or a process
// that is stopped.
type wire struct {
	net.Listener
	to    string
	wg    sync.WaitGroup
	cut   chan struct{}
	mu    sync.Mutex
	conns []net.Conn
}

func newWire(t testing.TB, to string) *wire {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	w := &wire{Listener: l, to: to, cut: make(chan struct{})}
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, c, up)
			w.mu.Unlock()
			w.wg.Go(func() { w.pass(c, up) })
			w.wg.Go(func() { w.pass(up, c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		w.mu.Lock()
		for _, c := range w.conns {
			c.Close()
		}
		w.mu.Unlock()
		w.wg.Wait()
	})
	return w
}

func (w *wire) pass(from, to net.Conn) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		select {
		case <-w.cut:
			if err != nil {
				return
			}
			continue
		default:
		}
		if n > 0 {
			to.Write(b[:n])
		}
		if err != nil {
			to.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// TestSilentSidecar: of two sidecars one falls silent with its connections open. No idempotent request fails, and soon none waits.
func TestSilentSidecar(t *testing.T) {
	c := newCluster(t, "us-east")
	one := callee(t, c, "checkout-1", http1, []string{newHTTPApp(t, "one").addr()})
	two := callee(t, c, "checkout-2", http1, []string{newHTTPApp(t, "two").addr()})
	w := newWire(t, one.addrs.Inbound)
	ep := endpoint(one, "checkout-1", c.id("checkout"), 1)
	ep.InboundAddress = w.Addr().String()
	near := caller(t, c, service("checkout", "main", http1, ep, endpoint(two, "checkout-2", c.id("checkout"), 1)))
	seen := map[string]bool{}
	eventually(t, "both serve", func() bool {
		_, body := get(t, near.up(), "/")
		seen[body] = true
		return len(seen) == 2
	})
	close(w.cut)
	began := time.Now()
	slow := time.Duration(0)
	for time.Since(began) < 8*time.Second {
		start := time.Now()
		if status, body := get(t, near.up(), "/"); status != 200 || body != "two" {
			t.Fatalf("%v after the silence began: %d %q", time.Since(began), status, body)
		}
		if start.Sub(began) > 5*time.Second {
			slow = max(slow, time.Since(start))
		}
	}
	if slow > 2*time.Second {
		t.Errorf("5 s after the silence began a request took %v", slow)
	}
}

// TestSeededState: a restarted sidecar goes on from what it last reported, so that a restart is no return.
func TestSeededState(t *testing.T) {
	us := newCluster(t, "us-east")
	home, away := newHTTPApp(t, "home"), newHTTPApp(t, "away")
	local := callee(t, us, "checkout-home", http1, []string{home.addr()})
	f := newRemote(t, http1, []*controlpb.LocalEndpoint{endpoint(local, "checkout-home", us.id("checkout"), 1)}, us, away.addr())
	held := federation.State{Version: 1, At: time.Now(), Active: "eu-west", Since: time.Now(), Members: map[federation.ClusterName]federation.MemberMemory{
		"us-east": {Phase: federation.PhaseHold, Since: time.Now(), Until: time.Now().Add(time.Minute), Judged: true, Healthy: 1},
		"eu-west": {Phase: federation.PhaseUp, Since: time.Now(), Judged: true, Healthy: 1},
	}}
	b, err := json.Marshal(held)
	check(t, err)
	self := us.self("web", "web")
	self.LastState = map[string][]byte{checkout.String(): b}
	snap := sidecar.NewSnapshot(us.source(us.id("web"), f.eu))
	check(t, snap.Put(self, f.svc, f.gateway.resource()))
	again := start(t, "web", snap, func(cfg *sidecar.Config) {
		cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}}
	})
	for range 5 {
		if status, body := get(t, again.up(), "/"); status != 200 || body != "away" {
			t.Fatalf("got %d %q", status, body)
		}
	}
}

// TestGatewayDies: with two gateways, the death of one costs no idempotent request.
func TestGatewayDies(t *testing.T) {
	f := newRemote(t, http1, nil, newCluster(t, "us-east"), newHTTPApp(t, "eu-0").addr(), newHTTPApp(t, "eu-1").addr())
	second := newGateway(t, f.us, "gateway-2", f.eu, f.gateway.far...)
	check(t, f.near.snap.Put(second.resource()))
	eventually(t, "a session to the second", func() bool { return len(second.all()) == 1 })
	for range 10 {
		get(t, f.near.up(), "/")
	}
	f.gateway.kill()
	for range 30 {
		if status, body := get(t, f.near.up(), "/"); status != 200 {
			t.Fatalf("got %d %q", status, body)
		}
	}
}

// TestLargeBodyBothWays: bytes survive the path in both directions at once.
func TestLargeBodyBothWays(t *testing.T) {
	c := newCluster(t, "us-east")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				io.Copy(nc, nc)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	far := callee(t, c, "checkout-1", tcp, []string{l.Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	nc, err := net.Dial("tcp", near.up())
	check(t, err)
	defer nc.Close()
	const size = 8 << 20
	wg.Go(func() {
		b := make([]byte, 1<<16)
		for i := range size / len(b) {
			for j := range b {
				b[j] = byte(i + j)
			}
			if _, err := nc.Write(b); err != nil {
				t.Error(err)
				return
			}
		}
		nc.(*net.TCPConn).CloseWrite()
	})
	got, err := io.ReadAll(nc)
	if err != nil || len(got) != size {
		t.Fatalf("%d bytes came back, %v", len(got), err)
	}
	for i := range got {
		if got[i] != byte(i/(1<<16)+i%(1<<16)) {
			t.Fatalf("byte %d differs", i)
		}
	}
}

// TestSilenceCostsNoBudget: the only sidecar of the own cluster falls silent under a steady load. What is issued two seconds later or
// more moves abroad, though far more calls wait by then than the retry budget carries.
func TestSilenceCostsNoBudget(t *testing.T) {
	us := newCluster(t, "us-east")
	local := callee(t, us, "checkout-home", http1, []string{newHTTPApp(t, "home").addr()})
	w := newWire(t, local.addrs.Inbound)
	ep := endpoint(local, "checkout-home", us.id("checkout"), 1)
	ep.InboundAddress = w.Addr().String()
	f := newRemote(t, http1, []*controlpb.LocalEndpoint{ep}, us, newHTTPApp(t, "away").addr())
	url := f.near.up()
	if _, body := get(t, url, "/"); body != "home" {
		t.Fatalf("at first: %q", body)
	}
	close(w.cut)
	began := time.Now()
	var calls sync.WaitGroup
	defer calls.Wait()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for at := range tick.C {
		since := at.Sub(began)
		if since > 4*time.Second {
			break
		}
		calls.Go(func() {
			status, body, err := tryGet(url, "/")
			if since >= 2*time.Second && (err != nil || status != 200 || body != "away") {
				t.Errorf("issued %v after the silence began: %d %q %v", since, status, body, err)
			}
		})
	}
}
