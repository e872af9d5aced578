// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// t0 is the time at which the tests judge.
var t0 = time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)

func at(t0 time.Time) func() time.Time { return func() time.Time { return t0 } }

func domain(t testing.TB, s string) spiffeid.TrustDomain {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func parseID(t testing.TB, s string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// authority signs what a test asks for, right or wrong.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
}

type edit func(*x509.Certificate)

func number() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return n
}

func caTemplate(name string, edits []edit) *x509.Certificate {
	tmpl := &x509.Certificate{
		SerialNumber: number(), Subject: pkix.Name{CommonName: name}, NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	for _, e := range edits {
		e(tmpl)
	}
	return tmpl
}

func signed(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newRoot(t testing.TB, name string, edits ...edit) *authority {
	key := newKey(t)
	tmpl := caTemplate(name, edits)
	return &authority{t, signed(t, tmpl, tmpl, key.Public(), key), key}
}

func (a *authority) issuer(name string, edits ...edit) *authority {
	key := newKey(a.t)
	return &authority{a.t, signed(a.t, caTemplate(name, edits), a.cert, key.Public(), a.key), key}
}

func leafTemplate(id string, edits []edit) *x509.Certificate {
	tmpl := &x509.Certificate{
		SerialNumber: number(), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: t0.Add(-time.Minute), NotAfter: t0.Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if id != "" {
		tmpl.ExtraExtensions = []pkix.Extension{sanExtension(false, id)}
	}
	for _, e := range edits {
		e(tmpl)
	}
	return tmpl
}

// sanExtension has URI names exactly as given: url.URL would change some of the texts that must be refused.
func sanExtension(critical bool, uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: critical, Value: value}
}

func (a *authority) leaf(id string, edits ...edit) *x509.Certificate {
	return signed(a.t, leafTemplate(id, edits), a.cert, newKey(a.t).Public(), a.key)
}

// identity is a proper one, below issuers that are given innermost first.
func (a *authority) identity(id string, notAfter time.Time, issuers ...*authority) *trust.Identity {
	a.t.Helper()
	key := newKey(a.t)
	leaf := signed(a.t, leafTemplate(id, []edit{func(c *x509.Certificate) { c.NotAfter = notAfter }}), a.cert, key.Public(), a.key)
	chain := [][]byte{leaf.Raw}
	if a.cert.Issuer.CommonName != a.cert.Subject.CommonName {
		chain = append(chain, a.cert.Raw)
	}
	for _, i := range issuers {
		chain = append(chain, i.cert.Raw)
	}
	out, err := trust.NewIdentity(chain, key)
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

func (a *authority) bundle(td string, sequence uint64) *trust.Bundle {
	a.t.Helper()
	b, err := trust.NewBundle(domain(a.t, td), []*x509.Certificate{a.cert}, sequence)
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

func set(t testing.TB, list ...*trust.Bundle) *trust.Bundles {
	t.Helper()
	s, err := trust.NewBundles(list...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func uri(s string) edit {
	return func(c *x509.Certificate) {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		c.URIs = []*url.URL{u}
	}
}
