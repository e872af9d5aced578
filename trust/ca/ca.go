// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Lifetimes.
const (
	RootLifetime   = 10 * 365 * 24 * time.Hour
	IssuerLifetime = 365 * 24 * time.Hour
	DefaultTTL     = 36 * time.Hour
	Backdate       = 10 * time.Minute // NotBefore lies this far back, for clocks that differ
	issuerRenewal  = 90 * 24 * time.Hour

	maxRequest = 16 << 10
)

// Config of a CA.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Now         func() time.Time // nil: time.Now
	// External is a directory with tls.crt (an intermediate CA, then its chain), tls.key and ca.crt (the roots), as cert-manager
	// writes them: it takes the place of the CA's own root and issuer. Refresh rereads it. "": the CA has its own root.
	External string
}

// CA issues identities of one trust domain. Make it with Create or Open.
type CA struct {
	*API
	td  spiffeid.TrustDomain
	now func() time.Time
	dir *datadir.Dir

	mu     sync.Mutex
	root   *pair
	issuer *pair
	bundle *trust.Bundle
}

type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

const (
	rootFile   = "ca/root.pem"
	issuerFile = "ca/issuer.pem"
	bundleFile = "bundles/own.json"
)

// Create makes a new root, issuer and API CA below dir. It refuses to overwrite.
func Create(dir *datadir.Dir, cfg Config) (*CA, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("create CA: no trust domain")
	}
	if _, err := dir.ReadFile(rootFile); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("create CA: %s exists", dir.Path(rootFile))
	}
	c := newCA(dir, cfg)
	now := c.now()
	root, err := selfSigned(caTemplate("Strait root of "+c.td.String(), now, RootLifetime, 1, c.td))
	if err != nil {
		return nil, fmt.Errorf("create root: %w", err)
	}
	c.root = root
	if c.issuer, err = c.newIssuer(); err != nil {
		return nil, err
	}
	if c.bundle, err = trust.NewBundle(c.td, []*x509.Certificate{root.cert}, 1); err != nil {
		return nil, err
	}
	if c.API, err = CreateAPI(dir, cfg); err != nil {
		return nil, err
	}
	if err := errors.Join(c.save(issuerFile, c.issuer), dir.WriteFile(bundleFile, c.bundle.Marshal())); err != nil {
		return nil, err
	}
	return c, c.save(rootFile, root) // last: it marks the CA as complete
}

// Open reads the CA below dir. An issuer within 90 days of its end is replaced.
func Open(dir *datadir.Dir, cfg Config) (*CA, error) {
	c := newCA(dir, cfg)
	var err error
	if c.root, err = c.load(rootFile); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if c.API, err = OpenAPI(dir, cfg); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if c.td, err = rootDomain(c.root.cert); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if !cfg.TrustDomain.IsZero() && cfg.TrustDomain != c.td {
		return nil, fmt.Errorf("open CA: the root is of %s, not of %s", c.td, cfg.TrustDomain)
	}
	if c.issuer, err = c.load(issuerFile); errors.Is(err, fs.ErrNotExist) {
		if c.issuer, err = c.newIssuer(); err == nil {
			err = c.save(issuerFile, c.issuer)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if err := c.issuer.cert.CheckSignatureFrom(c.root.cert); err != nil {
		return nil, fmt.Errorf("open CA: the issuer is not the root's: %w", err)
	}
	if c.issuer, err = c.currentIssuer(); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	jwks, err := dir.ReadFile(bundleFile)
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if c.bundle, err = trust.ParseBundle(c.td, jwks); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if !slices.ContainsFunc(c.bundle.Roots(), c.root.cert.Equal) {
		return nil, fmt.Errorf("open CA: %s lacks the root", bundleFile)
	}
	return c, nil
}

func newCA(dir *datadir.Dir, cfg Config) *CA {
	c := &CA{td: cfg.TrustDomain, now: cfg.Now, dir: dir}
	if c.now == nil {
		c.now = time.Now
	}
	return c
}

func rootDomain(c *x509.Certificate) (spiffeid.TrustDomain, error) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "spiffe" || c.URIs[0].Path != "" {
		return spiffeid.TrustDomain{}, errors.New("the root names no trust domain")
	}
	return spiffeid.ParseTrustDomain(c.URIs[0].Host)
}

func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[0] = b[0]&0x7f | 0x40 // positive, 127 bits
	return new(big.Int).SetBytes(b)
}

func caTemplate(name string, now time.Time, life time.Duration, maxPath int, td spiffeid.TrustDomain) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Strait"}, CommonName: name},
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(life), IsCA: true, BasicConstraintsValid: true,
		MaxPathLen: maxPath, MaxPathLenZero: maxPath == 0, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if !td.IsZero() {
		t.URIs = []*url.URL{{Scheme: "spiffe", Host: td.String()}}
	}
	return t
}

