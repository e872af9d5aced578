// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// san is an extension of the subject alternative names, as bytes of the caller's choice.
func san(names ...asn1.RawValue) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: must(asn1.Marshal(names))}
}

func uriName(s string) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(s)}
}

// greedyRequests ask for what was not granted (T3).
func greedyRequests() map[string]*x509.CertificateRequest {
	cp := spiffeid.ControlPlane(td)
	ext := func(id asn1.ObjectIdentifier, value any) pkix.Extension {
		return pkix.Extension{Id: id, Critical: true, Value: must(asn1.Marshal(value))}
	}
	with := func(e ...pkix.Extension) *x509.CertificateRequest {
		return &x509.CertificateRequest{ExtraExtensions: e}
	}
	return map[string]*x509.CertificateRequest{
		"nothing":        {},
		"another URI":    {URIs: []*url.URL{cp.URL()}},
		"two URIs":       {URIs: []*url.URL{web.URL(), cp.URL()}},
		"the same twice": {URIs: []*url.URL{web.URL(), web.URL()}},
		"DNS and URI":    {DNSNames: []string{"strait.example"}, URIs: []*url.URL{web.URL()}},
		"addresses":      {IPAddresses: []net.IP{{127, 0, 0, 1}}, EmailAddresses: []string{"root@acme.example"}},
		"NUL":            with(san(uriName(web.String() + "\x00.evil"))),
		"2049 bytes":     with(san(uriName("spiffe://" + td.String() + "/" + strings.Repeat("a", 2049)))),
		"many URIs":      with(san(uriName(web.String()), uriName(cp.String()), uriName("spiffe://eu-west.acme/x"))),
		"other name":     with(san(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: []byte{0x06, 0x01, 0x2a}})),
		"CA":             with(ext(asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ CA bool }{true})),
		"keyCertSign":    with(ext(asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.BitString{Bytes: []byte{0x04}, BitLength: 6})),
		"code signing":   with(ext(asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 3}})),
		"unknown":        with(ext(asn1.ObjectIdentifier{1, 2, 3, 4}, "x")),
		"operators":      {Subject: pkix.Name{CommonName: "root", Organization: []string{"system:masters"}, SerialNumber: "1"}},
	}
}

// TestGreedyRequests: whatever a request asks for, what is issued says what was granted and nothing else; or nothing is issued.
func TestGreedyRequests(t *testing.T) {
	a, dir, clk := newCA(t)
	root := must(dir.ReadFile("ca/root.pem"))
	issued := 0
	for name, tmpl := range greedyRequests() {
		key := p256()
		der := request(t, key, tmpl)
		ders, err := a.IssueCSR(der, web, time.Hour)
		if err != nil {
			continue // what Go's parser refuses
		}
		issued++
		leaf := chain(t, ders)[0]
		p, err := trust.Verify(chain(t, ders), must(trust.NewBundles(a.Bundle())), clk.Now())
		if err != nil || p.ID != web {
			t.Errorf("%s: verified as %v, %v", name, p, err)
			continue
		}
		names := len(leaf.DNSNames) + len(leaf.IPAddresses) + len(leaf.EmailAddresses)
		if leaf.IsCA || names != 0 || len(leaf.URIs) != 1 || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 2 ||
			leaf.Subject.String() != "O=Strait" || len(leaf.UnhandledCriticalExtensions) > 0 || len(leaf.Extensions) != 5 || !key.PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("%s has shaped the certificate: %s, %d extensions, %v", name, leaf.Subject, len(leaf.Extensions), leaf.URIs)
		}
		// The same as an issuer's request: it is none of this trust domain.
		csr := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
		if _, err := ca.SignIssuerRequest(root, csr, td, clk.Now()); err == nil {
			t.Errorf("%s became an issuer", name)
		}
		// And one that is, greedy in all else.
		tmpl.URIs = []*url.URL{{Scheme: "spiffe", Host: td.String()}}
		if bytes.Contains([]byte(name), []byte("URI")) || len(tmpl.ExtraExtensions) > 0 && tmpl.ExtraExtensions[0].Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			continue
		}
		csr = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: request(t, key, tmpl)})
		out, err := ca.SignIssuerRequest(root, csr, td, clk.Now())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		block, _ := pem.Decode(out)
		c := must(x509.ParseCertificate(block.Bytes))
		if len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0 || len(c.URIs) != 1 || !c.MaxPathLenZero || len(c.PermittedURIDomains) != 1 || len(c.ExtKeyUsage) != 0 || len(c.Extensions) != 6 {
			t.Errorf("%s has shaped the issuer: %d extensions", name, len(c.Extensions))
		}
	}
	if issued < 10 {
		t.Errorf("only %d requests were judged", issued)
	}
}

// FuzzIssuer: whatever somebody hands over as a request, a root or an issuer's certificate, nothing panics, nothing is signed for another
// trust domain, and the CA goes on.
func FuzzIssuer(f *testing.F) {
	clk := &clock{now: t0}
	dir := must(datadir.Create(filepath.Join(f.TempDir(), "strait")))
	a := must(ca.Create(dir, ca.Config{TrustDomain: td, Now: clk.Now}))
	root := must(dir.ReadFile("ca/root.pem"))
	csr := must(a.IssuerRequest())
	chain := must(ca.SignIssuerRequest(root, csr, td, t0))
	block, _ := pem.Decode(csr)
	f.Add(csr)
	f.Add(root)
	f.Add(chain)
	f.Add(block.Bytes)
	f.Add(append(bytes.Clone(root), root...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if out, err := ca.SignIssuerRequest(root, data, td, t0); err == nil && bytes.Contains(out, []byte("PRIVATE")) {
			t.Error("a signed request contains a key")
		}
		if out, err := ca.SignIssuerRequest(data, csr, td, t0); err == nil && (bytes.Contains(out, []byte("PRIVATE")) || must(ca.RootDomain(data)) != td) {
			t.Error("signed by a root of another trust domain")
		}
		_ = a.PrepareRoot(data)
		if a.State().Phase == ca.Prepared {
			if err := a.Abort(); err != nil {
				t.Fatal(err)
			}
		}
		_ = a.ImportIssuer(data)
		if ders, err := a.IssueCSR(data, web, 0); err == nil && len(ders) != 2 {
			t.Error("an odd chain")
		}
		id, err := a.IssueKey(web, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := verifies(id, a.Bundle(), t0); err != nil {
			t.Fatal(err)
		}
	})
}

// BenchmarkIssue: one identity: a signature, a line in the ledger and its fsync, which callers that come together share. The disk dominates.
func BenchmarkIssue(b *testing.B) {
	dir := must(datadir.Create(filepath.Join(b.TempDir(), "strait")))
	a := must(ca.Create(dir, ca.Config{TrustDomain: td}))
	der := must(x509.CreateCertificateRequest(bytes.NewReader(bytes.Repeat([]byte("x"), 4096)), &x509.CertificateRequest{}, p256()))
	b.Run("callers=1", func(b *testing.B) {
		for b.Loop() {
			if _, err := a.IssueCSR(der, web, 0); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("callers=64", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := a.IssueCSR(der, web, 0); err != nil {
					b.Error(err)
				}
			}
		})
	})
}
