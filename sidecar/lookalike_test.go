// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/relay"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestLookalikesAtTheSidecar: classes T2 and T3. A port that is open to every identity of a peer, and of the own trust domain, gives
// nothing to any certificate of the corpus that the peer's CA signs; the peer's honest workload is served. A TLS 1.3 client takes its
// handshake for complete before it is judged: what counts is the application's answer, and the refusal that the callee counts.
func TestLookalikesAtTheSidecar(t *testing.T) {
	us, third := newCluster(t, "us-east"), newCluster(t, "ap-south")
	tdPeer, err := spiffeid.ParseTrustDomain("eu-west." + fed)
	check(t, err)
	peer, err := lookalike.NewPeer(tdPeer, time.Now())
	check(t, err)
	app := newTCPApp(t, "one")
	source := us.source(us.id("checkout"), third)
	source.SetBundles(source.Bundles().With(peer.Bundle()))
	snap := sidecar.NewSnapshot(source)
	self := us.self("checkout-1", "checkout")
	in := us.inbound("checkout", "main", tcp, app.Addr().String())
	in.Access = &controlpb.Access{DefaultTrustDomains: []string{us.td.String(), tdPeer.String(), third.td.String()}}
	self.Inbound = []*controlpb.InboundPort{in}
	check(t, snap.Put(self))
	r := start(t, "checkout-1", snap, nil)
	eventually(t, "callee is ready", ready(r))

	dialler := us.source(us.id("web"))
	call := func(cert *tls.Certificate) (string, error) {
		raw, err := net.DialTimeout("tcp", r.addrs.Inbound, 5*time.Second)
		check(t, err)
		defer relay.Abort(raw)
		config := dialler.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ServerName: in.GetSni()})
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		return sayOn(tls.Client(raw, config), "hello")
	}
	honest, err := peer.Honest("/ns/shop/sa/web")
	check(t, err)
	if got, err := call(&tls.Certificate{Certificate: honest.ChainDER(), PrivateKey: honest.Key}); err != nil || got != "one:hello" {
		t.Fatalf("the peer's honest workload: %q, %v", got, err)
	}
	own := source.Identity()
	leaves, err := peer.Leaves(lookalike.Target{ID: us.id("web"), Chain: append(own.Chain[1:], us.ca.Bundle().Roots()...), Third: third.td})
	check(t, err)
	want := map[string]float64{}
	for _, l := range leaves {
		if got, err := call(&l.Certificate); err == nil || got != "" {
			t.Errorf("%s: the application answered %q, %v", l.Name, got, err)
		}
		reason := l.Reason
		if reason == lookalike.Malformed {
			reason = "broken" // crypto/tls cannot read it
		}
		want[reason]++
		eventually(t, l.Name+" is counted as "+reason, func() bool {
			return metricValue(t, r.reg, "strait_inbound_handshake_failures_total", map[string]string{"reason": reason}) == want[reason]
		})
	}
	t.Logf("0 of %d accepted: %v", len(leaves), want)
}
