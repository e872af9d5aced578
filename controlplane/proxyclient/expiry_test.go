// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/metric"
	"github.com/strait-mesh/strait/internal/problem"
)

// TestEndedIdentityIsRenewed is F22: away for longer than an identity lives, a proxy fails closed by name, and comes back without a
// token and without a restart.
func TestEndedIdentityIsRenewed(t *testing.T) {
	c := newCluster(t)
	c.grace = 168 * time.Hour
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	ctx := t.Context()
	client, err := proxyclient.Open(ctx, cfg)
	must(t, err)
	registry := metric.New(metric.Config{})
	client.Observe(registry)
	stop := run(t, client)
	eventually(t, "connected", func() bool { return client.Status().Connected })
	if err := client.Expired(); err != nil {
		t.Error(err)
	}
	c.stop()
	held := serial(client)
	c.clock.Advance(5 * 24 * time.Hour)
	c.renewOwn()
	if err := client.Expired(); !problem.Is(err, problem.IdentityExpired) {
		t.Fatalf("expired: %v", err)
	}
	if err := handshake(t, c, client.Source()); err == nil || !strings.Contains(err.Error(), "own identity has expired") {
		t.Fatalf("an expired identity was used: %v", err)
	}
	eventually(t, "failures counted", func() bool {
		return !strings.Contains(scrape(registry), `strait_certificate_renewals_total{result="failure"} 0`)
	})
	c.serve()
	begin := time.Now()
	eventually(t, "renewed", func() bool { return serial(client) != held })
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("renewed %s after the control plane came back", took)
	}
	eventually(t, "connected again", func() bool { return client.Status().Connected })
	if err := client.Expired(); err != nil {
		t.Error(err)
	}
	if err := handshake(t, c, client.Source()); err != nil {
		t.Errorf("after recovery: %v", err)
	}
	eventually(t, "success counted", func() bool {
		return !strings.Contains(scrape(registry), `strait_certificate_renewals_total{result="success"} 0`)
	})
	for _, want := range []string{`strait_certificate_not_after_seconds{kind="leaf",trust_domain="us-east.acme"}`, `{kind="issuer",`, `{kind="root",`, `strait_bundle_sequence{trust_domain="us-east.acme"}`} {
		if !strings.Contains(scrape(registry), want) {
			t.Errorf("%s is not among the metrics", want)
		}
	}
	stop()

	// It begins with an ended identity, too.
	held = serial(client)
	c.clock.Advance(5 * 24 * time.Hour)
	c.renewOwn()
	client, stop = open(t, cfg)
	eventually(t, "renewed at the start", func() bool { return serial(client) != held && client.Status().Connected })
	stop()

	// Longer than the grace, and withdrawn: only a token would help.
	for name, change := range map[string]func(){
		"after the grace": func() { c.clock.Advance(36*time.Hour + 168*time.Hour + time.Minute) },
		"withdrawn": func() {
			c.clock.Advance(36*time.Hour + time.Minute)
			must(t, c.denied.Add(client.Info().ID, "laptop lost"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			cfg := c.config(proxyclient.Sidecar, "shop/"+strings.Fields(name)[0], c.sidecarToken("shop/"+strings.Fields(name)[0], "web"), newDir(t))
			client, stop := open(t, cfg)
			stop()
			held := serial(client)
			change()
			c.renewOwn()
			cfg.TokenFile = ""
			client, _ = open(t, cfg)
			eventually(t, "refused", func() bool { return client.Status().LastError != nil })
			before := client.Status().LastError
			eventually(t, "refused again", func() bool { return client.Status().LastError != before })
			if serial(client) != held || client.Expired() == nil {
				t.Error("it was renewed")
			}
		})
	}
}

func scrape(r *metric.Registry) string {
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}
