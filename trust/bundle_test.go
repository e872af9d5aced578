// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/strait-mesh/strait/trust"
)

func TestParseBundleRows(t *testing.T) {
	a, b := newRoot(t, "root a", uri("spiffe://a.mesh")), newRoot(t, "root 2")
	foreign := newRoot(t, "root b", uri("spiffe://b.mesh"))
	path := newRoot(t, "root p", uri("spiffe://a.mesh/x"))
	x5c := func(c *x509.Certificate) string { return `"` + base64.StdEncoding.EncodeToString(c.Raw) + `"` }
	key := func(fields string, certs ...string) string {
		return `{"use":"x509-svid","kty":"EC"` + fields + `,"x5c":[` + strings.Join(certs, ",") + `]}`
	}
	keyA, keyB := key("", x5c(a.cert)), key("", x5c(b.cert))
	jwt := `{"use":"jwt-svid","kty":"EC","kid":"1","crv":"P-256","x":"AA","y":"AA"}`
	for _, tt := range []struct {
		name, doc string
		roots     int // -1: refused
		sequence  uint64
		refresh   time.Duration
	}{
		{"one root", `{"keys":[` + keyA + `],"spiffe_sequence":7,"spiffe_refresh_hint":300}`, 1, 7, 5 * time.Minute},
		{"two roots", `{"keys":[` + keyA + "," + keyB + `]}`, 2, 0, 0},
		{"a root twice", `{"keys":[` + keyA + "," + keyA + `]}`, 1, 0, 0},
		{"empty keys verify nothing", `{"keys":[]}`, 0, 0, 0},
		{"unknown fields", `{"keys":[` + key(`,"alg":"x","extra":{"a":[1]}`, x5c(a.cert)) + `],"other":true}`, 1, 0, 0},
		{"unknown kty", `{"keys":[{"use":"x509-svid","kty":"PQ","x5c":["!"]},` + keyA + `]}`, 1, 0, 0},
		{"unknown use", `{"keys":[{"use":"wit-svid","kty":"EC","kid":"x"},{"kty":"EC"},` + keyA + `]}`, 1, 0, 0},
		{"a JWT key is no root", `{"keys":[` + jwt + `]}`, 0, 0, 0},
		{"a JWT key with a certificate is no root", `{"keys":[` + strings.Replace(keyA, "x509-svid", "jwt-svid", 1) + `]}`, 0, 0, 0},
		{"only the first of an x5c counts", `{"keys":[` + key("", x5c(a.cert), x5c(b.cert)) + `]}`, 1, 0, 0},
		{"hint 0", `{"keys":[],"spiffe_refresh_hint":0}`, 0, 0, time.Minute},
		{"hint negative", `{"keys":[],"spiffe_refresh_hint":-5}`, 0, 0, time.Minute},
		{"hint 10^9", `{"keys":[],"spiffe_refresh_hint":1000000000}`, 0, 0, 24 * time.Hour},
		{"hint 1e300", `{"keys":[],"spiffe_refresh_hint":1e300}`, 0, 0, 24 * time.Hour},
		{"sequence 2^64-1", `{"keys":[],"spiffe_sequence":18446744073709551615}`, 0, 1<<64 - 1, 0},

		{"no keys", `{"spiffe_sequence":1}`, -1, 0, 0},
		{"keys null", `{"keys":null}`, -1, 0, 0},
		{"keys in another case", `{"Keys":[]}`, -1, 0, 0},
		{"keys twice", `{"keys":[` + keyA + `],"keys":[]}`, -1, 0, 0},
		{"keys no array", `{"keys":{}}`, -1, 0, 0},
		{"sequence a string", `{"keys":[],"spiffe_sequence" : "5"}`, -1, 0, 0},
		{"sequence negative", `{"keys":[],"spiffe_sequence":-1}`, -1, 0, 0},
		{"sequence fractional", `{"keys":[],"spiffe_sequence":1.5}`, -1, 0, 0},
		{"sequence too large", `{"keys":[],"spiffe_sequence":18446744073709551616}`, -1, 0, 0},
		{"sequence null", `{"keys":[],"spiffe_sequence":null}`, -1, 0, 0},
		{"sequence twice", `{"keys":[],"spiffe_sequence":9,"spiffe_sequence":1}`, -1, 0, 0},
		{"hint a string", `{"keys":[],"spiffe_refresh_hint":"300"}`, -1, 0, 0},
		{"kid on an X.509 key", `{"keys":[` + key(`,"kid":"1"`, x5c(a.cert)) + `]}`, -1, 0, 0},
		{"use twice", `{"keys":[` + key(`,"use":"jwt-svid"`, x5c(a.cert)) + `]}`, -1, 0, 0},
		{"use no string", `{"keys":[{"use":1,"kty":"EC"}]}`, -1, 0, 0},
		{"x5c empty", `{"keys":[` + key("") + `]}`, -1, 0, 0},
		{"x5c missing", `{"keys":[{"use":"x509-svid","kty":"EC"}]}`, -1, 0, 0},
		{"x5c no base64", `{"keys":[` + key("", `"!!"`) + `]}`, -1, 0, 0},
		{"x5c no certificate", `{"keys":[` + key("", `"AAAA"`) + `]}`, -1, 0, 0},
		{"root of another trust domain", `{"keys":[` + key("", x5c(foreign.cert)) + `]}`, -1, 0, 0},
		{"root whose ID has a path", `{"keys":[` + key("", x5c(path.cert)) + `]}`, -1, 0, 0},
		{"root that is a leaf", `{"keys":[` + key("", x5c(a.leaf(web))) + `]}`, -1, 0, 0},
		{"an array", `[]`, -1, 0, 0},
		{"nothing", ``, -1, 0, 0},
		{"cut short", `{"keys":[` + keyA, -1, 0, 0},
		{"something after it", `{"keys":[]}{"keys":[]}`, -1, 0, 0},
		{"too large", `{"keys":[]` + strings.Repeat(" ", trust.MaxBundleSize) + `}`, -1, 0, 0},
		{"too many", `{"keys":[` + strings.Repeat(keyA+",", 100) + keyB + `]}`, -1, 0, 0},
		{"very deep", `{"x":` + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + `,"keys":[]}`, -1, 0, 0},
	} {
		got, err := trust.ParseBundle(domain(t, "a.mesh"), []byte(tt.doc))
		switch {
		case tt.roots < 0 && err == nil:
			t.Errorf("%s: accepted", tt.name)
		case tt.roots < 0:
		case err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case len(got.Roots()) != tt.roots || got.Sequence() != tt.sequence || got.RefreshHint() != tt.refresh:
			t.Errorf("%s: %d roots, sequence %d, hint %v", tt.name, len(got.Roots()), got.Sequence(), got.RefreshHint())
		}
	}
	got, err := trust.ParseBundle(domain(t, "a.mesh"), []byte(`{"keys":[`+key("", x5c(a.cert), x5c(b.cert))+`]}`))
	if err != nil || !got.Roots()[0].Equal(a.cert) {
		t.Errorf("of two certificates not the first counts: %v", err)
	}
}

