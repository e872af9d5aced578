// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
)

// foreignCA is a CA that knows nothing of Strait.
type foreignCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

var number int64

func (f *foreignCA) sign(t *testing.T, name string, key crypto.Signer, edit func(*x509.Certificate)) *foreignCA {
	t.Helper()
	number++
	c := &x509.Certificate{
		SerialNumber: big.NewInt(number), Subject: pkix.Name{CommonName: name}, NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(2000 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if edit != nil {
		edit(c)
	}
	parent := f
	if f == nil {
		parent = &foreignCA{c, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent.cert, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	return &foreignCA{must(x509.ParseCertificate(der)), key}
}

func newForeign(t *testing.T, name string) *foreignCA {
	return (*foreignCA)(nil).sign(t, name, p256(), nil)
}

func keyPEM(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	switch k := key.(type) { // the encodings that cert-manager writes by default
	case *rsa.PrivateKey:
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)})
	case *ecdsa.PrivateKey:
		return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: must(x509.MarshalECPrivateKey(k))})
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
}

func certsPEM(list ...*foreignCA) (out []byte) {
	for _, f := range list {
		out = append(out, pemOf(f.cert)...)
	}
	return out
}

func put(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func volume(t *testing.T, chain []*foreignCA, roots ...*foreignCA) map[string][]byte {
	return map[string][]byte{"tls.crt": certsPEM(chain...), "tls.key": keyPEM(t, chain[0].key), "ca.crt": certsPEM(roots...)}
}

// TestExternalCA: an intermediate from files, of each kind of key, signs what everybody verifies; changes are taken without a restart.
func TestExternalCA(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"EC": p256(), "RSA": must(rsa.GenerateKey(rand.Reader, 2048))} {
		dir, clk := must(datadir.Create(t.TempDir())), &clock{now: t0}
		ext := t.TempDir()
		root := newForeign(t, "company root")
		policy := root.sign(t, "policy CA", p256(), nil)
		mesh := policy.sign(t, "mesh CA", key, func(c *x509.Certificate) { c.NotAfter = t0.Add(30 * 24 * time.Hour) })
		put(t, ext, volume(t, []*foreignCA{mesh, policy, root}, root)) // the root sent along, as some do
		cfg := ca.Config{TrustDomain: td, Now: clk.Now, External: ext}
		a, err := ca.Create(dir, cfg)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := dir.ReadFile("ca/root.pem"); err == nil {
			t.Error("it has made a root of its own")
		}
		if _, err := ca.Create(dir, cfg); err == nil || !ca.Exists(dir.Path()) {
			t.Error("Create overwrites")
		}
		b1, first := a.Bundle(), issue(t, a)
		if len(first.Chain) != 3 || b1.Sequence() != 1 || len(b1.JWTKeys()) != 1 || !b1.Roots()[0].Equal(root.cert) {
			t.Errorf("%s: a chain of %d, sequence %d", name, len(first.Chain), b1.Sequence())
		}
		if err := verifies(first, b1, clk.Now()); err != nil {
			t.Error(err)
		}
		if s := a.State(); !s.External || s.Phase != ca.Steady || s.Authorities[0].Key != "external" || s.Authorities[1].Kind != "issuer" {
			t.Errorf("state %+v", s)
		}
		long, err := a.IssueKey(web, 1000*24*time.Hour)
		if err != nil || long.NotAfter.After(mesh.cert.NotAfter) {
			t.Errorf("%s: an identity outlives the intermediate: %v", name, err)
		}
		for step, f := range steps {
			if err := f(a); !problem.Is(err, problem.RotationElsewhere) {
				t.Errorf("%s: %v", step, err)
			}
		}
		if _, err := a.IssuerRequest(); !problem.Is(err, problem.RotationElsewhere) {
			t.Error(err)
		}
		clk.add(time.Minute)
		if err := a.Refresh(); err != nil || !a.Bundle().Equal(b1) || !a.State().RenewIssuedBefore.IsZero() {
			t.Errorf("nothing has changed, and: %v", err)
		}
		// The company rotates its root: both in ca.crt, a new intermediate, then the new one alone.
		root2 := newForeign(t, "company root 2")
		mesh2 := root2.sign(t, "mesh CA 2", p256(), nil)
		put(t, ext, volume(t, []*foreignCA{mesh, policy}, root, root2))
		changed := a.Changed()
		if err := a.Refresh(); err != nil || a.Bundle().Sequence() != 2 || len(a.Bundle().Roots()) != 2 {
			t.Errorf("both roots: sequence %d, %v", a.Bundle().Sequence(), err)
		}
		select {
		case <-changed:
		default:
			t.Error("Changed says nothing")
		}
		put(t, ext, map[string][]byte{"tls.crt": certsPEM(mesh2)}) // the key comes a moment later
		if err := a.Refresh(); !problem.Is(err, problem.ExternalCARefused) || !strings.Contains(a.State().Trouble, "tls.key") {
			t.Errorf("half a change: %v, trouble %q", err, a.State().Trouble)
		}
		if err := verifies(issue(t, a), b1, clk.Now()); err != nil {
			t.Errorf("half a change stops what was there: %v", err)
		}
		put(t, ext, map[string][]byte{"tls.key": keyPEM(t, mesh2.key)})
		if err := a.Refresh(); err != nil || a.State().Trouble != "" || a.Bundle().Sequence() != 2 {
			t.Errorf("the new intermediate: %v", err)
		}
		second := issue(t, a)
		if trust.Issued(second.Chain[0]).Before(a.State().RenewIssuedBefore) || !trust.Issued(first.Chain[0]).Before(a.State().RenewIssuedBefore) {
			t.Error("a new intermediate does not recall")
		}
		put(t, ext, map[string][]byte{"ca.crt": certsPEM(root2)})
		re, err := ca.Open(dir, cfg) // over a restart
		if err != nil || re.Bundle().Sequence() != 3 || len(re.Bundle().Roots()) != 1 {
			t.Fatalf("the new root alone: sequence %d, %v", re.Bundle().Sequence(), err)
		}
		if err := verifies(second, re.Bundle(), clk.Now()); err != nil {
			t.Error(err)
		}
		if err := verifies(first, re.Bundle(), clk.Now()); err == nil {
			t.Error("the root that was dropped still verifies")
		}
		if again := must(ca.Open(dir, cfg)); !again.Bundle().Equal(re.Bundle()) {
			t.Error("it changes at each Open")
		}
		if _, err := ca.Open(dir, ca.Config{TrustDomain: td, Now: clk.Now}); !problem.Is(err, problem.ConfigInvalid) {
			t.Errorf("opened without the external CA: %v", err)
		}
	}
}

