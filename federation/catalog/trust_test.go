// SPDX-License-Identifier: Apache-2.0

package catalog_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func id(t testing.TB, text string) spiffeid.ID {
	t.Helper()
	v, err := spiffeid.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestTrustEntriesTravel: what an origin says of its bundle, of the consumer's and of its own withdrawn identities arrives, changes
// and ends, and is there after a restart of the reader.
func TestTrustEntriesTravel(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	b := bundles(t, eu)
	dir := storeDir(t)
	s := openStore(t, dir, catalog.StoreConfig{})
	p := newPeer(t, eu, time.Now)
	bundle, err := catalog.BundleEntry(eu.ca.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	seen, err := catalog.SeenEntry(catalog.Seen{Sequence: 7, Hash: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	before := time.UnixMilli(1_700_000_000_123).UTC()
	entries, left := catalog.DenialEntries(euWest, []catalog.Denial{
		{ID: id(t, "spiffe://eu-west.acme/ns/shop/sa/b"), IssuedBefore: before}, {ID: id(t, "spiffe://eu-west.acme/strait/gateway/g")},
		{ID: id(t, "spiffe://us-east.acme/ns/shop/sa/b")},
		{ID: id(t, "spiffe://eu-west.acme/"+strings.Repeat("x", 300))},
	})
	if left != 2 || len(entries) != 2 {
		t.Fatalf("%d entries, %d left out", len(entries), left)
	}
	entries[catalog.BundleKey], entries[catalog.SeenKey] = bundle, seen
	p.publish(entries)
	if _, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), b); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		v := s.View(euWest)
		if v.Bundle == nil || !v.Bundle.Equal(eu.ca.Bundle()) || v.Seen == nil || *v.Seen != (catalog.Seen{Sequence: 7, Hash: [32]byte{1}}) {
			t.Errorf("bundle %v, seen %v", v.Bundle, v.Seen)
		}
		want := []catalog.Denial{{ID: id(t, "spiffe://eu-west.acme/ns/shop/sa/b"), IssuedBefore: before}, {ID: id(t, "spiffe://eu-west.acme/strait/gateway/g")}}
		if !slices.Equal(v.Denied, want) {
			t.Errorf("denied %v, want %v", v.Denied, want)
		}
		s = openStore(t, dir, catalog.StoreConfig{})
	}
	have, seq := s.Have(euWest)
	p.publish(map[string][]byte{catalog.BundleKey: bundle})
	if _, err := s.Apply(euWest, p.origin.Update(usEast, have, seq), b); err != nil {
		t.Fatal(err)
	}
	if v := s.View(euWest); v.Bundle == nil || v.Seen != nil || v.Denied != nil {
		t.Errorf("after the delta: %+v", v)
	}
}

// TestForgedTrustEntriesRefuseTheHead: a member speaks for its own trust domain alone, and in one form.
func TestForgedTrustEntriesRefuseTheHead(t *testing.T) {
	eu, us := newAuthority(t, euWest, nil), newAuthority(t, usEast, nil)
	b := bundles(t, eu)
	jwks := eu.ca.Bundle().Marshal()
	deny := func(text string, before int64) []byte {
		return encode(&controlpb.DeniedIdentity{SpiffeId: text, IssuedBeforeMs: before})
	}
	foreign, err := trust.ParseBundle(usEast, us.ca.Bundle().Marshal())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, key string
		body      []byte
	}{
		{"no bundle", "bundle", []byte{0xff}},
		{"empty bundle", "bundle", nil},
		{"bundle without keys", "bundle", encode(&controlpb.TrustBundle{Jwks: []byte(`{"spiffe_sequence":1}`), Sequence: 1})},
		{"bundle that trusts nothing", "bundle", encode(&controlpb.TrustBundle{Jwks: []byte(`{"keys":[],"spiffe_sequence":1}`), Sequence: 1})},
		{"another sequence beside it", "bundle", encode(&controlpb.TrustBundle{Jwks: jwks, Sequence: 2})},
		{"bundle without sequence", "bundle", encode(&controlpb.TrustBundle{Jwks: eu.ca.Bundle().WithSequence(0).Marshal()})},
		{"bundle of more than an entry", "bundle", encode(&controlpb.TrustBundle{Jwks: append(jwks, []byte(strings.Repeat(" ", 64<<10))...), Sequence: 1})},
		{"a second bundle", "bundle/us-east.acme", encode(&controlpb.TrustBundle{Jwks: foreign.Marshal(), Sequence: 1})},
		{"no acknowledgement", "seen", []byte{0xff}},
		{"acknowledgement of nothing", "seen", encode(&controlpb.BundleSeen{Sha256: make([]byte, 32)})},
		{"acknowledgement without hash", "seen", encode(&controlpb.BundleSeen{Sequence: 1, Sha256: make([]byte, 31)})},
		{"a second acknowledgement", "seen/us-east.acme", encode(&controlpb.BundleSeen{Sequence: 1, Sha256: make([]byte, 32)})},
		{"no denial", "deny/ns/shop/sa/a", []byte{0xff}},
		{"denial of our workload", "deny/ns/shop/sa/a", deny("spiffe://us-east.acme/ns/shop/sa/a", 0)},
		{"denial of our gateway", "deny/strait/gateway/g", deny("spiffe://us-east.acme/strait/gateway/g", 0)},
		{"denial of a third member's workload", "deny/ns/shop/sa/a", deny("spiffe://ap-south.acme/ns/shop/sa/a", 0)},
		{"denial of a domain below", "deny/ns/shop/sa/a", deny("spiffe://x.eu-west.acme/ns/shop/sa/a", 0)},
		{"another identity's key", "deny/ns/shop/sa/b", deny("spiffe://eu-west.acme/ns/shop/sa/a", 0)},
		{"upper case", "deny/ns/shop/sa/a", deny("spiffe://EU-west.acme/ns/shop/sa/a", 0)},
		{"denial of the trust domain", "deny/", deny("spiffe://eu-west.acme", 0)},
		{"negative time", "deny/ns/shop/sa/a", deny("spiffe://eu-west.acme/ns/shop/sa/a", -1)},
		{"time without end", "deny/ns/shop/sa/a", deny("spiffe://eu-west.acme/ns/shop/sa/a", 1<<62)},
	} {
		s := openStore(t, storeDir(t), catalog.StoreConfig{})
		// signed by hand: an honest origin does not publish what is of no known kind
		entries := []*controlpb.CatalogEntry{{Key: "svc/shop/good", Version: 1, Body: service("shop", "good", 1)}, {Key: c.key, Version: 1, Body: c.body}}
		var fe *catalog.ForeignError
		if _, err := s.Apply(euWest, signed(t, eu, entries), b); !errors.As(err, &fe) || fe.Key != c.key {
			t.Errorf("%s: %v", c.name, err)
		}
		if s.View(euWest) != nil {
			t.Errorf("%s: a part of it was believed", c.name)
		}
	}
}

