// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/federation"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, c := range []struct {
		in string
		ok bool
	}{
		{"us-east", true}, {"a", true}, {"1", true}, {long, true},
		{"", false}, {long + "a", false}, {"US-east", false}, {"-a", false}, {"a-", false}, {"a.b", false}, {"a_b", false}, {"é", false},
		{"a\x00", false}, {"local", false}, {"any", false}, {"all", false}, {"clusterset", false},
	} {
		got, err := federation.ParseClusterName(c.in)
		if (err == nil) != c.ok || (c.ok && got.String() != c.in) {
			t.Errorf("ParseClusterName(%q) = %q, %v", c.in, got, err)
		}
	}
	if _, err := federation.ParseFederationName("local"); err == nil {
		t.Error("federation name local was accepted: it would swallow clusterset.local")
	}
	for in, ok := range map[string]bool{"shop/checkout": true, "shop": false, "shop/": false, "/checkout": false, "a/b/c": false, "Shop/x": false, "": false} {
		s, err := federation.ParseServiceName(in)
		if (err == nil) != ok || (ok && s.String() != in) {
			t.Errorf("ParseServiceName(%q) = %v, %v", in, s, err)
		}
	}
	for in, ok := range map[string]bool{"": true, "eu-west-1": true, "eu/a": true, "/a": false, "eu/": false, "eu/a/b": false, "e u": false} {
		l, err := federation.ParseLocality(in)
		if (err == nil) != ok || (ok && l.String() != in) {
			t.Errorf("ParseLocality(%q) = %v, %v", in, l, err)
		}
	}
}

func TestNamesAsText(t *testing.T) {
	type all struct {
		C federation.ClusterName
		F federation.FederationName
		P federation.PortName
		S federation.ServiceName
		Z federation.ServiceName
		M map[federation.ClusterName]int
	}
	in := all{"us-east", "acme", "http", federation.ServiceName{Namespace: "shop", Name: "checkout"}, federation.ServiceName{}, map[federation.ClusterName]int{"eu-west": 1}}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"C":"us-east","F":"acme","P":"http","S":"shop/checkout","Z":"","M":{"eu-west":1}}`
	if string(b) != want {
		t.Errorf("marshalled %s, want %s", b, want)
	}
	var out all
	if err := json.Unmarshal(b, &out); err != nil || out.S != in.S || out.M["eu-west"] != 1 {
		t.Errorf("unmarshalled %+v, %v", out, err)
	}
	for _, bad := range []string{`{"C":"U"}`, `{"F":"a.b"}`, `{"P":""","S":"x"}`, `{"S":"x"}`, `{"M":{"U":1}}`} {
		if err := json.Unmarshal([]byte(bad), &out); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestSNI(t *testing.T) {
	s := federation.ServiceName{Namespace: "shop", Name: "checkout"}
	const want = "http.checkout.shop.svc.us-east.acme"
	if got := federation.SNI("http", s, "us-east", "acme"); got != want {
		t.Fatalf("SNI = %q", got)
	}
	p, gs, c, f, err := federation.ParseSNI(want)
	if err != nil || p != "http" || gs != s || c != "us-east" || f != "acme" {
		t.Errorf("ParseSNI = %v %v %v %v %v", p, gs, c, f, err)
	}
	for _, bad := range []string{
		"", want + ".", strings.ToUpper(want), "checkout.shop.svc.us-east.acme", "x." + want, "http.checkout.shop.pod.us-east.acme",
		"http.checkout.shop.svc.local.acme", "http.checkout.shop.svc.us-east.local", "*.checkout.shop.svc.us-east.acme",
		"http..shop.svc.us-east.acme", "http.checkout.shop.svc.us-east.acme\x00", strings.Repeat("a.", 200),
	} {
		if _, _, _, _, err := federation.ParseSNI(bad); err == nil {
			t.Errorf("ParseSNI(%q) was accepted", bad)
		}
	}
}

func TestParseHost(t *testing.T) {
	s := federation.ServiceName{Namespace: "shop", Name: "checkout"}
	for _, c := range []struct {
		host   string
		pinned federation.ClusterName
		ok     bool
	}{
		{"checkout.shop", "", true},
		{"checkout.shop:8080", "", true},
		{"Checkout.SHOP.", "", true},
		{"checkout.shop.svc", "", true},
		{federation.ClusterSetHost(s), "", true},
		{federation.ClusterSetHost(s) + ".:80", "", true},
		{federation.PinnedHost(s, "eu-west", "acme"), "eu-west", true},
		{federation.PinnedHost(s, "eu-west", "other"), "", false},
		{"checkout.shop.svc.cluster.local", "", false},
		{"checkout.shop.svc.clusterset.acme", "", false},
		{"checkout", "", false}, {"", "", false}, {":80", "", false}, {"[::1]:80", "", false}, {"10.0.0.1", "", false}, {"a.b:c:d", "", false},
		{"checkout.shop..", "", false}, {"checkout.shop.svc.eu-west.acme.extra", "", false}, {"a_b.shop", "", false},
	} {
		got, pinned, ok := federation.ParseHost(c.host, "acme")
		if ok != c.ok || pinned != c.pinned || (ok && got != s) {
			t.Errorf("ParseHost(%q) = %v %q %v", c.host, got, pinned, ok)
		}
	}
	if _, pinned, ok := federation.ParseHost("checkout.shop.svc.eu-west.other", ""); !ok || pinned != "eu-west" {
		t.Error("without a federation any is accepted")
	}
}

func FuzzParseSNI(f *testing.F) {
	f.Add("http.checkout.shop.svc.us-east.acme")
	f.Add("a.b.c.svc.d.e")
	f.Fuzz(func(t *testing.T, in string) {
		p, s, c, fed, err := federation.ParseSNI(in)
		if err == nil && federation.SNI(p, s, c, fed) != in {
			t.Errorf("%q is not what it parses to", in)
		}
		if s, pinned, ok := federation.ParseHost(in, ""); ok && (s.IsZero() || pinned == federation.OwnCluster) {
			t.Errorf("host %q parses to %v %q", in, s, pinned)
		}
	})
}

func TestReasons(t *testing.T) {
	if n := len(federation.Reasons()); n != 31 {
		t.Errorf("%d reasons, the design lists 31", n)
	}
	for _, r := range federation.Reasons() {
		if got, err := federation.ParseReason(r.String()); err != nil || got != r {
			t.Errorf("%q: %v", r, err)
		}
	}
	if federation.Reason("because").Valid() {
		t.Error("an unknown word is a reason")
	}
	for r, want := range map[federation.Reason]string{
		federation.BelowMinHealthy: "BelowMinHealthy", federation.LocalOK: "LocalOK", federation.Drained: "Drained",
	} {
		if got := r.CamelCase(); got != want {
			t.Errorf("%s in camel case is %q, want %q", r, got, want)
		}
	}
}
