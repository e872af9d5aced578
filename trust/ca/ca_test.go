// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

var t0 = time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var (
	td  = must(spiffeid.ParseTrustDomain("us-east.acme"))
	web = must(spiffeid.Workload(td, "shop", "web"))
)

func newCA(t *testing.T) (*ca.CA, *datadir.Dir, *clock) {
	t.Helper()
	c := &clock{now: t0}
	dir, err := datadir.Create(filepath.Join(t.TempDir(), "strait"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.Create(dir, ca.Config{TrustDomain: td, Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	return a, dir, c
}

func request(t *testing.T, key any, tmpl *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func p256() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func chain(t *testing.T, ders [][]byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, der := range ders {
		out = append(out, must(x509.ParseCertificate(der)))
	}
	return out
}

func TestIssueTakesOnlyTheKey(t *testing.T) {
	a, _, _ := newCA(t)
	key := p256()
	greedy := request(t, key, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root", Organization: []string{"system:masters"}}, DNSNames: []string{"control.plane"}, IPAddresses: []net.IP{{127, 0, 0, 1}},
		URIs:            []*url.URL{spiffeid.ControlPlane(td).URL(), {Scheme: "spiffe", Host: "eu-west.acme", Path: "/x"}},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
	})
	ders, err := a.IssueCSR(greedy, web, 0)
	if err != nil {
		t.Fatal(err)
	}
	certs := chain(t, ders)
	p, err := trust.Verify(certs, must(trust.NewBundles(a.Bundle())), t0)
	if err != nil || p.ID != web {
		t.Fatalf("verified as %v, %v", p, err)
	}
	leaf, issuer := certs[0], certs[1]
	if leaf.IsCA || len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 || len(leaf.URIs) != 1 || leaf.Subject.CommonName != "" || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("the request shaped the certificate: %+v", leaf.Subject)
	}
	if !leaf.NotBefore.Equal(t0.Add(-10*time.Minute)) || !leaf.NotAfter.Equal(t0.Add(36*time.Hour)) {
		t.Errorf("valid %s to %s", leaf.NotBefore, leaf.NotAfter)
	}
	if !issuer.IsCA || issuer.MaxPathLen != 0 || !issuer.MaxPathLenZero || leaf.SerialNumber.BitLen() < 100 {
		t.Errorf("issuer path length %d, serial of %d bits", issuer.MaxPathLen, leaf.SerialNumber.BitLen())
	}
	root := a.Bundle().Roots()[0]
	if got := root.NotAfter.Sub(t0); got != ca.RootLifetime {
		t.Errorf("the root lives for %v", got)
	}
}

func TestIssueRefusals(t *testing.T) {
	a, _, _ := newCA(t)
	good := request(t, p256(), &x509.CertificateRequest{})
	bent := bytes.Clone(good)
	bent[len(bent)-1] ^= 1
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stranger := must(spiffeid.Workload(must(spiffeid.ParseTrustDomain("eu-west.acme")), "shop", "web"))
	for _, tt := range []struct {
		name string
		csr  []byte
		id   spiffeid.ID
	}{
		{"another trust domain", good, stranger},
		{"no ID", good, spiffeid.ID{}},
		{"broken signature", bent, web},
		{"nothing", nil, web},
		{"garbage", []byte("garbage"), web},
		{"something after it", append(bytes.Clone(good), 0), web},
		{"RSA", request(t, must(rsa.GenerateKey(rand.Reader, 2048)), &x509.CertificateRequest{}), web},
		{"Ed25519", request(t, edKey, &x509.CertificateRequest{}), web},
		{"P-521", request(t, must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)), &x509.CertificateRequest{}), web},
		{"large", request(t, p256(), &x509.CertificateRequest{DNSNames: []string{string(bytes.Repeat([]byte("x"), 20_000))}}), web},
	} {
		if ders, err := a.IssueCSR(tt.csr, tt.id, 0); err == nil || ders != nil {
			t.Errorf("%s: issued", tt.name)
		}
	}
	if _, err := a.IssueKey(stranger, 0); err == nil {
		t.Error("IssueKey for another trust domain")
	}
}

func TestOpen(t *testing.T) {
	a, dir, clk := newCA(t)
	for _, name := range []string{"root.pem", "issuer.pem", "api.pem"} {
		st, err := os.Stat(dir.Path("ca", name))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ca.Create(dir, ca.Config{TrustDomain: td}); err == nil {
		t.Error("Create overwrites keys")
	}
	b, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if b.TrustDomain() != td || b.Bundle().Hash() != a.Bundle().Hash() || b.Bundle().Sequence() != a.Bundle().Sequence() || !bytes.Equal(a.APIRootPEM(), b.APIRootPEM()) {
		t.Error("another CA was opened")
	}
	id, err := b.IssueKey(web, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Verify(id.Chain, must(trust.NewBundles(a.Bundle())), t0); err != nil {
		t.Error(err)
	}
	if _, err := ca.Open(dir, ca.Config{TrustDomain: must(spiffeid.ParseTrustDomain("eu-west.acme")), Now: clk.Now}); err == nil {
		t.Error("opened for another trust domain")
	}
	other, otherDir, _ := newCA(t)
	_ = other
	for _, name := range []string{"ca/root.pem", "ca/issuer.pem", "ca/api.pem", "bundles/own.json"} {
		kept, err := dir.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		half, foreign := kept[:len(kept)/2], must(otherDir.ReadFile(name))
		for what, bad := range map[string][]byte{"half": half, "empty": {}, "another CA's": foreign} {
			if err := dir.WriteFile(name, bad); err != nil {
				t.Fatal(err)
			}
			if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); err == nil && (what != "another CA's" || name != "ca/api.pem") {
				t.Errorf("opened with %s that is %s", name, what)
			}
		}
		if err := dir.WriteFile(name, kept); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); err != nil {
		t.Errorf("after all was put back: %v", err)
	}
}

// TestIssuerRenewal: a control plane that runs for years, and one that was down, issue without a gap; nothing outlives its issuer.
func TestIssuerRenewal(t *testing.T) {
	a, dir, clk := newCA(t)
	bundles := must(trust.NewBundles(a.Bundle()))
	first := a.IssuerNotAfter()
	long, err := a.IssueKey(web, 1000*24*time.Hour)
	if err != nil || long.NotAfter.After(first) {
		t.Errorf("an identity until %s, its issuer until %s, %v", long.NotAfter, first, err)
	}
	for month := range 60 {
		clk.add(30 * 24 * time.Hour)
		id, err := a.IssueKey(web, 0)
		if err != nil {
			t.Fatalf("month %d: %v", month, err)
		}
		if p, err := trust.Verify(id.Chain, bundles, clk.Now()); err != nil || p.NotAfter.Sub(clk.Now()) < ca.DefaultTTL {
			t.Fatalf("month %d: %v", month, err)
		}
	}
	clk.add(2 * 365 * 24 * time.Hour)
	b, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil || !b.IssuerNotAfter().After(clk.Now().Add(300*24*time.Hour)) {
		t.Errorf("opened after two years: issuer until %s, %v", b.IssuerNotAfter(), err)
	}
	clk.add(2 * 365 * 24 * time.Hour)
	id, err := b.IssueKey(web, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Verify(id.Chain, bundles, clk.Now()); err != nil {
		t.Error(err)
	}
	clk.add(2 * 365 * 24 * time.Hour) // past the root
	if id, err := b.IssueKey(web, 0); err == nil {
		t.Errorf("issued until %s by a root that has expired", id.NotAfter)
	}
}

func TestSerialsDiffer(t *testing.T) {
	a, _, _ := newCA(t)
	csr := request(t, p256(), &x509.CertificateRequest{})
	seen := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				ders, err := a.IssueCSR(csr, web, 0)
				if err != nil {
					t.Error(err)
					return
				}
				n := must(x509.ParseCertificate(ders[0])).SerialNumber
				mu.Lock()
				if seen[n.String()] || n.Cmp(big.NewInt(0)) <= 0 {
					t.Errorf("serial %s", n)
				}
				seen[n.String()] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// TestAPICA: the configuration API's certificates work with the standard library's own verification, and are worth nothing in
// the mesh; nor are the mesh's at the API.
func TestAPICA(t *testing.T) {
	a, _, _ := newCA(t)
	certPEM, keyPEM, err := a.IssueServing([]string{"strait.example"}, []net.IP{net.IPv4(127, 0, 0, 1)}, 0)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(a.APIRootPEM()) {
		t.Fatal("no API root")
	}
	serving, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	for name, ok := range map[string]bool{"strait.example": true, "127.0.0.1": true, "other.example": false, "127.0.0.2": false} {
		_, err := serving.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: pool, CurrentTime: t0})
		if (err == nil) != ok {
			t.Errorf("serving %s: %v", name, err)
		}
	}
	key := p256()
	clientPEM, err := a.IssueAPIClient(request(t, key, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "root", Organization: []string{"system:masters"}}}),
		"alice", []string{"strait:viewer"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(clientPEM)
	client := must(x509.ParseCertificate(block.Bytes))
	if client.Subject.CommonName != "alice" || len(client.Subject.Organization) != 1 || client.Subject.Organization[0] != "strait:viewer" {
		t.Errorf("client subject %s", client.Subject)
	}
	use := func(u x509.ExtKeyUsage) x509.VerifyOptions {
		return x509.VerifyOptions{Roots: pool, CurrentTime: t0, KeyUsages: []x509.ExtKeyUsage{u}}
	}
	if _, err := client.Verify(use(x509.ExtKeyUsageClientAuth)); err != nil {
		t.Error(err)
	}
	if _, err := client.Verify(use(x509.ExtKeyUsageServerAuth)); err == nil {
		t.Error("a client certificate serves")
	}
	if _, err := trust.Verify([]*x509.Certificate{client}, must(trust.NewBundles(a.Bundle())), t0); err == nil {
		t.Error("an API certificate is an identity of the mesh")
	}
	id, err := a.IssueKey(web, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := id.Chain[0].Verify(use(x509.ExtKeyUsageClientAuth)); err == nil {
		t.Error("an identity of the mesh is an operator")
	}
	if _, err := a.IssueAPIClient([]byte("garbage"), "alice", nil, 0); err == nil {
		t.Error("issued for garbage")
	}
}