// TestExternalCATakesOver: a cluster with a root of its own goes over to an external CA and back; the sequence only grows.
func TestExternalCATakesOver(t *testing.T) {
	a, dir, clk := newCA(t)
	own := a.Bundle()
	ext := t.TempDir()
	root := newForeign(t, "company root")
	put(t, ext, volume(t, []*foreignCA{root.sign(t, "mesh CA", p256(), nil)}, root))
	cfg := ca.Config{TrustDomain: td, Now: clk.Now, External: ext}
	run(t, a, "prepare")
	if _, err := ca.Open(dir, cfg); !problem.Is(err, problem.RotationPhase) {
		t.Errorf("in the middle of a rotation: %v", err)
	}
	run(t, a, "abort")
	b := must(ca.Open(dir, cfg))
	if b.Bundle().Sequence() != 4 || !b.Bundle().Roots()[0].Equal(root.cert) || b.State().RenewIssuedBefore.IsZero() {
		t.Errorf("sequence %d, recall %s", b.Bundle().Sequence(), b.State().RenewIssuedBefore)
	}
	if err := verifies(issue(t, b), b.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
	clk.add(time.Minute)
	c := reopen(t, dir, clk)
	if c.Bundle().Sequence() != 5 || c.Bundle().Hash() != own.Hash() || !c.State().RenewIssuedBefore.After(b.State().RenewIssuedBefore) {
		t.Errorf("back: sequence %d", c.Bundle().Sequence())
	}
	if err := verifies(issue(t, c), c.Bundle(), clk.Now()); err != nil {
		t.Error(err)
	}
}

func TestExternalCARefusals(t *testing.T) {
	_, dir, clk := newCA(t)
	root := newForeign(t, "company root")
	with := func(edit func(*x509.Certificate)) map[string][]byte {
		return volume(t, []*foreignCA{root.sign(t, "mesh CA", p256(), edit)}, root)
	}
	patch := func(files map[string][]byte, name string, data []byte) map[string][]byte {
		files[name] = data
		return files
	}
	good := func() map[string][]byte { return with(nil) }
	for name, tt := range map[string]struct {
		files map[string][]byte
		says  string
	}{
		"no CA":                {with(func(c *x509.Certificate) { c.IsCA = false }), "is no CA"},
		"may not sign":         {with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), "is no CA"},
		"another trust domain": {with(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "eu-west.acme"}} }), "names spiffe://eu-west.acme"},
		"an identity":          {with(func(c *x509.Certificate) { c.URIs = []*url.URL{web.URL()} }), "names spiffe://us-east.acme/ns"},
		"other names": {with(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"eu-west.acme"}, true
		}), "may sign names of [eu-west.acme]"},
		"names above":       {with(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"acme"} }), "may sign names of [acme]"},
		"excluded":          {with(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"us-east.acme"} }), "does not verify"},
		"ended":             {with(func(c *x509.Certificate) { c.NotAfter = t0.Add(-time.Minute) }), "expired"},
		"another root":      {patch(good(), "ca.crt", certsPEM(newForeign(t, "other root"))), "does not verify"},
		"another key":       {patch(good(), "tls.key", keyPEM(t, p256())), "tls.key is not the key"},
		"a root, no chain":  {volume(t, []*foreignCA{root}, root), "no intermediate"},
		"roots of td's own": {patch(good(), "ca.crt", append(certsPEM(root), pemOf(newForeignFor(t, "eu-west.acme").cert)...)), "ca.crt"},
		"no tls.key":        {patch(good(), "tls.key", nil), "tls.key"},
		"half of tls.crt":   {patch(good(), "tls.crt", good()["tls.crt"][:200]), "tls.crt"},
		"key in ca.crt":     {patch(good(), "ca.crt", append(certsPEM(root), keyPEM(t, root.key)...)), "ca.crt"},
		"too large":         {patch(good(), "ca.crt", bytes.Repeat([]byte("\n"), 2<<20)), "at most"},
		"an endless chain": {func() map[string][]byte {
			chain := []*foreignCA{root}
			for range 8 {
				chain = append([]*foreignCA{chain[0].sign(t, "link", p256(), nil)}, chain...)
			}
			return volume(t, chain, root)
		}(), "at most"},
	} {
		ext := t.TempDir()
		put(t, ext, tt.files)
		_, err := ca.Open(dir, ca.Config{TrustDomain: td, Now: clk.Now, External: ext})
		if !problem.Is(err, problem.ExternalCARefused) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ext := t.TempDir()
	if _, err := ca.Open(dir, ca.Config{TrustDomain: td, Now: clk.Now, External: ext}); !problem.Is(err, problem.ExternalCARefused) {
		t.Errorf("an empty directory: %v", err)
	}
	put(t, ext, good())
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o440: true, 0o400: true, 0o644: false, 0o660: false} {
		if err := os.Chmod(filepath.Join(ext, "tls.key"), mode); err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Open(dir, ca.Config{TrustDomain: td, Now: clk.Now, External: ext}); (err == nil) != ok || err != nil && !problem.Is(err, problem.KeyFileExposed) {
			t.Errorf("tls.key with mode %o: %v", mode, err)
		}
	}
}

func newForeignFor(t *testing.T, name string) *foreignCA {
	return (*foreignCA)(nil).sign(t, "root of "+name, p256(), func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: name}} })
}
