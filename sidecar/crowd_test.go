// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/crowd/crowdtest"
	"github.com/strait-mesh/strait/sidecar"
)

// TestSilentCrowd: callers that say nothing are closed in time on each port that others may reach, and keep nobody out meanwhile, not
// even where they are more than all connections that the listener takes.
func TestSilentCrowd(t *testing.T) {
	c := newCluster(t, "us-east")
	snap := sidecar.NewSnapshot(c.source(c.id("checkout")))
	self := c.self("checkout-1", "checkout")
	self.Inbound = []*controlpb.InboundPort{c.inbound("checkout", "main", tcp, newTCPApp(t, "one").Addr().String())}
	check(t, snap.Put(self))
	far := start(t, "checkout-1", snap, func(cfg *sidecar.Config) { cfg.MaxConnections = 1000 })
	eventually(t, "callee is ready", ready(far))
	web := c.source(c.id("web"))
	t.Run("inbound", func(t *testing.T) {
		crowdtest.Press(t, far.addrs.Inbound, func() error {
			conn, err := attacker(web, far.addrs.Inbound, c.sni("checkout", "main"))
			if err != nil {
				return err
			}
			defer conn.Close()
			got, err := sayOn(conn, "hi")
			if err == nil && got != "one:hi" {
				err = fmt.Errorf("answered %q", got)
			}
			return err
		})
	})
	t.Run("metrics", func(t *testing.T) {
		crowdtest.Press(t, far.addrs.Metrics, func() error {
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			r, err := client.Get("http://" + far.addrs.Metrics + "/readyz")
			if err != nil {
				return err
			}
			return r.Body.Close()
		})
	})
}
