// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/strait-mesh/strait/trust"
)

// again certifies the key and the name of b by a as well: a sibling of b's certificate.
func (a *authority) again(b *authority, edits ...edit) *authority {
	tmpl := caTemplate("", edits)
	tmpl.RawSubject = b.cert.RawSubject
	return &authority{a.t, signed(a.t, tmpl, a.cert, b.key.Public(), a.key), b.key}
}

func roots(t testing.TB, td string, list ...*authority) *trust.Bundles {
	var certs []*x509.Certificate
	for _, a := range list {
		certs = append(certs, a.cert)
	}
	b, err := trust.NewBundle(domain(t, td), certs, 1)
	if err != nil {
		t.Fatal(err)
	}
	return set(t, b)
}

// TestSiblings: during the rotation of a root an issuer stands in the chain twice, certified by the new root and by the old one.
func TestSiblings(t *testing.T) {
	td := uri("spiffe://a.mesh")
	r0, r1, r2 := newRoot(t, "root", td), newRoot(t, "root", td), newRoot(t, "root", td) // as our CA names them
	foreign := newRoot(t, "root", uri("spiffe://b.mesh"))
	both, err := trust.NewBundles(roots(t, "a.mesh", r1, r2).Get(domain(t, "a.mesh")), foreign.bundle("b.mesh", 1))
	if err != nil {
		t.Fatal(err)
	}
	i2 := r2.issuer("issuer", pathLen(0), td)
	i1 := r1.again(i2, pathLen(0), td)
	other := r1.issuer("issuer", pathLen(0), td) // another key
	renamed := r1.again(&authority{t, r1.issuer("another issuer").cert, i2.key}, pathLen(0))
	ended, soon := life(t0.Add(-2*time.Hour), t0.Add(-time.Hour)), life(t0.Add(time.Hour), t0.Add(2*time.Hour))
	leafKey := newKey(t)
	leaf := signed(t, leafTemplate(web, nil), i2.cert, leafKey.Public(), i2.key)
	leafTwin := i2.again(&authority{t, leaf, leafKey}) // the leaf's subject and key, as a CA
	chain := func(list ...*authority) []*x509.Certificate {
		out := []*x509.Certificate{leaf}
		for _, a := range list {
			out = append(out, a.cert)
		}
		return out
	}
	m2 := r2.issuer("middle")
	m1 := r1.again(m2)
	low := m2.issuer("low")
	deep := func(list ...*authority) []*x509.Certificate {
		return append([]*x509.Certificate{low.leaf(web)}, chain(list...)[1:]...)
	}
	var lowFirst []*x509.Certificate
	{ // an issuer of which one certificate is below a middle CA and one below the root
		l := m1.issuer("low")
		lowFirst = []*x509.Certificate{l.leaf(web), r2.again(l).cert, l.cert, m1.cert}
	}
	forged := &authority{t, foreign.again(i2, td).cert, i2.key} // another trust domain's CA over the same name and key
	stolen := foreign.again(i2, pathLen(0), td)
	fakeLeaf := newRoot(t, "issuer", func(c *x509.Certificate) { c.SubjectKeyId = i2.cert.SubjectKeyId }) // name and key identifier borrowed

	for _, tt := range []struct {
		name    string
		chain   []*x509.Certificate
		bundles *trust.Bundles
		want    string
	}{
		{"knows the new root only", chain(i2, i1), roots(t, "a.mesh", r2), ""},
		{"knows the old root only", chain(i2, i1), roots(t, "a.mesh", r1), ""},
		{"knows both", chain(i2, i1), both, ""},
		{"knows both, old one first", chain(i1, i2), both, ""},
		{"three siblings, knows the last", chain(i2, i1, r0.again(i2)), roots(t, "a.mesh", r0), ""},
		{"roots sent along, oldest first", chain(i2, i1, r1, r2), roots(t, "a.mesh", r2), ""},
		{"roots sent along, knows the old one", chain(i2, i1, r1, r2), roots(t, "a.mesh", r1), ""},
		{"after retire, knows both", chain(i2), both, ""},
		{"the sibling that is not needed has expired", chain(i2, r1.again(i2, ended)), both, ""},
		{"the sibling that is not needed is not valid yet", chain(i2, r1.again(i2, soon)), both, ""},
		{"the first has expired, the second serves", chain(r2.again(i2, ended), i1), both, ""},
		{"the root of the first has expired", chain(i2, i1), roots(t, "a.mesh", expiredCopy(t, r2), r1), ""},
		{"the first may not sign this name, the second may", chain(r2.again(i2, permitted("b.mesh")), i1), both, ""},
		{"siblings in the middle, new root", deep(low, m2, m1), roots(t, "a.mesh", r2), ""},
		{"siblings in the middle, old root", deep(low, m2, m1), roots(t, "a.mesh", r1), ""},
		{"paths of different length, short", lowFirst, roots(t, "a.mesh", r2), ""},
		{"paths of different length, long", lowFirst, roots(t, "a.mesh", r1), ""},

		{"knows neither", chain(i2, i1), roots(t, "a.mesh", r0), "untrusted"},
		{"knows the trust domain without roots", chain(i2, i1), roots(t, "a.mesh"), "untrusted"},
		{"without the sibling that is needed", chain(i2), roots(t, "a.mesh", r1), "untrusted"},
		{"the sibling that is needed has expired", chain(i2, r1.again(i2, ended)), roots(t, "a.mesh", r1), "expired"},
		{"the sibling that is needed is not valid yet", chain(i2, r1.again(i2, soon)), roots(t, "a.mesh", r1), "not_yet_valid"},
		{"both have expired", chain(r2.again(i2, ended), r1.again(i2, ended)), both, "expired"},
		{"a sibling with another key", chain(i2, other), both, "untrusted"},
		{"a sibling with another key first", chain(other, i2), both, "untrusted"},
		{"a sibling with another subject", chain(i2, renamed), both, "untrusted"},
		{"a sibling with another trust domain's ID", chain(i2, foreign.again(i2, uri("spiffe://b.mesh"))), both, "bad_san"},
		{"a sibling that is no CA", chain(i2, r1.again(i2, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })), both, "bad_usage"},
		{"a sibling of the leaf", []*x509.Certificate{leaf, leafTwin.cert, i2.cert}, both, "untrusted"},
		{"siblings apart", deep(low, m2, i2, m1), both, "untrusted"},
		{"another trust domain's CA with the same names and key", chain(forged), both, "untrusted"},
		{"another trust domain's CA beside one that has expired", chain(r1.again(i2, ended), stolen), roots(t, "a.mesh", r1), "expired"},
		{"genuine siblings over a forged leaf", []*x509.Certificate{fakeLeaf.leaf(web), i2.cert, i1.cert}, both, "untrusted"},
	} {
		p, err := trust.Verify(tt.chain, tt.bundles, t0)
		if tt.want == "" {
			if err != nil || p.ID.String() != web || len(p.Chain) != len(tt.chain) || p.NotAfter.Before(t0) {
				t.Errorf("%s: %+v, %v", tt.name, p, err)
			}
			continue
		}
		var v *trust.VerifyError
		if !errors.As(err, &v) || v.Reason != tt.want || p != nil {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
	// What another trust domain's CA may sign beside a genuine certificate changes nothing: the genuine path is there.
	if _, err := trust.Verify(chain(i2, stolen), both, t0); err != nil {
		t.Errorf("a useless sibling: %v", err)
	}
}

// expiredCopy is the same root, name and key, with an end in the past.
func expiredCopy(t *testing.T, root *authority) *authority {
	tmpl := caTemplate("", []edit{life(t0.Add(-2*time.Hour), t0.Add(-time.Hour))})
	tmpl.RawSubject, tmpl.SubjectKeyId = root.cert.RawSubject, root.cert.SubjectKeyId
	return &authority{t, signed(t, tmpl, tmpl, root.key.Public(), root.key), root.key}
}

// TestSiblingEnds: each end is that of what is used, not of what is sent for others.
func TestSiblingEnds(t *testing.T) {
	r1, r2 := newRoot(t, "root", life(t0.Add(-time.Hour), t0.Add(10*time.Minute))), newRoot(t, "root")
	i2 := r2.issuer("issuer")
	i1 := r1.again(i2, life(t0.Add(-time.Hour), t0.Add(5*time.Minute)))
	id := i2.identity(web, t0.Add(30*time.Minute), i1)
	if !id.NotAfter.Equal(t0.Add(30 * time.Minute)) {
		t.Errorf("the identity ends at %v with a sibling of the old root", id.NotAfter)
	}
	for name, tt := range map[string]struct {
		know []*authority
		want time.Duration
	}{"new": {[]*authority{r2}, 30 * time.Minute}, "both": {[]*authority{r1, r2}, 30 * time.Minute}, "old": {[]*authority{r1}, 5 * time.Minute}} {
		p, err := trust.Verify(id.Chain, roots(t, "a.mesh", tt.know...), t0)
		if err != nil || !p.NotAfter.Equal(t0.Add(tt.want)) {
			t.Errorf("%s: %+v, %v; want the end after %v", name, p, err, tt.want)
		}
	}
	short := r2.issuer("issuer", life(t0.Add(-time.Hour), t0.Add(10*time.Minute)))
	for _, chain := range [][]*authority{nil, {r1.again(short, life(t0.Add(-time.Hour), t0.Add(5*time.Minute)))}} {
		if got := short.identity(web, t0.Add(30*time.Minute), chain...); !got.NotAfter.Equal(t0.Add(10 * time.Minute)) {
			t.Errorf("an identity below an issuer that ends first ends at %v, with %d siblings", got.NotAfter, len(chain))
		}
	}
	data, err := id.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	back, err := trust.ParseIdentityPEM(data)
	if err != nil || !slices.EqualFunc(back.Chain, id.Chain, (*x509.Certificate).Equal) || len(back.Chain) != 3 || !back.NotAfter.Equal(id.NotAfter) {
		t.Errorf("on disk it becomes %+v, %v", back, err)
	}
	// An hour later the old root and the sibling have ended: neither end's present identity is concerned.
	later := at(t0.Add(20 * time.Minute))
	a, b := trust.NewSource(trust.SourceConfig{Now: later}), trust.NewSource(trust.SourceConfig{Now: later})
	for _, s := range []*trust.Source{a, b} {
		s.SetIdentity(id)
		s.SetBundles(roots(t, "a.mesh", r1, r2))
	}
	o := trust.TLSOptions{Authorize: trust.AuthorizeAny()}
	ce, se, cs, _ := exchange(t, a.ClientTLS(o), b.ServerTLS(o))
	if ce != nil || se != nil || len(cs.PeerCertificates) != 3 {
		t.Fatalf("client %v, server %v, %d certificates", ce, se, len(cs.PeerCertificates))
	}
	if p, err := trust.PeerFromState(cs); err != nil || !p.NotAfter.Equal(t0.Add(30*time.Minute)) {
		t.Errorf("the connection ends at %+v, %v", p, err)
	}
}

// TestPinsThroughRotation: a token's pin lives through prepare and activate, and dies with the root that it names.
func TestPinsThroughRotation(t *testing.T) {
	id := "spiffe://a.mesh/strait/controlplane"
	r1, r2, r3 := newRoot(t, "root", life(t0.Add(-3*time.Hour), t0.Add(time.Hour))), newRoot(t, "root", life(t0.Add(-2*time.Hour), t0.Add(time.Hour))), newRoot(t, "root")
	i1 := r1.issuer("issuer")
	i2 := r2.issuer("issuer")
	pin := func(list ...*authority) [32]byte { return roots(t, "a.mesh", list...).Get(domain(t, "a.mesh")).Hash() }
	end := t0.Add(30 * time.Minute)
	steady, activated, retired := i1.identity(id, end), i2.identity(id, end, r1.again(i2)), i2.identity(id, end)
	options := trust.TLSOptions{Authorize: trust.AuthorizeID(parseID(t, id)), ALPN: []string{trust.ALPNJoin}}
	for _, tt := range []struct {
		name string
		id   *trust.Identity
		have []*authority // in no order
		pin  [32]byte
		want int // roots learned; 0: refused
	}{
		{"steady", steady, []*authority{r1}, pin(r1), 1},
		{"prepared, an old pin", steady, []*authority{r2, r1}, pin(r1), 1},
		{"prepared, a new pin", steady, []*authority{r1, r2}, pin(r1, r2), 2},
		{"prepared, a pin of the new root alone", steady, []*authority{r1, r2}, pin(r2), 0}, // nothing is issued by it yet
		{"activated, an old pin", activated, []*authority{r2, r1}, pin(r1), 1},
		{"activated, a pin of both", activated, []*authority{r2, r1}, pin(r1, r2), 2},
		{"activated, a pin of the new root", activated, []*authority{r2, r1}, pin(r2), 1},
		{"the next is prepared, a pin from the middle", activated, []*authority{r3, r2, r1}, pin(r2), 1},
		{"the next is prepared, a pin with a gap", activated, []*authority{r3, r2, r1}, pin(r1, r3), 0},
		{"retired, a pin of the new root", retired, []*authority{r2}, pin(r2), 1},
		{"retired, an old pin", retired, []*authority{r2}, pin(r1), 0},
		{"retired, a pin of both", retired, []*authority{r2}, pin(r1, r2), 0},
		{"a pin of the issuer", steady, []*authority{r1}, pin(i1), 1}, // whoever pins an issuer has it
	} {
		s := trust.NewSource(trust.SourceConfig{Now: at(t0)})
		s.SetIdentity(tt.id)
		s.SetBundles(roots(t, "a.mesh", tt.have...))
		server := s.ServerTLS(trust.TLSOptions{AcceptUnverifiedClient: true, SendRoots: true, ALPN: []string{trust.ALPNJoin}})
		var got trust.Pinned
		client := trust.PinnedClientTLS(tt.pin, s, nil, options, func(p trust.Pinned) { got = p })
		ce, _, _, _ := exchange(t, client, server)
		switch {
		case tt.want == 0 && (reason(ce) != "untrusted" || got.Bundle != nil):
			t.Errorf("%s: %v", tt.name, ce)
		case tt.want > 0 && (ce != nil || len(got.Bundle.Roots()) != tt.want || got.Bundle.Hash() != tt.pin):
			t.Errorf("%s: %v, %+v", tt.name, ce, got.Bundle)
		}
	}
}

// TestPinWork: a server that sends as much as it may costs the client a bounded number of hashes, and is refused.
func TestPinWork(t *testing.T) {
	r := newRoot(t, "root")
	s := trust.NewSource(trust.SourceConfig{Now: at(t0)})
	s.SetIdentity(r.identity(web, t0.Add(time.Hour)))
	s.SetBundles(set(t, r.bundle("a.mesh", 1)))
	o := trust.TLSOptions{AcceptUnverifiedClient: true, SendRoots: true, ALPN: []string{trust.ALPNJoin}}
	for n, want := range map[int]string{trust.MaxBundleRoots: "untrusted", trust.MaxBundleRoots + trust.MaxChainLength: "too_large"} {
		server := s.ServerTLS(o)
		server.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c := &tls.Certificate{Certificate: s.Identity().ChainDER(), PrivateKey: s.Identity().Key}
			for range n {
				c.Certificate = append(c.Certificate, r.cert.Raw)
			}
			return c, nil
		}
		client := trust.PinnedClientTLS([32]byte{1}, s, nil, trust.TLSOptions{Authorize: trust.AuthorizeAny(), ALPN: []string{trust.ALPNJoin}}, nil)
		if ce, _, _, _ := exchange(t, client, server); reason(ce) != want {
			t.Errorf("%d roots: %v, want %s", n, ce, want)
		}
	}
}

