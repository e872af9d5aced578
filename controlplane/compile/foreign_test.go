// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestForeign: following a trust domain brings its bundle to the proxies and lets nobody in.
func TestForeign(t *testing.T) {
	const partner = "spiffe://partner.example/billing/reader"
	base := func() compile.Input {
		in := shop(t)
		in.Self.Federation = "acme"
		in.Objects.Federations = []*api.Federation{{
			ObjectMeta: metav1.ObjectMeta{Name: "acme", Generation: 3}, Spec: api.FederationSpec{TrustDomains: []api.TrustDomain{{Name: "partner.example"}}},
		}}
		in.Foreign = []compile.Foreign{{TrustDomain: trustDomain(t, "partner.example"), Bundle: []byte("{}"), BundleSeq: 7}}
		return in
	}
	rules := func(in compile.Input, rules ...api.AccessRule) (*controlpb.Access, string) {
		in.Objects.AccessPolicies = []*api.AccessPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
			Spec:       api.AccessPolicySpec{TargetRefs: []api.TargetRef{{Kind: "Service", Name: "web"}}, Rules: rules},
		}}
		out := compile.Compile(in)
		return get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web").Inbound[0].Access, condition(out, api.Ref{Kind: api.KindAccessPolicy, Namespace: "shop", Name: "p"}, "Accepted")
	}

	out := compile.Compile(base())
	b := get[*controlpb.Bundle](t, out, controlpb.TypeBundle, "partner.example")
	if b.Sequence != 7 || b.Cluster != "" {
		t.Errorf("bundle %v", b)
	}
	if got := condition(out, api.Ref{Kind: api.KindFederation, Name: "acme"}, "Accepted"); !strings.HasPrefix(got, "True Valid") {
		t.Error(got)
	}
	for _, p := range get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web").Inbound {
		if slices.Contains(p.Access.GetDefaultTrustDomains(), "partner.example") || len(p.Access.GetRules()) > 0 {
			t.Errorf("without a policy: %v", p.Access)
		}
	}

	a, said := rules(base(), api.AccessRule{From: []api.AccessFrom{{SPIFFEIDs: []string{partner}}}})
	if len(a.Rules) != 1 || !slices.Equal(a.Rules[0].SpiffeIds, []string{partner}) || len(a.Rules[0].TrustDomains) != 0 || !strings.HasPrefix(said, "True Valid") || strings.Contains(said, "partner") {
		t.Errorf("named exactly: %v, %s", a, said)
	}
	// A rule for anybody is for those the port is open to, and no foreign trust domain is among them.
	if a, _ = rules(base(), api.AccessRule{}); len(a.Rules) != 1 || slices.Contains(a.Rules[0].TrustDomains, "partner.example") || len(a.Rules[0].TrustDomains) == 0 {
		t.Errorf("anybody: %v", a)
	}
	in := base()
	in.Foreign = nil
	if a, said = rules(in, api.AccessRule{From: []api.AccessFrom{{SPIFFEIDs: []string{partner}}}}); len(a.Rules) != 0 || !a.HasPolicy || !strings.Contains(said, "partner.example") {
		t.Errorf("not followed: %v, %s", a, said)
	}
	// A member's identities stay within what is exported to it, however they are named.
	if a, _ = rules(base(), api.AccessRule{From: []api.AccessFrom{{SPIFFEIDs: []string{"spiffe://eu-west.acme/ns/shop/sa/web"}}}}); len(a.Rules) != 0 {
		t.Errorf("a member's identity without an export: %v", a)
	}
	for name, f := range map[string]api.AccessFrom{
		"beside clusters":  {SPIFFEIDs: []string{partner}, Clusters: []string{"eu-west"}},
		"beside accounts":  {SPIFFEIDs: []string{partner}, ServiceAccounts: []string{"shop/web"}},
		"a pattern":        {SPIFFEIDs: []string{"spiffe://partner.example/*"}},
		"a trust domain":   {SPIFFEIDs: []string{"spiffe://partner.example"}},
		"upper case":       {SPIFFEIDs: []string{"spiffe://Partner.example/x"}},
		"nobody after all": {},
	} {
		if a, said := rules(base(), api.AccessRule{From: []api.AccessFrom{f}}); len(a.Rules) != 0 || !strings.HasPrefix(said, "False Invalid") {
			t.Errorf("%s: %v, %s", name, a, said)
		}
	}

	// A member's trust domain, and the own one, come from the federation alone.
	in = base()
	member := in.Peers[0].TrustDomain
	in.Foreign = []compile.Foreign{{TrustDomain: member, Bundle: []byte(`{"evil":1}`)}, {TrustDomain: in.Self.TrustDomain, Bundle: []byte(`{"evil":1}`)}, {Invalid: "partner.example: no scheme"}}
	out = compile.Compile(in)
	for name, m := range out.Resources[controlpb.TypeBundle] {
		if strings.Contains(string(m.(*controlpb.Bundle).Jwks), "evil") {
			t.Errorf("%s was replaced", name)
		}
	}
	got := condition(out, api.Ref{Kind: api.KindFederation, Name: "acme"}, "Accepted")
	for _, want := range []string{"False Invalid", member.String(), in.Self.TrustDomain.String(), "no scheme"} {
		if !strings.Contains(got, want) {
			t.Errorf("condition %q lacks %s", got, want)
		}
	}
}

func trustDomain(t *testing.T, s string) spiffeid.TrustDomain {
	t.Helper()
	v, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
