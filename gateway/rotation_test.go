// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestCatalogCrossesARotation: the new bundle of a member comes in a catalog that the gateway itself has to verify. While the root
// rotates, the gateway takes it under the root that it holds, through the sibling certificate, over a tunnel to a gateway whose
// identity is already of the new issuer; once it holds the new root, the old one may go.
func TestCatalogCrossesARotation(t *testing.T) {
	east, west := newCluster(t, "us-east"), newCluster(t, "eu-west")
	cpe, cpw := east.controlPlane(), west.controlPlane()
	west.start()
	east.start()
	west.knows(east)
	east.knows(west, west.addrs.Listen)
	var signer atomic.Pointer[trust.Identity]
	gatewayID := must(spiffeid.Gateway(west.td, "gw-1"))
	renew := func() {
		signer.Store(must(west.ca.IssueKey(spiffeid.CatalogSigner(west.td), time.Hour)))
		west.client.source.SetIdentity(must(west.ca.IssueKey(gatewayID, time.Hour)))
		west.client.source.SetBundles(west.client.source.Bundles().With(west.ca.Bundle()))
	}
	renew()
	origin := must(catalog.NewOrigin(catalog.OriginConfig{Self: west.td, Signer: signer.Load,
		Epoch: func(_ context.Context, least uint64) (uint64, error) { return max(1, least), nil }}))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = origin.Run(ctx) })
	defer wg.Wait()
	defer cancel()

	var epoch, seq uint64
	offer := func() {
		t.Helper()
		changed := origin.Changed()
		if err := origin.Set(east.td, map[string][]byte{catalog.BundleKey: must(catalog.BundleEntry(west.ca.Bundle()))}); err != nil {
			t.Fatal(err)
		}
		<-changed
		u := origin.Update(east.td, epoch, seq)
		h := must(catalog.ParseHead(u.Head.Head))
		epoch, seq = h.Epoch, h.Seq
		cpw.say <- &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Offer{Offer: &controlpb.Offer{
			ConsumerTrustDomain: east.td.String(), Update: u}}}
	}
	hear := func() {
		t.Helper()
		want := seq
		m := cpe.hear("the catalog", func(m *controlpb.GatewayMessage) bool {
			h, err := catalog.ParseHead(m.GetCatalog().GetUpdate().GetHead().GetHead())
			return err == nil && h.Seq == want
		})
		if _, err := catalog.VerifyHead(m.GetCatalog().Update.Head, east.client.source.Bundles(), west.td, east.td, time.Now()); err != nil {
			t.Errorf("passed on without being verified: %v", err)
		}
	}
	offer()
	hear()
	old := must(trust.NewBundles(west.ca.Bundle()))

	// prepared and activated while us-east's control plane hears nothing of it
	for _, step := range []func() error{west.ca.Prepare, west.ca.Activate} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		renew()
	}
	if len(signer.Load().Chain) != 3 {
		t.Fatalf("a chain of %d", len(signer.Load().Chain))
	}
	if east.client.source.Bundles().Get(west.td).Hash() != old.Get(west.td).Hash() {
		t.Fatal("us-east has the new bundle already")
	}
	offer()
	hear()

	east.knows(west, west.addrs.Listen) // what its control plane took from that catalog
	if err := west.ca.Retire(); err != nil {
		t.Fatal(err)
	}
	renew()
	offer()
	hear()
}
