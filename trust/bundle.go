// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a bundle document, and of its refresh hint.
const (
	MaxBundleSize  = 256 << 10
	MaxBundleRoots = 64
	MaxJWTKeys     = 32
	MinRefreshHint = time.Minute
	MaxRefreshHint = 24 * time.Hour
)

// JWTKey verifies JWT-SVIDs of a trust domain: what a bundle holds under use "jwt-svid".
type JWTKey struct {
	ID  string           // kid, unique in the bundle
	Key crypto.PublicKey // ECDSA on P-256, P-384 or P-521, or RSA of 2,048 bits and more
}

// Bundle is the set of roots and JWT keys of one trust domain, immutable (SPIFFE Trust Domain and Bundle, section 4).
type Bundle struct {
	td       spiffeid.TrustDomain
	roots    []*x509.Certificate
	jwt      []JWTKey
	sequence uint64
	refresh  time.Duration
	pools    []*x509.CertPool // one for each root

	// anchored remembers issuers that a root was seen to have signed.
	anchored      sync.Map // anchor → struct{}
	anchoredCount atomic.Int32
}

// NewBundle makes a bundle. Without roots it is valid and verifies nothing. A root must be a CA certificate and, when it
// carries a SPIFFE ID, be td's own; one that stands twice counts once.
func NewBundle(td spiffeid.TrustDomain, roots []*x509.Certificate, sequence uint64) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("bundle: no trust domain")
	}
	if len(roots) > MaxBundleRoots {
		return nil, fmt.Errorf("bundle of %s: %d roots; at most %d", td, len(roots), MaxBundleRoots)
	}
	b := &Bundle{td: td, sequence: sequence}
	for _, c := range roots {
		if slices.ContainsFunc(b.roots, c.Equal) {
			continue
		}
		if err := errors.Join(issuerUsage(c), issuerID(c, td), checkKey(c)); err != nil {
			return nil, fmt.Errorf("bundle of %s: root %q: %w", td, c.Subject.CommonName, err)
		}
		b.roots = append(b.roots, c)
		pool := x509.NewCertPool()
		pool.AddCert(c)
		b.pools = append(b.pools, pool)
	}
	return b, nil
}

// TrustDomain is whose roots these are.
func (b *Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Roots returns the roots; do not modify them.
func (b *Bundle) Roots() []*x509.Certificate { return b.roots }

// JWTKeys returns the keys that verify JWT-SVIDs; do not modify them. They never verify certificates, nor roots tokens.
func (b *Bundle) JWTKeys() []JWTKey { return b.jwt }

// WithJWTKeys is a copy with other JWT keys and the same sequence number.
func (b *Bundle) WithJWTKeys(keys []JWTKey) (*Bundle, error) {
	if len(keys) > MaxJWTKeys {
		return nil, fmt.Errorf("bundle of %s: %d JWT keys; at most %d", b.td, len(keys), MaxJWTKeys)
	}
	n, err := NewBundle(b.td, b.roots, b.sequence)
	if err != nil {
		return nil, err
	}
	n.refresh = b.refresh
	for _, k := range keys {
		if k.ID == "" || slices.ContainsFunc(n.jwt, func(have JWTKey) bool { return have.ID == k.ID }) {
			return nil, fmt.Errorf("bundle of %s: JWT key %q: the kid is missing or stands twice", b.td, k.ID)
		}
		if err := checkJWTKey(k.Key); err != nil {
			return nil, fmt.Errorf("bundle of %s: JWT key %q: %w", b.td, k.ID, err)
		}
		n.jwt = append(n.jwt, k)
	}
	return n, nil
}

// WithSequence is a copy with another sequence number.
func (b *Bundle) WithSequence(sequence uint64) *Bundle {
	n, err := NewBundle(b.td, b.roots, sequence)
	if err != nil {
		panic("trust: " + err.Error()) // it was made of the same
	}
	n.refresh, n.jwt = b.refresh, b.jwt
	return n
}

// checkJWTKey accepts ECDSA on P-256, P-384 and P-521, and RSA of a size that is neither weak nor dear.
func checkJWTKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if curves[k.Curve.Params().Name] == nil {
			return fmt.Errorf("an ECDSA key on %s", k.Curve.Params().Name)
		}
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSA || n > maxRSA {
			return fmt.Errorf("an RSA key of %d bits; %d to %d", n, minRSA, maxRSA)
		}
		return nil
	default:
		return errors.New("a public key of an unsupported kind")
	}
}

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
	n, err := NewBundle(b.td, roots, b.sequence+1)
	if err == nil {
		n.refresh, n.jwt = b.refresh, b.jwt
	}
	return n, err
}

