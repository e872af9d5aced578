// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/strait-mesh/strait/gateway"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/internal/crowd/crowdtest"
	"github.com/strait-mesh/strait/internal/preface"
	"github.com/strait-mesh/strait/trust"
)

// TestSilentCrowd: callers that say nothing are closed in time on each port of a gateway, and keep nobody out meanwhile.
func TestSilentCrowd(t *testing.T) {
	east, west, web, _ := pair(t, func(c *gateway.Config) { c.DisableUDP = true })
	web.awaitPeer(west, tunnel.TCP)
	local := east.client.source
	sidecar := east.source(east.workload("cart"), west)
	t.Run("tunnels", func(t *testing.T) {
		crowdtest.Press(t, west.addrs.Listen, func() error { return east.tryTunnel(west, tunnel.TCP) })
	})
	t.Run("sidecars", func(t *testing.T) {
		crowdtest.Press(t, east.addrs.Local, func() error {
			c, err := tls.Dial("tcp", east.addrs.Local, sidecar.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeID(local.Identity().ID), ALPN: []string{preface.ALPN}}))
			if err != nil {
				return err
			}
			defer c.Close()
			_, _, err = web.call(west, "checkout")
			return err
		})
	})
	t.Run("metrics", func(t *testing.T) {
		crowdtest.Press(t, east.addrs.Metrics, func() error { return get("http://" + east.addrs.Metrics + "/healthz") })
	})
}

func get(url string) error {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err != nil || r.StatusCode != http.StatusOK {
		return errors.Join(errors.New(r.Status), err)
	}
	return nil
}
