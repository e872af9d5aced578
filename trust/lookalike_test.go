// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
)

// TestLookalikesOverTLS: classes T2 and T3 in handshakes. None of the corpus gets a byte out of a server, nor of a client that it
// poses as the server of, even where everybody verified would be welcome.
func TestLookalikesOverTLS(t *testing.T) {
	peer, err := lookalike.NewPeer(domain(t, "b.mesh"), t0)
	if err != nil {
		t.Fatal(err)
	}
	rootA, rootC := newRoot(t, "root a"), newRoot(t, "root c")
	issuerA := rootA.issuer("issuer a")
	own := issuerA.identity(web, t0.Add(time.Hour))
	leaves, err := peer.Leaves(lookalike.Target{ID: own.ID, Chain: append(own.Chain[1:], rootA.cert), Third: domain(t, "c.mesh")})
	if err != nil {
		t.Fatal(err)
	}
	honest, err := peer.Honest("/ns/shop/sa/web")
	if err != nil {
		t.Fatal(err)
	}
	us, them := trust.NewSource(trust.SourceConfig{Now: at(t0)}), trust.NewSource(trust.SourceConfig{Now: at(t0)})
	us.SetIdentity(own)
	them.SetIdentity(honest)
	for _, s := range []*trust.Source{us, them} {
		s.SetBundles(set(t, rootA.bundle("a.mesh", 1), peer.Bundle(), rootC.bundle("c.mesh", 1)))
	}
	o := trust.TLSOptions{Authorize: trust.AuthorizeAny()}
	if ce, se, _, _ := exchange(t, them.ClientTLS(o), us.ServerTLS(o)); ce != nil || se != nil {
		t.Fatalf("the honest peer: client %v, server %v", ce, se)
	}
	for _, l := range leaves {
		client, server := them.ClientTLS(o), them.ServerTLS(o)
		client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &l.Certificate, nil }
		server.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &l.Certificate, nil }
		want := l.Reason
		if want == lookalike.Malformed {
			want = "" // the handshake itself fails to parse it
		}
		if ce, se, _, ss := exchange(t, client, us.ServerTLS(o)); ce == nil || se == nil || reason(se) != want || ss.HandshakeComplete {
			t.Errorf("%s as a client: client %v, server %v, want %s", l.Name, ce, se, l.Reason)
		}
		if ce, se, cs, _ := exchange(t, us.ClientTLS(o), server); ce == nil || se == nil || reason(ce) != want || cs.HandshakeComplete {
			t.Errorf("%s as a server: client %v, server %v, want %s", l.Name, ce, se, l.Reason)
		}
	}
	t.Logf("0 of %d accepted, by either side", len(leaves))
}
