// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// ends sets the validity of a certificate.
func ends(from, until time.Time) edit {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, until }
}

// TestVerifyExpired holds the exception to what it is: the leaf's end is forgiven for a while, and nothing else.
func TestVerifyExpired(t *testing.T) {
	const grace = 168 * time.Hour
	root := newRoot(t, "a root")
	issuer := root.issuer("a issuer")
	web := "spiffe://a.mesh/ns/shop/sa/web"
	now := issuer.cert.NotBefore.Add(300 * time.Hour)
	long := ends(root.cert.NotBefore, now.Add(1000*time.Hour))
	root = newRoot(t, "a root", long)
	issuer = root.issuer("a issuer", long)
	ended := func(ago time.Duration) edit { return ends(now.Add(-ago-36*time.Hour), now.Add(-ago)) }
	stranger := newRoot(t, "a root", long)
	short := root.issuer("short issuer", ends(root.cert.NotBefore, now.Add(-time.Minute)))
	oldRoot := newRoot(t, "old root", ends(root.cert.NotBefore, now.Add(-time.Minute)))
	oldIssuer := oldRoot.issuer("issuer of the old root", ends(root.cert.NotBefore, now.Add(time.Hour)))
	held, err := trust.NewBundle(domain(t, "a.mesh"), []*x509.Certificate{root.cert, oldRoot.cert}, 1)
	if err != nil {
		t.Fatal(err)
	}
	bundles := set(t, held)
	for _, c := range []struct {
		name   string
		chain  []*x509.Certificate
		grace  time.Duration
		reason string // "": accepted
	}{
		{"ended a second ago", []*x509.Certificate{issuer.leaf(web, ended(time.Second)), issuer.cert}, grace, ""},
		{"ended nearly a grace ago", []*x509.Certificate{issuer.leaf(web, ended(grace-time.Second)), issuer.cert}, grace, ""},
		{"ended longer ago", []*x509.Certificate{issuer.leaf(web, ended(grace+time.Second)), issuer.cert}, grace, "expired"},
		{"no grace", []*x509.Certificate{issuer.leaf(web, ended(time.Second)), issuer.cert}, 0, "expired"},
		{"still valid", []*x509.Certificate{issuer.leaf(web, ended(-time.Hour)), issuer.cert}, grace, ""},
		{"still valid, no grace", []*x509.Certificate{issuer.leaf(web, ended(-time.Hour)), issuer.cert}, 0, ""},
		{"not yet valid", []*x509.Certificate{issuer.leaf(web, ends(now.Add(time.Second), now.Add(time.Hour))), issuer.cert}, grace, "not_yet_valid"},
		{"ended before it began", []*x509.Certificate{issuer.leaf(web, ends(now.Add(-time.Hour), now.Add(-2*time.Hour))), issuer.cert}, grace, "expired"},
		{"its issuer has ended, too", []*x509.Certificate{short.leaf(web, ended(time.Hour)), short.cert}, grace, "expired"},
		{"its root has ended, too", []*x509.Certificate{oldIssuer.leaf(web, ended(time.Hour)), oldIssuer.cert}, grace, "expired"},
		{"signed by a stranger", []*x509.Certificate{stranger.leaf(web, ended(time.Hour))}, grace, "untrusted"},
		{"of another trust domain", []*x509.Certificate{issuer.leaf("spiffe://b.mesh/ns/shop/sa/web", ended(time.Hour)), issuer.cert}, grace, "unknown_trust_domain"},
		{"two names", []*x509.Certificate{issuer.leaf(web, ended(time.Hour), func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(true, web, "spiffe://a.mesh/strait/controlplane")}
		}), issuer.cert}, grace, "bad_san"},
		{"a CA certificate", []*x509.Certificate{issuer.cert, root.cert}, grace, "bad_san"},
		{"may sign", []*x509.Certificate{issuer.leaf(web, ended(time.Hour), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), issuer.cert}, grace, "bad_usage"},
		{"nothing", nil, grace, "no_certificate"},
	} {
		p, err := trust.VerifyExpired(c.chain, bundles, now, c.grace)
		var v *trust.VerifyError
		switch {
		case c.reason == "" && (err != nil || p.ID.String() != web):
			t.Errorf("%s: %v", c.name, err)
		case c.reason != "" && (!errors.As(err, &v) || v.Reason != c.reason):
			t.Errorf("%s: %v; want %s", c.name, err, c.reason)
		}
	}
}

