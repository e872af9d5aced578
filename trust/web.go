// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// http1 is the protocol of bundle endpoints. Clients that offer no protocol at all are served, too: many HTTP clients do not.
var http1 = []string{"http/1.1"}

// BundleServerTLS is the configuration of a bundle endpoint of profile https_spiffe (SPIFFE Federation section 5.2.2): the source's
// identity, and no client certificate. Nothing may be granted to its clients.
func (s *Source) BundleServerTLS() *tls.Config {
	c := baseConfig(TLSOptions{ALPN: http1})
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.ownCertificate(false) }
	return c
}

// WebServerTLS is the configuration of a bundle endpoint of profile https_web: a certificate of the web's PKI, asked for at each
// handshake, and no client certificate.
func WebServerTLS(certificate func() (*tls.Certificate, error)) *tls.Config {
	c := baseConfig(TLSOptions{ALPN: http1})
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate() }
	return c
}

// WebClientTLS is the configuration of a client of https_web: the standard library's verification by host name, against roots,
// nil being the system's. now nil: time.Now.
func WebClientTLS(roots *x509.CertPool, now func() time.Time) *tls.Config {
	c := baseConfig(TLSOptions{ALPN: http1})
	c.RootCAs, c.Time = roots, now
	return c
}

// BundleClientTLS is the configuration of a client of https_spiffe that is nobody: the server must prove exactly endpoint, under the
// bundle held of that trust domain.
func BundleClientTLS(held *Bundle, endpoint spiffeid.ID, now func() time.Time) *tls.Config {
	if now == nil {
		now = time.Now
	}
	return clientConfig(TLSOptions{ALPN: http1}, nil, func(cs tls.ConnectionState) error {
		if cs.DidResume || held == nil {
			return &VerifyError{Reason: "untrusted", Err: errors.New("a resumed session, or no bundle to verify by")}
		}
		bundles, err := NewBundles(held)
		if err != nil {
			return err
		}
		p, err := Verify(cs.PeerCertificates, bundles, now())
		if err != nil {
			return err
		}
		return authorized(p.ID, AuthorizeID(endpoint))
	})
}

// WithRefreshHint is a copy that tells readers how often to ask, clamped to 1 min … 24 h.
func (b *Bundle) WithRefreshHint(d time.Duration) *Bundle {
	n := b.WithSequence(b.sequence)
	n.refresh = min(max(d, MinRefreshHint), MaxRefreshHint)
	return n
}
