// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestRenewExpired: who has ended may renew itself on strait-renew/1, for the grace, unless it was withdrawn; operators and the control
// plane may not, and 0 turns it off.
func TestRenewExpired(t *testing.T) {
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var ahead atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	fatal(err)
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "d"))
	fatal(err)
	defer dir.Close()
	issuer, err := ca.Create(dir, ca.Config{TrustDomain: td, Now: now})
	fatal(err)
	source := func(id spiffeid.ID) *trust.Source {
		s := trust.NewSource(trust.SourceConfig{Now: now})
		set, err := trust.NewBundles(issuer.Bundle())
		fatal(err)
		s.SetBundles(set)
		own, err := issuer.IssueKey(id, 0)
		fatal(err)
		s.SetIdentity(own)
		return s
	}
	web, err := spiffeid.Workload(td, "shop", "web")
	fatal(err)
	evil, err := spiffeid.Workload(td, "shop", "evil")
	fatal(err)
	gateway, err := spiffeid.Gateway(td, "gw-1")
	fatal(err)
	operator, err := spiffeid.Operator(td, "ann")
	fatal(err)
	clients := map[spiffeid.ID]*trust.Source{}
	for _, id := range []spiffeid.ID{web, evil, gateway, operator, spiffeid.ControlPlane(td)} {
		clients[id] = source(id)
	}
	serve := func(grace time.Duration) string {
		cp := source(spiffeid.ControlPlane(td))
		server, err := identity.New(identity.Config{
			Signer: issuer, Bundle: issuer.Bundle, Denied: func(id spiffeid.ID, _ time.Time) (string, bool) { return "laptop lost", id == evil },
		})
		fatal(err)
		inner, err := net.Listen("tcp", "127.0.0.1:0")
		fatal(err)
		l, err := identity.Open(inner, identity.ListenerConfig{
			Source: cp, TrustDomain: td, Renew: server.RenewExpired(cp, td, grace, now), RenewGrace: grace, Register: func(context.Context, *tls.Conn) {},
		})
		fatal(err)
		t.Cleanup(func() { _ = l.Close() })
		return l.Addr().String()
	}
	renew := func(addr string, id spiffeid.ID) (*controlpb.RenewResponse, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		fatal(err)
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		fatal(err)
		r, err := register.Renew(t.Context(), register.RenewConfig{
			Source: clients[id], Addresses: []string{addr}, Request: &controlpb.RenewRequest{CsrDer: csr, Proxy: "shop/web-1"},
		})
		if err == nil {
			got, err := trust.NewIdentity(r.GetChainDer(), key)
			fatal(err)
			if got.ID != id || !now().Before(got.NotAfter) {
				t.Errorf("%s got %s until %s", id, got.ID, got.NotAfter)
			}
		}
		return r, err
	}

	ahead.Store(int64(48 * time.Hour)) // every client's identity has ended, half a day ago
	open, closed := serve(168*time.Hour), serve(0)
	for id, want := range map[spiffeid.ID]bool{web: true, gateway: true, evil: false, operator: false, spiffeid.ControlPlane(td): false} {
		if _, err := renew(open, id); (err == nil) != want {
			t.Errorf("%s: %v", id, err)
		}
		if _, err := renew(closed, id); err == nil {
			t.Errorf("%s was renewed although that is off", id)
		}
	}
	if _, err := renew(open, evil); !problem.Is(err, problem.IdentityExpired) {
		t.Errorf("withdrawn: %v", err)
	}
	ahead.Store(int64((36 + 169) * time.Hour))
	if _, err := renew(serve(168*time.Hour), web); err == nil {
		t.Error("renewed after the grace")
	}
}