// signed is a snapshot of those entries as eu's signer signs it for us-east, whatever they are.
func signed(t testing.TB, a *authority, entries []*controlpb.CatalogEntry) *controlpb.CatalogUpdate {
	t.Helper()
	slices.SortFunc(entries, func(x, y *controlpb.CatalogEntry) int { return strings.Compare(x.GetKey(), y.GetKey()) })
	h := catalog.Head{
		TrustDomain: a.signer.ID.TrustDomain(), Consumer: usEast, Epoch: 1, Seq: 1, Hash: catalog.EntriesHash(entries), Count: len(entries),
		IssuedAt: time.Now(), TTL: time.Minute,
	}
	sh, err := catalog.Sign(h, a.signer)
	if err != nil {
		t.Fatal(err)
	}
	return &controlpb.CatalogUpdate{Head: sh, Snapshot: true, Entries: entries}
}

func TestDenialsAreBounded(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	var many []catalog.Denial
	now := time.Now()
	for i := range catalog.MaxDenials + 5 {
		many = append(many, catalog.Denial{ID: id(t, fmt.Sprintf("spiffe://eu-west.acme/ns/shop/sa/w%d", i)), At: now.Add(time.Duration(i) * time.Second)})
	}
	entries, left := catalog.DenialEntries(euWest, many)
	if left != 5 || len(entries) != catalog.MaxDenials {
		t.Fatalf("%d entries, %d left out", len(entries), left)
	}
	if entries["deny/ns/shop/sa/w0"] != nil || entries["deny/ns/shop/sa/w1004"] == nil {
		t.Error("the oldest were not the ones that were left out")
	}
	p := newPeer(t, eu, time.Now)
	p.publish(entries)
	s := openStore(t, storeDir(t), catalog.StoreConfig{})
	if _, err := s.Apply(euWest, p.origin.Update(usEast, 0, 0), bundles(t, eu)); err != nil {
		t.Errorf("at the bound: %v", err)
	}
	one := encode(&controlpb.DeniedIdentity{SpiffeId: "spiffe://eu-west.acme/ns/shop/sa/w0"})
	entries["deny/ns/shop/sa/w0"] = one
	var q *catalog.QuotaError
	if err := p.origin.Set(usEast, entries); !errors.As(err, &q) || q.Quota != "denials" {
		t.Errorf("an origin offers more: %v", err)
	}
	var list []*controlpb.CatalogEntry
	for k, body := range entries {
		list = append(list, &controlpb.CatalogEntry{Key: k, Version: 1, Body: body})
	}
	fresh := openStore(t, storeDir(t), catalog.StoreConfig{})
	if _, err := fresh.Apply(euWest, signed(t, eu, list), bundles(t, eu)); !errors.As(err, &q) || q.Quota != "denials" {
		t.Errorf("a reader takes more: %v", err)
	}
}

// TestLargeBundleIsRefusedAtTheOrigin: its operator reads why, and no consumer sees a catalog that it would have to refuse.
func TestLargeBundleIsRefusedAtTheOrigin(t *testing.T) {
	eu := newAuthority(t, euWest, nil)
	var keys []trust.JWTKey
	for i := range trust.MaxJWTKeys {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, trust.JWTKey{ID: fmt.Sprintf("%03d%s", i, strings.Repeat("k", 3000)), Key: k.Public()})
	}
	b, err := eu.ca.Bundle().WithJWTKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.BundleEntry(b); err == nil || !strings.Contains(err.Error(), "at most 65536") {
		t.Errorf("a bundle of %d bytes: %v", len(b.Marshal()), err)
	}
	if _, err := catalog.BundleEntry(eu.ca.Bundle().WithSequence(0)); err == nil {
		t.Error("a bundle without sequence could go back unseen")
	}
}
