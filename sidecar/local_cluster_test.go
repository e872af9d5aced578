// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust"
)

const (
	tcp   = controlpb.Protocol_PROTOCOL_TCP
	http1 = controlpb.Protocol_PROTOCOL_HTTP1
)

// callee starts a sidecar in front of instances of shop/checkout.
func callee(t testing.TB, c *testCluster, proxy string, proto controlpb.Protocol, addrs []string, others ...*testCluster) *running {
	t.Helper()
	snap := sidecar.NewSnapshot(c.source(c.id("checkout"), others...))
	self := c.self(proxy, "checkout")
	self.Inbound = []*controlpb.InboundPort{c.inbound("checkout", "main", proto, addrs...)}
	check(t, snap.Put(self))
	r := start(t, proxy, snap, nil)
	eventually(t, "callee is ready", ready(r))
	return r
}

// caller starts a sidecar with an upstream to shop/checkout.
func caller(t testing.TB, c *testCluster, svc *controlpb.Service, others ...*testCluster) *running {
	t.Helper()
	snap := sidecar.NewSnapshot(c.source(c.id("web"), others...))
	check(t, snap.Put(c.self("web", "web"), svc))
	r := start(t, "web", snap, func(cfg *sidecar.Config) {
		cfg.HTTPProxyListen = "127.0.0.1:0"
		cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}}
	})
	eventually(t, "caller is ready", ready(r))
	return r
}

func (r *running) up() string { return r.addrs.Upstreams[0] }

func TestSidecarToSidecarFromSnapshotFiles(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newHTTPApp(t, "checkout-0")
	write := func(name string, self *controlpb.Self, services ...*controlpb.Service) string {
		raw := func(m proto.Message) json.RawMessage {
			b, err := protojson.Marshal(m)
			check(t, err)
			return b
		}
		file := map[string]any{
			"self":    raw(self),
			"bundles": []json.RawMessage{raw(&controlpb.Bundle{TrustDomain: c.td.String(), Jwks: c.ca.Bundle().Marshal()})},
		}
		var list []json.RawMessage
		for _, s := range services {
			list = append(list, raw(s))
		}
		file["services"] = list
		b, err := json.Marshal(file)
		check(t, err)
		path := filepath.Join(t.TempDir(), name)
		check(t, os.WriteFile(path, b, 0o600))
		return path
	}
	self := c.self("checkout-1", "checkout")
	self.Inbound = []*controlpb.InboundPort{c.inbound("checkout", "main", http1, app.addr())}
	snap := sidecar.NewSnapshot(c.source(c.id("checkout")))
	check(t, snap.Load(write("callee.json", self)))
	far := start(t, "checkout-1", snap, nil)
	eventually(t, "callee is ready", ready(far))

	svc := service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1))
	snap = sidecar.NewSnapshot(c.source(c.id("web")))
	check(t, snap.Load(write("caller.json", c.self("web", "web"), svc)))
	near := start(t, "web", snap, func(cfg *sidecar.Config) {
		cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}}
	})
	for range 5 {
		if status, body := get(t, near.up(), "/"); status != 200 || body != "checkout-0" {
			t.Fatalf("got %d %q", status, body)
		}
	}
	if err := snap.Load(write("broken.json", &controlpb.Self{Name: "shop/web"})); err == nil {
		t.Error("a Self without a cluster was accepted")
	}
	if status, _ := get(t, near.up(), "/"); status != 200 {
		t.Errorf("after a refused snapshot: %d", status)
	}
}

func TestHTTPByHost(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newHTTPApp(t, "checkout-0")
	far := callee(t, c, "checkout-1", http1, []string{app.addr()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 1)))
	for host, want := range map[string]int{
		"checkout.shop":                       200,
		"checkout.shop:80":                    200,
		"checkout.shop.svc.clusterset.local":  200,
		"checkout.shop.svc.us-east.acme":      200,
		"CHECKOUT.shop.svc.clusterset.local.": 200,
		"checkout.shop.svc.eu-west.acme":      503,
		"nothing.shop.svc.clusterset.local":   503,
		"checkout.shop.svc.us-east.other":     404,
		"example.com.evil.org":                404,
		"checkout.shop:81":                    503,
	} {
		nc, err := net.Dial("tcp", near.addrs.HTTPProxy)
		check(t, err)
		nc.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = io.WriteString(nc, "GET / HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n")
		check(t, err)
		line, err := bufio.NewReader(nc).ReadString('\n')
		check(t, err)
		nc.Close()
		if code := strings.Fields(line)[1]; code != itoa(want) {
			t.Errorf("Host %s: %s, want %d", host, strings.TrimSpace(line), want)
		}
	}
}

