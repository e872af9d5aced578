// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// JWTLifetime is how long a JWT-SVID is valid.
const JWTLifetime = 5 * time.Minute

// newJWT makes a signing key and its file.
func (c *CA) newJWT() (*jwtKey, error) {
	key, err := newECKey()
	if err != nil {
		return nil, err
	}
	k := &jwtKey{file: newName("jwt"), key: key}
	if k.id, err = kidOf(key); err != nil {
		return nil, err
	}
	return k, writeKeyFile(c.dir, k.file, &keyFile{key: key})
}

func loadJWT(dir files, name string) (*jwtKey, error) {
	f, err := readKeyFile(dir, name)
	if err != nil {
		return nil, err
	}
	key, ok := f.key.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s: no P-256 key", name)
	}
	id, err := kidOf(key)
	return &jwtKey{name, id, key}, err
}

// kidOf names a key after itself.
func kidOf(key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:16]), err
}

// SignJWT makes a JWT-SVID (ES256; typ, alg, kid, sub, aud, iat, exp) of an identity of the CA's trust domain. The audience must
// not be empty. notAfter is what exp says.
func (c *CA) SignJWT(id spiffeid.ID, audience []string) (token string, notAfter time.Time, err error) {
	fail := func(err error) (string, time.Time, error) {
		return "", time.Time{}, fmt.Errorf("sign JWT-SVID of %s: %w", id, err)
	}
	if id.IsZero() || id.TrustDomain() != c.td {
		return fail(fmt.Errorf("not of trust domain %s", c.td))
	}
	if len(audience) == 0 {
		return fail(errors.New("no audience"))
	}
	c.mu.Lock()
	m := c.cur
	c.mu.Unlock()
	k := m.jwt[0]
	if m.st.Phase == Activated {
		k = m.jwt[1]
	}
	opts := (&jose.SignerOptions{}).WithType("JWT")
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.key, KeyID: k.id}}, opts)
	if err != nil {
		return fail(err)
	}
	now := c.now().Truncate(time.Second)
	notAfter = now.Add(JWTLifetime)
	token, err = jwt.Signed(s).Claims(jwt.Claims{
		Subject: id.String(), Audience: audience, IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(notAfter),
	}).Serialize()
	if err != nil {
		return fail(err)
	}
	return token, notAfter, nil
}
