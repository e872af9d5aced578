// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a bundle document, and of its refresh hint.
const (
	MaxBundleSize  = 256 << 10
	MaxBundleRoots = 64
	MinRefreshHint = time.Minute
	MaxRefreshHint = 24 * time.Hour
)

// Bundle is the set of roots of one trust domain, immutable (SPIFFE Trust Domain and Bundle, section 4).
type Bundle struct {
	td       spiffeid.TrustDomain
	roots    []*x509.Certificate
	sequence uint64
	refresh  time.Duration
	pool     *x509.CertPool
}

// NewBundle makes a bundle. Without roots it is valid and verifies nothing.
func NewBundle(td spiffeid.TrustDomain, roots []*x509.Certificate, sequence uint64) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("bundle: no trust domain")
	}
	if len(roots) > MaxBundleRoots {
		return nil, fmt.Errorf("bundle of %s: %d roots; at most %d", td, len(roots), MaxBundleRoots)
	}
	b := &Bundle{td: td, roots: append([]*x509.Certificate(nil), roots...), sequence: sequence, pool: x509.NewCertPool()}
	for _, c := range roots {
		b.pool.AddCert(c)
	}
	return b, nil
}

// TrustDomain is whose roots these are.
func (b *Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Roots returns the roots; do not modify them.
func (b *Bundle) Roots() []*x509.Certificate { return b.roots }

// Sequence increases with each change.
func (b *Bundle) Sequence() uint64 { return b.sequence }

// RefreshHint says how often the publisher wants to be asked, clamped to 1 min … 24 h; 0 = no hint.
func (b *Bundle) RefreshHint() time.Duration { return b.refresh }

// Hash is SHA-256 over the roots' DER in sorted order, each with its length: what tokens pin.
func (b *Bundle) Hash() [32]byte { return hashRoots(b.roots) }

func hashRoots(roots []*x509.Certificate) [32]byte {
	ders := make([][]byte, 0, len(roots))
	for _, c := range roots {
		ders = append(ders, c.Raw)
	}
	sort.Slice(ders, func(i, j int) bool { return bytes.Compare(ders[i], ders[j]) < 0 })
	h := sha256.New()
	for _, d := range ders {
		n := len(d)
		h.Write([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		h.Write(d)
	}
	return [32]byte(h.Sum(nil))
}

// NotAfter is the end of the root that ends first; the zero time without roots.
func (b *Bundle) NotAfter() time.Time {
	var first time.Time
	for _, c := range b.roots {
		if first.IsZero() || c.NotAfter.Before(first) {
			first = c.NotAfter
		}
	}
	return first
}

// WithRoots is a copy with other roots and the next sequence number.
func (b *Bundle) WithRoots(roots []*x509.Certificate) (*Bundle, error) {
	return NewBundle(b.td, roots, b.sequence+1)
}

type jwksDoc struct {
	Keys     *[]jwk      `json:"keys"`
	Sequence json.Number `json:"spiffe_sequence,omitempty"`
	Refresh  json.Number `json:"spiffe_refresh_hint,omitempty"`
}

type jwk struct {
	Use string   `json:"use,omitempty"`
	Kty string   `json:"kty"`
	Crv string   `json:"crv,omitempty"`
	X   string   `json:"x,omitempty"`
	Y   string   `json:"y,omitempty"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
	X5c []string `json:"x5c,omitempty"`
}

// Marshal renders the bundle as a SPIFFE bundle document.
func (b *Bundle) Marshal() []byte {
	keys := make([]jwk, 0, len(b.roots))
	for _, c := range b.roots {
		k := jwk{Use: "x509-svid", X5c: []string{base64.StdEncoding.EncodeToString(c.Raw)}}
		switch pub := c.PublicKey.(type) {
		case *ecdsa.PublicKey:
			raw, err := pub.Bytes() // 0x04 ‖ X ‖ Y
			if err != nil {
				continue
			}
			n := (len(raw) - 1) / 2
			k.Kty, k.Crv = "EC", pub.Curve.Params().Name
			k.X, k.Y = base64.RawURLEncoding.EncodeToString(raw[1:1+n]), base64.RawURLEncoding.EncodeToString(raw[1+n:])
		case *rsa.PublicKey:
			e := []byte{byte(pub.E >> 16), byte(pub.E >> 8), byte(pub.E)}
			k.Kty, k.N, k.E = "RSA", base64.RawURLEncoding.EncodeToString(pub.N.Bytes()), base64.RawURLEncoding.EncodeToString(bytes.TrimLeft(e, "\x00"))
		default:
			k.Kty = "OKP"
		}
		keys = append(keys, k)
	}
	doc := struct {
		Keys     []jwk  `json:"keys"`
		Sequence uint64 `json:"spiffe_sequence"`
		Refresh  int64  `json:"spiffe_refresh_hint,omitempty"`
	}{keys, b.sequence, int64(b.refresh / time.Second)}
	out, err := json.Marshal(doc)
	if err != nil {
		panic("trust: marshal bundle: " + err.Error()) // strings and numbers only
	}
	return out
}

// ParseBundle reads a SPIFFE bundle document of td. Keys of unknown kty or use are ignored; a document without "keys" is
// refused, one with empty "keys" verifies nothing. Only the first certificate of an x5c counts.
func ParseBundle(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("bundle of %s: %d bytes; at most %d", td, len(data), MaxBundleSize)
	}
	var doc jwksDoc
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	if doc.Keys == nil {
		return nil, fmt.Errorf(`bundle of %s: no "keys"`, td)
	}
	if bytes.Contains(data, []byte(`"spiffe_sequence":"`)) || bytes.Contains(data, []byte(`"spiffe_sequence": "`)) {
		return nil, fmt.Errorf("bundle of %s: spiffe_sequence is no number", td)
	}
	var sequence uint64
	if doc.Sequence != "" {
		n, err := parseUint(doc.Sequence)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: spiffe_sequence: %w", td, err)
		}
		sequence = n
	}
	var roots []*x509.Certificate
	for i, k := range *doc.Keys {
		if k.Use != "x509-svid" || k.Kty != "EC" && k.Kty != "RSA" && k.Kty != "OKP" {
			continue
		}
		if len(k.X5c) == 0 {
			return nil, fmt.Errorf("bundle of %s: key %d has no x5c", td, i)
		}
		der, err := base64.StdEncoding.DecodeString(k.X5c[0])
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: key %d: %w", td, i, err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: key %d: %w", td, i, err)
		}
		roots = append(roots, c)
	}
	b, err := NewBundle(td, roots, sequence)
	if err != nil {
		return nil, err
	}
	if doc.Refresh != "" {
		if n, err := doc.Refresh.Int64(); err == nil && n != 0 {
			b.refresh = min(max(time.Duration(min(n, int64(MaxRefreshHint/time.Second)))*time.Second, MinRefreshHint), MaxRefreshHint)
		}
	}
	return b, nil
}

func parseUint(n json.Number) (uint64, error) {
	var v uint64
	err := json.Unmarshal([]byte(n.String()), &v)
	return v, err
}

// Bundles is an immutable set of bundles, one per trust domain, that are never merged.
type Bundles struct {
	byDomain map[spiffeid.TrustDomain]*Bundle
}

// NewBundles makes a set; two bundles of one trust domain are refused.
func NewBundles(list ...*Bundle) (*Bundles, error) {
	m := make(map[spiffeid.TrustDomain]*Bundle, len(list))
	for _, b := range list {
		if m[b.td] != nil {
			return nil, fmt.Errorf("bundles: %s stands twice", b.td)
		}
		m[b.td] = b
	}
	return &Bundles{m}, nil
}

// Get returns the bundle of td, or nil. It may be called on nil.
func (s *Bundles) Get(td spiffeid.TrustDomain) *Bundle {
	if s == nil {
		return nil
	}
	return s.byDomain[td]
}

// With is a copy that has b in place of the bundle of its trust domain.
func (s *Bundles) With(b *Bundle) *Bundles {
	m := s.clone()
	m[b.td] = b
	return &Bundles{m}
}

// Without is a copy that lacks the bundle of td.
func (s *Bundles) Without(td spiffeid.TrustDomain) *Bundles {
	m := s.clone()
	delete(m, td)
	return &Bundles{m}
}

func (s *Bundles) clone() map[spiffeid.TrustDomain]*Bundle {
	m := map[spiffeid.TrustDomain]*Bundle{}
	if s != nil {
		for k, v := range s.byDomain {
			m[k] = v
		}
	}
	return m
}

// TrustDomains lists whose bundles are in the set, sorted.
func (s *Bundles) TrustDomains() []spiffeid.TrustDomain {
	var out []spiffeid.TrustDomain
	if s != nil {
		for td := range s.byDomain {
			out = append(out, td)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].String() < out[j].String() })
	return out
}
