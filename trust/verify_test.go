// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/lookalike"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const web = "spiffe://a.mesh/ns/shop/sa/web"

func sans(critical bool, uris ...string) edit {
	return func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{sanExtension(critical, uris...)} }
}

func usage(u x509.KeyUsage) edit { return func(c *x509.Certificate) { c.KeyUsage = u } }

// rawUsage replaces the key usage extension, which Go always writes as critical.
func rawUsage(critical bool, bits byte) edit {
	return func(c *x509.Certificate) {
		c.KeyUsage = 0
		value, _ := asn1.Marshal(asn1.BitString{Bytes: []byte{bits}, BitLength: 8})
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: critical, Value: value})
	}
}

func extended(u ...x509.ExtKeyUsage) edit { return func(c *x509.Certificate) { c.ExtKeyUsage = u } }

func life(from, to time.Time) edit {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
}

func pathLen(n int) edit {
	return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
}

func permitted(domains ...string) edit {
	return func(c *x509.Certificate) { c.PermittedURIDomains, c.PermittedDNSDomainsCritical = domains, true }
}

func excluded(domains ...string) edit {
	return func(c *x509.Certificate) { c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = domains, true }
}

func noSubject(c *x509.Certificate) { c.Subject = pkix.Name{} }

// TestVerifyRows has the rows of certificates that a verifier of X509-SVIDs must judge. Everything is signed by the right root
// unless the row says otherwise; want "" is accepted.
func TestVerifyRows(t *testing.T) {
	root := newRoot(t, "root a", uri("spiffe://a.mesh"))
	iss := root.issuer("issuer a", pathLen(0))
	other := newRoot(t, "root b", uri("spiffe://b.mesh"))
	bundles := set(t, root.bundle("a.mesh", 1), other.bundle("b.mesh", 1))

	one := func(a *authority, id string, edits ...edit) []*x509.Certificate {
		chain := []*x509.Certificate{a.leaf(id, edits...)}
		if a != root && a != other {
			chain = append(chain, a.cert)
		}
		return chain
	}
	below := func(edits ...edit) []*x509.Certificate { return one(root.issuer("special", edits...), web) }
	deep := func(n int) []*x509.Certificate {
		a, chain := root, []*x509.Certificate(nil)
		for range n {
			a = a.issuer("i" + number().String())
			chain = append([]*x509.Certificate{a.cert}, chain...)
		}
		return append([]*x509.Certificate{a.leaf(web)}, chain...)
	}
	rsaLeaf := func(bits int) []*x509.Certificate {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return []*x509.Certificate{signed(t, leafTemplate(web, nil), iss.cert, &key.PublicKey, iss.key), iss.cert}
	}
	ecLeaf := func(curve elliptic.Curve) []*x509.Certificate {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return []*x509.Certificate{signed(t, leafTemplate(web, nil), iss.cert, &key.PublicKey, iss.key), iss.cert}
	}
	hugeRSA := func() []*x509.Certificate { // nobody has its private half
		n := new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 8192), big.NewInt(1))
		return []*x509.Certificate{signed(t, leafTemplate(web, nil), iss.cert, &rsa.PublicKey{N: n, E: 65537}, iss.key), iss.cert}
	}
	large := func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: make([]byte, 65<<10)})
	}
	wide := root.issuer("wide")
	narrow := wide.issuer("narrow", pathLen(0))
	tooDeep := narrow.issuer("too deep")
	impostor := newRoot(t, "root a", uri("spiffe://a.mesh")) // same name, another key
	renamed := &authority{t, impostor.cert, impostor.key}

	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		want  string
	}{
		{"by the issuer", one(iss, web), ""},
		{"by the root itself", one(root, web), ""},
		{"with the root sent along", append(one(iss, web), root.cert), ""},
		{"EKU absent", one(iss, web, extended()), ""},
		{"critical SAN without subject", one(iss, "", noSubject, sans(true, web)), ""},
		{"2,048 bytes", one(iss, "spiffe://a.mesh/"+strings.Repeat("x", 2032)), ""},
		{"other kinds of SAN beside it", one(iss, "", uri(web), func(c *x509.Certificate) {
			c.DNSNames, c.IPAddresses, c.EmailAddresses = []string{"web.shop", "spiffe.b.mesh"}, []net.IP{{10, 0, 0, 1}}, []string{"a@b.mesh"}
		}), ""},
		{"issuer with the trust domain's own ID", below(uri("spiffe://a.mesh")), ""},
		{"constraint that is the name", below(permitted("a.mesh")), ""},
		{"eight certificates", deep(7), ""},
		{"RSA 2048", rsaLeaf(2048), ""},
		{"P-384", ecLeaf(elliptic.P384()), ""},
		{"P-521", ecLeaf(elliptic.P521()), ""},
		{"valid until this second", one(iss, web, life(t0.Add(-time.Hour), t0)), ""},
		{"valid from this second", one(iss, web, life(t0, t0.Add(time.Hour))), ""},

		{"nothing", nil, "no_certificate"},
		{"no URI", one(iss, ""), "bad_san"},
		{"DNS name alone", one(iss, "", func(c *x509.Certificate) { c.DNSNames = []string{"a.mesh"} }), "bad_san"},
		{"two URIs", one(iss, "", sans(false, web, "spiffe://a.mesh/x")), "bad_san"},
		{"two URIs, the same", one(iss, "", sans(false, web, web)), "bad_san"},
		{"two URIs, one no SPIFFE ID", one(iss, "", sans(false, web, "https://a.mesh/x")), "bad_san"},
		{"no path", one(iss, "spiffe://a.mesh"), "bad_id"},
		{"upper-case scheme", one(iss, "SPIFFE://a.mesh/x"), "bad_id"},
		{"upper-case host", one(iss, "spiffe://A.mesh/x"), "bad_id"},
		{"escape in path", one(iss, "spiffe://a.mesh/%78"), "bad_id"},
		{"empty fragment", one(iss, "spiffe://a.mesh/x#"), "bad_id"},
		{"empty query", one(iss, "spiffe://a.mesh/x?"), "bad_id"},
		{"port", one(iss, "spiffe://a.mesh:1/x"), "bad_id"},
		{"2,049 bytes", one(iss, "spiffe://a.mesh/"+strings.Repeat("x", 2033)), "bad_id"},
		{"https", one(iss, "https://a.mesh/x"), "bad_id"},
		{"CA leaf", one(iss, web, func(c *x509.Certificate) { c.IsCA = true }), "bad_usage"},
		{"keyCertSign", one(iss, web, usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign)), "bad_usage"},
		{"cRLSign", one(iss, web, usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCRLSign)), "bad_usage"},
		{"no digitalSignature", one(iss, web, usage(x509.KeyUsageKeyAgreement)), "bad_usage"},
		{"no key usage", one(iss, web, usage(0)), "bad_usage"},
		{"key usage not critical", one(iss, web, rawUsage(false, 0x80)), "bad_usage"},
		{"serverAuth alone", one(iss, web, extended(x509.ExtKeyUsageServerAuth)), "bad_usage"},
		{"clientAuth alone", one(iss, web, extended(x509.ExtKeyUsageClientAuth)), "bad_usage"},
		{"another EKU alone", one(iss, web, extended(x509.ExtKeyUsageCodeSigning)), "bad_usage"},
		{"any EKU alone", one(iss, web, extended(x509.ExtKeyUsageAny)), "bad_usage"},
		{"unknown EKU alone", one(iss, web, extended(), func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }), "bad_usage"},
		{"neither subject nor critical SAN", one(iss, "", noSubject, sans(false, web)), "bad_usage"},
		{"RSA 1024", rsaLeaf(1024), "bad_usage"},
		{"RSA of 8,193 bits", hugeRSA(), "bad_usage"},
		{"P-224", ecLeaf(elliptic.P224()), "bad_usage"},
		{"signing certificate as identity", []*x509.Certificate{root.issuer("x", uri(web)).cert}, "bad_usage"},
		{"issuer's ID with a path", below(uri("spiffe://a.mesh/x")), "bad_san"},
		{"issuer's ID of another trust domain", below(uri("spiffe://b.mesh")), "bad_san"},
		{"issuer without keyCertSign", below(usage(x509.KeyUsageDigitalSignature)), "bad_usage"},
		{"issuer without key usage", below(usage(0)), "bad_usage"},
		{"issuer that is a leaf", []*x509.Certificate{iss.leaf(web), iss.leaf("spiffe://a.mesh/y")}, "bad_san"},
		{"issuer that is no CA", below(func(c *x509.Certificate) { c.IsCA = false }), "bad_usage"},
		{"issuer has expired", below(life(t0.Add(-2*time.Hour), t0.Add(-time.Second))), "expired"},
		{"issuer is not valid yet", below(life(t0.Add(time.Second), t0.Add(time.Hour))), "not_yet_valid"},
		{"expired by a second", one(iss, web, life(t0.Add(-time.Hour), t0.Add(-time.Second))), "expired"},
		{"valid in a second", one(iss, web, life(t0.Add(time.Second), t0.Add(time.Hour))), "not_yet_valid"},
		{"unknown trust domain", one(iss, "spiffe://c.mesh/x"), "unknown_trust_domain"},
		{"another trust domain's CA", one(other, web), "untrusted"},
		{"chain through another trust domain's CA", one(other.issuer("issuer b"), web), "untrusted"},
		{"own ID, root of another", one(iss, "spiffe://b.mesh/x"), "untrusted"},
		{"another trust domain's CA under our root's name", one(renamed, web), "untrusted"},
		{"self-signed", []*x509.Certificate{signedBySelf(t, web)}, "untrusted"},
		{"the issuer is missing", one(iss, web)[:1], "untrusted"},
		{"out of order", []*x509.Certificate{narrow.leaf(web), wide.cert, narrow.cert}, "untrusted"},
		{"something unrelated between", []*x509.Certificate{iss.leaf(web), wide.cert, iss.cert}, "untrusted"},
		{"path length violated", []*x509.Certificate{tooDeep.leaf(web), tooDeep.cert, narrow.cert, wide.cert}, "untrusted"},
		{"name constraint violated", below(permitted("b.mesh")), "untrusted"},
		{"sub-domain of the constraint", below(permitted("mesh")), "untrusted"},
		{"constraint in another case", below(permitted("A.MESH")), "untrusted"},
		{"constraint with a leading dot", below(permitted(".mesh")), "untrusted"},
		{"excluded by name", below(excluded("a.mesh")), "untrusted"},
		{"excluded from above", below(excluded("mesh")), "untrusted"},
		{"nine certificates", deep(8), "too_large"},
		{"more than 64 KiB", one(iss, web, large), "too_large"},
	} {
		p, err := trust.Verify(tt.chain, bundles, t0)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			} else if p.NotAfter.After(tt.chain[0].NotAfter) {
				t.Errorf("%s: lasts until %s, after its leaf", tt.name, p.NotAfter)
			}
			continue
		}
		var v *trust.VerifyError
		if !errors.As(err, &v) || v.Reason != tt.want || p != nil {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
}

