// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
)

// BenchmarkVerify: one operation judges one chain (leaf, issuer) of P-256 keys. The two signature checks dominate; a stranger's chain
// costs none, or one when it borrows the name and key identifier of a root. It cannot show what the handshake itself costs. Run
// with -bench Verify.
func BenchmarkVerify(b *testing.B) {
	root := newRoot(b, "root")
	bundles := set(b, root.bundle("a.mesh", 1))
	for name, signer := range map[string]*authority{"own": root, "stranger": newRoot(b, "root")} {
		id := signer.issuer("issuer").identity(web, t0.Add(time.Hour))
		chain := []*x509.Certificate{id.Chain[0], id.Chain[1]}
		b.Run("chain="+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := trust.Verify(chain, bundles, t0); (err == nil) != (name == "own") {
					b.Fatal(err)
				}
			}
		})
	}
}
