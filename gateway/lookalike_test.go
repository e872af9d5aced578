// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestLookalikesAtTheLocalPort: classes T2 and T3 at the port of a gateway that is for its own cluster's sidecars. The gateway knows its
// peers' bundles, and yet neither what a peer's CA makes up nor the peer's honest workloads get a byte there.
func TestLookalikesAtTheLocalPort(t *testing.T) {
	west := newCluster(t, "us-west")
	peer := must(lookalike.NewPeer(must(spiffeid.ParseTrustDomain("eu-west.acme")), time.Now()))
	third := must(lookalike.NewPeer(must(spiffeid.ParseTrustDomain("ap-south.acme")), time.Now()))
	west.client.source.SetBundles(west.client.source.Bundles().With(peer.Bundle()).With(third.Bundle()))
	west.start()
	web := west.source(west.workload("web"))
	knock := func(cert *tls.Certificate) (given int, err error) {
		raw := must(net.DialTimeout("tcp", west.addrs.Local, 5*time.Second))
		defer raw.Close()
		_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
		config := web.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeTrustDomain(west.td), ALPN: []string{preface.ALPN}})
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		c := tls.Client(raw, config)
		if err := c.HandshakeContext(t.Context()); err != nil {
			return 0, err
		}
		_, _ = c.Write([]byte{0, 0, 0, 0}) // a frame that no session begins with
		return c.Read(make([]byte, 1))
	}
	refused := func(err error) bool { // by an alert: the handshake, and not what was said after it
		var op *net.OpError
		return errors.As(err, &op) && op.Op == "remote error"
	}
	if _, err := knock(&tls.Certificate{Certificate: web.Identity().ChainDER(), PrivateKey: web.Identity().Key}); refused(err) {
		t.Fatalf("a sidecar of the cluster: %v", err)
	}
	id := web.Identity()
	leaves := must(peer.Leaves(lookalike.Target{ID: id.ID, Chain: append(id.Chain[1:], west.ca.Bundle().Roots()...), Third: third.Bundle().TrustDomain()}))
	for _, path := range []string{id.ID.Path(), "/strait/gateway/gw-1", "/strait/controlplane"} {
		honest := must(peer.Honest(path))
		leaves = append(leaves, lookalike.Leaf{Name: "the peer's own " + path, Certificate: tls.Certificate{Certificate: honest.ChainDER(), PrivateKey: honest.Key}})
	}
	for _, l := range leaves {
		if given, err := knock(&l.Certificate); given > 0 || !refused(err) {
			t.Errorf("%s: given %d bytes, %v", l.Name, given, err)
		}
	}
	t.Logf("0 of %d accepted", len(leaves))
}
