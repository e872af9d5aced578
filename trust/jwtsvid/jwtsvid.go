// SPDX-License-Identifier: Apache-2.0

package jwtsvid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes that algorithms name
	_ "crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of a token, and how far its clock may be from ours.
const (
	MaxSize = 16 << 10
	Leeway  = time.Minute // go-spiffe allows as much

	maxDepth = 16 // of arrays and objects in a token
)

// Claims are what a token that holds says.
type Claims struct {
	ID       spiffeid.ID
	Audience []string
	NotAfter time.Time
	Issued   time.Time      // zero: the token does not say
	All      map[string]any // as encoding/json reads them
}

// Verify judges a token for one audience at now. Errors say which rule a token breaks; they never repeat the token.
func Verify(token, audience string, bundles *trust.Bundles, now time.Time) (*Claims, error) {
	c, err := verify(token, audience, bundles, now)
	if err != nil {
		return nil, fmt.Errorf("JWT-SVID: %w", err)
	}
	return c, nil
}

func verify(token, audience string, bundles *trust.Bundles, now time.Time) (*Claims, error) {
	if audience == "" {
		return nil, errors.New("no audience to judge it for")
	}
	if len(token) > MaxSize {
		return nil, fmt.Errorf("%d bytes; at most %d", len(token), MaxSize)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("not of three parts")
	}
	h, err := readHeader(parts[0])
	if err != nil {
		return nil, err
	}
	c, err := readClaims(parts[1])
	if err != nil {
		return nil, err
	}
	signature, err := decode(parts[2])
	if err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	key, err := keyOf(bundles, c.ID.TrustDomain(), h.kid)
	if err != nil {
		return nil, err
	}
	if err := checkSignature(key, h.alg, token[:len(parts[0])+1+len(parts[1])], signature); err != nil {
		return nil, err
	}
	switch notBefore := c.All["nbf"]; {
	case !slices.Contains(c.Audience, audience):
		return nil, errors.New("for another audience")
	case now.After(c.NotAfter.Add(Leeway)):
		return nil, fmt.Errorf("expired at %s", c.NotAfter.UTC().Format(time.RFC3339))
	case notBefore != nil && now.Add(Leeway).Before(asTime(notBefore)):
		return nil, fmt.Errorf("not valid before %s", asTime(notBefore).UTC().Format(time.RFC3339))
	case now.Add(Leeway).Before(c.Issued):
		return nil, fmt.Errorf("issued in the future, at %s", c.Issued.UTC().Format(time.RFC3339))
	}
	return c, nil
}

// decode reads unpadded base64url in its one spelling; Go's decoder would skip line ends.
func decode(part string) ([]byte, error) {
	if strings.ContainsAny(part, "\r\n") {
		return nil, errors.New("no base64url")
	}
	data, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil {
		return nil, errors.New("no base64url")
	}
	return data, nil
}

type header struct{ alg, kid string }

// readHeader accepts the three parameters of JWT-SVID section 2 and no others: whatever else a header could say (jku, jwk, x5u,
// crit, zip, cty …) would ask for something that is not done here.
func readHeader(part string) (h header, err error) {
	data, err := decode(part)
	if err != nil {
		return h, fmt.Errorf("header: %w", err)
	}
	m, err := readJSON(data)
	if err != nil {
		return h, fmt.Errorf("header: %w", err)
	}
	for name, v := range m {
		text, ok := v.(string)
		switch {
		case !ok:
			return h, fmt.Errorf("header: %.20q is no text", name)
		case name == "alg":
			h.alg = text
		case name == "kid":
			h.kid = text
		case name == "typ" && (text == "JWT" || text == "JOSE"):
		default:
			return h, fmt.Errorf("header: %.20q is not accepted", name)
		}
	}
	if _, ok := algorithms[h.alg]; !ok {
		return h, fmt.Errorf("algorithm %.20q is not accepted", h.alg)
	}
	if h.kid == "" {
		return h, errors.New("header: no kid")
	}
	return h, nil
}

