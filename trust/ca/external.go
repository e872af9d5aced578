// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// external is an intermediate CA from files.
type external struct {
	certs  []*x509.Certificate // the intermediate, then what leads to a root; no root
	key    crypto.Signer
	roots  []*x509.Certificate
	digest string
}

// maxExternalChain leaves room for the leaf and a root.
const maxExternalChain = trust.MaxChainLength - 2

// readExternal reads tls.crt, tls.key and ca.crt below dir. They fit together, or it is an error with problem.ExternalCARefused.
func readExternal(dir string, td spiffeid.TrustDomain, now time.Time) (*external, error) {
	e, err := parseExternal(dir)
	if err == nil {
		err = e.check(td, now)
	}
	var p *problem.Error
	if err == nil || errors.As(err, &p) {
		return e, err
	}
	return nil, problem.New(problem.ExternalCARefused, "%s: %v", dir, err).Wrap(err)
}

func parseExternal(dir string) (*external, error) {
	data := map[string][]byte{}
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt"} {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		data[name], err = io.ReadAll(io.LimitReader(f, maxKeyFile+1))
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	if err := checkOwner(filepath.Join(dir, "tls.key"), 0o040); err != nil { // a group: Kubernetes gives the files of a volume to one
		return nil, err
	}
	chain, err := parseKeyFile(data["tls.crt"])
	if err != nil {
		return nil, fmt.Errorf("tls.crt: %w", err)
	}
	key, err := parseKeyFile(data["tls.key"])
	if err != nil {
		return nil, fmt.Errorf("tls.key: %w", err)
	}
	roots, err := parseKeyFile(data["ca.crt"])
	if err != nil {
		return nil, fmt.Errorf("ca.crt: %w", err)
	}
	switch {
	case len(chain.certs) == 0 || chain.key != nil:
		return nil, errors.New("tls.crt must hold certificates alone")
	case key.key == nil:
		return nil, errors.New("tls.key holds no private key")
	case len(roots.certs) == 0 || roots.key != nil:
		return nil, errors.New("ca.crt must hold certificates alone")
	case !samePublic(chain.certs[0].PublicKey, key.key.Public()):
		return nil, errors.New("tls.key is not the key of the first certificate in tls.crt")
	}
	e := &external{key: key.key, roots: roots.certs}
	for _, c := range chain.certs {
		if !slices.ContainsFunc(roots.certs, c.Equal) {
			e.certs = append(e.certs, c)
		}
	}
	if len(e.certs) == 0 {
		return nil, errors.New("tls.crt holds a root of ca.crt, and no intermediate")
	}
	if len(e.certs) > maxExternalChain {
		return nil, fmt.Errorf("tls.crt has %d certificates; at most %d", len(e.certs), maxExternalChain)
	}
	h := sha256.New()
	for _, c := range slices.Concat(e.certs, e.roots) {
		h.Write(c.Raw)
	}
	e.digest = hex.EncodeToString(h.Sum(nil))
	return e, nil
}

// check judges the chain by what every reader will judge it by: a leaf made for the trial must verify.
func (e *external) check(td spiffeid.TrustDomain, now time.Time) error {
	c := e.certs[0]
	id, idErr := rootDomain(c)
	switch {
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("the certificate %q in tls.crt is no CA", c.Subject)
	case len(c.URIs) > 0 && (idErr != nil || id != td):
		return fmt.Errorf("the certificate %q in tls.crt names %s, and the trust domain is %s", c.Subject, c.URIs[0], td)
	case len(c.PermittedURIDomains) > 0 && !slices.Contains(c.PermittedURIDomains, td.String()):
		return fmt.Errorf("the certificate %q in tls.crt may sign names of %v, and the trust domain is %s", c.Subject, c.PermittedURIDomains, td)
	}
	bundle, err := trust.NewBundle(td, e.roots, 0)
	if err != nil {
		return fmt.Errorf("ca.crt: %w", err)
	}
	bundles, err := trust.NewBundles(bundle)
	if err != nil {
		return err
	}
	key, err := newECKey()
	if err != nil {
		return err
	}
	leaf, err := sign(leafTemplate(spiffeid.ControlPlane(td), big.NewInt(1), now, now, now.Add(time.Minute)), c, &key.PublicKey, e.key)
	if err != nil {
		return err
	}
	if _, err := trust.Verify(append([]*x509.Certificate{leaf}, e.certs...), bundles, now); err != nil {
		return fmt.Errorf("what tls.crt signs does not verify with ca.crt: %w", err)
	}
	return nil
}

// Refresh reads the external CA's files again, and takes them when they have changed and fit together. With an own root it does nothing.
// The error is also State().Trouble.
func (c *CA) Refresh() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.external == "" {
		return nil
	}
	now := c.now()
	e, err := readExternal(c.external, c.td, now)
	if err == nil && e.digest != c.cur.st.External {
		err = c.takeExternalLocked(e, now)
	}
	c.trouble = ""
	if err != nil {
		c.trouble = err.Error()
	}
	return err
}

func (c *CA) takeExternalLocked(e *external, now time.Time) error {
	if err := c.authorities.recordExternal(e, c.td, now); err != nil {
		return err
	}
	next := c.cur.next()
	next.ext, next.st.RenewIssuedBefore = e, c.recallLocked(now)
	return c.commitLocked(next)
}

// recordExternal notes that an intermediate came into use.
func (l *ledger) recordExternal(e *external, td spiffeid.TrustDomain, now time.Time) error {
	if _, err := l.serial(now); err != nil { // opens the file
		return err
	}
	return l.record(e.certs[0], "spiffe://"+td.String(), "issuer", "external CA", now)
}

func leafTemplate(id spiffeid.ID, serial *big.Int, now, at, end time.Time) *x509.Certificate {
	from := at.Add(-Backdate)
	if from.After(now) {
		from = now
	}
	return &x509.Certificate{
		SerialNumber: serial, Subject: leafSubject, URIs: []*url.URL{id.URL()}, NotBefore: from, NotAfter: end, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// randomSerial is for certificates that no ledger of this data directory numbers.
func randomSerial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[0] = b[0]&0x3f | 0x40
	return new(big.Int).SetBytes(b)
}
