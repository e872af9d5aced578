// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// knock dials the listener with a certificate and returns how many bytes it was given.
func (d *door) knock(source *trust.Source, cert *tls.Certificate, wrap func(net.Conn) net.Conn) (given int, err error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), within)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", d.listener.Addr().String())
	must(d.t, err)
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(within))
	config := source.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}})
	config.CurvePreferences = []tls.CurveID{tls.X25519}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	if wrap != nil {
		raw = wrap(raw)
	}
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		return 0, err
	}
	return c.Read(make([]byte, 1)) // gRPC's server speaks first: its SETTINGS
}

// TestLookalikesAtTheControlPlane: classes T2, T3 and T7. The control plane knows the bundles of its peers; nothing that a peer's CA signs
// gets a byte out of 7400, nor does a client without a certificate, however its ClientHello is cut.
func TestLookalikesAtTheControlPlane(t *testing.T) {
	tdPeer, err := spiffeid.ParseTrustDomain("eu-west.acme")
	must(t, err)
	tdThird, err := spiffeid.ParseTrustDomain("ap-south.acme")
	must(t, err)
	peer, err := lookalike.NewPeer(tdPeer, time.Now())
	must(t, err)
	third, err := lookalike.NewPeer(tdThird, time.Now())
	must(t, err)
	var own *trust.Source
	d := openDoor(t, func(c *identity.ListenerConfig) {
		own = c.Source
		own.SetBundles(own.Bundles().With(peer.Bundle()).With(third.Bundle()))
	})
	self := own.Identity()
	leaves, err := peer.Leaves(lookalike.Target{ID: self.ID, Chain: append(self.Chain[1:], d.ca.Bundle().Roots()...), Third: tdThird})
	must(t, err)
	web := d.source(d.workload("web"))
	member := &tls.Certificate{Certificate: web.Identity().ChainDER(), PrivateKey: web.Identity().Key}
	if n, err := d.knock(web, member, nil); n == 0 {
		t.Fatalf("a member of the cluster: %v", err)
	}
	for _, path := range []string{self.ID.Path(), "/strait/operator/alice", "/strait/gateway/gw-1", "/ns/shop/sa/web"} {
		honest, err := peer.Honest(path)
		must(t, err)
		leaves = append(leaves, lookalike.Leaf{Name: "the peer's own " + path, Reason: "not_authorized",
			Certificate: tls.Certificate{Certificate: honest.ChainDER(), PrivateKey: honest.Key}})
	}
	want := map[string]int{}
	for _, l := range leaves {
		reason := l.Reason
		if reason == lookalike.Malformed {
			reason = "handshake" // crypto/tls cannot read it
		}
		want[reason]++
		if n, err := d.knock(web, &l.Certificate, nil); n > 0 || err == nil {
			t.Errorf("%s: was given %d bytes, %v", l.Name, n, err)
		}
		eventually(t, l.Name+" is counted as "+reason, func() bool { return d.count(reason) == want[reason] })
	}
	t.Logf("0 of %d accepted: %v", len(leaves), want)
	for _, records := range []bool{false, true} {
		for n := 1; ; n++ {
			var s *lookalike.SplitConn
			given, err := d.knock(web, &tls.Certificate{}, func(c net.Conn) net.Conn {
				s = &lookalike.SplitConn{Conn: c, At: n, Records: records}
				return s
			})
			if given > 0 || err == nil {
				t.Fatalf("no certificate, cut at %d (records %t): was given %d bytes, %v", n, records, given, err)
			}
			if n >= s.Len()-1 {
				break
			}
		}
	}
}
