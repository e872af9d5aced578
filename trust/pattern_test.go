// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestNoPatterns: class T5. An identity, and a trust domain, is accepted when it is the same text, and never because it fits what another
// parser would take for a pattern: 100,000 pairs that differ by a character or a segment, or not at all.
func TestNoPatterns(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...string) string { return list[rng.IntN(len(list))] }
	name := func() string { // few letters and many dots: what "a.b" means as a pattern occurs often
		var b strings.Builder
		for range 1 + rng.IntN(4) {
			b.WriteString(pick("a", "b", ".", "-", "_", "x"))
		}
		return strings.Trim(b.String(), ".") + "a"
	}
	same, different, likely := 0, 0, 0
	for range 100_000 {
		td, ns, sa := name(), name(), name()
		one := "spiffe://" + td + "/ns/" + ns + "/sa/" + sa
		two := one
		switch rng.IntN(7) {
		case 0: // the same
		case 1: // what a dot would match
			two = strings.Replace(one, ".", pick("x", "-", "a"), 1)
		case 2:
			two = one + pick("a", ".", "/x")
		case 3:
			two = "spiffe://" + pick("x.", "a", "a-") + one[len("spiffe://"):]
		case 4:
			two = "spiffe://" + td + "/ns/" + ns + "x/sa/" + sa
		case 5:
			two = "spiffe://" + td + "/ns/" + ns
		case 6:
			two = "spiffe://" + name() + "/ns/" + name() + "/sa/" + name()
		}
		a, errA := spiffeid.Parse(one)
		b, errB := spiffeid.Parse(two)
		if errA != nil || errB != nil {
			continue
		}
		if a == b {
			same++
		} else {
			different++
		}
		if len(one) == len(two) && one != two {
			likely++
		}
		if accepted := trust.AuthorizeID(a)(b) == nil; accepted != (one == two) {
			t.Fatalf("%s accepts %s: %t", one, two, accepted)
		}
		if accepted := trust.AuthorizeTrustDomain(a.TrustDomain())(b) == nil; accepted != (a.TrustDomain().String() == b.TrustDomain().String()) {
			t.Fatalf("the trust domain of %s accepts %s: %t", one, two, accepted)
		}
	}
	if same+different < 90_000 || same < 10_000 || likely < 1_000 {
		t.Errorf("%d pairs the same, %d different, %d of one length", same, different, likely)
	}
}