func TestTCPHalfCloseAndReset(t *testing.T) {
	c := newCluster(t, "us-east")
	app := newTCPApp(t, "one")
	far := callee(t, c, "checkout-1", tcp, []string{app.Addr().String()})
	near := caller(t, c, service("checkout", "main", tcp, endpoint(far, "checkout-1", c.id("checkout"), 1)))

	t.Run("half-close", func(t *testing.T) {
		nc, err := net.Dial("tcp", near.up())
		check(t, err)
		defer nc.Close()
		if got, err := sayOn(nc, "hello"); err != nil || got != "one:hello" {
			t.Fatalf("got %q, %v", got, err)
		}
		check(t, nc.(*net.TCPConn).CloseWrite())
		rest, err := io.ReadAll(nc)
		if err != nil || string(rest) != "one:end\n" {
			t.Fatalf("after our half-close the application's last words were %q, %v", rest, err)
		}
		if err := <-app.got; err != nil {
			t.Fatalf("the application saw %v, want a clean end", err)
		}
	})
	t.Run("the application resets", func(t *testing.T) {
		nc, err := net.Dial("tcp", near.up())
		check(t, err)
		defer nc.Close()
		if _, err := sayOn(nc, "hello"); err != nil {
			t.Fatal(err)
		}
		_, err = sayOn(nc, "reset")
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("we saw %v, want a reset", err)
		}
	})
	t.Run("the caller resets", func(t *testing.T) {
		nc, err := net.Dial("tcp", near.up())
		check(t, err)
		if _, err := sayOn(nc, "hello"); err != nil {
			t.Fatal(err)
		}
		relay.Abort(nc)
		if err := <-app.got; !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the application saw %v, want a reset", err)
		}
	})
}

