// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// authority is where a cluster of the world has its identities from.
type authority interface {
	Bundle() *trust.Bundle
	IssueKey(id spiffeid.ID, ttl time.Duration) (*trust.Identity, error)
}

// rotor is an authority whose root rotates at the test's word, in the phases of trust/ca/DESIGN.md.
type rotor struct {
	t  *testing.T
	td spiffeid.TrustDomain

	mu      sync.Mutex
	roots   []root // oldest first
	issuer  *ecdsa.PrivateKey
	chain   []*x509.Certificate // of the issuer: the newest root's sibling first
	bundle  *trust.Bundle
	changed chan struct{}
}

type root struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newRotor(t *testing.T, td spiffeid.TrustDomain) *rotor {
	t.Helper()
	r := &rotor{t: t, td: td, changed: make(chan struct{})}
	r.roots = []root{r.newRoot("root 1")}
	r.newIssuer(r.roots[0])
	r.publish(1)
	return r
}

func (r *rotor) sign(name string, isCA bool, id string, pub *ecdsa.PublicKey, by *root) *x509.Certificate {
	now := time.Now()
	u, err := url.Parse(id)
	must(r.t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(r.t, err)
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-trust.Backdate), NotAfter: now.Add(time.Hour),
		BasicConstraintsValid: true, IsCA: isCA, KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{u},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if isCA {
		tmpl.KeyUsage, tmpl.ExtKeyUsage = x509.KeyUsageCertSign, nil
	}
	parent := by.cert
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by.key)
	must(r.t, err)
	c, err := x509.ParseCertificate(der)
	must(r.t, err)
	return c
}

func (r *rotor) newKey() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(r.t, err)
	return k
}

func (r *rotor) newRoot(name string) root {
	k := r.newKey()
	return root{r.sign(name, true, "spiffe://"+r.td.String(), &k.PublicKey, &root{key: k}), k}
}

// newIssuer makes an issuer certified by each of those roots.
func (r *rotor) newIssuer(by ...root) {
	r.issuer, r.chain = r.newKey(), nil
	for i := range by {
		r.chain = append(r.chain, r.sign("issuer", true, "spiffe://"+r.td.String(), &r.issuer.PublicKey, &by[i]))
	}
}

func (r *rotor) publish(sequence uint64) {
	var certs []*x509.Certificate
	for _, one := range r.roots {
		certs = append(certs, one.cert)
	}
	b, err := trust.NewBundle(r.td, certs, sequence)
	must(r.t, err)
	r.bundle = b
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *rotor) prepare() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roots = append(r.roots, r.newRoot("root 2"))
	r.publish(r.bundle.Sequence() + 1)
}

func (r *rotor) activate() {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.roots)
	r.newIssuer(r.roots[n-1], r.roots[n-2])
	r.publish(r.bundle.Sequence())
}

func (r *rotor) retire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roots = r.roots[len(r.roots)-1:]
	r.chain = r.chain[:1]
	r.publish(r.bundle.Sequence() + 1)
}

// set puts another bundle in the place of the present one.
func (r *rotor) set(sequence uint64, roots ...root) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roots = roots
	r.publish(sequence)
}

// raise is what a CA does when a member has seen a newer bundle.
func (r *rotor) raise(seen uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publish(seen + 1)
	return nil
}

func (r *rotor) Bundle() *trust.Bundle {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bundle
}

func (r *rotor) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *rotor) IssueKey(id spiffeid.ID, _ time.Duration) (*trust.Identity, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.newKey()
	leaf := r.sign("leaf", false, id.String(), &k.PublicKey, &root{r.chain[0], r.issuer})
	return &trust.Identity{ID: id, Key: k, Chain: append([]*x509.Certificate{leaf}, r.chain...)}, nil
}
