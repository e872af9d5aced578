// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
)

// TestWithdrawnInTheHandshake: whom the process knows to be withdrawn is refused inside the handshake, by either side, and by the
// certificate that it presents: one issued later is another matter.
func TestWithdrawnInTheHandshake(t *testing.T) {
	m := newMeshes(t, at(t0))
	options := trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"x"}}
	client, server := m.a.ClientTLS(options), m.b.ServerTLS(options)
	if ce, se, _, _ := exchange(t, client, server); ce != nil || se != nil {
		t.Fatal(ce, se)
	}
	var asked *trust.Peer
	withdrawn := func(p *trust.Peer) (string, bool) { asked = p; return "stolen", true }
	m.b.SetWithdrawn(withdrawn)
	if _, se, _, _ := exchange(t, client, server); reason(se) != "withdrawn" {
		t.Errorf("the server says %v", se)
	}
	if asked == nil || asked.ID != m.a.Identity().ID || !asked.Issued().Equal(m.a.Identity().Chain[0].NotBefore.Add(10*time.Minute)) {
		t.Errorf("asked about %+v", asked)
	}
	m.b.SetWithdrawn(nil)
	m.a.SetWithdrawn(withdrawn)
	if ce, _, _, _ := exchange(t, client, server); reason(ce) != "withdrawn" {
		t.Errorf("the client says %v", ce)
	}
	m.a.SetWithdrawn(func(p *trust.Peer) (string, bool) { return "old", p.Issued().Before(t0.Add(-time.Hour)) })
	if ce, se, _, _ := exchange(t, client, server); ce != nil || se != nil {
		t.Errorf("a certificate issued later: %v, %v", ce, se)
	}
}

func TestIssued(t *testing.T) {
	if got := trust.Issued(&x509.Certificate{NotBefore: t0}); !got.Equal(t0.Add(trust.Backdate)) {
		t.Errorf("issued %v", got)
	}
	if got := (&trust.Peer{}).Issued(); !got.IsZero() {
		t.Errorf("without a certificate issued %v", got)
	}
}