func TestWrongIdentitiesAreRefused(t *testing.T) {
	us, eu := newCluster(t, "us-east"), newCluster(t, "eu-west")
	fake := newCluster(t, "us-east") // another root that claims the same trust domain
	app := newTCPApp(t, "one")
	far := callee(t, us, "checkout-1", tcp, []string{app.Addr().String()}, eu)
	sni := us.sni("checkout", "main")
	good := us.source(us.id("web"))
	useless := func(t *testing.T, c net.Conn, err error) {
		t.Helper()
		if err != nil {
			return
		}
		defer c.Close()
		if answer, err := sayOn(c, "hello"); err == nil {
			t.Fatalf("the application answered %q", answer)
		}
	}
	for name, dial := range map[string]func() (net.Conn, error){
		"no client certificate": func() (net.Conn, error) { return wrap(attacker(nil, far.addrs.Inbound, sni)) },
		"another root":          func() (net.Conn, error) { return wrap(attacker(fakeTrusting(fake, us), far.addrs.Inbound, sni)) },
		"domain that nobody exported to": func() (net.Conn, error) {
			return wrap(attacker(eu.source(eu.id("web"), us), far.addrs.Inbound, sni))
		},
		"no server name":         func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, "")) },
		"upper case":             func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, strings.ToUpper(sni))) },
		"one letter upper case":  func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, "M"+sni[1:])) },
		"another port":           func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, us.sni("checkout", "admin"))) },
		"another service":        func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, us.sni("cart", "main"))) },
		"another cluster's name": func() (net.Conn, error) { return wrap(attacker(good, far.addrs.Inbound, eu.sni("checkout", "main"))) },
		"plain text":             func() (net.Conn, error) { return net.Dial("tcp", far.addrs.Inbound) },
	} {
		t.Run(name, func(t *testing.T) {
			c, err := dial()
			useless(t, c, err)
		})
	}
	t.Run("the right one", func(t *testing.T) {
		c, err := attacker(good, far.addrs.Inbound, sni)
		check(t, err)
		defer c.Close()
		if got, err := sayOn(c, "hello"); err != nil || got != "one:hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	})
	t.Run("hello split at every byte", func(t *testing.T) { splitHello(t, good, far.addrs.Inbound, sni) })
}

// fakeTrusting is an identity of fake's root in a source that believes us.
func fakeTrusting(fake, us *testCluster) *trust.Source {
	s := fake.source(fake.id("web"))
	bundles, err := trust.NewBundles(us.ca.Bundle())
	check(us.t, err)
	s.SetBundles(bundles)
	return s
}

func wrap[C net.Conn](c C, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// TestWrongCalleeIsRefused: what answers at the address must prove the identity that discovery lists, not just any of the domain.
func TestWrongCalleeIsRefused(t *testing.T) {
	us, eu := newCluster(t, "us-east"), newCluster(t, "eu-west")
	app := newTCPApp(t, "one")
	for name, tc := range map[string]struct {
		callee *running
		listed string
	}{
		"another workload of the domain": {callee(t, us, "checkout-1", tcp, []string{app.Addr().String()}), us.id("cart").String()},
		"the same path, another domain":  {callee(t, us, "checkout-2", tcp, []string{app.Addr().String()}), eu.id("checkout").String()},
	} {
		t.Run(name, func(t *testing.T) {
			ep := endpoint(tc.callee, "checkout-1", us.id("checkout"), 1)
			ep.SpiffeId = tc.listed
			near := caller(t, us, service("checkout", "main", tcp, ep), eu)
			if got, err := say(near.up(), "secret"); err == nil {
				t.Fatalf("answered %q", got)
			}
		})
	}
	select {
	case err := <-app.got:
		t.Errorf("the application was reached: %v", err)
	default:
	}
}

func TestFailingInstancesLeaveRotation(t *testing.T) {
	c := newCluster(t, "us-east")
	a, b := newHTTPApp(t, "a"), newHTTPApp(t, "b")
	far := callee(t, c, "checkout-1", http1, []string{a.addr(), b.addr()})
	near := caller(t, c, service("checkout", "main", http1, endpoint(far, "checkout-1", c.id("checkout"), 2)))
	seen := map[string]bool{}
	eventually(t, "both instances serve", func() bool {
		_, body := get(t, near.up(), "/")
		seen[body] = true
		return seen["a"] && seen["b"]
	})
	t.Run("a streak of 5xx ejects", func(t *testing.T) {
		a.status.Store(500)
		eventually(t, "a is ejected", func() bool {
			get(t, near.up(), "/")
			return metricValue(t, far.reg, "strait_ejections_total", map[string]string{"reason": "outlier_ejected"}) == 1
		})
		served := a.served.Load()
		for range 30 {
			if status, body := get(t, near.up(), "/"); status != 200 || body != "b" {
				t.Fatalf("got %d %q", status, body)
			}
		}
		if a.served.Load() != served {
			t.Error("an ejected instance was called")
		}
	})
	t.Run("the last one is not ejected", func(t *testing.T) {
		b.status.Store(500)
		for range 10 {
			if status, body := get(t, near.up(), "/"); status != 500 || body != "b" {
				t.Fatalf("got %d %q", status, body)
			}
		}
		b.status.Store(200)
	})
	t.Run("a dead one costs nothing", func(t *testing.T) {
		b.CloseClientConnections()
		b.Close()
		eventually(t, "all instances are out", func() bool {
			status, _ := get(t, near.up(), "/")
			return status == 503
		})
	})
}

// TestSidecarDies: of two sidecars one is gone; no call may fail, and the dead one is not tried for each call.
func TestSidecarDies(t *testing.T) {
	for name, proto := range map[string]controlpb.Protocol{"http": http1, "tcp": tcp} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, "us-east")
			var eps []*controlpb.LocalEndpoint
			var fars []*running
			for _, proxy := range []string{"checkout-1", "checkout-2"} {
				var addr string
				if proto == tcp {
					addr = newTCPApp(t, proxy).Addr().String()
				} else {
					addr = newHTTPApp(t, proxy).addr()
				}
				r := callee(t, c, proxy, proto, []string{addr})
				fars = append(fars, r)
				eps = append(eps, endpoint(r, proxy, c.id("checkout"), 1))
			}
			near := caller(t, c, service("checkout", "main", proto, eps...))
			call := func() (string, error) {
				if proto == tcp {
					return say(near.up(), "x")
				}
				status, body, err := tryGet(near.up(), "/")
				if err == nil && status != 200 {
					err = errors.New(body)
				}
				return body, err
			}
			seen := map[string]bool{}
			eventually(t, "both sidecars serve", func() bool {
				body, err := call()
				check(t, err)
				seen[strings.TrimSuffix(body, ":x")] = true
				return len(seen) == 2
			})
			fars[0].end()
			var wg sync.WaitGroup
			errs := make(chan error, 100)
			for range 10 {
				wg.Go(func() {
					for range 5 {
						body, err := call()
						if err == nil && !strings.HasPrefix(body, "checkout-2") {
							err = errors.New("answered by " + body)
						}
						if err != nil {
							errs <- err
						}
					}
				})
			}
			wg.Wait()
			close(errs)
			for err := range errs {
				t.Error(err)
			}
		})
	}
}