// TestSiblingsInterop: go-spiffe verifies a chain with a sibling under either root, as we do: it searches for a path among all that is sent.
func TestSiblingsInterop(t *testing.T) {
	now := time.Now()
	current := life(now.Add(-time.Hour), now.Add(24*time.Hour))
	r1, r2 := newRoot(t, "root", current), newRoot(t, "root", current)
	i2 := r2.issuer("issuer", current, pathLen(0))
	id := i2.identity(web, now.Add(time.Hour), r1.again(i2, current, pathLen(0)))
	td := gospiffe.RequireTrustDomainFromString("a.mesh")
	for name, root := range map[string]*authority{"old": r1, "new": r2} {
		if got, _, err := x509svid.Verify(id.Chain, x509bundle.FromX509Authorities(td, []*x509.Certificate{root.cert})); err != nil || got.String() != web {
			t.Errorf("under the %s root: %v, %v", name, got, err)
		}
	}
	if _, _, err := x509svid.Verify(id.Chain, x509bundle.FromX509Authorities(td, []*x509.Certificate{newRoot(t, "root", current).cert})); err == nil {
		t.Error("under a root of the same name")
	}
}

// TestSignatureBudget: class T10. Certificates that borrow the name and the key identifier of a root cost a signature check each, and no
// chain gets more than four: what is genuine behind three decoys is found, and behind four is not.
func TestSignatureBudget(t *testing.T) {
	real := newRoot(t, "root")
	issuer := real.issuer("issuer")
	leaf := issuer.leaf(web)
	for decoys, want := range map[int]string{0: "", 3: "", 4: "untrusted", 5: "untrusted"} {
		chain := []*x509.Certificate{leaf}
		for range decoys {
			fake := newRoot(t, "root", func(c *x509.Certificate) { c.SubjectKeyId = real.cert.SubjectKeyId })
			chain = append(chain, fake.again(issuer).cert)
		}
		bundles := roots(t, "a.mesh", real) // a bundle remembers issuers: each time a new one
		if _, err := trust.Verify(append(chain, issuer.cert), bundles, t0); reason(err) != want {
			t.Errorf("behind %d decoys: %v, want %q", decoys, err, want)
		}
		if _, err := trust.Verify([]*x509.Certificate{leaf, issuer.cert}, bundles, t0); err != nil {
			t.Errorf("without decoys: %v", err)
		}
		if _, err := trust.Verify(append(chain, issuer.cert), bundles, t0); decoys < 4 && err != nil {
			t.Errorf("behind %d decoys, once it is known: %v", decoys, err)
		}
	}
}
