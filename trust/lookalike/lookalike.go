// SPDX-License-Identifier: Apache-2.0

package lookalike

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Malformed is the reason of a leaf that crypto/x509 already cannot read; all others are those of trust.VerifyError.
const Malformed = "malformed"

// Peer is the cluster with the lying CA. Its methods may be used by one goroutine at a time.
type Peer struct {
	td     spiffeid.TrustDomain
	now    time.Time
	root   pair
	issuer pair
	// anonymous names no trust domain, and may therefore sit above any leaf.
	anonymous pair
	leaf      *ecdsa.PrivateKey // of every leaf
}

type pair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Leaf is one certificate that must be refused.
type Leaf struct {
	Name   string
	Reason string // of trust.VerifyError, or Malformed
	// Certificate goes into GetClientCertificate or GetCertificate of a config of package trust.
	Certificate tls.Certificate
}

// NewPeer makes the root and the issuer of td, valid around now.
func NewPeer(td spiffeid.TrustDomain, now time.Time) (*Peer, error) {
	p := &Peer{td: td, now: now}
	var err error
	if p.leaf, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if p.root, err = p.authority(nil, "Strait root of "+td.String(), nil); err != nil {
		return nil, err
	}
	cn := "Strait issuer of " + td.String()
	if p.issuer, err = p.authority(&p.root, cn, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }); err != nil {
		return nil, err
	}
	p.anonymous, err = p.authority(&p.root, cn, func(c *x509.Certificate) { c.URIs = nil })
	return p, err
}

// Bundle is what the verifier holds of the peer.
func (p *Peer) Bundle() *trust.Bundle {
	b, err := trust.NewBundle(p.td, []*x509.Certificate{p.root.cert}, 1)
	if err != nil {
		panic("lookalike: " + err.Error()) // NewPeer made it
	}
	return b
}

// Honest is a proper identity of the peer: the control of a test.
func (p *Peer) Honest(path string) (*trust.Identity, error) {
	id, err := spiffeid.Parse("spiffe://" + p.td.String() + path)
	if err != nil {
		return nil, err
	}
	der, err := p.sign(p.template(id.String()), p.issuer)
	if err != nil {
		return nil, err
	}
	return trust.NewIdentity([][]byte{der, p.issuer.cert.Raw}, p.leaf)
}

// template is a proper leaf but for its name, which is written as it stands.
func (p *Peer) template(uris ...string) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Strait"}}, NotBefore: p.now.Add(-trust.Backdate), NotAfter: p.now.Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if len(uris) > 0 {
		var names [][]byte
		for _, u := range uris {
			names = append(names, name(tagURI, u))
		}
		t.ExtraExtensions = []pkix.Extension{altNames(oidSAN, false, names...)}
	}
	return t
}

func (p *Peer) sign(t *x509.Certificate, by pair) ([]byte, error) {
	return x509.CreateCertificate(rand.Reader, t, by.cert, p.leaf.Public(), by.key)
}

// authority makes a CA below parent, or a root.
func (p *Peer) authority(parent *pair, cn string, edit func(*x509.Certificate)) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Strait"}, CommonName: cn}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: p.now.Add(-trust.Backdate), NotAfter: p.now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: p.td.String()}}, MaxPathLen: -1,
	}
	if edit != nil {
		edit(t)
	}
	by := pair{t, key}
	if parent != nil {
		by = *parent
	}
	der, err := x509.CreateCertificate(rand.Reader, t, by.cert, key.Public(), by.key)
	if err != nil {
		return pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return pair{cert, key}, err
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return n
}

// Target is whom the peer would like to pass for.
type Target struct {
	ID spiffeid.ID // of another trust domain, whose bundle the verifier holds
	// Chain is what everybody can see of the target: its issuers and roots, for those leaves that borrow names, key identifiers
	// and the certificates themselves. At least one.
	Chain []*x509.Certificate
	// Third is a further trust domain whose bundle the verifier holds.
	Third spiffeid.TrustDomain
}

// Leaves is the corpus, more than 100 certificates.
func (p *Peer) Leaves(t Target) ([]Leaf, error) {
	if t.ID.IsZero() || t.ID.TrustDomain() == p.td || t.Third.IsZero() || len(t.Chain) == 0 {
		return nil, fmt.Errorf("lookalike: an incomplete target %+v", t)
	}
	var out []Leaf
	for _, s := range append(append(names(p.td.String(), t), forms(p, t)...), times(p)...) {
		tmpl := s.template
		if tmpl == nil {
			tmpl = p.template(s.uris...)
		}
		der, err := p.sign(tmpl, p.anonymous)
		if err != nil {
			return nil, fmt.Errorf("lookalike %q: %w", s.name, err)
		}
		out = append(out, p.leafOf(s.name, s.reason, der, p.anonymous.cert))
	}
	chains, err := p.chains(t)
	return append(out, chains...), err
}

func (p *Peer) leafOf(name, reason string, der []byte, above ...*x509.Certificate) Leaf {
	c := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: p.leaf}
	for _, a := range above {
		c.Certificate = append(c.Certificate, a.Raw)
	}
	return Leaf{name, reason, c}
}
