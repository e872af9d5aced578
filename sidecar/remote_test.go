// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"net"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/sidecar"
)

// remoteFixture is us-east with a caller and a gateway, and eu-west with sidecars of shop/checkout.
type remoteFixture struct {
	us, eu  *testCluster
	gateway *fakeGateway
	fars    []*running
	near    *running
	svc     *controlpb.Service
}

func newRemote(t *testing.T, proto controlpb.Protocol, locals []*controlpb.LocalEndpoint, us *testCluster, addrs ...string) *remoteFixture {
	t.Helper()
	f := &remoteFixture{us: us, eu: newCluster(t, "eu-west")}
	var instances []farInstance
	for i, addr := range addrs {
		proxy := "checkout-" + itoa(i)
		snap := sidecar.NewSnapshot(f.eu.source(f.eu.id("checkout"), f.us))
		self := f.eu.self(proxy, "checkout")
		port := f.eu.inbound("checkout", "main", proto, addr)
		port.Access.DefaultTrustDomains = append(port.Access.DefaultTrustDomains, f.us.td.String())
		self.Inbound = []*controlpb.InboundPort{port}
		check(t, snap.Put(self))
		far := start(t, proxy, snap, nil)
		eventually(t, "callee is ready", ready(far))
		f.fars = append(f.fars, far)
		instances = append(instances, farInstance{handle: preface.Handle{byte(i + 1)}, addr: far.addrs.Inbound})
	}
	f.gateway = newGateway(t, f.us, "gateway-1", f.eu, instances...)
	f.svc = service("checkout", "main", proto, locals...)
	f.svc.Remote = []*controlpb.RemoteCluster{{
		Cluster: "eu-west", Federation: fed, TrustDomain: f.eu.td.String(), Region: "eu-west", Ports: f.svc.Ports,
		SpiffeIds: []string{f.eu.id("checkout").String()}, Same: true, Freshness: controlpb.Freshness_FRESHNESS_FRESH,
		Zones: map[string]*controlpb.HealthCounts{"a": {Healthy: uint32(len(addrs))}}, TunnelUp: true,
	}}
	snap := sidecar.NewSnapshot(f.us.source(f.us.id("web"), f.eu))
	check(t, snap.Put(f.us.self("web", "web"), f.svc, f.gateway.resource()))
	f.near = start(t, "web", snap, func(cfg *sidecar.Config) {
		cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}, {Service: checkout, Pinned: "eu-west", Listen: "127.0.0.1:0"}}
	})
	eventually(t, "caller is ready", ready(f.near))
	eventually(t, "the local session is open", func() bool { return len(f.gateway.all()) == 1 })
	return f
}

func TestHTTPAcrossClusters(t *testing.T) {
	var apps []*httpApp
	var addrs []string
	for i := range 6 {
		apps = append(apps, newHTTPApp(t, "eu-"+itoa(i)))
		addrs = append(addrs, apps[i].addr())
	}
	f := newRemote(t, http1, nil, newCluster(t, "us-east"), addrs...)

	t.Run("pools four connections on different instances", func(t *testing.T) {
		seen := map[string]bool{}
		eventually(t, "four instances serve", func() bool {
			status, body := get(t, f.near.up(), "/")
			if status != 200 {
				t.Fatalf("got %d %q", status, body)
			}
			seen[body] = true
			return len(seen) == 4
		})
		for range 50 {
			get(t, f.near.up(), "/")
		}
		if n := f.gateway.count(); n != 4 {
			t.Errorf("%d inner connections, want 4", n)
		}
	})
	t.Run("marks each request on the local session", func(t *testing.T) {
		eventually(t, "a begin and its end", func() bool {
			f.gateway.mu.Lock()
			defer f.gateway.mu.Unlock()
			begun := map[string]bool{}
			for _, m := range f.gateway.markers {
				if !m.End {
					begun[m.Traceparent] = m.Traceparent != "" && m.Connection > 0
				} else if begun[m.Traceparent] {
					return true
				}
			}
			return false
		})
	})
	t.Run("an instance dies", func(t *testing.T) {
		f.fars[1].end()
		f.fars[2].end()
		for range 60 {
			if status, body := get(t, f.near.up(), "/"); status != 200 {
				t.Fatalf("got %d %q", status, body)
			}
		}
	})
	t.Run("withdrawn connections end and are made again", func(t *testing.T) {
		before := f.gateway.count()
		var all []uint64
		for i := range 100 {
			all = append(all, uint64(i))
		}
		f.gateway.notify(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Withdraw{Withdraw: &controlpb.WithdrawNotice{Connections: all, Reason: "test"}}})
		// All four connections are cut at once: a request that is on its way may meet each of them, and has four attempts.
		eventually(t, "new connections that answer", func() bool {
			status, _ := get(t, f.near.up(), "/")
			return status == 200 && f.gateway.count() > before
		})
	})
	t.Run("drained connections are retired without a failure", func(t *testing.T) {
		before := f.gateway.count()
		f.gateway.notify(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{TrustDomain: f.eu.td.String()}}})
		eventually(t, "new connections", func() bool {
			if status, body := get(t, f.near.up(), "/"); status != 200 {
				t.Fatalf("got %d %q", status, body)
			}
			return f.gateway.count() > before
		})
	})
	t.Run("a service that is not offered any more is cut off", func(t *testing.T) {
		svc := service("checkout", "main", http1)
		check(t, f.near.snap.Put(svc))
		eventually(t, "refused", func() bool {
			status, _ := get(t, f.near.up(), "/")
			return status == 503
		})
	})
}