// TestRenewHandshake makes the connection: an ended identity gets in on strait-renew/1, nowhere else, and only its key's holder.
func TestRenewHandshake(t *testing.T) {
	root := newRoot(t, "a root")
	control, web := "spiffe://a.mesh/strait/controlplane", "spiffe://a.mesh/ns/shop/sa/web"
	client := root.identity(web, root.cert.NotBefore.Add(2*time.Hour))
	now := client.NotAfter.Add(time.Hour)
	server := root.identity(control, now.Add(24*time.Hour))
	source := func(id *trust.Identity) *trust.Source {
		s := trust.NewSource(trust.SourceConfig{Now: at(now)})
		s.SetBundles(set(t, root.bundle("a.mesh", 1)))
		s.SetIdentity(id)
		return s
	}
	serving, asking := source(server), source(client)
	workloads := func(id spiffeid.ID) error {
		if _, _, ok := id.Workload(); !ok {
			return errors.New("no workload")
		}
		return nil
	}
	mutual := serving.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{"h2"}})
	renew := serving.RenewServerTLS(workloads, 24*time.Hour)
	toControl := trust.AuthorizeID(parseID(t, control))
	ordinary := asking.ClientTLS(trust.TLSOptions{Authorize: toControl, ALPN: []string{"h2"}})
	if err := connect(t, renew, asking.RenewClientTLS(toControl)); err != nil {
		t.Errorf("renewal: %v", err)
	}
	if err := connect(t, mutual, ordinary); err == nil {
		t.Error("an ended identity was presented on h2")
	}
	smuggled := asking.RenewClientTLS(toControl).Clone()
	smuggled.NextProtos, smuggled.VerifyConnection = []string{"h2"}, nil
	if err := connect(t, trust.ByALPN(mutual, renew), smuggled); err == nil {
		t.Error("an ended identity was accepted on h2")
	}
	noProtocol := asking.RenewClientTLS(toControl).Clone()
	noProtocol.NextProtos, noProtocol.VerifyConnection = nil, nil
	if err := connect(t, renew, noProtocol); err == nil {
		t.Error("an ended identity was accepted without a protocol")
	}
	if err := connect(t, serving.RenewServerTLS(func(spiffeid.ID) error { return errors.New("withdrawn") }, 24*time.Hour), asking.RenewClientTLS(toControl)); err == nil {
		t.Error("a refused identity was accepted")
	}
	if err := connect(t, serving.RenewServerTLS(workloads, time.Minute), asking.RenewClientTLS(toControl)); err == nil {
		t.Error("accepted after the grace")
	}
	if err := connect(t, renew, asking.RenewClientTLS(trust.AuthorizeID(parseID(t, web)))); err == nil {
		t.Error("the client took the control plane for somebody else")
	}
	if err := connect(t, renew, source(root.identity("spiffe://a.mesh/strait/operator/eve", client.NotAfter)).RenewClientTLS(toControl)); err == nil {
		t.Error("an operator was accepted")
	}
}

// connect makes one handshake over a pipe. On success it holds PeerFromState to refusing what came in on strait-renew/1.
func connect(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		defer b.Close()
		c := tls.Server(b, server)
		err := c.HandshakeContext(ctx)
		if err == nil {
			if _, err := trust.PeerFromState(c.ConnectionState()); err == nil {
				t.Error("PeerFromState names the client of " + c.ConnectionState().NegotiatedProtocol)
			}
		}
		failed <- err
	}()
	c := tls.Client(a, client)
	err := c.HandshakeContext(ctx)
	if err == nil {
		_, _ = io.Copy(io.Discard, c) // the server's verdict comes after the client's handshake
	}
	a.Close()
	return errors.Join(err, <-failed)
}