// Equal reports whether two bundles say the same: trust domain, sequence, roots and JWT keys.
func (b *Bundle) Equal(o *Bundle) bool {
	return b.td == o.td && b.sequence == o.sequence && b.sameAuthorities(o)
}

func (b *Bundle) sameAuthorities(o *Bundle) bool {
	return b.Hash() == o.Hash() && len(b.jwt) == len(o.jwt) && !slices.ContainsFunc(b.jwt, func(k JWTKey) bool {
		return !slices.ContainsFunc(o.jwt, func(other JWTKey) bool { return other.ID == k.ID && samePublicKey(k.Key, other.Key) })
	})
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// ErrRollback is a bundle that would go back: a lower sequence, or the same one with other roots or JWT keys.
var ErrRollback = errors.New("bundle goes back")

// CheckUpdate says whether next may replace b, which may be nil. Publishers without sequences (0) always may.
func (b *Bundle) CheckUpdate(next *Bundle) error {
	switch {
	case b == nil:
		return nil
	case b.td != next.td:
		return fmt.Errorf("bundle of %s offered for %s", next.td, b.td)
	case next.sequence < b.sequence:
		return fmt.Errorf("bundle of %s: sequence %d after %d: %w", b.td, next.sequence, b.sequence, ErrRollback)
	case next.sequence == b.sequence && next.sequence != 0 && !next.sameAuthorities(b):
		return fmt.Errorf("bundle of %s: two bundles of sequence %d: %w", b.td, b.sequence, ErrRollback)
	}
	return nil
}

type jwk struct {
	Use string   `json:"use,omitempty"`
	Kid string   `json:"kid,omitempty"`
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
	keys := make([]jwk, 0, len(b.roots)+len(b.jwt))
	for _, c := range b.roots {
		k := publicJWK(c.PublicKey)
		k.Use, k.X5c = "x509-svid", []string{base64.StdEncoding.EncodeToString(c.Raw)}
		keys = append(keys, k)
	}
	for _, j := range b.jwt {
		k := publicJWK(j.Key)
		k.Use, k.Kid = "jwt-svid", j.ID
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

// publicJWK renders a key that checkKey or checkJWTKey has let pass.
func publicJWK(key crypto.PublicKey) (k jwk) {
	switch pub := key.(type) {
	case *ecdsa.PublicKey:
		raw, err := pub.Bytes() // 0x04 ‖ X ‖ Y
		if err != nil {
			return k
		}
		n := (len(raw) - 1) / 2
		k.Kty, k.Crv = "EC", pub.Curve.Params().Name
		k.X, k.Y = base64.RawURLEncoding.EncodeToString(raw[1:1+n]), base64.RawURLEncoding.EncodeToString(raw[1+n:])
	case *rsa.PublicKey:
		k.Kty, k.N = "RSA", base64.RawURLEncoding.EncodeToString(pub.N.Bytes())
		k.E = base64.RawURLEncoding.EncodeToString(big.NewInt(int64(pub.E)).Bytes())
	case ed25519.PublicKey:
		k.Kty, k.Crv, k.X = "OKP", "Ed25519", base64.RawURLEncoding.EncodeToString(pub)
	}
	return k
}

// ParseBundle reads a SPIFFE bundle document of td. Keys of unknown kty or use are ignored; a document without "keys" is
// refused, one with empty "keys" verifies nothing. Only the first certificate of an x5c counts. A name that stands twice in
// an object is refused, since two parsers could read two documents.
func ParseBundle(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	b, err := parseBundle(td, data)
	if err != nil {
		return nil, fmt.Errorf("parse bundle of %s: %w", td, err)
	}
	return b, nil
}

func parseBundle(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("%d bytes; at most %d", len(data), MaxBundleSize)
	}
	doc, err := readObject(data)
	if err != nil {
		return nil, err
	}
	var keys []json.RawMessage
	if raw, ok := doc["keys"]; !ok || json.Unmarshal(raw, &keys) != nil || keys == nil {
		return nil, errors.New(`no "keys"`)
	}
	var sequence *uint64
	if raw, ok := doc["spiffe_sequence"]; ok && (json.Unmarshal(raw, &sequence) != nil || sequence == nil) {
		return nil, errors.New("spiffe_sequence is no sequence number")
	}
	var hint *float64 // some publishers write 10e8
	if raw, ok := doc["spiffe_refresh_hint"]; ok && (json.Unmarshal(raw, &hint) != nil || hint == nil) {
		return nil, errors.New("spiffe_refresh_hint is no number")
	}
	var roots []*x509.Certificate
	var jwt []JWTKey
	for i, raw := range keys {
		c, j, err := readKey(raw)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i, err)
		}
		if c != nil {
			roots = append(roots, c)
		}
		if j != nil {
			jwt = append(jwt, *j)
		}
	}
	if sequence == nil {
		sequence = new(uint64)
	}
	b, err := NewBundle(td, roots, *sequence)
	if err == nil && len(jwt) > 0 {
		b, err = b.WithJWTKeys(jwt)
	}
	if err != nil {
		return nil, err
	}
	if hint != nil {
		seconds := min(max(*hint, MinRefreshHint.Seconds()), MaxRefreshHint.Seconds())
		b.refresh = time.Duration(seconds) * time.Second
	}
	return b, nil
}

