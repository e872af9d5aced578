// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"os"
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
)

// TestFreshToken: a proxy whose identity was withdrawn comes back with a new token once it is readmitted, running or started anew; its
// old identity and its old token do not help it.
func TestFreshToken(t *testing.T) {
	for _, restart := range []bool{false, true} {
		c := newCluster(t)
		c.serve()
		must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
		dir := newDir(t)
		cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), dir)
		client, stop := open(t, cfg)
		eventually(t, "connected", func() bool { return client.Status().Connected })
		id := client.Info().ID
		must(t, c.denied.Add(id, "stolen"))
		must(t, c.tokens.RevokeFor(id))
		c.withdrawals.Judge(c.judge)
		eventually(t, "cut off", func() bool { return !client.Status().Connected })
		must(t, c.denied.Readmit(id))
		eventually(t, "the next second", func() bool { _, denied := c.denied.Issuable(id); return !denied })
		if restart {
			stop()
			client, stop = open(t, cfg)
		}
		old := client.Source().Identity().Chain[0].SerialNumber
		token, err := os.ReadFile(c.sidecarToken("shop/web-1", "web"))
		must(t, err)
		if client.Status().Connected {
			t.Error("connected with the old certificate")
		}
		must(t, os.WriteFile(cfg.TokenFile, token, 0o600))
		eventually(t, "connected again", func() bool { return client.Status().Connected })
		if client.Source().Identity().Chain[0].SerialNumber.Cmp(old) == 0 {
			t.Error("with the old certificate")
		}
		must(t, os.WriteFile(cfg.TokenFile, []byte("strait-register-v1.nonsense"), 0o600))
		stop()
		client, _ = open(t, cfg)
		eventually(t, "connected after a restart beside a broken token file", func() bool { return client.Status().Connected })
	}
}

// TestFreshTokenOfAnotherAccount: a running proxy that is given a token for another service account speaks to the control plane as that at
// once: connections that were opened under the old ID are closed.
func TestFreshTokenOfAnotherAccount(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	client, _ := open(t, cfg)
	eventually(t, "connected", func() bool { return client.Status().Connected })
	before := client.Info().ID
	token, err := os.ReadFile(c.sidecarToken("shop/web-1", "checkout"))
	must(t, err)
	must(t, os.WriteFile(cfg.TokenFile, token, 0o600))
	eventually(t, "the control plane to see the new identity alone", func() bool {
		seen := c.withdrawals.Snapshot()
		for _, s := range seen {
			if s.Identity == before {
				return false
			}
		}
		return len(seen) > 0 && client.Info().ID != before && client.Status().Connected
	})
}
