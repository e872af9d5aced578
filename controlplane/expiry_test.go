// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/rotation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestCertificateHorizon is item 6 of the acceptance list: a day before the end of the root, of the issuer below it and of a followed
// bundle, check warns by the horizon, each by name; and it warns of processes that do not renew.
func TestCertificateHorizon(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	_, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1"})
	must(t, err)
	c, err := New(Config{DataDir: dir})
	must(t, err)
	end := c.issuer.Bundle().NotAfter()
	partner, bundle, _ := foreignEndpoint(t) // made now, so its root is as old as ours
	must(t, c.dir.Close())
	now := end.Add(-24 * time.Hour)
	c, err = New(Config{DataDir: dir, Now: func() time.Time { return now }})
	must(t, err)
	t.Cleanup(func() { _ = c.dir.Close() })
	trustItems := func(horizon time.Duration) map[string]*controlpb.CheckItem {
		out := map[string]*controlpb.CheckItem{}
		k := &checks{}
		c.checkTrust(k, c.federate.View(), horizon)
		for _, it := range k.items {
			out[it.Text] = it
		}
		return out
	}
	find := func(items map[string]*controlpb.CheckItem, text string) *controlpb.CheckItem {
		for have, it := range items {
			if strings.HasPrefix(have, text) {
				return it
			}
		}
		return nil
	}
	c.follow([]api.TrustDomain{{Name: partner.String(), Bundle: string(bundle.Marshal())}, {Name: "broken.example", Bundle: "{}"}}, map[string]string{})
	for _, tc := range []struct {
		horizon time.Duration
		state   string
	}{{14 * 24 * time.Hour, "warn"}, {25 * time.Hour, "warn"}, {time.Hour, "ok"}} {
		items := trustItems(tc.horizon)
		for _, who := range []string{"root of us-east", "issuer of us-east", "root of the trust domain partner.example"} {
			if it := find(items, who+" expires"); it == nil || it.State != tc.state || tc.state == "warn" && (it.Code != string(problem.RootExpiring) || !strings.Contains(it.Text, "horizon") || it.Fix == "") {
				t.Errorf("horizon %s: %s: %v", tc.horizon, who, it)
			}
		}
		if it := find(items, "the bundle of broken.example"); it == nil || it.State != "warn" || it.Code != string(problem.BundleNotFollowed) {
			t.Errorf("a bundle that is not followed: %v", it)
		}
	}
	now = end.Add(time.Second)
	if it := find(trustItems(time.Hour), "root of us-east has expired"); it == nil || it.State != "fail" {
		t.Errorf("after the end: %v", it)
	}

	now = end.Add(-24 * time.Hour)
	reporting := map[string]spiffeid.ID{}
	hold := func(name string, left time.Duration) {
		id, err := spiffeid.Workload(c.self.trustDomain, "shop", name)
		must(t, err)
		reporting["shop/"+name] = id
		c.rotation.Issued("shop/"+name, id, false, rotation.Identity{Issued: now.Add(left - 36*time.Hour), NotAfter: now.Add(left)})
	}
	hold("fresh", 35*time.Hour+30*time.Minute)
	leaves := func() []*controlpb.CheckItem {
		k := &checks{}
		c.checkLeaves(k, reporting)
		return k.items
	}
	if list := leaves(); len(list) != 1 || list[0].State != "ok" {
		t.Errorf("all renewed: %v", list)
	}
	hold("late", 20*time.Hour)
	hold("ended", -time.Minute)
	hold("silent", 20*time.Hour)
	delete(reporting, "shop/silent")
	said := fmt.Sprint(leaves())
	for _, want := range []string{"shop/late expires in 20h", string(problem.CertificateExpiring), "shop/ended has expired", string(problem.IdentityExpired)} {
		if !strings.Contains(said, want) {
			t.Errorf("%s lacks %q", said, want)
		}
	}
	if strings.Contains(said, "silent") || strings.Contains(said, "fresh") {
		t.Errorf("too much: %s", said)
	}
	for i := range 30 {
		hold(fmt.Sprintf("more-%d", i), time.Hour)
	}
	if list := leaves(); len(list) != maxListed+1 || list[maxListed].Text != "and 12 more" {
		t.Errorf("%d items, the last: %v", len(list), list[len(list)-1])
	}
}

// TestTrustMetrics: names and labels are API.
func TestTrustMetrics(t *testing.T) {
	c := closed(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.expiryLoop(ctx) }()
	text := func() string {
		w := httptest.NewRecorder()
		c.metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Body.String()
	}
	until(t, c.source.Changed, func() bool { return strings.Contains(text(), "strait_bundle_age_seconds{") })
	for _, want := range []string{
		`strait_certificate_not_after_seconds{kind="root",trust_domain="us-east.acme"}`, `kind="issuer"`, `kind="leaf"`,
		`strait_bundle_sequence{trust_domain="us-east.acme"} 1`, `strait_bundle_age_seconds{trust_domain="us-east.acme"} 0`,
	} {
		if !strings.Contains(text(), want) {
			t.Errorf("%s is missing", want)
		}
	}
	cancel()
	must(t, <-done)
}
