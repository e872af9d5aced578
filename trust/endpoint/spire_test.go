// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust/endpoint"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestSPIRE runs against a real agent, SPIRE's or another, where STRAIT_SPIRE_SOCKET says: unix:///run/spire/sockets/agent.sock. The test
// process must be entitled to the identity in STRAIT_SPIRE_ID. With STRAIT_SPIRE_WAIT (a duration) it stays until an identity was renewed.
// docs/how-to/spire.md has the entry to register.
func TestSPIRE(t *testing.T) {
	socket, wanted := os.Getenv("STRAIT_SPIRE_SOCKET"), os.Getenv("STRAIT_SPIRE_ID")
	if socket == "" || wanted == "" {
		t.Skip("needs STRAIT_SPIRE_SOCKET and STRAIT_SPIRE_ID: a SPIRE agent, and an entry for this process")
	}
	want := id(t, wanted)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	h, err := endpoint.Open(ctx, endpoint.Config{
		Socket: socket, Wants: []endpoint.Want{endpoint.Exactly(want)}, Dir: newDir(t), Federated: func(spiffeid.TrustDomain) bool { return true },
	})
	must(t, err)
	defer h.Close()
	must(t, handshake(h.Source()))
	first := h.Source().Identity()
	t.Logf("%s until %s, chain of %d, bundle %d with %d roots and %d JWT keys, bundles of %v; offered %v", first.ID, first.NotAfter, len(first.Chain),
		h.Bundle().Sequence(), len(h.Bundle().Roots()), len(h.Bundle().JWTKeys()), h.Source().Bundles().TrustDomains(), h.Status().Offered)
	wait, err := time.ParseDuration(os.Getenv("STRAIT_SPIRE_WAIT"))
	if err != nil {
		return
	}
	timeout := time.After(wait)
	for {
		changed := h.Changed()
		if now := h.Source().Identity(); !now.NotAfter.Equal(first.NotAfter) {
			must(t, handshake(h.Source()))
			t.Logf("renewed: until %s", now.NotAfter)
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("not renewed within %v", wait)
		}
	}
}