func readClaims(part string) (*Claims, error) {
	data, err := decode(part)
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	m, err := readJSON(data)
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	c := &Claims{All: m}
	subject, ok := m["sub"].(string)
	if !ok {
		return nil, errors.New("claims: no sub")
	}
	if c.ID, err = spiffeid.Parse(subject); err != nil {
		return nil, fmt.Errorf("claims: sub: %w", err)
	}
	switch aud := m["aud"].(type) {
	case string:
		c.Audience = []string{aud}
	case []any:
		for _, a := range aud {
			text, ok := a.(string)
			if !ok {
				return nil, errors.New("claims: aud is no list of texts")
			}
			c.Audience = append(c.Audience, text)
		}
	default:
		return nil, errors.New("claims: no aud")
	}
	for _, name := range []string{"exp", "nbf", "iat"} {
		v, ok := m[name]
		if !ok && name != "exp" {
			continue
		}
		if n, ok := v.(float64); !ok || n < 1 || n > maxTime {
			return nil, fmt.Errorf("claims: %s is no time", name)
		}
	}
	c.NotAfter = asTime(m["exp"])
	if iat, ok := m["iat"]; ok {
		c.Issued = asTime(iat)
	}
	return c, nil
}

// maxTime is the year 9999 in Unix seconds.
const maxTime = 253402300799

// asTime reads a NumericDate that readClaims has let pass.
func asTime(v any) time.Time {
	n, _ := v.(float64)
	whole, fraction := math.Modf(n)
	return time.Unix(int64(whole), int64(fraction*1e9))
}

func keyOf(bundles *trust.Bundles, td spiffeid.TrustDomain, kid string) (crypto.PublicKey, error) {
	b := bundles.Get(td)
	if b == nil {
		return nil, fmt.Errorf("trust domain %s is not trusted", td)
	}
	for _, k := range b.JWTKeys() {
		if k.ID == kid {
			return k.Key, nil
		}
	}
	return nil, fmt.Errorf("trust domain %s has no such key", td)
}

type algorithm struct {
	hash crypto.Hash
	bits int  // of the curve; 0: RSA
	pss  bool // RSASSA-PSS
}

// algorithms are those of JWT-SVID section 2.1.
var algorithms = map[string]algorithm{
	"ES256": {hash: crypto.SHA256, bits: 256}, "ES384": {hash: crypto.SHA384, bits: 384}, "ES512": {hash: crypto.SHA512, bits: 521},
	"RS256": {hash: crypto.SHA256}, "RS384": {hash: crypto.SHA384}, "RS512": {hash: crypto.SHA512},
	"PS256": {hash: crypto.SHA256, pss: true}, "PS384": {hash: crypto.SHA384, pss: true}, "PS512": {hash: crypto.SHA512, pss: true},
}

var errSignature = errors.New("the signature does not hold")

func checkSignature(key crypto.PublicKey, alg, signed string, signature []byte) error {
	a := algorithms[alg]
	h := a.hash.New()
	h.Write([]byte(signed))
	digest := h.Sum(nil)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if a.bits != k.Curve.Params().BitSize {
			return fmt.Errorf("algorithm %s does not fit the key", alg)
		}
		n := (a.bits + 7) / 8
		if len(signature) != 2*n {
			return errSignature
		}
		if !ecdsa.Verify(k, digest, new(big.Int).SetBytes(signature[:n]), new(big.Int).SetBytes(signature[n:])) {
			return errSignature
		}
		return nil
	case *rsa.PublicKey:
		var err error
		switch {
		case a.bits != 0:
			return fmt.Errorf("algorithm %s does not fit the key", alg)
		case a.pss:
			err = rsa.VerifyPSS(k, a.hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		default:
			err = rsa.VerifyPKCS1v15(k, a.hash, digest, signature)
		}
		if err != nil {
			return errSignature
		}
		return nil
	}
	return errors.New("a key of an unknown kind")
}
