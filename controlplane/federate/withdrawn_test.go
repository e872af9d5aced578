// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestCatalogOfAWithdrawnPeerLeavesNothing: a peer that is removed while its join's catalogs cross does not come back without a name.
func TestCatalogOfAWithdrawnPeerLeavesNothing(t *testing.T) {
	dir, err := datadir.Create(t.TempDir() + "/d")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	us, err := spiffeid.ParseTrustDomain("us-east.acme")
	if err != nil {
		t.Fatal(err)
	}
	eu, err := spiffeid.ParseTrustDomain("eu-west.acme")
	if err != nil {
		t.Fatal(err)
	}
	identity := func() *trust.Identity { return nil }
	m, err := New(Config{Federation: "acme", Cluster: "us-east", TrustDomain: us, Dir: dir, Identity: identity, Signer: identity,
		Bundle: func() *trust.Bundle { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.takeCatalog(eu, &controlpb.JoinCatalog{}); !problem.Is(err, problem.TrustRefused) {
		t.Errorf("taken: %v", err)
	}
	if n := len(m.View().Peers); n != 0 {
		t.Errorf("%d peers", n)
	}
}
