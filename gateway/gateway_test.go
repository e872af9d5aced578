// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
)

func TestCallCrossesClusters(t *testing.T) {
	for _, transport := range []string{tunnel.QUIC, tunnel.TCP} {
		t.Run(transport, func(t *testing.T) {
			east, west, web, checkout := pair(t, func(c *gateway.Config) { c.DisableUDP = transport == tunnel.TCP })
			web.awaitPeer(west, transport)
			tc, pc, err := web.call(west, "checkout")
			if err != nil {
				t.Fatalf("call: %v", err)
			}
			if pc.Handle().IsZero() {
				t.Error("the status frame names no instance")
			}
			// Half-close: the callee sees the end, answers after it, and the caller reads that and then the end.
			if err := tc.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(tc); err != nil || string(rest) != "-end" {
				t.Errorf("after half-close read %q, %v", rest, err)
			}
			if err := <-checkout.closed; err != nil {
				t.Errorf("callee saw %v instead of a clean end", err)
			}
			_ = east
		})
	}
}

func TestLargeTransferBothWays(t *testing.T) {
	for _, transport := range []string{tunnel.QUIC, tunnel.TCP} {
		t.Run(transport, func(t *testing.T) {
			_, west, web, _ := pair(t, func(c *gateway.Config) { c.DisableUDP = transport == tunnel.TCP })
			web.awaitPeer(west, transport)
			tc, _, err := web.call(west, "checkout")
			if err != nil {
				t.Fatalf("call: %v", err)
			}
			const size = 4 << 20
			sent := make(chan error, 1)
			go func() {
				_, err := tc.Write(make([]byte, size))
				sent <- errors.Join(err, tc.CloseWrite())
			}()
			n, err := io.Copy(io.Discard, tc)
			if err != nil || n != size+int64(len("-end")) {
				t.Errorf("echo of %d bytes: %d, %v", size, n, err)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestResetOfTheCallerIsNoCleanEnd(t *testing.T) {
	for _, transport := range []string{tunnel.QUIC, tunnel.TCP} {
		t.Run(transport, func(t *testing.T) {
			_, west, web, checkout := pair(t, func(c *gateway.Config) { c.DisableUDP = transport == tunnel.TCP })
			web.awaitPeer(west, transport)
			_, pc, err := web.call(west, "checkout")
			if err != nil {
				t.Fatalf("call: %v", err)
			}
			raw := pc.NetConn().(*net.TCPConn)
			_ = raw.SetLinger(0)
			raw.Close()
			if err := <-checkout.closed; err == nil || errors.Is(err, io.EOF) {
				t.Errorf("callee saw %v instead of a reset", err)
			}
		})
	}
}

func TestWithdrawalEndsOpenStreams(t *testing.T) {
	cases := map[string]func(east, west *cluster){
		"export":           func(east, west *cluster) { west.unexports(east, "checkout") },
		"port":             func(east, west *cluster) { west.exports(east, "checkout", "grpc") },
		"peer at receiver": func(east, west *cluster) { west.client.set(controlpb.TypePeer, east.td.String(), nil) },
		"peer at sender":   func(east, west *cluster) { east.client.set(controlpb.TypePeer, west.td.String(), nil) },
		"caller identity": func(east, west *cluster) {
			id := east.workload("web").String()
			east.client.set(controlpb.TypeDenied, id, &controlpb.Denied{SpiffeId: id, Reason: "evicted"})
		},
		"callee identity": func(east, west *cluster) {
			id := west.workload("checkout").String()
			west.client.set(controlpb.TypeDenied, id, &controlpb.Denied{SpiffeId: id, Reason: "evicted"})
		},
	}
	for name, withdraw := range cases {
		t.Run(name, func(t *testing.T) {
			east, west, web, checkout := pair(t)
			web.awaitPeer(west, tunnel.QUIC)
			tc, _, err := web.call(west, "checkout")
			if err != nil {
				t.Fatalf("call: %v", err)
			}
			began := time.Now()
			withdraw(east, west)
			if _, err := tc.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("caller read %v instead of a reset", err)
			}
			if err := <-checkout.closed; err == nil {
				t.Error("callee saw a clean end")
			}
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
			if _, _, err := web.call(west, "checkout"); err == nil {
				t.Error("a new call passed")
			}
		})
	}
}

// TestPeerGatewayReachesOnlyItsGrants lets a gateway with a valid peer identity speak the tunnel protocol directly (T26).
func TestPeerGatewayReachesOnlyItsGrants(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	other := newCluster(t, "ap-south") // a peer to which something else is exported
	west.exports(other, "catalog", "http")
	west.knows(other)
	payments := west.callee("payments")
	west.serves("payments", payments.endpoint(1))

	sessions := map[*cluster]*tunnel.Session{east: east.redTeam(west), other: other.redTeam(west)}
	open := func(from *cluster, h tunnel.Header, sni string) preface.Status {
		t.Helper()
		s := sessions[from]
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		out, err := s.Open(ctx, h, helloFor(sni))
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		defer out.Reset()
		return out.Status
	}
	good := tunnel.Header{Service: "shop/checkout", Port: "http", Export: "export-checkout", Hops: 1,
		Source: east.workload("web").String()}
	with := func(f func(*tunnel.Header)) tunnel.Header { h := good; f(&h); return h }
	sni := west.sni("checkout")
	cases := []struct {
		name string
		from *cluster
		h    tunnel.Header
		sni  string
		want preface.Code
	}{
		{"what is exported", east, good, sni, preface.CodeOK},
		{"no export id", east, with(func(h *tunnel.Header) { h.Export = "" }), sni, preface.CodeOK},
		{"another export id", east, with(func(h *tunnel.Header) { h.Export = "export-x" }), sni, preface.CodeNotExported},
		{"service that is not exported", east, with(func(h *tunnel.Header) { h.Service = "shop/payments" }), west.sni("payments"), preface.CodeNotExported},
		{"service exported to another", east, with(func(h *tunnel.Header) { h.Service, h.Export = "shop/catalog", "" }), west.sni("catalog"), preface.CodeNotExported},
		{"not to this peer", other, with(func(h *tunnel.Header) { h.Source = other.workload("web").String() }), sni, preface.CodeNotExported},
		{"another port", east, with(func(h *tunnel.Header) { h.Port = "admin" }), sni, preface.CodeNotExported},
		{"empty service", east, with(func(h *tunnel.Header) { h.Service = "" }), sni, preface.CodeNotExported},
		{"empty port", east, with(func(h *tunnel.Header) { h.Port = "" }), sni, preface.CodeNotExported},
		{"wildcard service", east, with(func(h *tunnel.Header) { h.Service = "shop/*" }), sni, preface.CodeNotExported},
		{"wildcard namespace", east, with(func(h *tunnel.Header) { h.Service = "*/checkout" }), sni, preface.CodeNotExported},
		{"wildcard port", east, with(func(h *tunnel.Header) { h.Port = "*" }), sni, preface.CodeNotExported},
		{"an address", east, with(func(h *tunnel.Header) { h.Service = "127.0.0.1:7400" }), sni, preface.CodeNotExported},
		{"control plane", east, with(func(h *tunnel.Header) { h.Service = "strait/controlplane" }), sni, preface.CodeNotExported},
		{"other case", east, with(func(h *tunnel.Header) { h.Service = "shop/Checkout" }), sni, preface.CodeNotExported},
		{"path tricks", east, with(func(h *tunnel.Header) { h.Service = "shop/checkout/../payments" }), sni, preface.CodeNotExported},
		{"inner name of another service", east, good, west.sni("payments"), preface.CodeBadRequest},
		{"inner name in another cluster", east, good, east.sni("checkout"), preface.CodeBadRequest},
		{"inner name with a dot behind", east, good, sni + ".x", preface.CodeBadRequest},
		{"inner name in capitals", east, good, strings.ToUpper(sni), preface.CodeBadRequest},
		{"no inner name", east, good, "", preface.CodeBadRequest},
		{"source of the callee's own cluster", east, with(func(h *tunnel.Header) { h.Source = west.workload("web").String() }), sni, preface.CodeDenied},
		{"source of a third cluster", east, with(func(h *tunnel.Header) { h.Source = other.workload("web").String() }), sni, preface.CodeDenied},
		{"no source", east, with(func(h *tunnel.Header) { h.Source = "" }), sni, preface.CodeDenied},
		{"a gateway as source", east, with(func(h *tunnel.Header) { h.Source = "spiffe://" + east.td.String() + "/strait/gateway/gw-1" }), sni, preface.CodeDenied},
		{"no hops", east, with(func(h *tunnel.Header) { h.Hops = 0 }), sni, preface.CodeBadRequest},
		{"a loop", east, with(func(h *tunnel.Header) { h.Hops = 2 }), sni, preface.CodeBadRequest},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := open(c.from, c.h, c.sni); got.Code != c.want {
				t.Errorf("got %v %q, want %v", got.Code, got.Reason, c.want)
			}
		})
	}
	t.Run("revoked peer", func(t *testing.T) {
		s := sessions[other]
		west.client.set(controlpb.TypePeer, other.td.String(), nil)
		select {
		case <-s.Done():
		case <-time.After(5 * time.Second):
			t.Error("the session still stands after 5 s")
		}
		if _, err := other.tryRedTeam(t.Context(), west, time.Second); err == nil {
			t.Error("a new session was accepted")
		}
	})
	select {
	case err := <-payments.closed:
		t.Errorf("a connection reached payments: %v", err)
	default:
	}
}

func TestInstancesAreAvoidedAndCounted(t *testing.T) {
	_, west, web, checkout := pair(t)
	second := west.callee("checkout", web.c)
	second.proxy = "shop/checkout-2"
	dead := second.endpoint(100)
	dead.Proxy, dead.InboundAddress = "shop/checkout-3", "127.0.0.1:1"
	west.serves("checkout", checkout.endpoint(1), second.endpoint(1), dead)
	web.awaitPeer(west, tunnel.QUIC)
	seen := map[preface.Handle]bool{}
	sni := west.sni("checkout")
	var avoid []preface.Handle
	for range 2 {
		p := web.preface(sni)
		p.Avoid = avoid
		_, pc, err := web.dial(sni, p, west.workload("checkout"))
		if err != nil {
			t.Fatalf("call avoiding %d: %v", len(avoid), err)
		}
		if seen[pc.Handle()] {
			t.Error("an instance to avoid was picked")
		}
		seen[pc.Handle()] = true
		avoid = append(avoid, pc.Handle())
	}
	p := web.preface(sni)
	p.Avoid = avoid
	west.serves("checkout", checkout.endpoint(1), second.endpoint(1))
	if _, _, err := web.dial(sni, p, west.workload("checkout")); code(err) != "no_healthy_instance all_avoided" {
		t.Errorf("avoiding all: %s", code(err))
	}
	west.serves("checkout", checkout.endpoint(0), second.endpoint(0))
	if _, _, err := web.call(west, "checkout"); code(err) != "no_healthy_instance" {
		t.Errorf("with none healthy: %s", code(err))
	}
	west.serves("checkout", dead)
	if _, _, err := web.call(west, "checkout"); code(err) != "no_healthy_instance sidecars_unreachable" {
		t.Errorf("with a dead sidecar: %s", code(err))
	}
}

func TestPrefacesAreJudged(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	sni, id := west.sni("checkout"), west.workload("checkout")
	p := web.preface(sni)
	if _, _, err := web.dial(sni, p, id); err != nil {
		t.Fatalf("first use: %v", err)
	}
	if _, _, err := web.dial(sni, p, id); code(err) != "bad_request replayed" {
		t.Errorf("counter used twice: %s", code(err))
	}
	p = web.preface(west.sni("payments"))
	if _, _, err := web.dial(sni, p, id); code(err) != "bad_request preface" {
		t.Errorf("authority that is not the server name: %s", code(err))
	}
	p = web.preface(sni)
	p.Session[0]++
	if _, _, err := web.dial(sni, p, id); code(err) != "bad_request preface" {
		t.Errorf("unknown session: %s", code(err))
	}
	key := web.key
	web.key = make([]byte, preface.KeySize)
	if _, _, err := web.dial(sni, web.preface(sni), id); code(err) != "bad_request preface" {
		t.Errorf("wrong key: %s", code(err))
	}
	web.key = key
	for _, name := range []string{east.sni("checkout"), "http.checkout.shop.svc.nowhere.acme", "http.checkout.shop.svc.eu-west.other"} {
		if _, _, err := web.dial(name, web.preface(name), id); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Errorf("a good call afterwards: %v", err)
	}
}

func TestLocalSessionsAreForOwnWorkloads(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	for name, source := range map[string]*trust.Source{
		"a peer's workload":  west.source(west.workload("web"), east),
		"own gateway":        east.client.source,
		"no such CA":         newCluster(t, "us-east").source(east.workload("web")),
		"withdrawn identity": east.source(east.workload("gone")),
	} {
		id := east.workload("gone").String()
		east.client.set(controlpb.TypeDenied, id, &controlpb.Denied{SpiffeId: id})
		if _, err := east.dialLocal(source, east); !errors.Is(err, errSessionRefused) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	id := east.workload("web").String()
	east.client.set(controlpb.TypeDenied, id, &controlpb.Denied{SpiffeId: id})
	limit := time.After(5 * time.Second)
	for open := true; open; {
		select {
		case _, open = <-web.notices:
		case <-limit:
			t.Fatal("the session of a withdrawn identity stands")
		}
	}
}

func TestDrain(t *testing.T) {
	east, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	tc, _, err := web.call(west, "checkout")
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- west.stop() }()
	web.await("the far gateway's drain", func(m *controlpb.ToSidecar) bool {
		d := m.GetDrain()
		return d != nil && d.TrustDomain == west.td.String() && len(d.Connections) == 1 && d.Connections[0] == web.counter
	})
	// For a moment it takes what comes, from those who know no other gateway; then nothing new, and what is open has its grace.
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Errorf("right after the notice: %v", err)
	}
	limit := time.After(5 * time.Second)
	for err = nil; err == nil; {
		select {
		case <-limit:
			t.Fatal("a draining gateway takes new streams for ever")
		default:
			_, _, err = web.call(west, "checkout")
		}
	}
	if _, err := tc.Read(make([]byte, 1)); err == nil {
		t.Error("what was left open was not cut after the grace")
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	go func() { stopped <- east.stop() }()
	web.await("the own gateway's drain", func(m *controlpb.ToSidecar) bool {
		return m.GetDrain() != nil && m.GetDrain().TrustDomain == ""
	})
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestUDPBlackHole has the peer's UDP address swallow everything: TCP has to carry traffic within about a second (F7).
func TestUDPBlackHole(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	checkout := west.callee("checkout", east)
	west.start(func(c *gateway.Config) { c.DisableUDP = true })
	hole := must(net.ListenPacket("udp", west.addrs.Listen)) // the same port: silence instead of a refusal
	defer hole.Close()
	east.start(func(c *gateway.Config) { c.HeadStart = 0 })
	west.exports(east, "checkout", "http")
	west.serves("checkout", checkout.endpoint(1))
	west.knows(east)
	web := east.caller("web", west)
	began := time.Now()
	east.knows(west, west.addrs.Listen)
	web.awaitPeer(west, tunnel.TCP)
	t.Logf("on TCP after %v", time.Since(began))
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	if _, _, err := web.call(west, "checkout"); err != nil {
		t.Error(err)
	}
}

func TestMetricsPort(t *testing.T) {
	_, west, web, _ := pair(t)
	web.awaitPeer(west, tunnel.QUIC)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		r, err := client.Get("http://" + west.addrs.Metrics + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		return r.StatusCode, string(must(io.ReadAll(r.Body)))
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/": 404, "/debug/pprof/": 404} {
		if got, _ := get(path); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	within(t, 5*time.Second, "strait_tunnel_up", func() bool {
		_, body := get("/metrics")
		return strings.Contains(body, `strait_tunnel_up{gateway="gw-1",lane="interactive",local_cluster="eu-west",peer_cluster="us-east",transport="quic"} 1`)
	})
}
