// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/trust"
)

// recalling publishes the own bundle with the wish that identities issued before a time be renewed.
func (c *cluster) recalling(before time.Time) {
	b := c.ca.Bundle()
	must(c.t, c.discovery.Replace(controlpb.TypeBundle, map[string]proto.Message{c.td.String(): &controlpb.Bundle{
		TrustDomain: c.td.String(), Jwks: b.Marshal(), Sequence: b.Sequence(), RenewIssuedBeforeMs: before.UnixMilli(),
	}}))
}

// TestRecall: identities issued before a time are renewed although their own time has not come, once, and also by a proxy that has
// the recall from its snapshot alone.
func TestRecall(t *testing.T) {
	for role, name := range map[proxyclient.Role]string{proxyclient.Sidecar: "shop/web-1", proxyclient.Gateway: "gw-1"} {
		t.Run(string(role), func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			c.serve()
			c.recalling(time.UnixMilli(0))
			dir := newDir(t)
			token := c.gatewayToken
			if role == proxyclient.Sidecar {
				token = func(name string) string { return c.sidecarToken(name, "web") }
			}
			cfg := c.config(role, name, token(name), dir)
			cfg.RenewEvery = 16 * time.Second // the recall waits for 4 s at most, the next renewal for 14 s at least
			client, stop := open(t, cfg)
			eventually(t, "connected", func() bool { return client.Status().Connected })
			if n := c.renewals.Load(); n != 0 {
				t.Fatalf("%d renewals without a recall", n)
			}
			first, err := dir.ReadFile("identity/svid.pem")
			must(t, err)

			c.clock.Advance(2 * time.Second)
			before, asked := c.clock.Now().Truncate(time.Second), time.Now()
			c.recalling(before)
			issued := func() time.Time { return trust.Issued(client.Source().Identity().Chain[0]) }
			eventually(t, "renewed", func() bool { return !issued().Before(before) })
			if took := time.Since(asked); took > 12*time.Second {
				t.Errorf("after %v", took)
			}
			if r := c.renewed.Load(); r.Proxy != name || r.ID != client.Info().ID || r.Issuer == "" || r.Application {
				t.Errorf("the control plane heard of %+v", r)
			}
			stop()
			if n := c.renewals.Load(); n != 1 {
				t.Errorf("%d renewals for one recall", n)
			}

			must(t, dir.WriteFile("identity/svid.pem", first)) // as a crash before the renewal leaves it
			c.stop()
			c.newDiscovery() // which says nothing
			c.serve()
			client, _ = open(t, cfg)
			eventually(t, "renewed by what the snapshot says", func() bool { return !issued().Before(before) })
		})
	}
}

// TestOwnBundleNeverGoesBack: neither a resource nor the answer to a renewal brings an older bundle of the own trust domain back.
func TestOwnBundleNeverGoesBack(t *testing.T) {
	c := newCluster(t)
	c.serve()
	publish := func(b *trust.Bundle) {
		t.Helper()
		must(t, c.discovery.Replace(controlpb.TypeBundle, map[string]proto.Message{
			c.td.String(): &controlpb.Bundle{TrustDomain: c.td.String(), Jwks: b.Marshal(), Sequence: b.Sequence()},
		}))
	}
	older := c.ca.Bundle() // which renewals answer with
	newer, err := older.WithRoots(append(older.Roots(), newClusterOf(t, c.td.String()).ca.Bundle().Roots()...))
	must(t, err)
	publish(newer)
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	cfg.RenewEvery = 50 * time.Millisecond
	client, _ := open(t, cfg)
	own := func() *trust.Bundle { return client.Source().Bundles().Get(c.td) }
	eventually(t, "the newer bundle", func() bool { return own().Equal(newer) })
	n := c.renewals.Load()
	eventually(t, "renewals", func() bool { return c.renewals.Load() > n+2 })
	publish(older)
	acked := func(want int) func() bool {
		return func() bool {
			acked, subscribed, nacks := c.discovery.Acked(controlpb.TypeBundle, c.td.String())
			return subscribed == 1 && acked == want && len(nacks) == 1-want
		}
	}
	eventually(t, "the older one was looked at", acked(1))
	if !own().Equal(newer) {
		t.Fatalf("sequence %d after %d", own().Sequence(), newer.Sequence())
	}
	publish(older.WithSequence(newer.Sequence()))
	eventually(t, "two bundles of one sequence are refused", acked(0))
	if !own().Equal(newer) {
		t.Fatal("another bundle of the same sequence is in force")
	}
}
