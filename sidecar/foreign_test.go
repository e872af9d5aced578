// SPDX-License-Identifier: Apache-2.0

package sidecar_test

import (
	"bufio"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/sidecar"
	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestForeignCaller: the bundle of a foreign trust domain lets its identities prove themselves; only the one that a rule names exactly
// may call, and without a policy none.
func TestForeignCaller(t *testing.T) {
	c, partner := newCluster(t, "us-east"), newCluster(t, "partner")
	app := newHTTPApp(t, "one")
	rule := &controlpb.Access{HasPolicy: true, DefaultTrustDomains: []string{c.td.String()}, Rules: []*controlpb.AccessRule{
		{Name: "partner", Policy: "shop/p", SpiffeIds: []string{partner.id("reader").String()}},
	}}
	for name, tc := range map[string]struct {
		access  *controlpb.Access
		follows bool
		caller  string
		want    int // status; 0: no answer at all
	}{
		"named exactly":           {rule, true, "reader", 200},
		"a neighbour":             {rule, true, "writer", 0},
		"no policy":               {&controlpb.Access{DefaultTrustDomains: []string{c.td.String()}}, true, "reader", 0},
		"audit lets in no more":   {&controlpb.Access{HasPolicy: true, Audit: true, DefaultTrustDomains: []string{c.td.String()}}, true, "reader", 0},
		"named, and not followed": {rule, false, "reader", 0},
	} {
		t.Run(name, func(t *testing.T) {
			snap := sidecar.NewSnapshot(c.source(c.id("checkout")))
			self := c.self("checkout-1", "checkout")
			self.Inbound = []*controlpb.InboundPort{c.inbound("checkout", "main", http1, app.addr())}
			self.Inbound[0].Access = tc.access
			check(t, snap.Put(self))
			if tc.follows {
				check(t, snap.Put(&controlpb.Bundle{TrustDomain: partner.td.String(), Jwks: partner.ca.Bundle().Marshal(), Sequence: 1}))
			}
			far := start(t, "checkout-1", snap, nil)
			eventually(t, "callee is ready", ready(far))
			d := &inner.Dialer{Source: partner.source(partner.id(tc.caller), c), Timeout: 5 * time.Second}
			conn, err := d.Dial(t.Context(), inner.Target{Address: far.addrs.Inbound, IDs: []spiffeid.ID{c.id("checkout")}, SNI: c.sni("checkout", "main"), ALPN: []string{"http/1.1"}})
			check(t, err) // a TLS client is done before it is judged
			defer conn.Close()
			q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://checkout.shop/", http.NoBody)
			check(t, err)
			r, err := roundTrip(conn.Stream(), q)
			switch {
			case tc.want == 0 && err == nil:
				t.Errorf("answered %d", r.StatusCode)
			case tc.want != 0 && (err != nil || r.StatusCode != tc.want):
				t.Errorf("got %v, %v; want %d", r, err, tc.want)
			}
			if err == nil {
				_, _ = io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}
		})
	}
}

// roundTrip sends one request over a connection that stands and reads the answer.
func roundTrip(rw io.ReadWriter, q *http.Request) (*http.Response, error) {
	q.Close = true
	if err := q.Write(rw); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(rw), q)
}
