// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func caTemplate(name string, serial *big.Int, now time.Time, life time.Duration, maxPath int, td spiffeid.TrustDomain) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Strait"}, CommonName: name},
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(life), IsCA: true, BasicConstraintsValid: true,
		MaxPathLen: maxPath, MaxPathLenZero: maxPath == 0, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if !td.IsZero() {
		t.URIs = []*url.URL{{Scheme: "spiffe", Host: td.String()}}
	}
	return t
}

func selfSigned(t *x509.Certificate) (*pair, error) {
	key, err := newECKey()
	if err != nil {
		return nil, err
	}
	cert, err := sign(t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &pair{cert, key}, nil
}

func sign(t, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// constraint is the URI name constraint of td's issuers; none when td is no name that a constraint can hold (RFC 5280, 4.2.1.10: a host
// name, never an address).
func constraint(td spiffeid.TrustDomain) []string {
	name := td.String()
	if net.ParseIP(name) != nil || slices.Contains(strings.Split(name, "."), "") {
		return nil
	}
	return []string{name}
}

// issuerName is the common name of an issuer, made from its key: siblings must have the same subject, others another.
func issuerName(td spiffeid.TrustDomain, pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return "Strait issuer of " + td.String() + " " + hex.EncodeToString(sum[:8]), nil
}

// certify makes an issuer's certificate for pub: path length 0, and no name but td's.
func certify(r *root, pub crypto.PublicKey, td spiffeid.TrustDomain, serial *big.Int, now time.Time) (*x509.Certificate, error) {
	name, err := issuerName(td, pub)
	if err != nil {
		return nil, err
	}
	t := caTemplate(name, serial, now, IssuerLifetime, 0, td)
	t.PermittedURIDomains = constraint(td)
	t.PermittedDNSDomainsCritical = t.PermittedURIDomains != nil
	if t.NotAfter.After(r.cert.NotAfter) {
		t.NotAfter = r.cert.NotAfter
	}
	return sign(t, r.cert, pub, r.key)
}

// certifyHere signs with a root whose key is here, and writes it down.
func (c *CA) certifyHere(r *root, pub crypto.PublicKey, now time.Time, by string) (*x509.Certificate, error) {
	n, err := c.authorities.serial(now)
	if err != nil {
		return nil, err
	}
	cert, err := certify(r, pub, c.td, n, now)
	if err != nil {
		return nil, err
	}
	return cert, c.authorities.record(cert, "spiffe://"+c.td.String(), "issuer", by, now)
}

// newIssuer makes an issuer that each of roots certifies, and its file. One that has ended certifies nothing.
func (c *CA) newIssuer(file string, roots []*root, now time.Time, by string) (*issuer, error) {
	key, err := newECKey()
	if err != nil {
		return nil, err
	}
	i := &issuer{file: file, key: key}
	for n, r := range roots {
		if n > 0 && !now.Before(r.cert.NotAfter) {
			continue
		}
		cert, err := c.certifyHere(r, &key.PublicKey, now, by)
		if err != nil {
			return nil, fmt.Errorf("create issuer: %w", err)
		}
		i.certs = append(i.certs, cert)
	}
	return i, writeKeyFile(c.dir, i.file, &keyFile{i.certs, key})
}

// offlineRoots are those of roots that must sign now and cannot.
func offlineRoots(roots []*root, now time.Time) (names []string) {
	for n, r := range roots {
		if r.key == nil && (n == 0 || now.Before(r.cert.NotAfter)) {
			names = append(names, fmt.Sprintf("%q (key %s)", r.cert.Subject.CommonName, keyIDOf(r.cert)))
		}
	}
	return names
}

// orderIssuer leaves of an issuer's certificates one by each root that signs now, newest root first.
func (m *material) orderIssuer() error {
	if m.issuer == nil {
		return nil
	}
	i := &issuer{file: m.issuer.file, key: m.issuer.key}
	for n, r := range m.signers() {
		at := slices.IndexFunc(m.issuer.certs, func(c *x509.Certificate) bool { return c.CheckSignatureFrom(r.cert) == nil })
		if at >= 0 {
			i.certs = append(i.certs, m.issuer.certs[at])
		} else if n == 0 {
			return fmt.Errorf("the issuer in %s is not the root's", i.file)
		}
	}
	m.issuer = i
	return nil
}

// renewLocked replaces the issuer when it nears its end: control planes run for longer than a year. While that fails, or a root's key is
// offline, the present one serves as long as it is valid.
func (c *CA) renewLocked(now time.Time) error {
	m := c.cur
	if m.ext != nil {
		return nil
	}
	end, roots := m.issuer.certs[0].NotAfter, m.signers()
	if now.Before(end.Add(-issuerRenewal)) || !end.Before(roots[0].cert.NotAfter) {
		return nil
	}
	if offline := offlineRoots(roots, now); len(offline) > 0 {
		if now.Before(end) {
			return nil
		}
		return problem.New(problem.RootKeyOffline, "the issuer ended at %s, and the key of %s is offline", end.UTC().Format(time.RFC3339), strings.Join(offline, " and ")).
			WithState("nothing is issued; identities in use go on until their end.")
	}
	i, err := c.newIssuer(newName("issuer"), roots, now, "renewal of the issuer")
	if err == nil {
		next := m.next()
		next.issuer = i
		err = c.commitLocked(next)
	}
	if now.Before(end) {
		return nil
	}
	return err
}

// IssuerNotAfter is the end of the issuer.
func (c *CA) IssuerNotAfter() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cur.issuerEnd()
}

// issuerEnd is when nothing can be issued any more.
func (m *material) issuerEnd() time.Time {
	if m.ext == nil {
		return m.issuer.certs[0].NotAfter
	}
	end := m.ext.certs[0].NotAfter
	for _, c := range m.ext.certs {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// issuing is the signing key and the chain below a leaf at now: siblings that have ended are left out.
func (m *material) issuing(now time.Time) (crypto.Signer, []*x509.Certificate) {
	if m.ext != nil {
		return m.ext.key, m.ext.certs
	}
	certs := m.issuer.certs[:1:1]
	for _, c := range m.issuer.certs[1:] {
		if now.Before(c.NotAfter) {
			certs = append(certs, c)
		}
	}
	return m.issuer.key, certs
}