func signedBySelf(t *testing.T, id string) *x509.Certificate {
	key := newKey(t)
	tmpl := leafTemplate(id, nil)
	return signed(t, tmpl, tmpl, key.Public(), key)
}

// TestTrustDomainConfusion: class T2. A peer's CA signs IDs of others, and of every name that resembles its own or ours; none
// is accepted although both bundles are known.
func TestTrustDomainConfusion(t *testing.T) {
	us, peer := newRoot(t, "root"), newRoot(t, "root") // even with the same subject
	bundles := set(t, us.bundle("eu.acme", 1), peer.bundle("us.acme", 1), newRoot(t, "root").bundle("acme", 1))
	names := []string{"eu.acme", "acme", "EU.acme", "eu.ACME", "eu.acme.", ".eu.acme", "eu..acme", "x.eu.acme", "eu.acme.us.acme", "us.acme.eu.acme",
		"xeu.acme", "eu.acmex", "us.acme.", "US.acme", "x.us.acme", "eu-acme", "eu_acme", "xn--eu.acme", "xn--us-xka.acme", "e\u0075\u0301.acme", "eu.acme:443",
		"eu.acme@us.acme", "us.acme@eu.acme", "eu%2eacme", "%65u.acme", "eu.acme%00", "eu.acme\x00.us.acme", "us.acme\x00", "us.acme\x00.eu.acme", " eu.acme", "eu.acme ", "us.acme\t", "*.acme", "*", "", "[::1]", "us.acme\n"}
	n := 0
	for _, name := range names {
		for _, path := range []string{"/ns/shop/sa/web", "/strait/controlplane"} {
			n++
			id := "spiffe://" + name + path
			p, err := trust.Verify([]*x509.Certificate{lenient(t, peer, id)}, bundles, t0)
			if err == nil {
				t.Errorf("%q was accepted as %s", id, p.ID)
			}
		}
	}
	if n < 60 {
		t.Errorf("only %d names", n)
	}
	if _, err := trust.Verify([]*x509.Certificate{peer.leaf("spiffe://us.acme/ns/shop/sa/web")}, bundles, t0); err != nil {
		t.Errorf("the peer's own: %v", err)
	}
}

