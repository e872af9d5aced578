// SPDX-License-Identifier: Apache-2.0

package lookalike_test

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var t0 = time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// reason is what Verify says of a leaf, after the parser that stands before it in every handshake.
func reason(l lookalike.Leaf, bundles *trust.Bundles) (string, error) {
	var chain []*x509.Certificate
	for _, der := range l.Certificate.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return lookalike.Malformed, err
		}
		chain = append(chain, c)
	}
	p, err := trust.Verify(chain, bundles, t0)
	var v *trust.VerifyError
	if errors.As(err, &v) {
		return v.Reason, err
	}
	if err == nil {
		return "accepted as " + p.ID.String(), nil
	}
	return "", err
}

// TestCorpus: classes T2 and T3. Each leaf is refused, for its own reason; the peer's honest identities pass.
func TestCorpus(t *testing.T) {
	for _, names := range [][3]string{{"us.acme", "eu.acme", "ap.acme"}, {"acme", "eu.acme", "us.eu.acme"}, {"eu.acme", "acme", "xacme"}, {"b", "a", "c"}} {
		t.Run(strings.Join(names[:], ","), func(t *testing.T) {
			var tds [3]spiffeid.TrustDomain
			for i, n := range names {
				tds[i] = must(spiffeid.ParseTrustDomain(n))
			}
			peer, target, third := must(lookalike.NewPeer(tds[0], t0)), must(lookalike.NewPeer(tds[1], t0)), must(lookalike.NewPeer(tds[2], t0))
			bundles := must(trust.NewBundles(peer.Bundle(), target.Bundle(), third.Bundle()))
			id := must(target.Honest("/ns/shop/sa/web"))
			leaves := must(peer.Leaves(lookalike.Target{ID: id.ID, Chain: append(id.Chain[1:], target.Bundle().Roots()...), Third: tds[2]}))
			seen, kinds := map[string]bool{}, map[string]int{}
			for _, l := range leaves {
				got, err := reason(l, bundles)
				if got != l.Reason {
					t.Errorf("%s: %s (%v), want %s", l.Name, got, err, l.Reason)
				}
				if seen[l.Name] {
					t.Errorf("%s stands twice", l.Name)
				}
				seen[l.Name] = true
				kinds[got]++
			}
			if len(leaves) < 120 {
				t.Errorf("%d leaves; the corpus had 120 and more", len(leaves))
			}
			t.Logf("%d leaves refused: %v", len(leaves), kinds)
			for _, path := range []string{"/ns/shop/sa/web", "/strait/controlplane", "/x"} {
				if _, err := trust.Verify(must(peer.Honest(path)).Chain, bundles, t0); err != nil {
					t.Errorf("the peer's own %s: %v", path, err)
				}
			}
		})
	}
	if _, err := must(lookalike.NewPeer(must(spiffeid.ParseTrustDomain("a")), t0)).Leaves(lookalike.Target{}); err == nil {
		t.Error("leaves without a target")
	}
}