func selfSigned(t *x509.Certificate) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return sign(t, t, &key.PublicKey, key, key)
}

func sign(t, parent *x509.Certificate, pub crypto.PublicKey, signer *ecdsa.PrivateKey, key *ecdsa.PrivateKey) (*pair, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, signer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pair{cert, key}, nil
}

func (c *CA) newIssuer() (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("create issuer: %w", err)
	}
	t := caTemplate("Strait issuer of "+c.td.String(), c.now(), IssuerLifetime, 0, c.td)
	if t.NotAfter.After(c.root.cert.NotAfter) {
		t.NotAfter = c.root.cert.NotAfter
	}
	p, err := sign(t, c.root.cert, &key.PublicKey, c.root.key, key)
	if err != nil {
		return nil, fmt.Errorf("create issuer: %w", err)
	}
	return p, nil
}

func (c *CA) save(name string, p *pair) error {
	key, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return fmt.Errorf("save %s: %w", name, err)
	}
	var b bytes.Buffer
	_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw})
	_ = pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: key})
	return c.dir.WriteFile(name, b.Bytes())
}

func (c *CA) load(name string) (*pair, error) {
	data, err := c.dir.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var p pair
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			if p.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			key, ok := k.(*ecdsa.PrivateKey)
			if err != nil || !ok {
				return nil, fmt.Errorf("%s: malformed private key", name)
			}
			p.key = key
		}
	}
	if p.cert == nil || p.key == nil || !p.key.PublicKey.Equal(p.cert.PublicKey) {
		return nil, fmt.Errorf("%s: certificate and key do not belong together", name)
	}
	return &p, nil
}

// TrustDomain is whose identities this CA issues.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// Bundle is the trust bundle of the CA's trust domain.
func (c *CA) Bundle() *trust.Bundle {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bundle
}

// IssuerNotAfter is the end of the issuer.
func (c *CA) IssuerNotAfter() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.issuer.cert.NotAfter
}

// currentIssuer replaces the issuer when it nears its end: control planes run for longer than a year. While that fails the
// present one serves as long as it is valid.
func (c *CA) currentIssuer() (*pair, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if now.Before(c.issuer.cert.NotAfter.Add(-issuerRenewal)) || !c.issuer.cert.NotAfter.Before(c.root.cert.NotAfter) {
		return c.issuer, nil
	}
	next, err := c.newIssuer()
	if err == nil {
		err = c.save(issuerFile, next)
	}
	if err == nil {
		c.issuer = next
	} else if now.After(c.issuer.cert.NotAfter) {
		return nil, err
	}
	return c.issuer, nil
}

// IssueCSR signs an identity for the request's public key; everything else in the request is ignored. ttl 0 is 36 h; no
// identity outlives the issuer.
func (c *CA) IssueCSR(csrDER []byte, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	pub, err := requestKey(csrDER)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return c.issue(pub, id, ttl)
}

// IssueKey makes a key and signs an identity for it: for the control plane's own roles.
func (c *CA) IssueKey(id spiffeid.ID, ttl time.Duration) (*trust.Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	chain, err := c.issue(&key.PublicKey, id, ttl)
	if err != nil {
		return nil, err
	}
	return trust.NewIdentity(chain, key)
}

func checkKey(pub crypto.PublicKey) error {
	if k, ok := pub.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
		return errors.New("want an ECDSA key on P-256 or P-384")
	}
	return nil
}

// requestKey reads a certificate request, proves that its sender holds the key, and forgets everything else in it.
func requestKey(csrDER []byte) (crypto.PublicKey, error) {
	if len(csrDER) > maxRequest {
		return nil, fmt.Errorf("a certificate request of %d bytes; at most %d", len(csrDER), maxRequest)
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, err
	}
	if err := checkKey(csr.PublicKey); err != nil { // before its signature costs anything
		return nil, err
	}
	return csr.PublicKey, csr.CheckSignature()
}

func (c *CA) issue(pub crypto.PublicKey, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	if id.IsZero() || id.TrustDomain() != c.td {
		return nil, fmt.Errorf("issue %s: not of trust domain %s", id, c.td)
	}
	if err := checkKey(pub); err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	if ttl <= 0 {
		ttl = DefaultTTL
	}
	issuer, err := c.currentIssuer()
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	now := c.now()
	if !now.Before(issuer.cert.NotAfter) {
		return nil, fmt.Errorf("issue %s: the issuer has expired", id)
	}
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Strait"}}, URIs: []*url.URL{id.URL()},
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(ttl), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if t.NotAfter.After(issuer.cert.NotAfter) {
		t.NotAfter = issuer.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, issuer.cert, pub, issuer.key)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return [][]byte{der, issuer.cert.Raw}, nil
}
