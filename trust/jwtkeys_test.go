// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/strait-mesh/strait/trust"
)

// TestJWTKeyRows: keys for tokens never take the roots with them: one that is malformed or unknown is left out and verifies nothing.
func TestJWTKeyRows(t *testing.T) {
	root := newRoot(t, "root")
	key := newKey(t)
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	x, y := b64(raw[1:33]), b64(raw[33:])
	ec := func(crv, x, y string) string { return fmt.Sprintf(`"kty":"EC","crv":%q,"x":%q,"y":%q`, crv, x, y) }
	proper := ec("P-256", x, y)
	modulus := make([]byte, 256)
	modulus[0], modulus[255] = 0x80, 1
	weak := append([]byte{}, modulus[:255]...)
	for _, tt := range []struct {
		name, fields string
		want         int // keys
	}{
		{"EC", `"kid":"k",` + proper, 1},
		{"RSA 2048", `"kid":"k","kty":"RSA","n":"` + b64(modulus) + `","e":"AQAB"`, 1},
		{"with other fields", `"kid":"k","alg":"ES256","key_ops":["verify"],"x5t":"x",` + proper, 1},
		{"no kid", proper, 0},
		{"empty kid", `"kid":"",` + proper, 0},
		{"unknown kty", `"kid":"k","kty":"PQ"`, 0},
		{"a secret", `"kid":"k","kty":"oct","k":"AAAA"`, 0},
		{"Ed25519", `"kid":"k","kty":"OKP","crv":"Ed25519","x":"` + x + `"`, 0},
		{"another curve", `"kid":"k",` + ec("secp256k1", x, y), 0},
		{"a curve that does not fit", `"kid":"k",` + ec("P-384", x, y), 0},
		{"not on the curve", `"kid":"k",` + ec("P-256", y, x), 0},
		{"at infinity", `"kid":"k",` + ec("P-256", b64(make([]byte, 32)), b64(make([]byte, 32))), 0},
		{"a coordinate too short", `"kid":"k",` + ec("P-256", b64(raw[2:33]), y), 0},
		{"padded base64", `"kid":"k",` + ec("P-256", base64.URLEncoding.EncodeToString(raw[1:33]), y), 0},
		{"no coordinates", `"kid":"k","kty":"EC","crv":"P-256"`, 0},
		{"RSA 1024", `"kid":"k","kty":"RSA","n":"` + b64(weak[:128]) + `","e":"AQAB"`, 0},
		{"RSA beyond 8192", `"kid":"k","kty":"RSA","n":"` + b64(append(make([]byte, 1024), modulus...)) + `","e":"AQAB"`, 0},
		{"RSA without exponent", `"kid":"k","kty":"RSA","n":"` + b64(modulus) + `"`, 0},
		{"RSA with a large exponent", `"kid":"k","kty":"RSA","n":"` + b64(modulus) + `","e":"AQAAAAAB"`, 0},
	} {
		cert := `{"use":"x509-svid","kty":"EC","x5c":["` + base64.StdEncoding.EncodeToString(root.cert.Raw) + `"]}`
		doc := `{"keys":[{"use":"jwt-svid",` + tt.fields + `},` + cert + `]}`
		b, err := trust.ParseBundle(domain(t, "a.mesh"), []byte(doc))
		switch {
		case err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case len(b.JWTKeys()) != tt.want || len(b.Roots()) != 1:
			t.Errorf("%s: %d JWT keys, %d roots; want %d and 1", tt.name, len(b.JWTKeys()), len(b.Roots()), tt.want)
		}
	}
	twice := `{"keys":[{"use":"jwt-svid","kid":"k",` + proper + `},{"use":"jwt-svid","kid":"k",` + proper + `}]}`
	if b, err := trust.ParseBundle(domain(t, "a.mesh"), []byte(twice)); err == nil && len(b.JWTKeys()) > 1 {
		t.Errorf("two keys of one kid: %d", len(b.JWTKeys()))
	}
	many := `{"keys":[` + strings.TrimSuffix(strings.Repeat(`{"use":"jwt-svid","kid":"k",`+proper+`},`, trust.MaxJWTKeys+1), ",") + `]}`
	if b, err := trust.ParseBundle(domain(t, "a.mesh"), []byte(many)); err == nil && len(b.JWTKeys()) > trust.MaxJWTKeys {
		t.Errorf("%d keys", len(b.JWTKeys()))
	}
}

// TestJWTKeys: they come back from a document, ours and go-spiffe's, and a change of them is a change of the bundle.
func TestJWTKeys(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := []trust.JWTKey{{ID: "ec", Key: newKey(t).Public()}, {ID: "p384", Key: p384.Public()}, {ID: "rsa", Key: rsaKey.Public()}}
	bare := newRoot(t, "root").bundle("a.mesh", 7)
	b, err := bare.WithJWTKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	back, err := trust.ParseBundle(b.TrustDomain(), b.Marshal())
	if err != nil || !back.Equal(b) || len(back.JWTKeys()) != 3 {
		t.Errorf("came back with %d keys, %v", len(back.JWTKeys()), err)
	}
	theirs, err := spiffebundle.Parse(gospiffe.RequireTrustDomainFromString("a.mesh"), b.Marshal())
	if err != nil || len(theirs.JWTAuthorities()) != 3 {
		t.Fatalf("go-spiffe reads %v, %v", theirs, err)
	}
	for _, k := range keys {
		if got, ok := theirs.FindJWTAuthority(k.ID); !ok || !got.(interface{ Equal(crypto.PublicKey) bool }).Equal(k.Key) {
			t.Errorf("go-spiffe reads another key under %s", k.ID)
		}
	}
	if back.Hash() != bare.Hash() {
		t.Error("a pin depends on JWT keys")
	}
	if err := bare.CheckUpdate(b); !errors.Is(err, trust.ErrRollback) {
		t.Errorf("JWT keys that appear under the same sequence: %v", err)
	}
	fewer, err := b.WithJWTKeys(keys[:2])
	if err != nil || !errors.Is(b.CheckUpdate(fewer), trust.ErrRollback) || b.CheckUpdate(fewer.WithSequence(8)) != nil {
		t.Errorf("JWT keys that go: %v", err)
	}
	swapped, err := b.WithJWTKeys([]trust.JWTKey{keys[0], keys[1], {ID: "rsa", Key: newKey(t).Public()}})
	if err != nil || !errors.Is(b.CheckUpdate(swapped), trust.ErrRollback) {
		t.Errorf("another key under the same kid and sequence: %v", err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	many := make([]trust.JWTKey, trust.MaxJWTKeys+1)
	for i := range many {
		many[i] = trust.JWTKey{ID: fmt.Sprint(i), Key: keys[0].Key}
	}
	for name, bad := range map[string][]trust.JWTKey{
		"no kid": {{Key: keys[0].Key}}, "a kid twice": {keys[0], keys[0]}, "Ed25519": {{ID: "x", Key: ed.Public()}}, "nothing": {{ID: "x"}}, "too many": many,
	} {
		if _, err := bare.WithJWTKeys(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
