// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a presented chain.
const (
	MaxChainLength = 8
	MaxChainBytes  = 64 << 10
)

// VerifyError says why a chain was refused; Reason is one machine word: no_certificate, too_large, bad_san, bad_id,
// bad_usage, unknown_trust_domain, expired, not_yet_valid, untrusted, not_authorized.
type VerifyError struct {
	Reason string
	ID     spiffeid.ID // as claimed, when it could be parsed
	Err    error
}

func (e *VerifyError) Error() string {
	text := "verify certificate: " + e.Reason
	if !e.ID.IsZero() {
		text += " (" + e.ID.String() + ")"
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns the cause.
func (e *VerifyError) Unwrap() error { return e.Err }

// Peer is the other end of a verified connection.
type Peer struct {
	ID       spiffeid.ID
	NotAfter time.Time // of the first certificate of its chain to end
	Chain    []*x509.Certificate
}

// Verify judges a presented chain, leaf first: one URI SAN that is a SPIFFE ID, the key usages of a leaf, and a path to a
// root of the bundle of exactly the claimed trust domain, at now. Errors are *VerifyError. It authorizes nobody.
func Verify(chain []*x509.Certificate, bundles *Bundles, now time.Time) (*Peer, error) {
	if len(chain) == 0 {
		return nil, &VerifyError{Reason: "no_certificate"}
	}
	size := 0
	for _, c := range chain {
		size += len(c.Raw)
	}
	if len(chain) > MaxChainLength || size > MaxChainBytes {
		return nil, &VerifyError{Reason: "too_large", Err: fmt.Errorf("%d certificates of %d bytes; at most %d of %d", len(chain), size, MaxChainLength, MaxChainBytes)}
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	if err := leafUsage(leaf); err != nil {
		return nil, &VerifyError{Reason: "bad_usage", ID: id, Err: err}
	}
	for _, c := range chain[1:] {
		if err := issuerID(c, id.TrustDomain()); err != nil {
			return nil, &VerifyError{Reason: "bad_san", ID: id, Err: err}
		}
	}
	bundle := bundles.Get(id.TrustDomain())
	if bundle == nil {
		return nil, &VerifyError{Reason: "unknown_trust_domain", ID: id}
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: bundle.pool, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, &VerifyError{Reason: pathReason(chain, now, err), ID: id, Err: err}
	}
	p := &Peer{ID: id, Chain: chain}
	for _, c := range paths[0] {
		if p.NotAfter.IsZero() || c.NotAfter.Before(p.NotAfter) {
			p.NotAfter = c.NotAfter
		}
	}
	return p, nil
}

func pathReason(chain []*x509.Certificate, now time.Time, err error) string {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		for _, c := range chain {
			if now.Before(c.NotBefore) {
				return "not_yet_valid"
			}
		}
		return "expired"
	}
	return "untrusted"
}

// oidSAN is id-ce-subjectAltName.
var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// leafID reads the one URI SAN from the certificate's bytes: Go's parser hands out url.URL values, which have lost
// distinctions (case of the scheme, escapes) that an exact comparison needs.
func leafID(c *x509.Certificate) (spiffeid.ID, error) {
	uris, err := uriSANs(c)
	if err != nil {
		return spiffeid.ID{}, &VerifyError{Reason: "bad_san", Err: err}
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, &VerifyError{Reason: "bad_san", Err: fmt.Errorf("%d URI names; want one", len(uris))}
	}
	id, err := spiffeid.Parse(uris[0])
	if err != nil {
		return spiffeid.ID{}, &VerifyError{Reason: "bad_id", Err: err}
	}
	return id, nil
}

func uriSANs(c *x509.Certificate) ([]string, error) {
	var uris []string
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		var seq asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &seq); err != nil || len(rest) > 0 || !seq.IsCompound || seq.Tag != asn1.TagSequence {
			return nil, errors.New("malformed subject alternative name")
		}
		for rest := seq.Bytes; len(rest) > 0; {
			var v asn1.RawValue
			var err error
			if rest, err = asn1.Unmarshal(rest, &v); err != nil {
				return nil, errors.New("malformed subject alternative name")
			}
			if v.Class == asn1.ClassContextSpecific && v.Tag == 6 {
				uris = append(uris, string(v.Bytes))
			}
		}
	}
	return uris, nil
}

// leafUsage holds a leaf to X509-SVID section 4 and appendix A.
func leafUsage(c *x509.Certificate) error {
	if c.IsCA {
		return errors.New("a CA certificate presented as an identity")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("keyCertSign or cRLSign on a leaf")
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("digitalSignature is missing")
	}
	critical := false
	for _, ext := range c.Extensions {
		if ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 15}) {
			critical = ext.Critical
		}
	}
	if !critical {
		return errors.New("key usage is not critical")
	}
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 {
		return nil
	}
	server, client := false, false
	for _, u := range c.ExtKeyUsage {
		server = server || u == x509.ExtKeyUsageServerAuth
		client = client || u == x509.ExtKeyUsageClientAuth
	}
	if !server || !client {
		return errors.New("extended key usage without both serverAuth and clientAuth")
	}
	return nil
}

// issuerID holds a signing certificate's SPIFFE ID, if it has one, to the leaf's trust domain and to having no path.
func issuerID(c *x509.Certificate, td spiffeid.TrustDomain) error {
	uris, err := uriSANs(c)
	if err != nil || len(uris) == 0 {
		return err
	}
	if len(uris) != 1 || uris[0] != "spiffe://"+td.String() {
		return errors.New("a signing certificate names something else than its trust domain")
	}
	return nil
}

// Authorize judges a verified identity; an error refuses it.
type Authorize func(spiffeid.ID) error

// AuthorizeID accepts exactly these.
func AuthorizeID(ids ...spiffeid.ID) Authorize {
	return func(id spiffeid.ID) error {
		for _, want := range ids {
			if id == want && !want.IsZero() {
				return nil
			}
		}
		return errors.New("not an accepted identity")
	}
}

// AuthorizeControlPlane accepts the control plane of td.
func AuthorizeControlPlane(td spiffeid.TrustDomain) Authorize {
	return AuthorizeID(spiffeid.ControlPlane(td))
}

// AuthorizeTrustDomain accepts every identity of td.
func AuthorizeTrustDomain(td spiffeid.TrustDomain) Authorize {
	return func(id spiffeid.ID) error {
		if td.IsZero() || id.TrustDomain() != td {
			return errors.New("not of trust domain " + td.String())
		}
		return nil
	}
}

// AuthorizeAny accepts every verified identity: the caller judges afterwards.
func AuthorizeAny() Authorize { return func(spiffeid.ID) error { return nil } }

// PeerFromState is the other end of a connection whose handshake a config of this package has verified. It reads the leaf's ID
// again and judges nothing.
func PeerFromState(cs tls.ConnectionState) (*Peer, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return nil, &VerifyError{Reason: "no_certificate"}
	}
	id, err := leafID(cs.PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	p := &Peer{ID: id, Chain: cs.PeerCertificates}
	for _, c := range cs.PeerCertificates {
		if p.NotAfter.IsZero() || c.NotAfter.Before(p.NotAfter) {
			p.NotAfter = c.NotAfter
		}
	}
	return p, nil
}
