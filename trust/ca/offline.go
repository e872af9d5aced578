// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// IssuerRequest is a certificate request (PEM) for the next issuer, for SignIssuerRequest where the root's key is. Until its
// certificate is imported, asking again gives a request of the same key.
func (c *CA) IssuerRequest() (csrPEM []byte, err error) {
	if err := c.lockForStep("issuer request"); err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	if c.cur.request == nil {
		next := c.cur.next()
		if next.request, err = newECKey(); err != nil {
			return nil, fmt.Errorf("issuer request: %w", err)
		}
		next.st.Request = newName("request")
		if err := writeKeyFile(c.dir, next.st.Request, &keyFile{key: next.request}); err != nil {
			return nil, fmt.Errorf("issuer request: %w", err)
		}
		if err := c.commitLocked(next); err != nil {
			return nil, fmt.Errorf("issuer request: %w", err)
		}
	}
	key := c.cur.request
	name, err := issuerName(c.td, &key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("issuer request: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"Strait"}, CommonName: name}, URIs: []*url.URL{{Scheme: "spiffe", Host: c.td.String()}},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("issuer request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ImportIssuer takes what SignIssuerRequest made of IssuerRequest: certificates of the requested issuer, PEM; while a rotation is
// under way one by each root whose key is not here, all in one file. In phase Steady and Activated the issuer is used at once, in Prepared
// by Activate.
func (c *CA) ImportIssuer(chainPEM []byte) error {
	if err := c.lockForStep("issuer import"); err != nil {
		return err
	}
	defer c.mu.Unlock()
	m, now := c.cur, c.now()
	refuse := func(format string, args ...any) error {
		return problem.New(problem.IssuerRefused, "issuer import: "+format, args...).WithState("the present issuer goes on.")
	}
	if m.request == nil {
		return refuse("no issuer was requested, or its certificate was imported already")
	}
	f, err := parseKeyFile(chainPEM)
	switch {
	case err != nil:
		return refuse("%v", err)
	case f.key != nil:
		return refuse("the file holds a private key")
	}
	roots := m.signers()
	if m.st.Phase == Prepared {
		roots = []*root{m.roots[1], m.roots[0]}
	}
	given, err := c.matchImported(f.certs, roots, now)
	if err != nil {
		return refuse("%v", err)
	}
	i := &issuer{file: newName("issuer"), key: m.request}
	var missing []*root
	for n, r := range roots {
		cert := given[n]
		switch {
		case cert != nil:
		case n > 0 && !now.Before(r.cert.NotAfter):
			continue
		case r.key == nil:
			missing = append(missing, r)
			continue
		default:
			if cert, err = c.certifyHere(r, &m.request.PublicKey, now, "issuer import"); err != nil {
				return fmt.Errorf("issuer import: %w", err)
			}
		}
		i.certs = append(i.certs, cert)
	}
	if len(missing) > 0 {
		return refuse("a certificate by %s is missing: its key is offline, and phase %s needs its signature", strings.Join(offlineRoots(missing, now), " and "), m.st.Phase)
	}
	for _, cert := range given {
		if cert != nil {
			if err := c.authorities.recordImported(cert, c.td, now); err != nil {
				return fmt.Errorf("issuer import: %w", err)
			}
		}
	}
	if err := writeKeyFile(c.dir, i.file, &keyFile{i.certs, i.key}); err != nil {
		return fmt.Errorf("issuer import: %w", err)
	}
	next := m.next()
	next.request, next.st.Request = nil, ""
	if m.st.Phase == Prepared {
		next.imported = i
	} else {
		next.issuer = i
	}
	if err := c.commitLocked(next); err != nil {
		return fmt.Errorf("issuer import: %w", err)
	}
	return nil
}

func (l *ledger) recordImported(cert *x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	if _, err := l.serial(now); err != nil { // opens the file
		return err
	}
	return l.record(cert, "spiffe://"+td.String(), "issuer", "issuer import", now)
}

// matchImported sorts certificates by the root that signed each; roots sent along are left out.
func (c *CA) matchImported(certs []*x509.Certificate, roots []*root, now time.Time) ([]*x509.Certificate, error) {
	given := make([]*x509.Certificate, len(roots))
	for _, cert := range certs {
		if cert.CheckSignatureFrom(cert) == nil {
			continue
		}
		n := slices.IndexFunc(roots, func(r *root) bool { return cert.CheckSignatureFrom(r.cert) == nil })
		if n < 0 {
			return nil, fmt.Errorf("no root that signs now has signed %q (its issuer is %q)", cert.Subject.CommonName, cert.Issuer.CommonName)
		}
		if err := checkIssuer(cert, &c.cur.request.PublicKey, c.td, now); err != nil {
			return nil, fmt.Errorf("%q %w", cert.Subject.CommonName, err)
		}
		given[n] = cert
	}
	return given, nil
}

// checkIssuer holds an imported certificate to what certify makes.
func checkIssuer(cert *x509.Certificate, pub crypto.PublicKey, td spiffeid.TrustDomain, now time.Time) error {
	name, err := issuerName(td, pub)
	if err != nil {
		return err
	}
	id, idErr := rootDomain(cert)
	switch {
	case !samePublic(cert.PublicKey, pub):
		return errors.New("is not of the key that was requested")
	case cert.Subject.String() != (pkix.Name{Organization: []string{"Strait"}, CommonName: name}).String():
		return fmt.Errorf("has another subject than %q", name)
	case !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage&x509.KeyUsageCertSign == 0 || cert.MaxPathLen != 0 || !cert.MaxPathLenZero:
		return errors.New("is no CA with path length 0")
	case idErr != nil || id != td || len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) > 0:
		return fmt.Errorf("does not name %s alone", td)
	case !slices.Equal(cert.PermittedURIDomains, constraint(td)) || cert.PermittedURIDomains != nil && !cert.PermittedDNSDomainsCritical:
		return fmt.Errorf("has no critical name constraint to %s", td)
	case now.Before(cert.NotBefore) || !now.Before(cert.NotAfter):
		return fmt.Errorf("is valid from %s to %s, and not now", cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// NewRoot makes a root of td whose key is kept offline from the start: certificate and key, PEM, for SignIssuerRequest, and the certificate
// alone for PrepareRoot.
func NewRoot(td spiffeid.TrustDomain, now time.Time) (rootPEM, certPEM []byte, err error) {
	if td.IsZero() {
		return nil, nil, errors.New("new root: no trust domain")
	}
	n := randomSerial()
	p, err := selfSigned(caTemplate(fmt.Sprintf("Strait root of %s %x", td, n.Bytes()[:8]), n, now, RootLifetime, 1, td))
	if err != nil {
		return nil, nil, fmt.Errorf("new root: %w", err)
	}
	f := &keyFile{certs: []*x509.Certificate{p.cert}}
	if certPEM, err = f.encode(); err != nil {
		return nil, nil, err
	}
	f.key = p.key
	rootPEM, err = f.encode()
	return rootPEM, certPEM, err
}

// splitRoots takes a file apart that holds several roots, each a certificate and its key.
func splitRoots(data []byte) (list []*keyFile, err error) {
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%d bytes; at most %d", len(data), maxKeyFile)
	}
	var part bytes.Buffer
	flush := func() error {
		if part.Len() == 0 {
			return nil
		}
		f, err := parseKeyFile(part.Bytes())
		part.Reset()
		if err == nil && (len(f.certs) != 1 || f.key == nil) {
			err = errors.New("want one certificate, and then its private key")
		}
		list = append(list, f)
		return err
	}
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("damaged, or not PEM")
		}
		data = rest
		if block.Type == "CERTIFICATE" {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		_ = pem.Encode(&part, block)
	}
	if err := flush(); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, errors.New("empty")
	}
	return list, nil
}

// ownRoots reads the roots of a data directory whose control plane is stopped.
func ownRoots(dir *datadir.Dir) ([]*root, error) {
	st, _, err := openState(stored{dir}, true)
	if err != nil {
		return nil, err
	}
	m, err := load(stored{dir}, &state{Roots: st.Roots})
	if err != nil {
		return nil, err
	}
	if len(m.roots) == 0 {
		return nil, problem.New(problem.RotationElsewhere, "%s holds no root", dir.Path())
	}
	return m.roots, nil
}

// ExportRoot writes each root whose key is in the data directory, certificate and key, to w, and then removes the key from the data
// directory, which must be locked by the caller. sync is called between the two: the key must be durable where it went. nil: w needs none.
// While a rotation is under way there may be two.
func ExportRoot(dir *datadir.Dir, w io.Writer, sync func() error) error {
	return exportRoot(stored{dir}, dir, w, sync)
}

func exportRoot(to files, dir *datadir.Dir, w io.Writer, sync func() error) error {
	roots, err := ownRoots(dir)
	if err != nil {
		return fmt.Errorf("export root: %w", err)
	}
	here := slices.DeleteFunc(slices.Clone(roots), func(r *root) bool { return r.key == nil })
	if len(here) == 0 {
		return problem.New(problem.RootKeyOffline, "export: the key of the root is not in %s", dir.Path()).
			WithWhy("it was exported before").WithFix("strait trust root import FILE puts it back").WithState("nothing was changed.")
	}
	for _, r := range here {
		data, err := (&keyFile{[]*x509.Certificate{r.cert}, r.key}).encode()
		if err == nil {
			_, err = w.Write(data)
		}
		if err != nil {
			return fmt.Errorf("export root: %w; the key is still in %s", err, dir.Path())
		}
	}
	if sync != nil {
		if err := sync(); err != nil {
			return fmt.Errorf("export root: %w; the key is still in %s", err, dir.Path())
		}
	}
	for _, r := range here {
		if err := writeKeyFile(to, r.file, &keyFile{certs: []*x509.Certificate{r.cert}}); err != nil {
			return fmt.Errorf("export root: %w", err)
		}
	}
	return nil
}

// ImportRoot puts back keys that ExportRoot removed. The data directory must be locked by the caller.
func ImportRoot(dir *datadir.Dir, r io.Reader) error {
	data, err := io.ReadAll(io.LimitReader(r, maxKeyFile+1))
	if err != nil {
		return fmt.Errorf("import root: %w", err)
	}
	list, err := splitRoots(data)
	if err != nil {
		return problem.New(problem.IssuerRefused, "import: the root: %v", err).WithState("nothing was changed.").Wrap(err)
	}
	roots, err := ownRoots(dir)
	if err != nil {
		return fmt.Errorf("import root: %w", err)
	}
	found := map[*root]*keyFile{}
	for _, f := range list {
		at := slices.IndexFunc(roots, func(r *root) bool { return r.cert.Equal(f.certs[0]) })
		if at < 0 {
			return problem.New(problem.IssuerRefused, "import: %q (key %s) is no root of this cluster now", f.certs[0].Subject.CommonName, keyIDOf(f.certs[0])).
				WithWhy("only the key of a root that the cluster has can be put back").WithFix("strait trust roots lists them").WithState("nothing was changed.")
		}
		found[roots[at]] = f
	}
	for r, f := range found {
		if err := writeKeyFile(stored{dir}, r.file, f); err != nil {
			return fmt.Errorf("import root: %w", err)
		}
	}
	return nil
}

// SignIssuerRequest signs an issuer's request offline: rootPEM holds a root of td, certificate and key, or several, each of which signs.
// Of the request nothing but its key is taken. The result is the issuer's certificate, followed by the root's.
func SignIssuerRequest(rootPEM, csrPEM []byte, td spiffeid.TrustDomain, now time.Time) (chainPEM []byte, err error) {
	refuse := func(format string, args ...any) ([]byte, error) {
		return nil, problem.New(problem.IssuerRefused, "sign: "+format, args...).WithState("nothing was signed.")
	}
	list, err := splitRoots(rootPEM)
	if err != nil {
		return refuse("the root: %v", err)
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
		return refuse("want one certificate request (PEM), as strait trust issuer request prints it")
	}
	pub, err := requestKey(block.Bytes)
	if err != nil {
		return refuse("the request: %v", err)
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || len(csr.URIs) != 1 || csr.URIs[0].String() != "spiffe://"+td.String() {
		return refuse("the request is not of an issuer of %s", td)
	}
	var out, roots []*x509.Certificate
	for _, f := range list {
		if err := checkRoot(f.certs[0], nil, td, now); err != nil {
			return refuse("the root %q %v", f.certs[0].Subject.CommonName, err)
		}
		if samePublic(f.certs[0].PublicKey, pub) {
			return refuse("the request is of the root's own key")
		}
		cert, err := certify(&root{cert: f.certs[0], key: f.key}, pub, td, randomSerial(), now)
		if err != nil {
			return refuse("%v", err)
		}
		out, roots = append(out, cert), append(roots, f.certs[0])
	}
	return (&keyFile{certs: append(out, roots...)}).encode()
}

// RootDomain is the trust domain of a root's file, as NewRoot and ExportRoot write it.
func RootDomain(rootPEM []byte) (spiffeid.TrustDomain, error) {
	list, err := splitRoots(rootPEM)
	if err != nil {
		return spiffeid.TrustDomain{}, problem.New(problem.IssuerRefused, "the root: %v", err).Wrap(err)
	}
	return rootDomain(list[0].certs[0])
}

// Restored prepares a directory that came out of a backup for Open: what was published after the backup is not known, so the sequence of
// the own bundle goes on well above.
func Restored(dir *datadir.Dir) error {
	const skip = 1 << 16
	d := stored{dir}
	st, legacy, err := openState(d, true)
	if errors.Is(err, fs.ErrNotExist) || err == nil && legacy && len(st.Roots) == 0 {
		return nil // identities come from elsewhere
	}
	if err != nil {
		return err
	}
	if legacy { // its sequence is the bundle's
		f, err := readKeyFile(d, rootFile)
		if err != nil {
			return err
		}
		td, err := rootDomain(f.certs[0])
		if err != nil {
			return err
		}
		data, err := d.ReadFile(bundleFile)
		if err != nil {
			return err
		}
		own, err := trust.ParseBundle(td, data)
		if err != nil {
			return err
		}
		return d.WriteFile(bundleFile, own.WithSequence(own.Sequence()+skip).Marshal())
	}
	st.Sequence, st.Content = st.Sequence+skip, ""
	return writeState(d, st)
}
