// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/crowd/crowdtest"
	"github.com/strait-mesh/strait/trust"
)

// TestSilentThousands: whoever says nothing is closed in time, before the handshake or after that of a registration, and keeps nobody
// out meanwhile.
func TestSilentThousands(t *testing.T) {
	d := openDoor(t, nil)
	renew := func() error {
		conn := d.dial(d.source(d.workload("web")))
		defer conn.Close()
		csr, _ := request(t)
		_, err := controlpb.NewIdentityClient(conn).Renew(t.Context(), &controlpb.RenewRequest{CsrDer: csr})
		return err
	}
	crowdtest.Press(t, d.listener.Addr().String(), renew)

	cfg := trust.PinnedClientTLS(d.ca.Bundle().Hash(), nil, nil, trust.TLSOptions{Authorize: trust.AuthorizeControlPlane(d.td), ALPN: []string{"strait-register/1"}}, nil)
	var conns []net.Conn
	var since []time.Time
	for range 300 { // more than may be pending
		c, err := tls.Dial("tcp", d.listener.Addr().String(), cfg)
		must(t, err)
		defer c.NetConn().Close()
		conns, since = append(conns, c), append(since, time.Now())
	}
	must(t, renew())
	crowdtest.AwaitClosed(t, conns, since)
}
