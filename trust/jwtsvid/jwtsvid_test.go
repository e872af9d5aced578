// SPDX-License-Identifier: Apache-2.0

package jwtsvid_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	upstreamid "github.com/spiffe/go-spiffe/v2/spiffeid"
	upstream "github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/jwtsvid"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	audience = "spiffe://eu-west.acme.test/ns/shop/sa/checkout"
	subject  = "spiffe://us-east.acme.test/ns/shop/sa/web"
)

var now = time.Now().Truncate(time.Second)

// keys are made once: RSA keys are slow to make.
var keys = sync.OnceValue(func() (k struct {
	east, other, p384, p521, west *ecdsa.PrivateKey
	rsa                           *rsa.PrivateKey
}) {
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			panic(err)
		}
		return key
	}
	k.east, k.other, k.west, k.p384, k.p521 = ec(elliptic.P256()), ec(elliptic.P256()), ec(elliptic.P256()), ec(elliptic.P384()), ec(elliptic.P521())
	var err error
	if k.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		panic(err)
	}
	return k
})

func bundle(t testing.TB, td string, list ...trust.JWTKey) *trust.Bundle {
	t.Helper()
	name, err := spiffeid.ParseTrustDomain(td)
	if err != nil {
		t.Fatal(err)
	}
	b, err := trust.NewBundle(name, nil, 1)
	if err == nil {
		b, err = b.WithJWTKeys(list)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bundles are those of two trust domains: the first has a key of each kind.
func bundles(t testing.TB) *trust.Bundles {
	t.Helper()
	k := keys()
	out, err := trust.NewBundles(
		bundle(t, "us-east.acme.test", trust.JWTKey{ID: "e1", Key: k.east.Public()}, trust.JWTKey{ID: "e2", Key: k.other.Public()},
			trust.JWTKey{ID: "p384", Key: k.p384.Public()}, trust.JWTKey{ID: "p521", Key: k.p521.Public()}, trust.JWTKey{ID: "rsa", Key: k.rsa.Public()}),
		bundle(t, "eu-west.acme.test", trust.JWTKey{ID: "w1", Key: k.west.Public()}),
	)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

type m = map[string]any

func encode(v any) string {
	switch x := v.(type) {
	case string:
		return base64.RawURLEncoding.EncodeToString([]byte(x))
	case []byte:
		return base64.RawURLEncoding.EncodeToString(x)
	}
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return base64.RawURLEncoding.EncodeToString(data)
}

// raw signs what is given, whatever it is.
func raw(alg string, key any, head, body string) string {
	signed := head + "." + body
	var sig []byte
	h := crypto.SHA256
	switch alg[2:] {
	case "384":
		h = crypto.SHA384
	case "512":
		h = crypto.SHA512
	}
	d := h.New()
	d.Write([]byte(signed))
	digest := d.Sum(nil)
	var err error
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, e := ecdsa.Sign(rand.Reader, k, digest)
		n := (k.Params().BitSize + 7) / 8
		sig, err = append(r.FillBytes(make([]byte, n)), s.FillBytes(make([]byte, n))...), e
	case *rsa.PrivateKey:
		if strings.HasPrefix(alg, "PS") {
			sig, err = rsa.SignPSS(rand.Reader, k, h, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(rand.Reader, k, h, digest)
		}
	case []byte:
		mac := hmac.New(sha256.New, k)
		if alg == "HS512" {
			mac = hmac.New(sha512.New, k)
		}
		mac.Write([]byte(signed))
		sig = mac.Sum(nil)
	}
	if err != nil {
		panic(err)
	}
	return signed + "." + encode(sig)
}

func head(alg, kid string) m { return m{"alg": alg, "kid": kid, "typ": "JWT"} }

func claims() m {
	return m{"sub": subject, "aud": []string{audience}, "exp": now.Add(5 * time.Minute).Unix(), "iat": now.Unix()}
}

func with(base m, name string, v any) m {
	out := m{}
	for k, x := range base {
		out[k] = x
	}
	if out[name] = v; v == nil {
		delete(out, name)
	}
	return out
}

func good(h, c m) string { return raw("ES256", keys().east, encode(h), encode(c)) }

func TestVerify(t *testing.T) {
	k := keys()
	for name, token := range map[string]string{
		"ES256":            good(head("ES256", "e1"), claims()),
		"second key":       raw("ES256", k.other, encode(head("ES256", "e2")), encode(claims())),
		"ES384":            raw("ES384", k.p384, encode(head("ES384", "p384")), encode(claims())),
		"ES512":            raw("ES512", k.p521, encode(head("ES512", "p521")), encode(claims())),
		"RS256":            raw("RS256", k.rsa, encode(head("RS256", "rsa")), encode(claims())),
		"RS512":            raw("RS512", k.rsa, encode(head("RS512", "rsa")), encode(claims())),
		"PS384":            raw("PS384", k.rsa, encode(head("PS384", "rsa")), encode(claims())),
		"no typ":           good(with(head("ES256", "e1"), "typ", nil), claims()),
		"typ JOSE":         good(with(head("ES256", "e1"), "typ", "JOSE"), claims()),
		"no iat":           good(head("ES256", "e1"), with(claims(), "iat", nil)),
		"aud as one text":  good(head("ES256", "e1"), with(claims(), "aud", audience)),
		"several aud":      good(head("ES256", "e1"), with(claims(), "aud", []string{"x", audience})),
		"expired 59 s ago": good(head("ES256", "e1"), with(claims(), "exp", now.Add(-59*time.Second).Unix())),
		"iat in 59 s":      good(head("ES256", "e1"), with(claims(), "iat", now.Add(59*time.Second).Unix())),
		"other claims":     good(head("ES256", "e1"), with(claims(), "team", m{"name": "a", "list": []int{1, 2}})),
	} {
		c, err := jwtsvid.Verify(token, audience, bundles(t), now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.ID.String() != subject || !slices.Contains(c.Audience, audience) {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// TestRefused is SECURITY.md T11: nothing of it is accepted.
func TestRefused(t *testing.T) {
	k := keys()
	spki, err := x509.MarshalPKIXPublicKey(k.east.Public())
	if err != nil {
		t.Fatal(err)
	}
	point, err := k.east.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	h, c := head("ES256", "e1"), claims()
	ok := good(h, c)
	parts := strings.Split(ok, ".")
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		t.Fatal(err)
	}
	flip := bytes.Clone(signature)
	flip[7] ^= 1
	der, err := ecdsa.SignASN1(rand.Reader, k.east, func() []byte { s := sha256.Sum256([]byte(parts[0] + "." + parts[1])); return s[:] }())
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: k.other.Public(), KeyID: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	deep := strings.Repeat("[", 4000) + strings.Repeat("]", 4000)
	jws, err := json.Marshal(m{"protected": parts[0], "payload": parts[1], "signature": parts[2]})
	if err != nil {
		t.Fatal(err)
	}
	by := func(key any, h, c m) string { return raw("ES256", key, encode(h), encode(c)) }
	sub := func(s any) string { return good(h, with(c, "sub", s)) }
	corpus := map[string]string{
		"empty":                             "",
		"dots":                              "..",
		"two parts":                         parts[0] + "." + parts[1],
		"four parts":                        ok + ".x",
		"five parts":                        ok + ".x.y",
		"JWS in JSON":                       string(jws),
		"alg none, no signature":            encode(m{"alg": "none", "kid": "e1"}) + "." + parts[1] + ".",
		"alg None":                          encode(m{"alg": "None", "kid": "e1"}) + "." + parts[1] + ".",
		"alg none, old signature":           encode(m{"alg": "none", "kid": "e1"}) + "." + parts[1] + "." + parts[2],
		"alg missing":                       good(with(h, "alg", nil), c),
		"alg empty":                         good(with(h, "alg", ""), c),
		"alg a number":                      good(with(h, "alg", 1), c),
		"alg lower case":                    good(with(h, "alg", "es256"), c),
		"alg ES256K":                        good(with(h, "alg", "ES256K"), c),
		"alg EdDSA":                         good(with(h, "alg", "EdDSA"), c),
		"HS256 with the public key (SPKI)":  raw("HS256", spki, encode(head("HS256", "e1")), parts[1]),
		"HS256 with the public key (point)": raw("HS256", point, encode(head("HS256", "e1")), parts[1]),
		"HS256 with an empty key":           raw("HS256", []byte{}, encode(head("HS256", "e1")), parts[1]),
		"HS512":                             raw("HS512", spki, encode(head("HS512", "e1")), parts[1]),
		"ES384 over a P-256 key":            raw("ES384", k.east, encode(head("ES384", "e1")), parts[1]),
		"ES256 over a P-384 key":            raw("ES256", k.p384, encode(head("ES256", "p384")), parts[1]),
		"RS256 over a P-256 key":            raw("RS256", k.rsa, encode(head("RS256", "e1")), parts[1]),
		"ES256 over an RSA key":             by(k.east, head("ES256", "rsa"), c),
		"PS256 signed as RS256":             raw("RS256", k.rsa, encode(head("PS256", "rsa")), parts[1]),
		"RS256 signed as PS256": func() string {
			return strings.Join([]string{encode(head("RS256", "rsa")), parts[1], strings.Split(raw("PS256", k.rsa, encode(head("RS256", "rsa")), parts[1]), ".")[2]}, ".")
		}(),
		"no kid":                            good(with(h, "kid", nil), c),
		"kid empty":                         good(with(h, "kid", ""), c),
		"kid unknown":                       good(with(h, "kid", "nobody"), c),
		"kid of another key":                good(with(h, "kid", "e2"), c),
		"kid a list":                        good(with(h, "kid", []string{"e1"}), c),
		"kid a path":                        good(with(h, "kid", "../e1"), c),
		"key of another trust domain":       by(k.west, head("ES256", "w1"), c),
		"other trust domain's key, our kid": by(k.west, h, c),
		"other trust domain's subject":      good(h, with(c, "sub", "spiffe://eu-west.acme.test/ns/shop/sa/web")),
		"unknown trust domain":              good(h, with(c, "sub", "spiffe://other.test/ns/shop/sa/web")),
		"signature flipped":                 parts[0] + "." + parts[1] + "." + encode(flip),
		"signature missing":                 parts[0] + "." + parts[1] + ".",
		"signature zero":                    parts[0] + "." + parts[1] + "." + encode(make([]byte, 64)),
		"signature short":                   parts[0] + "." + parts[1] + "." + encode(signature[:63]),
		"signature long":                    parts[0] + "." + parts[1] + "." + encode(append(bytes.Clone(signature), 0)),
		"signature in DER":                  parts[0] + "." + parts[1] + "." + encode(der),
		"signature's r plus n":              parts[0] + "." + parts[1] + "." + encode(append(new(big.Int).Mod(new(big.Int).Add(new(big.Int).SetBytes(signature[:32]), elliptic.P256().Params().N), new(big.Int).Lsh(big.NewInt(1), 256)).FillBytes(make([]byte, 32)), signature[32:]...)),
		"claims changed":                    parts[0] + "." + encode(with(c, "aud", []string{audience, "y"})) + "." + parts[2],
		"header changed":                    encode(with(h, "typ", "JOSE")) + "." + parts[1] + "." + parts[2],
		"padded base64":                     parts[0] + "=." + parts[1] + "." + parts[2],
		"line end in base64":                parts[0] + ".\n" + parts[1] + "." + parts[2],
		"standard base64":                   parts[0] + "." + parts[1] + "." + base64.StdEncoding.EncodeToString(append([]byte{0xff, 0xff}, signature[2:]...)),
		"space before":                      " " + ok,
		"line end after":                    ok + "\n",
		"Bearer":                            "Bearer " + ok,
		"crit":                              good(with(h, "crit", []string{"exp"}), c),
		"b64 false":                         good(with(h, "b64", false), c),
		"jku":                               good(with(h, "jku", "https://evil.test/jwks.json"), c),
		"jwk of the attacker":               by(k.other, with(h, "jwk", json.RawMessage(jwk)), c),
		"x5u":                               good(with(h, "x5u", "https://evil.test/x"), c),
		"x5c":                               good(with(h, "x5c", []string{"AA=="}), c),
		"zip":                               good(with(h, "zip", "DEF"), c),
		"typ at+jwt":                        good(with(h, "typ", "at+jwt"), c),
		"typ a number":                      good(with(h, "typ", 1), c),
		"nested: cty JWT":                   good(with(h, "cty", "JWT"), c),
		"nested: a token as claims":         raw("ES256", k.east, encode(h), encode(ok)),
		"JWE":                               encode(m{"alg": "RSA-OAEP", "enc": "A256GCM"}) + ".a.b.c.d",
		"header no JSON":                    raw("ES256", k.east, encode("x"), parts[1]),
		"header an array":                   raw("ES256", k.east, encode("[]"), parts[1]),
		"header null":                       raw("ES256", k.east, encode("null"), parts[1]),
		"alg twice":                         raw("ES256", k.east, encode(`{"alg":"ES256","kid":"e1","alg":"ES256"}`), parts[1]),
		"Alg beside alg":                    raw("ES256", k.east, encode(`{"alg":"ES256","kid":"e1","Alg":"none"}`), parts[1]),
		"claims no JSON":                    raw("ES256", k.east, encode(h), encode("x")),
		"claims an array":                   raw("ES256", k.east, encode(h), encode("[]")),
		"claims: more behind":               raw("ES256", k.east, encode(h), encode(string(mustJSON(c))+"{}")),
		"claims: sub twice":                 raw("ES256", k.east, encode(h), encode(`{"sub":"spiffe://us-east.acme.test/ns/shop/sa/admin",`+string(mustJSON(c))[1:])),
		"claims: no UTF-8":                  raw("ES256", k.east, encode(h), encode("{\"x\":\"\xff\","+string(mustJSON(c))[1:])),
		"claims nested 4,000 deep":          raw("ES256", k.east, encode(h), encode(`{"x":`+deep+`,`+string(mustJSON(c))[1:])),
		"sub missing":                       sub(nil),
		"sub empty":                         sub(""),
		"sub a number":                      sub(7),
		"sub no SPIFFE ID":                  sub("web"),
		"sub https":                         sub("https://us-east.acme.test/ns/shop/sa/web"),
		"sub upper case":                    sub("spiffe://US-EAST.acme.test/ns/shop/sa/web"),
		"sub with a query":                  sub(subject + "?x"),
		"sub with a dot segment":            sub("spiffe://us-east.acme.test/ns/shop/../web"),
		"sub of 2,049 bytes":                sub("spiffe://us-east.acme.test/" + strings.Repeat("a", 2049-27)),
		"aud missing":                       good(h, with(c, "aud", nil)),
		"aud empty":                         good(h, with(c, "aud", []string{})),
		"aud an empty text":                 good(h, with(c, "aud", "")),
		"aud another":                       good(h, with(c, "aud", "spiffe://eu-west.acme.test/ns/shop/sa/other")),
		"aud a prefix":                      good(h, with(c, "aud", audience[:len(audience)-1])),
		"aud longer":                        good(h, with(c, "aud", audience+"x")),
		"aud upper case":                    good(h, with(c, "aud", strings.ToUpper(audience))),
		"aud a wildcard":                    good(h, with(c, "aud", "*")),
		"aud an object":                     good(h, with(c, "aud", m{audience: true})),
		"aud with a number":                 good(h, with(c, "aud", []any{audience, 1})),
		"exp missing":                       good(h, with(c, "exp", nil)),
		"exp null":                          raw("ES256", k.east, encode(h), encode(strings.Replace(string(mustJSON(c)), fmt.Sprint(c["exp"]), "null", 1))),
		"exp a text":                        good(h, with(c, "exp", fmt.Sprint(now.Add(time.Hour).Unix()))),
		"exp 0":                             good(h, with(c, "exp", 0)),
		"exp negative":                      good(h, with(c, "exp", -1)),
		"exp 1e300":                         good(h, with(c, "exp", 1e300)),
		"expired by more than the leeway":   good(h, with(c, "exp", now.Add(-jwtsvid.Leeway-time.Second).Unix())),
		"nbf in two minutes":                good(h, with(c, "nbf", now.Add(2*time.Minute).Unix())),
		"nbf a text":                        good(h, with(c, "nbf", "0")),
		"iat in two minutes":                good(h, with(c, "iat", now.Add(2*time.Minute).Unix())),
		"17 KiB":                            good(h, with(c, "x", strings.Repeat("x", 17<<10))),
		"exactly one byte too long": func() string {
			s := good(h, with(c, "x", strings.Repeat("x", 11900)))
			return s + strings.Repeat("A", jwtsvid.MaxSize+1-len(s))
		}(),
		"1 MiB of dots": strings.Repeat(".", 1<<20),
	}
	if len(corpus) < 40 {
		t.Fatalf("%d cases; T11 asks for 40", len(corpus))
	}
	for name, token := range corpus {
		got, err := jwtsvid.Verify(token, audience, bundles(t), now)
		if err == nil {
			t.Errorf("%s: accepted as %s", name, got.ID)
			continue
		}
		if len(token) > 40 && strings.Contains(err.Error(), token[len(token)-30:]) || len(err.Error()) > 400 {
			t.Errorf("%s: the error repeats the token: %v", name, err)
		}
	}
	t.Logf("%d tokens, 0 accepted", len(corpus))
	if _, err := jwtsvid.Verify(ok, "", bundles(t), now); err == nil {
		t.Error("a token was accepted for no audience")
	}
	if _, err := jwtsvid.Verify(ok, audience, nil, now); err == nil {
		t.Error("a token was accepted without bundles")
	}
	if _, err := jwtsvid.Verify(ok, audience, bundles(t).Without(mustTD(t, "us-east.acme.test")), now); err == nil {
		t.Error("a token of a trust domain that was withdrawn was accepted")
	}
}

func mustTD(t testing.TB, s string) spiffeid.TrustDomain {
	t.Helper()
	td, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func mustJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// FuzzVerify never panics, and accepts nothing that go-spiffe refuses. Tokens are signed after they were changed, so that
// what is behind the signature is reached, too.
func FuzzVerify(f *testing.F) {
	f.Add(mustJSON(head("ES256", "e1")), mustJSON(claims()), []byte(nil))
	f.Add([]byte(`{"alg":"none"}`), mustJSON(claims()), []byte("x"))
	f.Add(mustJSON(head("ES256", "w1")), []byte(`{"sub":"spiffe://a/b","aud":"x","exp":1e9}`), []byte(nil))
	set := bundles(f)
	td := upstreamid.RequireTrustDomainFromString("us-east.acme.test")
	theirs := jwtbundle.New(td)
	for _, k := range set.Get(mustTD(f, td.Name())).JWTKeys() {
		if err := theirs.AddJWTAuthority(k.ID, k.Key); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, h, c, sig []byte) {
		token := encode(h) + "." + encode(c) + "." + encode(sig)
		if len(sig) == 0 {
			token = raw("ES256", keys().east, encode(h), encode(c))
		}
		got, err := jwtsvid.Verify(token, audience, set, time.Now())
		if err != nil {
			return
		}
		if got.ID.String() == "" || !slices.Contains(got.Audience, audience) {
			t.Fatalf("accepted as %+v", got)
		}
		if _, err := upstream.ParseAndValidate(token, jwtbundle.NewSet(theirs), []string{audience}); err != nil {
			t.Fatalf("accepted, and go-spiffe says %v", err)
		}
	})
}
