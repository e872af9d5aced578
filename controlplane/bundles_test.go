// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/bundleendpoint"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestForeignTrustDomain runs a control plane that publishes its bundle and follows a partner's, from the Federation object to the
// proxies' resources and back.
func TestForeignTrustDomain(t *testing.T) {
	partner, bundle, addr := foreignEndpoint(t)
	base, err := os.MkdirTemp("", "cp-") // short: unix sockets live below it
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	dir := filepath.Join(base, "d")
	_, err = Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1"})
	must(t, err)
	c, err := New(Config{DataDir: dir, Listen: "127.0.0.1:0", APIListen: "127.0.0.1:0", MetricsListen: "off",
		Bundles: BundlesConfig{Listen: "127.0.0.1:0", AllowLocalTarget: true}})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	waitFor(t, filepath.Join(dir, "run", "addrs.json"), done)
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})

	// Somebody else can follow us.
	outside, err := datadir.Create(filepath.Join(t.TempDir(), "d"))
	must(t, err)
	defer outside.Close()
	f, err := bundleendpoint.NewFollower(bundleendpoint.FollowerConfig{Dir: outside, AllowLocal: true})
	must(t, err)
	must(t, f.Set([]bundleendpoint.Endpoint{{
		TrustDomain: c.self.trustDomain, URL: "https://" + c.addrs.Bundle, Profile: bundleendpoint.ProfileSPIFFE, EndpointID: spiffeid.ControlPlane(c.self.trustDomain),
		Bundle: c.issuer.Bundle().WithSequence(0),
	}}))
	followed := make(chan error, 1)
	fctx, stop := context.WithCancel(ctx)
	go func() { followed <- f.Run(fctx) }()
	until(t, f.Changed, func() bool { return f.Followed()[0].Bundle.Equal(c.issuer.Bundle()) })
	stop()
	must(t, <-followed)

	// And we follow the partner.
	ref := api.Ref{Kind: api.KindFederation, Name: "acme"}
	domains := func(list ...any) {
		t.Helper()
		must(t, c.objects.SetSpec(ctx, ref, map[string]any{"trustDomains": list}))
	}
	entry := map[string]any{"name": partner.String(), "bundle": string(bundle.WithSequence(1).Marshal()), "endpoint": map[string]any{
		"url": "https://" + addr, "profile": "https_spiffe", "spiffeID": spiffeid.ControlPlane(partner).String(),
	}}
	domains(entry)
	until(t, c.discovery.Changed, func() bool {
		out := c.compiled.Load()
		if out == nil {
			return false
		}
		b, _ := out.Resources[controlpb.TypeBundle][partner.String()].(*controlpb.Bundle)
		return b.GetSequence() == bundle.Sequence()
	})
	list := c.trustedBundles()
	if len(list) != 1 || list[0].TrustDomain != partner.String() || list[0].Source != "https_spiffe" || list[0].Sequence != bundle.Sequence() ||
		list[0].UpdatedUnix == 0 || list[0].Error != "" || len(list[0].Authorities) == 0 {
		t.Errorf("trust status: %v", list)
	}
	// What no schema can see is said on the object, and the rest stays in force.
	domains(entry, map[string]any{"name": "broken.example", "bundle": "{}"}, map[string]any{"name": "other.example", "bundle": string(bundle.Marshal())})
	until(t, c.objects.Changed, func() bool {
		for _, cond := range c.federationObject().Status.Conditions {
			if cond.Type == "Accepted" && cond.Status == "False" && strings.Contains(cond.Message, "broken.example") && strings.Contains(cond.Message, "other.example") {
				return true
			}
		}
		return false
	})
	if list := c.trustedBundles(); len(list) != 3 || list[0].Sequence != bundle.Sequence() {
		t.Errorf("trust status: %v", list)
	}
	domains()
	until(t, c.discovery.Changed, func() bool { return c.compiled.Load().Resources[controlpb.TypeBundle][partner.String()] == nil })
}

// foreignEndpoint is a trust domain of no member with an endpoint of profile https_spiffe.
func foreignEndpoint(t *testing.T) (td spiffeid.TrustDomain, b *trust.Bundle, addr string) {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain("partner.example")
	must(t, err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "d"))
	must(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	issuer, err := ca.Create(dir, ca.Config{TrustDomain: td})
	must(t, err)
	id, err := issuer.IssueKey(spiffeid.ControlPlane(td), 0)
	must(t, err)
	source := trust.NewSource(trust.SourceConfig{})
	source.SetIdentity(id)
	b = issuer.Bundle().WithSequence(5)
	s, err := bundleendpoint.NewServer(bundleendpoint.ServerConfig{Bundle: func() *trust.Bundle { return b }, Source: source})
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		must(t, s.Close())
		must(t, <-served)
	})
	return td, b, l.Addr().String()
}

// until waits for cond, which is asked again at each change and once in 50 ms.
func until(t *testing.T, changed func() <-chan struct{}, cond func() bool) {
	t.Helper()
	late := time.NewTimer(30 * time.Second)
	defer late.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		c := changed()
		if cond() {
			return
		}
		select {
		case <-c:
		case <-tick.C:
		case <-late.C:
			t.Fatal("not within 30 s")
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