// readKey returns the root or the JWT key that a JWK holds, neither when it is of another kind.
func readKey(raw json.RawMessage) (*x509.Certificate, *JWTKey, error) {
	key, err := readObject(raw)
	if err != nil {
		return nil, nil, err
	}
	var f struct{ use, kty, kid, crv, x, y, n, e string }
	for name, v := range map[string]*string{
		"use": &f.use, "kty": &f.kty, "kid": &f.kid, "crv": &f.crv, "x": &f.x, "y": &f.y, "n": &f.n, "e": &f.e,
	} {
		if raw, ok := key[name]; ok && json.Unmarshal(raw, v) != nil {
			return nil, nil, fmt.Errorf("%s is no string", name)
		}
	}
	switch {
	case f.use == "jwt-svid" && (f.kty == "EC" || f.kty == "RSA"):
		return nil, readJWTKey(f.kid, f.kty, f.crv, f.x, f.y, f.n, f.e), nil
	case f.use != "x509-svid" || f.kty != "EC" && f.kty != "RSA" && f.kty != "OKP":
		return nil, nil, nil
	}
	if _, ok := key["kid"]; ok {
		return nil, nil, errors.New("an x509-svid key with a kid")
	}
	var x5c []string
	if raw, ok := key["x5c"]; !ok || json.Unmarshal(raw, &x5c) != nil || len(x5c) == 0 {
		return nil, nil, errors.New("no x5c")
	}
	der, err := base64.StdEncoding.DecodeString(x5c[0])
	if err != nil {
		return nil, nil, fmt.Errorf("x5c: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	return c, nil, err
}

var curves = map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}

// readJWTKey reads the public key of a JWK (RFC 7518, section 6), nil when it is malformed or of an unknown kind: what is
// left out verifies nothing, and a key for tokens must not take the roots with it.
func readJWTKey(kid, kty, crv, x, y, n, e string) *JWTKey {
	if kid == "" {
		return nil
	}
	var key crypto.PublicKey
	if kty == "EC" {
		curve := curves[crv]
		if curve == nil {
			return nil
		}
		size := (curve.Params().BitSize + 7) / 8
		point := []byte{4}
		for _, text := range []string{x, y} {
			b, err := base64.RawURLEncoding.DecodeString(text)
			if err != nil || len(b) != size {
				return nil
			}
			point = append(point, b...)
		}
		pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
		if err != nil {
			return nil
		}
		key = pub
	} else {
		modulus, errN := base64.RawURLEncoding.DecodeString(n)
		exponent, errE := base64.RawURLEncoding.DecodeString(e)
		if errN != nil || errE != nil || len(modulus) > 1024 || len(exponent) == 0 || len(exponent) > 4 {
			return nil
		}
		key = &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(new(big.Int).SetBytes(exponent).Int64())}
	}
	if checkJWTKey(key) != nil {
		return nil
	}
	return &JWTKey{kid, key}
}

// readObject splits a JSON object by its exact names and refuses names that stand twice. (encoding/json would take the last,
// and ignore case.)
func readObject(data []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("no JSON object")
	}
	out := map[string]json.RawMessage{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name, _ := t.(string)
		if _, ok := out[name]; ok {
			return nil, fmt.Errorf("%q stands twice", name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, err
		}
		out[name] = v
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something after the JSON object")
	}
	return out, nil
}

// Bundles is an immutable set of bundles, one per trust domain, that are never merged.
type Bundles struct {
	byDomain map[spiffeid.TrustDomain]*Bundle
}

// NewBundles makes a set; two bundles of one trust domain are refused.
func NewBundles(list ...*Bundle) (*Bundles, error) {
	m := make(map[spiffeid.TrustDomain]*Bundle, len(list))
	for _, b := range list {
		if b == nil {
			return nil, errors.New("bundles: no bundle")
		}
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