func TestBundleUpdate(t *testing.T) {
	a, b := newRoot(t, "a"), newRoot(t, "b")
	five := a.bundle("a.mesh", 5)
	other := b.bundle("a.mesh", 5)
	for _, tt := range []struct {
		name     string
		old, new *trust.Bundle
		ok, back bool
	}{
		{"first", nil, five, true, false},
		{"higher", five, b.bundle("a.mesh", 6), true, false},
		{"the same again", five, a.bundle("a.mesh", 5), true, false},
		{"lower", five, a.bundle("a.mesh", 4), false, true},
		{"same number, other roots", five, other, false, true},
		{"without sequences", a.bundle("a.mesh", 0), b.bundle("a.mesh", 0), true, false},
		{"of another trust domain", five, b.bundle("b.mesh", 9), false, false},
	} {
		err := tt.old.CheckUpdate(tt.new)
		if (err == nil) != tt.ok || errors.Is(err, trust.ErrRollback) != tt.back {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	both, err := five.WithRoots([]*x509.Certificate{a.cert, b.cert})
	if err != nil || both.Sequence() != 6 || len(both.Roots()) != 2 {
		t.Fatalf("WithRoots: %v", err)
	}
	swapped, err := trust.NewBundle(domain(t, "a.mesh"), []*x509.Certificate{b.cert, a.cert}, 0)
	if err != nil || swapped.Hash() != both.Hash() {
		t.Errorf("the hash depends on order or sequence: %v", err)
	}
	if both.Hash() == five.Hash() {
		t.Error("the hash does not depend on the roots")
	}
}

func TestBundles(t *testing.T) {
	a, b := newRoot(t, "a").bundle("a.mesh", 1), newRoot(t, "b").bundle("b.mesh", 1)
	again := newRoot(t, "c").bundle("a.mesh", 1)
	if _, err := trust.NewBundles(a, b, again); err == nil {
		t.Error("two bundles of one trust domain make a set")
	}
	if _, err := trust.NewBundles(a, nil); err == nil {
		t.Error("nil makes a set")
	}
	s := set(t, a)
	grown := s.With(b).With(again)
	if s.Get(b.TrustDomain()) != nil || s.Get(a.TrustDomain()) != a {
		t.Error("With changed the set it was called on")
	}
	if grown.Get(a.TrustDomain()) != again || len(grown.TrustDomains()) != 2 {
		t.Error("With did not replace")
	}
	if shrunk := grown.Without(b.TrustDomain()); shrunk.Get(b.TrustDomain()) != nil || grown.Get(b.TrustDomain()) != b {
		t.Error("Without")
	}
	var none *trust.Bundles
	if none.Get(a.TrustDomain()) != nil || len(none.TrustDomains()) != 0 || none.With(a).Get(a.TrustDomain()) != a {
		t.Error("nil is not the empty set")
	}
}

// TestBundleInterop: go-spiffe reads our documents and we read its, with every kind of key.
func TestBundleInterop(t *testing.T) {
	root := newRoot(t, "ec")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := caTemplate("rsa", nil)
	rsaRoot := signed(t, tmpl, tmpl, rsaKey.Public(), rsaKey)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl = caTemplate("ed", nil)
	edRoot := signed(t, tmpl, tmpl, edKey.Public(), edKey)
	roots := []*x509.Certificate{root.cert, rsaRoot, edRoot}
	ours, err := trust.NewBundle(domain(t, "a.mesh"), roots, 42)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := spiffebundle.Parse(gospiffe.RequireTrustDomainFromString("a.mesh"), ours.Marshal())
	if err != nil {
		t.Fatalf("go-spiffe refuses our document: %v\n%s", err, ours.Marshal())
	}
	if seq, _ := theirs.SequenceNumber(); seq != 42 || len(theirs.X509Authorities()) != 3 {
		t.Errorf("go-spiffe reads sequence %d and %d roots", seq, len(theirs.X509Authorities()))
	}
	for _, r := range roots {
		if !theirs.HasX509Authority(r) {
			t.Errorf("go-spiffe lacks %s", r.Subject)
		}
	}
	if err := theirs.AddJWTAuthority("jwt-1", root.key.Public()); err != nil {
		t.Fatal(err)
	}
	theirs.SetRefreshHint(10 * time.Minute)
	doc, err := theirs.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := trust.ParseBundle(domain(t, "a.mesh"), doc)
	if err != nil {
		t.Fatalf("we refuse go-spiffe's document: %v\n%s", err, doc)
	}
	if back.Hash() != ours.Hash() || back.Sequence() != 42 || back.RefreshHint() != 10*time.Minute {
		t.Errorf("came back with sequence %d, hint %v, %d roots", back.Sequence(), back.RefreshHint(), len(back.Roots()))
	}
	if again, err := trust.ParseBundle(domain(t, "a.mesh"), back.Marshal()); err != nil || again.RefreshHint() != back.RefreshHint() ||
		!slices.EqualFunc(again.Roots(), back.Roots(), (*x509.Certificate).Equal) {
		t.Errorf("our own document: %v", err)
	}
	empty, err := trust.NewBundle(domain(t, "a.mesh"), nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spiffebundle.Parse(gospiffe.RequireTrustDomainFromString("a.mesh"), empty.Marshal()); err != nil {
		t.Errorf("go-spiffe refuses the empty document: %v", err)
	}
}

// FuzzBundle: what parses can be rendered and parsed again to the same bundle.
func FuzzBundle(f *testing.F) {
	root := newRoot(f, "root")
	f.Add(root.bundle("a.mesh", 3).Marshal())
	f.Add([]byte(`{"keys":[],"spiffe_refresh_hint":1e9}`))
	f.Add([]byte(fmt.Sprintf(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["%s"]}]}`, base64.StdEncoding.EncodeToString(root.cert.Raw))))
	keyed, err := root.bundle("a.mesh", 4).WithJWTKeys([]trust.JWTKey{{ID: "k", Key: newKey(f).Public()}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(keyed.Marshal())
	td := domain(f, "a.mesh")
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := trust.ParseBundle(td, data)
		if err != nil {
			return
		}
		again, err := trust.ParseBundle(td, b.Marshal())
		if err != nil || !again.Equal(b) || again.Hash() != b.Hash() || again.RefreshHint() != b.RefreshHint() {
			t.Fatalf("%q does not come back: %v", data, err)
		}
	})
}
