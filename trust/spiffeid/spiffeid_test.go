// SPDX-License-Identifier: Apache-2.0

package spiffeid_test

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// longest is a valid ID of n bytes.
func longest(n int) string {
	const head = "spiffe://a.mesh/"
	return head + strings.Repeat("x", n-len(head))
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		ok       bool
	}{
		{"workload", "spiffe://us-east.acme/ns/shop/sa/checkout", true},
		{"upper case in path", "spiffe://a.mesh/Ns/X", true},
		{"underscore in host", "spiffe://a_b.mesh/x", true},
		{"an address is an opaque name", "spiffe://10.0.0.1/x", true},
		{"2,048 bytes", longest(2048), true},
		{"dots within a segment", "spiffe://a.mesh/a..b/.c", true},
		{"2,049 bytes", longest(2049), false},
		{"other scheme", "http://a/x", false},
		{"no trust domain", "spiffe:///x", false},
		{"no path, as a leaf", "spiffe://a.mesh", false},
		{"user", "spiffe://u@a.mesh/x", false},
		{"port", "spiffe://a.mesh:1/x", false},
		{"empty port", "spiffe://a.mesh:/x", false},
		{"upper-case host", "spiffe://A.mesh/x", false},
		{"escaped host", "spiffe://a%2emesh/x", false},
		{"escaped path", "spiffe://a.mesh/%78", false},
		{"empty segment", "spiffe://a.mesh//x", false},
		{"empty segment inside", "spiffe://a.mesh/x//y", false},
		{"trailing slash", "spiffe://a.mesh/x/", false},
		{"slash alone", "spiffe://a.mesh/", false},
		{"dot segment", "spiffe://a.mesh/./x", false},
		{"dot-dot segment", "spiffe://a.mesh/x/..", false},
		{"query", "spiffe://a.mesh/x?q", false},
		{"empty query", "spiffe://a.mesh/x?", false},
		{"fragment", "spiffe://a.mesh/x#f", false},
		{"empty fragment", "spiffe://a.mesh/x#", false},
		{"space", "spiffe://a.mesh/x y", false},
		{"leading space", " spiffe://a.mesh/x", false},
		{"trailing newline", "spiffe://a.mesh/x\n", false},
		{"NUL", "spiffe://a.mesh/x\x00", false},
		{"non-ASCII path", "spiffe://a.mesh/é", false},
		{"non-ASCII host", "spiffe://é.mesh/x", false},
		{"tilde", "spiffe://a.mesh/~x", false},
		{"IPv6 host", "spiffe://[::1]/x", false},
		{"upper-case scheme", "SPIFFE://a.mesh/x", false},
		{"backslash", `spiffe://a.mesh/x\y`, false},
		{"trust domain of 256 bytes", "spiffe://" + strings.Repeat("a", 256) + "/x", false},
		{"empty", "", false},
	} {
		id, err := spiffeid.Parse(tt.in)
		switch {
		case (err == nil) != tt.ok:
			t.Errorf("%s: Parse(%.60q) = %v, want ok %t", tt.name, tt.in, err, tt.ok)
		case err == nil && (id.String() != tt.in || id.URL().String() != tt.in):
			t.Errorf("%s: %q became %q (URL %q)", tt.name, tt.in, id, id.URL())
		case err != nil && !id.IsZero():
			t.Errorf("%s: a refused ID is not the zero value", tt.name)
		}
	}
}