func TestTCPAcrossClusters(t *testing.T) {
	f := newRemote(t, tcp, nil, newCluster(t, "us-east"), newTCPApp(t, "eu-0").Addr().String(), newTCPApp(t, "eu-1").Addr().String())
	for range 4 {
		if got, err := say(f.near.up(), "hi"); err != nil || !strings.HasSuffix(got, ":hi") {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	t.Run("the other instance after one died", func(t *testing.T) {
		f.fars[0].end()
		for range 10 {
			if got, err := say(f.near.up(), "hi"); err != nil || got != "eu-1:hi" {
				t.Fatalf("got %q, %v", got, err)
			}
		}
	})
	t.Run("withdrawal of the callee's identity ends what is open", func(t *testing.T) {
		c, err := net.Dial("tcp", f.near.up())
		check(t, err)
		defer c.Close()
		if _, err := sayOn(c, "hi"); err != nil {
			t.Fatal(err)
		}
		check(t, f.near.snap.Put(&controlpb.Denied{SpiffeId: f.eu.id("checkout").String(), Reason: "stolen"}))
		eventually(t, "it ends", func() bool { _, err := sayOn(c, "still there?"); return err != nil })
	})
	t.Run("withdrawal of the trust domain", func(t *testing.T) {
		f.near.snap.Remove(controlpb.TypeDenied, f.eu.id("checkout").String())
		eventually(t, "calls work again", func() bool { _, err := say(f.near.up(), "hi"); return err == nil })
		c, err := net.Dial("tcp", f.near.up())
		check(t, err)
		defer c.Close()
		if _, err := sayOn(c, "hi"); err != nil {
			t.Fatal(err)
		}
		f.near.snap.Remove(controlpb.TypeBundle, f.eu.td.String())
		eventually(t, "it ends", func() bool { _, err := sayOn(c, "still there?"); return err != nil })
	})
}

func TestFailover(t *testing.T) {
	us := newCluster(t, "us-east")
	home := newHTTPApp(t, "home")
	local := callee(t, us, "checkout-home", http1, []string{home.addr()})
	away := newHTTPApp(t, "away")
	f := newRemote(t, http1, []*controlpb.LocalEndpoint{endpoint(local, "checkout-home", us.id("checkout"), 1)}, us, away.addr())
	if _, body := get(t, f.near.up(), "/"); body != "home" {
		t.Fatalf("at first: %q", body)
	}
	if f.gateway.count() != 0 {
		t.Error("a connection went abroad although home was fine")
	}
	t.Run("the local sidecar dies", func(t *testing.T) {
		local.end()
		for range 20 {
			if status, body := get(t, f.near.up(), "/"); status != 200 || body != "away" {
				t.Fatalf("got %d %q", status, body)
			}
		}
		eventually(t, "the decision says so", func() bool {
			return metricValue(t, f.near.reg, "strait_failover_share_ratio", map[string]string{"dst_cluster": "eu-west"}) == 1 &&
				metricValue(t, f.near.reg, "strait_failover_transitions_total", map[string]string{"to": "eu-west"}) == 1
		})
	})
	t.Run("the tunnel goes down, too", func(t *testing.T) {
		f.gateway.tunnel("down")
		eventually(t, "nothing is left", func() bool {
			status, _ := get(t, f.near.up(), "/")
			return status == 503 || status == 502
		})
		f.gateway.tunnel("up")
		eventually(t, "abroad again", func() bool {
			status, _ := get(t, f.near.up(), "/")
			return status == 200
		})
	})
}

func TestPinnedUpstream(t *testing.T) {
	us := newCluster(t, "us-east")
	home, away := newHTTPApp(t, "home"), newHTTPApp(t, "away")
	local := callee(t, us, "checkout-home", http1, []string{home.addr()})
	f := newRemote(t, http1, []*controlpb.LocalEndpoint{endpoint(local, "checkout-home", us.id("checkout"), 1)}, us, away.addr())
	for range 5 {
		if _, body := get(t, f.near.up(), "/"); body != "home" {
			t.Fatalf("federated: %q", body)
		}
		if _, body := get(t, f.near.addrs.Upstreams[1], "/"); body != "away" {
			t.Fatalf("pinned: %q", body)
		}
	}
	t.Run("a typed refusal reaches the caller with its reason", func(t *testing.T) {
		f.gateway.set(func() { f.gateway.refuse = preface.Status{Code: preface.CodeNotExported} })
		f.gateway.notify(&controlpb.ToSidecar{Message: &controlpb.ToSidecar_Drain{Drain: &controlpb.DrainNotice{TrustDomain: f.eu.td.String()}}})
		eventually(t, "refused", func() bool {
			status, _ := get(t, f.near.addrs.Upstreams[1], "/")
			return status == 403
		})
		if _, body := get(t, f.near.up(), "/"); body != "home" {
			t.Fatalf("federated: %q", body)
		}
	})
}

// TestWrongRemoteCallee: a gateway that leads to the wrong place gets no byte of the application.
func TestWrongRemoteCallee(t *testing.T) {
	us, third := newCluster(t, "us-east"), newCluster(t, "ap-south")
	evil := newTCPApp(t, "evil")
	snap := sidecar.NewSnapshot(third.source(third.id("checkout"), us))
	self := third.self("checkout-9", "checkout")
	port := third.inbound("checkout", "main", tcp, evil.Addr().String())
	port.Access.DefaultTrustDomains = append(port.Access.DefaultTrustDomains, us.td.String())
	self.Inbound = []*controlpb.InboundPort{port}
	check(t, snap.Put(self))
	wrong := start(t, "checkout-9", snap, nil)
	eventually(t, "callee is ready", ready(wrong))

	f := newRemote(t, tcp, nil, us, newTCPApp(t, "eu-0").Addr().String())
	f.gateway.set(func() { f.gateway.far = []farInstance{{handle: preface.Handle{9}, addr: wrong.addrs.Inbound}} })
	if got, err := say(f.near.up(), "secret"); err == nil {
		t.Fatalf("answered %q", got)
	}
	select {
	case err := <-evil.got:
		t.Errorf("the wrong callee was reached: %v", err)
	default:
	}
}

func TestHealthReachesTheGateway(t *testing.T) {
	us := newCluster(t, "us-east")
	g := newGateway(t, us, "gateway-1", newCluster(t, "eu-west"))
	app := newTCPApp(t, "one")
	snap := sidecar.NewSnapshot(us.source(us.id("checkout")))
	self := us.self("checkout-1", "checkout")
	self.Inbound = []*controlpb.InboundPort{us.inbound("checkout", "main", tcp, app.Addr().String())}
	check(t, snap.Put(self, g.resource()))
	start(t, "checkout-1", snap, nil)
	counts := func() *controlpb.HealthCounts {
		g.mu.Lock()
		defer g.mu.Unlock()
		if len(g.health) == 1 {
			return g.health[0].GetHealth()
		}
		return &controlpb.HealthCounts{}
	}
	eventually(t, "one healthy", func() bool { return counts().GetHealthy() == 1 })
	app.kill()
	eventually(t, "one unhealthy", func() bool { return counts().GetUnhealthy() == 1 && counts().GetHealthy() == 0 })
}

// TestFewerInstancesThanHealthy: health counts instances, handles name sidecars. That there is no other sidecar says nothing
// against the one there is.
func TestFewerInstancesThanHealthy(t *testing.T) {
	f := newRemote(t, http1, nil, newCluster(t, "us-east"), newHTTPApp(t, "eu-0").addr())
	svc := proto.Clone(f.svc).(*controlpb.Service)
	svc.Remote[0].Zones["a"].Healthy = 8
	check(t, f.near.snap.Put(svc))
	for range 50 {
		if status, body := get(t, f.near.up(), "/"); status != 200 {
			t.Fatalf("got %d %q", status, body)
		}
	}
	if n := metricValue(t, f.near.reg, "strait_ejections_total", nil); n != 0 {
		t.Errorf("%v ejections", n)
	}
	if n := f.gateway.count(); n > 3 {
		t.Errorf("%d inner connections were asked for", n)
	}
}
