// SPDX-License-Identifier: Apache-2.0

package access_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/sidecar/access"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestIdentitiesAreNoPatterns: class T5. A rule for an identity, or for a trust domain, concerns that one alone: 100,000 pairs of names full of
// dots, of which a parser of patterns would take many for one another.
func TestIdentitiesAreNoPatterns(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	own := td(t, "us-east.acme")
	name := func() string {
		var b strings.Builder
		for range 1 + rng.IntN(3) {
			b.WriteString([]string{"a", "b", ".", "-", "x"}[rng.IntN(5)])
		}
		return strings.Trim(b.String(), ".") + "b"
	}
	same := 0
	for i := range 100_000 {
		domain, sa := name(), name()
		listed := "spiffe://" + domain + "/ns/shop/sa/" + sa
		other := listed
		switch i % 4 {
		case 0:
			other = strings.Replace(listed, ".", "x", 1)
		case 1:
			other = "spiffe://" + name() + "/ns/shop/sa/" + name()
		case 2:
			other = listed + []string{".", "x", "/x"}[rng.IntN(3)]
		}
		caller, err := spiffeid.Parse(other)
		if err != nil {
			t.Fatal(err)
		}
		if listed == other {
			same++
		}
		for rule, want := range map[*controlpb.AccessRule]bool{
			{SpiffeIds: []string{listed}}:    listed == other,
			{TrustDomains: []string{domain}}: caller.TrustDomain().String() == domain,
		} {
			p, err := access.Compile(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{rule}}, own)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Judge(access.Request{Caller: caller}).Allowed; got != want || p.MayConnect(caller) != want {
				t.Fatalf("a rule %v: %s is allowed: %t", rule, other, got)
			}
		}
	}
	if same < 25_000 {
		t.Errorf("%d pairs were the same", same)
	}
}