// lenient makes a leaf that Go's own parser might refuse: then there is nothing to verify, and an empty certificate stands for it.
func lenient(t *testing.T, a *authority, id string) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, leafTemplate(id, nil), a.cert, newKey(t).Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return &x509.Certificate{}
	}
	return c
}

func TestVerifyRootExpired(t *testing.T) {
	root := newRoot(t, "root", life(t0.Add(-2*time.Hour), t0.Add(-time.Hour)))
	_, err := trust.Verify([]*x509.Certificate{root.leaf(web)}, set(t, root.bundle("a.mesh", 1)), t0)
	var v *trust.VerifyError
	if !errors.As(err, &v) || v.Reason != "expired" {
		t.Errorf("%v, want expired", err)
	}
	if _, err := trust.Verify([]*x509.Certificate{root.leaf(web)}, nil, t0); !errors.As(err, &v) || v.Reason != "unknown_trust_domain" {
		t.Errorf("without bundles: %v", err)
	}
}

func TestAuthorize(t *testing.T) {
	a, b := parseID(t, web), parseID(t, "spiffe://a.mesh/ns/shop/sa/we")
	for _, tt := range []struct {
		name string
		f    trust.Authorize
		id   spiffeid.ID
		ok   bool
	}{
		{"listed", trust.AuthorizeID(b, a), a, true},
		{"a prefix is listed", trust.AuthorizeID(b), a, false},
		{"none listed", trust.AuthorizeID(), a, false},
		{"the zero ID", trust.AuthorizeID(spiffeid.ID{}), spiffeid.ID{}, false},
		{"trust domain", trust.AuthorizeTrustDomain(a.TrustDomain()), a, true},
		{"other trust domain", trust.AuthorizeTrustDomain(domain(t, "mesh")), a, false},
		{"no trust domain", trust.AuthorizeTrustDomain(spiffeid.TrustDomain{}), spiffeid.ID{}, false},
		{"control plane", trust.AuthorizeControlPlane(a.TrustDomain()), spiffeid.ControlPlane(a.TrustDomain()), true},
		{"control plane of another", trust.AuthorizeControlPlane(domain(t, "b.mesh")), spiffeid.ControlPlane(a.TrustDomain()), false},
		{"control plane of none", trust.AuthorizeControlPlane(spiffeid.TrustDomain{}), spiffeid.ID{}, false},
		{"any", trust.AuthorizeAny(), a, true},
	} {
		if err := tt.f(tt.id); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// FuzzCertificate: no chain that Go can parse makes Verify panic, or pass without a bundle that signed it. What passes claims an
// ID that comes back as its own text, of the trust domain whose root stands above it.
func FuzzCertificate(f *testing.F) {
	root, peer := newRoot(f, "root a"), newRoot(f, "root b")
	issuer := root.issuer("issuer")
	strangers := set(f, newRoot(f, "root a").bundle("a.mesh", 1), newRoot(f, "root b").bundle("b.mesh", 1))
	known := set(f, root.bundle("a.mesh", 1), peer.bundle("b.mesh", 1))
	add := func(chain ...*x509.Certificate) {
		for len(chain) < 3 {
			chain = append(chain, &x509.Certificate{})
		}
		f.Add(chain[0].Raw, chain[1].Raw, chain[2].Raw)
	}
	add(root.leaf(web), root.cert)
	add(root.leaf(""), root.leaf(web))
	add(issuer.leaf(web), issuer.cert, peer.again(issuer).cert)
	add(peer.leaf(web))
	add(peer.leaf("spiffe://b.mesh/x"))
	hostile, err := lookalike.NewPeer(domain(f, "b.mesh"), t0)
	if err != nil {
		f.Fatal(err)
	}
	leaves, err := hostile.Leaves(lookalike.Target{ID: parseID(f, web), Chain: []*x509.Certificate{issuer.cert, root.cert}, Third: domain(f, "c.mesh")})
	if err != nil {
		f.Fatal(err)
	}
	for _, l := range leaves {
		if der := append(l.Certificate.Certificate, nil, nil); len(der[0]) < 4<<10 {
			f.Add(der[0], der[1], der[2])
		}
	}
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		var chain []*x509.Certificate
		for _, der := range [][]byte{a, b, c} {
			if cert, err := x509.ParseCertificate(der); err == nil {
				chain = append(chain, cert)
			}
		}
		if p, err := trust.Verify(chain, strangers, t0); err == nil {
			t.Fatalf("accepted %s", p.ID)
		}
		p, err := trust.Verify(chain, known, t0)
		if err != nil {
			var v *trust.VerifyError
			if !errors.As(err, &v) || v.Reason == "" {
				t.Fatalf("an error without a reason: %v", err)
			}
			return
		}
		if id, err := spiffeid.Parse(p.ID.String()); err != nil || id != p.ID {
			t.Fatalf("accepted %q", p.ID)
		}
		above := map[string]*authority{"a.mesh": root, "b.mesh": peer}[p.ID.TrustDomain().String()]
		if above == nil || chain[0].CheckSignatureFrom(above.cert) != nil && chain[1].CheckSignatureFrom(above.cert) != nil &&
			(len(chain) < 3 || chain[2].CheckSignatureFrom(above.cert) != nil) {
			t.Fatalf("accepted %s, which no root of its trust domain has signed", p.ID)
		}
	})
}
