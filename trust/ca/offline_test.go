// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// reopen opens a CA again, as a restart does.
func reopen(t *testing.T, dir *datadir.Dir, clk *clock) *ca.CA {
	t.Helper()
	a, err := ca.Open(dir, ca.Config{Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func rootKey(s ca.State) (out []string) {
	for _, a := range s.Authorities {
		if a.Kind == "root" {
			out = append(out, a.State+" "+a.Key)
		}
	}
	return out
}

// TestOfflineRoot: the root's key leaves, everything goes on, the issuer is replaced by a request, and the key comes back.
func TestOfflineRoot(t *testing.T) {
	a, dir, clk := newCA(t)
	b1 := a.Bundle()
	var vault bytes.Buffer
	synced := false
	if err := ca.ExportRoot(dir, &vault, func() error { synced = true; return nil }); err != nil || !synced {
		t.Fatalf("export: %v, synced %t", err, synced)
	}
	if data := must(dir.ReadFile("ca/root.pem")); bytes.Contains(data, []byte("PRIVATE")) || !bytes.Contains(data, []byte("CERTIFICATE")) {
		t.Error("the key is still in the data directory, or the certificate is not")
	}
	if err := ca.ExportRoot(dir, &vault, nil); !problem.Is(err, problem.RootKeyOffline) {
		t.Errorf("export twice: %v", err)
	}
	a = reopen(t, dir, clk)
	if got := rootKey(a.State()); len(got) != 1 || got[0] != "active offline" || !a.Bundle().Equal(b1) {
		t.Errorf("roots %v", got)
	}
	clk.add(300 * 24 * time.Hour) // within 90 days of the issuer's end
	a = reopen(t, dir, clk)
	end := a.IssuerNotAfter()
	if id := issue(t, a); id.NotAfter.After(end) || end.Sub(clk.Now()) > 90*24*time.Hour {
		t.Errorf("the issuer was replaced by a root that is not here: it ends %s", end)
	}
	csr := must(a.IssuerRequest())
	a = reopen(t, dir, clk) // the request outlives a restart
	again := must(a.IssuerRequest())
	if !bytes.Equal(csrKey(t, csr), csrKey(t, again)) {
		t.Error("asking again gives another key")
	}
	chain, err := ca.SignIssuerRequest(vault.Bytes(), csr, td, clk.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.ImportIssuer(chain); err != nil {
		t.Fatal(err)
	}
	if got := a.IssuerNotAfter().Sub(clk.Now()); got < 300*24*time.Hour {
		t.Errorf("the imported issuer ends in %v", got)
	}
	if err := a.ImportIssuer(chain); !problem.Is(err, problem.IssuerRefused) {
		t.Errorf("imported twice: %v", err)
	}
	for _, a := range []*ca.CA{a, reopen(t, dir, clk)} {
		if err := verifies(issue(t, a), b1, clk.Now()); err != nil {
			t.Error(err)
		}
	}
	clk.add(366 * 24 * time.Hour) // nobody has imported the next one
	if _, err := a.IssueKey(web, 0); !problem.Is(err, problem.RootKeyOffline) {
		t.Errorf("issued after the issuer's end: %v", err)
	}
	if err := ca.ImportRoot(dir, bytes.NewReader(vault.Bytes())); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, dir, clk)
	if err := verifies(issue(t, a), b1, clk.Now()); err != nil || rootKey(a.State())[0] != "active here" {
		t.Errorf("the key is back: %v, %v", err, rootKey(a.State()))
	}
}

func csrKey(t *testing.T, csrPEM []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(csrPEM)
	return must(x509.ParseCertificateRequest(block.Bytes)).RawSubjectPublicKeyInfo
}

// TestOfflineRotation: both roots are offline; activation asks for the issuer that both have signed, and says so.
func TestOfflineRotation(t *testing.T) {
	a, dir, clk := newCA(t)
	b1 := a.Bundle()
	var vault bytes.Buffer
	if err := ca.ExportRoot(dir, &vault, nil); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, dir, clk)
	rootPEM, certPEM, err := ca.NewRoot(td, clk.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.PrepareRoot(rootPEM); !problem.Is(err, problem.IssuerRefused) {
		t.Errorf("a root with its key: %v", err)
	}
	if err := a.PrepareRoot(certPEM); err != nil {
		t.Fatal(err)
	}
	if err := a.PrepareRoot(certPEM); err != nil {
		t.Errorf("prepared twice: %v", err)
	}
	_, other, _ := ca.NewRoot(td, clk.Now())
	if err := a.PrepareRoot(other); !problem.Is(err, problem.RotationPhase) {
		t.Errorf("another root: %v", err)
	}
	if got := rootKey(a.State()); strings.Join(got, ", ") != "active offline, prepared offline" {
		t.Errorf("roots %v", got)
	}
	err = a.Activate()
	if !problem.Is(err, problem.RootKeyOffline) || !strings.Contains(err.Error(), "no issuer was imported") || a.State().Phase != ca.Prepared {
		t.Fatalf("activated without an issuer: %v", err)
	}
	csr := must(a.IssuerRequest())
	oldChain := must(ca.SignIssuerRequest(vault.Bytes(), csr, td, clk.Now()))
	newChain := must(ca.SignIssuerRequest(rootPEM, csr, td, clk.Now()))
	for name, half := range map[string][]byte{"the old root": oldChain, "the new root": newChain} {
		if err := a.ImportIssuer(half); !problem.Is(err, problem.IssuerRefused) {
			t.Errorf("imported what only %s signed: %v", name, err)
		}
	}
	if err := a.ImportIssuer(append(oldChain, newChain...)); err != nil {
		t.Fatal(err)
	}
	before := issue(t, a)
	if len(before.Chain) != 2 {
		t.Error("the imported issuer is used before Activate")
	}
	a = reopen(t, dir, clk)
	run(t, a, "activate")
	id := issue(t, a)
	for name, b := range map[string]*trust.Bundle{"old": b1, "both": a.Bundle(), "new": must(trust.NewBundle(td, a.Bundle().Roots()[1:], 9))} {
		if err := verifies(id, b, clk.Now()); err != nil {
			t.Errorf("%s root: %v", name, err)
		}
	}
	run(t, a, "retire")
	if err := verifies(issue(t, reopen(t, dir, clk)), a.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
	if err := ca.ImportRoot(dir, bytes.NewReader(vault.Bytes())); !problem.Is(err, problem.IssuerRefused) {
		t.Errorf("the key of a root that was retired is back: %v", err)
	}
	both := append(bytes.Clone(vault.Bytes()), rootPEM...)
	if _, err := ca.SignIssuerRequest(both, csr, td, clk.Now()); err != nil {
		t.Errorf("two roots in one file: %v", err)
	}
}

// TestMixedRotation: the old root is offline, the next one here.
func TestMixedRotation(t *testing.T) {
	a, dir, clk := newCA(t)
	b1 := a.Bundle()
	var vault bytes.Buffer
	if err := ca.ExportRoot(dir, &vault, nil); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, dir, clk)
	run(t, a, "prepare")
	if err := a.Activate(); !problem.Is(err, problem.RootKeyOffline) {
		t.Fatal(err)
	}
	if err := a.ImportIssuer(must(ca.SignIssuerRequest(vault.Bytes(), must(a.IssuerRequest()), td, clk.Now()))); err != nil {
		t.Fatal(err)
	}
	run(t, a, "activate")
	if err := verifies(issue(t, a), b1, clk.Now()); err != nil {
		t.Error(err)
	}
	run(t, a, "retire")
	if err := verifies(issue(t, a), a.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
}

// TestPreparedRoots: a root that cannot serve is refused before anybody is told of it.
func TestPreparedRoots(t *testing.T) {
	a, _, clk := newCA(t)
	good := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: must(x509.ParseCertificate(issue(t, a).Chain[0].Raw)).SerialNumber, Subject: pkix.Name{CommonName: "other root"},
			NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(1000 * 24 * time.Hour), IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
			KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: td.String()}},
		}
	}
	signed := func(f func(*x509.Certificate)) []byte {
		c, key := good(), p256()
		f(c)
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: must(x509.CreateCertificate(bytes.NewReader(bytes.Repeat([]byte("x"), 4096)), c, c, &key.PublicKey, key))})
	}
	now := clk.Now()
	for name, pem := range map[string][]byte{
		"nothing":              nil,
		"garbage":              []byte("garbage"),
		"the present root":     pemOf(a.Bundle().Roots()[0]),
		"a leaf":               pemOf(issue(t, a).Chain[0]),
		"an issuer":            pemOf(issue(t, a).Chain[1]),
		"another trust domain": signed(func(c *x509.Certificate) { c.URIs[0].Host = "eu-west.acme" }),
		"no trust domain":      signed(func(c *x509.Certificate) { c.URIs = nil }),
		"path length 0":        signed(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }),
		"no CA":                signed(func(c *x509.Certificate) { c.IsCA = false }),
		"may not sign":         signed(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }),
		"other names":          signed(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"eu-west.acme"} }),
		"ends soon":            signed(func(c *x509.Certificate) { c.NotAfter = now.Add(24 * time.Hour) }),
		"begins later":         signed(func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }),
	} {
		if err := a.PrepareRoot(pem); !problem.Is(err, problem.IssuerRefused) || a.State().Phase != ca.Steady {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := a.PrepareRoot(signed(func(*x509.Certificate) {})); err != nil {
		t.Error(err)
	}
}

func TestImportRefusals(t *testing.T) {
	a, dir, clk := newCA(t)
	root := must(dir.ReadFile("ca/root.pem"))
	_, strangerDir, _ := newCA(t)
	strange := must(strangerDir.ReadFile("ca/root.pem"))
	issued := issue(t, a)
	if err := a.ImportIssuer(pemOf(issued.Chain[1])); !problem.Is(err, problem.IssuerRefused) {
		t.Errorf("nothing was requested: %v", err)
	}
	csr := must(a.IssuerRequest())
	good := must(ca.SignIssuerRequest(root, csr, td, clk.Now()))
	stale := must(ca.SignIssuerRequest(root, csr, td, clk.Now()))
	for name, chain := range map[string][]byte{
		"nothing":          nil,
		"garbage":          []byte("garbage"),
		"half":             good[:len(good)/3],
		"with a key":       append(bytes.Clone(good), root...),
		"a stranger's":     must(ca.SignIssuerRequest(strange, csr, td, clk.Now())),
		"a leaf":           pemOf(issued.Chain[0]),
		"the present one":  pemOf(issued.Chain[1]),
		"the request":      csr,
		"the root and key": root,
	} {
		if err := a.ImportIssuer(chain); err == nil || name != "the root and key" && !problem.Is(err, problem.IssuerRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	elsewhere := must(spiffeid.ParseTrustDomain("eu-west.acme"))
	for name, sign := range map[string]func() ([]byte, error){
		"another trust domain": func() ([]byte, error) { return ca.SignIssuerRequest(root, csr, elsewhere, clk.Now()) },
		"no key":               func() ([]byte, error) { return ca.SignIssuerRequest(pemOf(a.Bundle().Roots()[0]), csr, td, clk.Now()) },
		"an issuer's key": func() ([]byte, error) {
			return ca.SignIssuerRequest(must(dir.ReadFile("ca/issuer.pem")), csr, td, clk.Now())
		},
		"no request": func() ([]byte, error) { return ca.SignIssuerRequest(root, root, td, clk.Now()) },
		"a leaf's request": func() ([]byte, error) {
			der := request(t, p256(), &x509.CertificateRequest{URIs: []*url.URL{web.URL()}})
			return ca.SignIssuerRequest(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), td, clk.Now())
		},
		"after the root's end": func() ([]byte, error) { return ca.SignIssuerRequest(root, csr, td, clk.Now().Add(ca.RootLifetime)) },
	} {
		if out, err := sign(); !problem.Is(err, problem.IssuerRefused) || out != nil {
			t.Errorf("signed with %s: %v", name, err)
		}
	}
	clk.add(2 * 365 * 24 * time.Hour)
	if err := a.ImportIssuer(stale); !problem.Is(err, problem.IssuerRefused) {
		t.Errorf("imported one that has ended: %v", err)
	}
}

// TestIssuerConstraints: an issuer signs nothing outside of its trust domain, by our rule and by go-spiffe's, whatever its key is made to sign.
func TestIssuerConstraints(t *testing.T) {
	a, dir, clk := newCA(t)
	id := issue(t, a)
	issuer := id.Chain[1]
	if !issuer.PermittedDNSDomainsCritical || len(issuer.PermittedURIDomains) != 1 || issuer.PermittedURIDomains[0] != td.String() {
		t.Fatalf("the issuer may sign %v (critical: %t)", issuer.PermittedURIDomains, issuer.PermittedDNSDomainsCritical)
	}
	data := must(dir.ReadFile("ca/issuer.pem"))
	var key any
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "PRIVATE KEY" {
			key = must(x509.ParsePKCS8PrivateKey(block.Bytes))
		}
	}
	for _, name := range []string{"us-east.acme", "eu-west.acme", "x.us-east.acme", "acme", "xus-east.acme"} {
		leaf := *id.Chain[0]
		leaf.URIs, leaf.ExtraExtensions = []*url.URL{{Scheme: "spiffe", Host: name, Path: "/ns/shop/sa/web"}}, nil
		der := must(x509.CreateCertificate(bytes.NewReader(bytes.Repeat([]byte("x"), 4096)), &leaf, issuer, leaf.PublicKey, key))
		certs := []*x509.Certificate{must(x509.ParseCertificate(der)), issuer}
		own := name == td.String()
		if _, err := trust.Verify(certs, must(trust.NewBundles(a.Bundle())), clk.Now()); (err == nil) != own {
			t.Errorf("%s, by our rule: %v", name, err)
		}
		// One who takes our root for that trust domain's. Go reads the constraint as a suffix.
		source := x509bundle.FromX509Authorities(gospiffe.RequireTrustDomainFromString(name), a.Bundle().Roots())
		if _, _, err := x509svid.Verify(certs, source, x509svid.WithTime(clk.Now())); (err == nil) != own && name != "x.us-east.acme" {
			t.Errorf("%s, by go-spiffe's: %v", name, err)
		}
	}
	// An intermediate below the issuer is one too many.
	sub := *issuer
	sub.ExtraExtensions, sub.AuthorityKeyId = nil, nil
	subKey := p256()
	subCert := must(x509.ParseCertificate(must(x509.CreateCertificate(bytes.NewReader(bytes.Repeat([]byte("x"), 4096)), &sub, issuer, &subKey.PublicKey, key))))
	leaf := *id.Chain[0]
	leaf.ExtraExtensions = nil
	certs := []*x509.Certificate{must(x509.ParseCertificate(must(x509.CreateCertificate(bytes.NewReader(bytes.Repeat([]byte("x"), 4096)), &leaf, subCert, leaf.PublicKey, subKey)))), subCert, issuer}
	if _, err := trust.Verify(certs, must(trust.NewBundles(a.Bundle())), clk.Now()); err == nil {
		t.Error("the issuer has made a CA")
	}
}

// TestTrustDomains: every trust domain that a URI in a certificate can hold gets a CA whose identities verify, also where no name constraint
// can say it.
func TestTrustDomains(t *testing.T) {
	for _, name := range []string{"us-east.acme", "10.0.0.1", "a_b", "a_.b-", "-", "1", "0x7f.1", strings.Repeat("a", 200)} {
		d, err := spiffeid.ParseTrustDomain(name)
		if err != nil {
			t.Fatal(err)
		}
		dir := must(datadir.Create(t.TempDir()))
		clk := &clock{now: t0}
		a, err := ca.Create(dir, ca.Config{TrustDomain: d, Now: clk.Now})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		id := must(a.IssueKey(spiffeid.ControlPlane(d), 0))
		if err := verifies(id, a.Bundle(), t0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKeyFiles(t *testing.T) {
	_, dir, clk := newCA(t)
	for _, name := range append(must(dir.List("ca")), "") {
		if name == "state.json" || name == "" {
			continue
		}
		p := dir.Path("ca", name)
		if st := must(os.Stat(p)); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", name, st.Mode().Perm())
		}
		for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601, 0o666} {
			if err := os.Chmod(p, mode); err != nil {
				t.Fatal(err)
			}
			if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); !problem.Is(err, problem.KeyFileExposed) {
				t.Errorf("%s with mode %o: %v", name, mode, err)
			}
		}
		if err := os.Chmod(p, 0o600); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() != 0 {
			continue
		}
		if err := os.Chown(p, 1234, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Open(dir, ca.Config{Now: clk.Now}); !problem.Is(err, problem.KeyFileExposed) {
			t.Errorf("%s of another user: %v", name, err)
		}
		if err := os.Chown(p, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir.Path("ca/state.json"), 0o644); err != nil {
		t.Fatal(err)
	}
	reopen(t, dir, clk)
}