func TestKinds(t *testing.T) {
	td, err := spiffeid.ParseTrustDomain("us-east.acme")
	if err != nil {
		t.Fatal(err)
	}
	web, err := spiffeid.Workload(td, "shop", "web")
	if err != nil || web.String() != "spiffe://us-east.acme/ns/shop/sa/web" {
		t.Fatalf("Workload = %s, %v", web, err)
	}
	if ns, sa, ok := web.Workload(); !ok || ns != "shop" || sa != "web" {
		t.Errorf("Workload() = %q, %q, %t", ns, sa, ok)
	}
	gw, err := spiffeid.Gateway(td, "gw-1")
	if name, ok := gw.Gateway(); err != nil || !ok || name != "gw-1" {
		t.Errorf("Gateway = %s, %v", gw, err)
	}
	op, err := spiffeid.Operator(td, "alice")
	if name, ok := op.Operator(); err != nil || !ok || name != "alice" {
		t.Errorf("Operator = %s, %v", op, err)
	}
	if cp := spiffeid.ControlPlane(td); !cp.IsControlPlane() || cp.IsCatalogSigner() || cp.TrustDomain() != td {
		t.Errorf("ControlPlane = %s", cp)
	}
	if cs := spiffeid.CatalogSigner(td); !cs.IsCatalogSigner() || cs.IsControlPlane() {
		t.Errorf("CatalogSigner = %s", cs)
	}
	if !spiffeid.ControlPlane(spiffeid.TrustDomain{}).IsZero() {
		t.Error("a control plane of no trust domain")
	}
	for _, bad := range []string{"", ".", "..", "a/b", "a b", "é", "../gateway/x"} {
		if id, err := spiffeid.Workload(td, bad, "web"); err == nil {
			t.Errorf("Workload with namespace %q is %s", bad, id)
		}
		if id, err := spiffeid.Workload(td, "shop", bad); err == nil {
			t.Errorf("Workload with service account %q is %s", bad, id)
		}
		if id, err := spiffeid.Gateway(td, bad); err == nil {
			t.Errorf("Gateway %q is %s", bad, id)
		}
		if id, err := spiffeid.Operator(td, bad); err == nil {
			t.Errorf("Operator %q is %s", bad, id)
		}
	}
	for _, text := range []string{"spiffe://a.mesh/ns/shop/sa/web/x", "spiffe://a.mesh/xns/shop/sa/web", "spiffe://a.mesh/strait/gateway/a/b",
		"spiffe://a.mesh/strait/gateway", "spiffe://a.mesh/strait/controlplane/x", "spiffe://a.mesh/strait/operatorx"} {
		id, err := spiffeid.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		_, _, workload := id.Workload()
		_, gateway := id.Gateway()
		_, operator := id.Operator()
		if workload || gateway || operator || id.IsControlPlane() || id.IsCatalogSigner() {
			t.Errorf("%s passes for one of our kinds", id)
		}
	}
}

func TestText(t *testing.T) {
	type doc struct {
		TD spiffeid.TrustDomain
		ID spiffeid.ID
	}
	id, err := spiffeid.Parse("spiffe://a.mesh/x")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []doc{{}, {id.TrustDomain(), id}} {
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got doc
		if err := json.Unmarshal(b, &got); err != nil || got != want {
			t.Errorf("%s became %v, %v", b, got, err)
		}
	}
	var got doc
	if err := json.Unmarshal([]byte(`{"ID":"spiffe://A/x"}`), &got); err == nil {
		t.Error("text unmarshalling accepts what Parse refuses")
	}
	if err := json.Unmarshal([]byte(`{"TD":"A"}`), &got); err == nil {
		t.Error("text unmarshalling accepts what ParseTrustDomain refuses")
	}
	u, err := url.Parse("spiffe://a.mesh/x")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := spiffeid.FromURL(u); err != nil || got != id {
		t.Errorf("FromURL = %s, %v", got, err)
	}
	if _, err := spiffeid.FromURL(nil); err == nil {
		t.Error("FromURL(nil) is an ID")
	}
}

// FuzzSPIFFEID: what parses is what was given, byte for byte, and taking it apart and together again changes nothing.
func FuzzSPIFFEID(f *testing.F) {
	for _, s := range []string{"spiffe://a.mesh/ns/shop/sa/web", "spiffe://10.0.0.1/x", "SPIFFE://a/x", "spiffe://a/%78", "spiffe://a//x", "spiffe://a/x#", "spiffe://a:1/x", "spiffe://a/../x", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := spiffeid.Parse(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Fatalf("%q became %q", s, id)
		}
		if again := "spiffe://" + id.TrustDomain().String() + id.Path(); again != s {
			t.Fatalf("%q became %q", s, again)
		}
		if td, err := spiffeid.ParseTrustDomain(id.TrustDomain().String()); err != nil || td != id.TrustDomain() {
			t.Fatalf("trust domain of %q: %v", s, err)
		}
		u, err := url.Parse(s)
		if err != nil {
			t.Fatalf("%q is an ID and no URL: %v", s, err)
		}
		if again, err := spiffeid.FromURL(u); err != nil || again != id {
			t.Fatalf("%q by way of a URL: %q, %v", s, again, err)
		}
	})
}
