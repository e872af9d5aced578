// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a presented chain.
const (
	MaxChainLength = 8
	MaxChainBytes  = 64 << 10
)

// VerifyError says why a chain was refused; Reason is one machine word: no_certificate, too_large, bad_san, bad_id,
// bad_usage, unknown_trust_domain, expired, not_yet_valid, untrusted, withdrawn, not_authorized.
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
	NotAfter time.Time // of the first certificate of its path to end
	Chain    []*x509.Certificate
}

// Verify judges a presented chain: one URI SAN that is a SPIFFE ID, the key usages of a leaf, and a path to a root of the bundle
// of exactly the claimed trust domain, at now. Each certificate after the leaf is the issuer of the one before it, or a sibling
// of it: the same subject and key, certified by another authority. Every certificate must have the form of its place; in time
// must be the leaf and one path to a root, since a sibling is sent for those who know the other root. Errors are
// *VerifyError. It authorizes nobody.
//
// Cheap rules come first. A stranger costs one signature check: a root must have signed a certificate of the chain before
// anything else about signatures is looked at.
func Verify(chain []*x509.Certificate, bundles *Bundles, now time.Time) (*Peer, error) {
	return verify(chain, bundles, now, now)
}

// verify is Verify with the leaf as of another time.
func verify(chain []*x509.Certificate, bundles *Bundles, leafAt, now time.Time) (*Peer, error) {
	if err := checkSize(chain, MaxChainLength); err != nil {
		return nil, err
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	refuse := func(reason string, err error) (*Peer, error) {
		return nil, &VerifyError{Reason: reason, ID: id, Err: err}
	}
	if err := leafUsage(leaf); err != nil {
		return refuse("bad_usage", err)
	}
	if err := checkKey(leaf); err != nil {
		return refuse("bad_usage", err)
	}
	if late := valid(leaf, leafAt); late != nil {
		return refuse(late.reason, late.err)
	}
	for _, c := range chain[1:] {
		if reason, err := checkIssuer(c, id.TrustDomain()); err != nil {
			return refuse(reason, err)
		}
	}
	list, err := steps(chain)
	if err != nil {
		return refuse("untrusted", err)
	}
	bundle := bundles.Get(id.TrustDomain())
	if bundle == nil {
		return refuse("unknown_trust_domain", nil)
	}
	path, why := bundle.verify(list, id.TrustDomain(), leafAt, now)
	if why != nil {
		return refuse(why.reason, why.err)
	}
	return &Peer{ID: id, Chain: chain, NotAfter: firstEnd(path)}, nil
}

// checkIssuer holds any certificate above the leaf to the rules of a signing certificate, whether it will be needed or not.
func checkIssuer(c *x509.Certificate, td spiffeid.TrustDomain) (reason string, err error) {
	if err := issuerID(c, td); err != nil {
		return "bad_san", err
	}
	return "bad_usage", errors.Join(checkKey(c), issuerUsage(c))
}

func checkSize(chain []*x509.Certificate, most int) error {
	if len(chain) == 0 {
		return &VerifyError{Reason: "no_certificate"}
	}
	size := 0
	for _, c := range chain {
		size += len(c.Raw)
	}
	if len(chain) > most || size > MaxChainBytes {
		return &VerifyError{Reason: "too_large", Err: fmt.Errorf("%d certificates of %d bytes; at most %d of %d", len(chain), size, most, MaxChainBytes)}
	}
	return nil
}

// checkConstraints holds td to the URI name constraints of a verified path. Go applies them as well, but takes a constraint
// as a suffix and ignores case; here a permitted name must be td itself, and a name excluded covers what lies below it.
func checkConstraints(path []*x509.Certificate, td spiffeid.TrustDomain) error {
	name := td.String()
	for _, c := range path[1:] {
		if len(c.PermittedURIDomains) > 0 && !slices.Contains(c.PermittedURIDomains, name) {
			return fmt.Errorf("%s is not among the names that %q may sign", name, c.Subject.CommonName)
		}
		for _, x := range c.ExcludedURIDomains {
			x = strings.ToLower(strings.TrimPrefix(x, "."))
			if name == x || strings.HasSuffix(name, "."+x) {
				return fmt.Errorf("%s is among the names that %q may not sign", name, c.Subject.CommonName)
			}
		}
	}
	return nil
}

// id-ce-subjectAltName and id-ce-keyUsage.
var (
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
)

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
				if v.IsCompound {
					return nil, errors.New("malformed URI name")
				}
				uris = append(uris, string(v.Bytes))
			}
		}
	}
	return uris, nil
}

// The RSA moduli accepted anywhere in a chain, in bits: shorter ones are weak, longer ones cost too much to check.
const (
	minRSA = 2048
	maxRSA = 8192
)

func checkKey(c *x509.Certificate) error {
	if _, ok := c.PublicKey.(ed25519.PublicKey); ok {
		return nil
	}
	return checkJWTKey(c.PublicKey)
}

// issuerUsage holds a signing certificate of the chain to X509-SVID sections 4.1 and 4.3.
func issuerUsage(c *x509.Certificate) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("a certificate that is no CA in an issuer's place")
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("keyCertSign is missing on an issuer")
	}
	return nil
}

// emptyName is the DER of a subject without attributes.
var emptyName = []byte{0x30, 0x00}

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
	if !isCritical(c, oidKeyUsage) {
		return errors.New("key usage is not critical")
	}
	if bytes.Equal(c.RawSubject, emptyName) && !isCritical(c, oidSAN) {
		return errors.New("neither a subject nor a critical subject alternative name")
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

func isCritical(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) && e.Critical })
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
// again and judges nothing. Clients of ALPNJoin are not verified and those of ALPNRenew may have ended; it refuses them.
func PeerFromState(cs tls.ConnectionState) (*Peer, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return nil, &VerifyError{Reason: "no_certificate"}
	}
	if cs.NegotiatedProtocol == ALPNJoin || cs.NegotiatedProtocol == ALPNRenew {
		return nil, &VerifyError{Reason: "untrusted", Err: errors.New("clients of " + cs.NegotiatedProtocol + " are not verified by the handshake, or have ended")}
	}
	id, err := leafID(cs.PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	return &Peer{ID: id, Chain: cs.PeerCertificates, NotAfter: chainEnd(cs.PeerCertificates)}, nil
}
