// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust"
)

// TestClockSteps is F22 and F25 at a caller's sidecar: its wall clock steps past the end of its identity. It fails closed within a
// second and by name, what was open ends, and it serves again as soon as the clock is right or the identity renewed.
func TestClockSteps(t *testing.T) {
	c := newCluster(t, "us-east")
	app, raw := newHTTPApp(t, "one"), newTCPApp(t, "two")
	far := callee(t, c, "checkout-1", http1, []string{app.addr()})
	farTCP := callee(t, c, "checkout-2", tcp, []string{raw.Addr().String()})
	var ahead atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	source := trust.NewSource(trust.SourceConfig{Now: now})
	like := c.source(c.id("web"))
	source.SetIdentity(like.Identity())
	source.SetBundles(like.Bundles())
	start1 := func(proto string, svcOf *running) *running {
		snap := sidecar.NewSnapshot(source)
		p := http1
		if proto == "tcp" {
			p = tcp
		}
		check(t, snap.Put(c.self("web", "web"), service("checkout", "main", p, endpoint(svcOf, "checkout-1", c.id("checkout"), 1))))
		r := start(t, "web", snap, func(cfg *sidecar.Config) {
			cfg.Now = now
			cfg.Upstreams = []sidecar.Upstream{{Service: checkout, Listen: "127.0.0.1:0"}}
		})
		eventually(t, "caller is ready", ready(r))
		return r
	}
	near, nearTCP := start1("http", far), start1("tcp", farTCP)
	works := func() bool {
		status, body, err := tryGet(near.up(), "/")
		return err == nil && status == 200 && body == "one"
	}
	if !works() {
		t.Fatal("the way does not work")
	}

	for _, skew := range []time.Duration{5 * time.Minute, -5 * time.Minute} {
		ahead.Store(int64(skew))
		for range 20 {
			if !works() {
				t.Fatalf("a clock that is %s off costs a request", skew)
			}
		}
	}
	ahead.Store(0)
	open, err := net.Dial("tcp", nearTCP.up())
	check(t, err)
	defer open.Close()
	if _, err := sayOn(open, "hi"); err != nil {
		t.Fatal(err)
	}

	ahead.Store(int64(25 * time.Hour))
	begin := time.Now()
	check(t, open.SetReadDeadline(begin.Add(5*time.Second)))
	if _, err := open.Read(make([]byte, 1)); err == nil || time.Since(begin) > 2*time.Second {
		t.Errorf("what was open ended after %s: %v", time.Since(begin), err)
	}
	status, body, err := tryGet(near.up(), "/")
	if err != nil || status != http.StatusBadGateway || !strings.Contains(body, string(problem.IdentityExpired)) || !strings.Contains(body, "identity_expired") {
		t.Errorf("refusal: %d %v %s", status, err, body)
	}
	r, err := http.Get("http://" + near.addrs.Metrics + "/readyz")
	check(t, err)
	text, _ := io.ReadAll(r.Body)
	r.Body.Close()
	if r.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(text), "identity_expired") {
		t.Errorf("readiness: %d %s", r.StatusCode, text)
	}

	ahead.Store(0)
	begin = time.Now()
	eventually(t, "the clock is right again", func() bool { return works() && ready(near)() })
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("recovered after %s", took)
	}
	ahead.Store(int64(-25 * time.Hour)) // every certificate is of the future now
	if got, err := say(nearTCP.up(), "hi"); err == nil {
		t.Errorf("a connection was made by a clock that is a day behind: %q", got)
	}
	ahead.Store(0)
	eventually(t, "the clock is right once more", func() bool { _, err := say(nearTCP.up(), "hi"); return err == nil })
}
