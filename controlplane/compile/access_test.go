// SPDX-License-Identifier: Apache-2.0

package compile_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
)

func accessPolicy(rules ...api.AccessRule) *api.AccessPolicy {
	return &api.AccessPolicy{ObjectMeta: meta("shop", "p"), Spec: api.AccessPolicySpec{TargetRefs: []api.TargetRef{{Kind: api.KindService, Name: "web"}}, Rules: rules}}
}

func accessOf(t *testing.T, out compile.Output, port string) *controlpb.Access {
	t.Helper()
	for _, p := range get[*controlpb.Self](t, out, controlpb.TypeSelf, "shop/web").Inbound {
		if p.PortName == port {
			return p.Access
		}
	}
	t.Fatalf("no port %s", port)
	return nil
}

var policyRef = api.Ref{Kind: api.KindAccessPolicy, Namespace: "shop", Name: "p"}

func TestAccess(t *testing.T) {
	cart := api.AccessFrom{ServiceAccounts: []string{"shop/cart"}}
	for _, c := range []struct {
		name     string
		policy   *api.AccessPolicy
		exported bool
		http     string // access of port http
		said     string
	}{
		{"own account", accessPolicy(api.AccessRule{Name: "r", From: []api.AccessFrom{cart}}), true, `has_policy: true default_trust_domains: "eu-west.acme" default_trust_domains: "us-east.acme"
			rules: {name: "r" policy: "shop/p" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart"}`, "True Valid: "},
		{"accounts of clusters", accessPolicy(api.AccessRule{From: []api.AccessFrom{{ServiceAccounts: []string{"shop/cart", "shop/pay"}, Clusters: []string{"eu-west", "us-east"}}}}), true,
			`has_policy: true default_trust_domains: "eu-west.acme" default_trust_domains: "us-east.acme" rules: {name: "rule-1" policy: "shop/p"
			spiffe_ids: "spiffe://eu-west.acme/ns/shop/sa/cart" spiffe_ids: "spiffe://eu-west.acme/ns/shop/sa/pay"
			spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/pay"}`, "True Valid: "},
		{"a whole cluster", accessPolicy(api.AccessRule{From: []api.AccessFrom{{Clusters: []string{"eu-west"}}}}), true,
			`has_policy: true default_trust_domains: "eu-west.acme" default_trust_domains: "us-east.acme" rules: {name: "rule-1" policy: "shop/p" trust_domains: "eu-west.acme"}`, "True Valid: "},
		{"a cluster it is not exported to", accessPolicy(api.AccessRule{From: []api.AccessFrom{{Clusters: []string{"eu-west"}}}}), false,
			`has_policy: true default_trust_domains: "us-east.acme"`, "True Valid: "},
		{"a cluster nobody knows", accessPolicy(api.AccessRule{From: []api.AccessFrom{{Clusters: []string{"ap-south"}}}}), true,
			`has_policy: true default_trust_domains: "eu-west.acme" default_trust_domains: "us-east.acme"`, "True Valid: not members"},
		{"anybody", accessPolicy(api.AccessRule{}), false, `has_policy: true default_trust_domains: "us-east.acme" rules: {name: "rule-1" policy: "shop/p" trust_domains: "us-east.acme"}`, "True Valid: "},
		{"no rule", accessPolicy(), true, `has_policy: true default_trust_domains: "eu-west.acme" default_trust_domains: "us-east.acme"`, "True Valid: "},
		{"deny first", accessPolicy(api.AccessRule{From: []api.AccessFrom{cart}}, api.AccessRule{Action: api.ActionDeny, From: []api.AccessFrom{{Clusters: []string{"eu-west"}}}}), false,
			`has_policy: true default_trust_domains: "us-east.acme" rules: {name: "rule-2" policy: "shop/p" deny: true trust_domains: "eu-west.acme"}
			rules: {name: "rule-1" policy: "shop/p" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart"}`, "True Valid: "},
		{"methods and paths", accessPolicy(api.AccessRule{From: []api.AccessFrom{cart}, To: []api.AccessTo{{Methods: []string{"POST", "GET"}, Paths: []string{"/v1/*"}}, {Ports: []string{"db"}}}}), false,
			`has_policy: true default_trust_domains: "us-east.acme" rules: {name: "rule-1" policy: "shop/p" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart" methods: "GET" methods: "POST" paths: "/v1/*"}`, "True Valid: "},
		{"other target", func() *api.AccessPolicy { p := accessPolicy(); p.Spec.TargetRefs[0].Name = "cart"; return p }(), false, `default_trust_domains: "us-east.acme"`, "True Valid: no such service yet: cart"},
		{"other namespace", func() *api.AccessPolicy { p := accessPolicy(); p.Namespace = "evil"; return p }(), false, `default_trust_domains: "us-east.acme"`, "none"},
		{"audit", func() *api.AccessPolicy {
			p := accessPolicy(api.AccessRule{From: []api.AccessFrom{cart}})
			p.Spec.Mode = api.ModeAudit
			return p
		}(), false,
			`has_policy: true audit: true default_trust_domains: "us-east.acme" rules: {name: "rule-1" policy: "shop/p" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart"}`, "True Valid: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := shop(t)
			if c.exported {
				export(&in, "shop", "web", []string{"eu-west"})
			}
			in.Objects.AccessPolicies = []*api.AccessPolicy{c.policy}
			out := compile.Compile(in)
			want(t, accessOf(t, out, "http"), c.http)
			if got := condition(out, policyRef, "Accepted"); !strings.HasPrefix(got, c.said) {
				t.Errorf("condition %q, want %q", got, c.said)
			}
		})
	}
}

// TestAccessNotUnderstood: P7. What is not fully understood is not applied: the last good version stays, and without one nobody calls.
func TestAccessNotUnderstood(t *testing.T) {
	good := accessPolicy(api.AccessRule{Name: "good", From: []api.AccessFrom{{ServiceAccounts: []string{"shop/cart"}}}})
	for name, change := range map[string]func(*api.AccessPolicy){
		"action": func(p *api.AccessPolicy) { p.Spec.Rules[0].Action = "permit" },
		"mode":   func(p *api.AccessPolicy) { p.Spec.Mode = "dry" },
		"target kind": func(p *api.AccessPolicy) {
			p.Spec.TargetRefs = append(p.Spec.TargetRefs, api.TargetRef{Kind: "Route", Name: "x"})
		},
		"target group":    func(p *api.AccessPolicy) { p.Spec.TargetRefs[0].Group = "apps" },
		"account":         func(p *api.AccessPolicy) { p.Spec.Rules[0].From[0].ServiceAccounts = []string{"cart"} },
		"account path":    func(p *api.AccessPolicy) { p.Spec.Rules[0].From[0].ServiceAccounts = []string{"shop/a/b"} },
		"account pattern": func(p *api.AccessPolicy) { p.Spec.Rules[0].From[0].ServiceAccounts = []string{"shop/*"} },
		"nobody":          func(p *api.AccessPolicy) { p.Spec.Rules[0].From[0] = api.AccessFrom{} },
		"cluster":         func(p *api.AccessPolicy) { p.Spec.Rules[0].From[0].Clusters = []string{"*"} },
		"method":          func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Methods: []string{"post"}}} },
		"nothing":         func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{}} },
		"path":            func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Paths: []string{"v1"}}} },
		"path star":       func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Paths: []string{"/v*/x"}}} },
		"path dots":       func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Paths: []string{"/a/../b"}}} },
		"path escape":     func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Paths: []string{"/a%2fb"}}} },
		"path slashes":    func(p *api.AccessPolicy) { p.Spec.Rules[0].To = []api.AccessTo{{Paths: []string{"//a"}}} },
		"deny by method on TCP": func(p *api.AccessPolicy) {
			p.Spec.Rules[0].Action, p.Spec.Rules[0].To = api.ActionDeny, []api.AccessTo{{Methods: []string{"POST"}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bad := accessPolicy(api.AccessRule{Name: "bad", From: []api.AccessFrom{{ServiceAccounts: []string{"shop/cart"}}}})
			bad.Generation = 2
			change(bad)
			in := shop(t)
			in.Objects.AccessPolicies = []*api.AccessPolicy{bad}
			out := compile.Compile(in)
			want(t, accessOf(t, out, "http"), `has_policy: true default_trust_domains: "us-east.acme"`)
			if got := condition(out, policyRef, "Accepted"); !strings.HasPrefix(got, "False Invalid") || !strings.HasSuffix(got, "nobody may call its targets") && name != "mode" {
				t.Error(got)
			}
			if len(out.LastGood.Access) != 0 {
				t.Error("it counts as good")
			}

			in.Objects.AccessPolicies = []*api.AccessPolicy{good}
			in.LastGood = compile.Compile(in).LastGood
			in.Objects.AccessPolicies = []*api.AccessPolicy{bad}
			for range 2 { // it stays good
				out = compile.Compile(in)
				want(t, accessOf(t, out, "http"), `has_policy: true default_trust_domains: "us-east.acme"
					rules: {name: "good" policy: "shop/p" spiffe_ids: "spiffe://us-east.acme/ns/shop/sa/cart"}`)
				if got := condition(out, policyRef, "Accepted"); !strings.HasSuffix(got, "generation 1 stays in force") {
					t.Error(got)
				}
				in.LastGood = out.LastGood
			}
			in.Objects.AccessPolicies = nil
			if out = compile.Compile(in); len(out.LastGood.Access) != 0 || accessOf(t, out, "http").HasPolicy {
				t.Error("a policy that was deleted is kept")
			}
		})
	}
}

func TestAccessUnreadable(t *testing.T) {
	in := shop(t)
	in.Objects.Unreadable = []api.Unreadable{{Ref: policyRef, Generation: 4, Error: "unknown field", Targets: []api.TargetRef{{Kind: api.KindService, Name: "web"}}}}
	out := compile.Compile(in)
	want(t, accessOf(t, out, "http"), `has_policy: true default_trust_domains: "us-east.acme"`)
	if got := condition(out, policyRef, "Accepted"); got != "False Invalid: unknown field" {
		t.Error(got)
	}
	good := shop(t)
	good.Objects.AccessPolicies = []*api.AccessPolicy{accessPolicy(api.AccessRule{})}
	in.LastGood = compile.Compile(good).LastGood
	if a := accessOf(t, compile.Compile(in), "http"); len(a.Rules) != 1 {
		t.Errorf("the last good version did not stay: %v", a)
	}
}

// TestAuditBesideEnforcement: an audit never opens what another policy closes.
func TestAuditBesideEnforcement(t *testing.T) {
	in := shop(t)
	audit := accessPolicy(api.AccessRule{})
	audit.Name, audit.Spec.Mode = "a", api.ModeAudit
	in.Objects.AccessPolicies = []*api.AccessPolicy{audit, accessPolicy()}
	if a := accessOf(t, compile.Compile(in), "http"); a.Audit || !a.HasPolicy || len(a.Rules) != 0 {
		t.Errorf("%v", a)
	}
}

// TestNoRuleMeansAnyone: a rule without an identity would mean every authenticated caller; none comes out, whatever goes in.
func TestNoRuleMeansAnyone(t *testing.T) {
	in := shop(t)
	froms := [][]api.AccessFrom{nil, {{Clusters: []string{"gone"}}}, {{Clusters: []string{"eu-west"}}}, {{ServiceAccounts: []string{"a/b"}, Clusters: []string{"gone"}}},
		{{Clusters: []string{"gone"}}, {ServiceAccounts: []string{"a/b"}}}}
	for _, from := range froms {
		for _, action := range []string{"", api.ActionAllow, api.ActionDeny} {
			in.Objects.AccessPolicies = []*api.AccessPolicy{accessPolicy(api.AccessRule{Action: action, From: from})}
			for _, port := range []string{"http", "db"} {
				for _, r := range accessOf(t, compile.Compile(in), port).Rules {
					if len(r.SpiffeIds)+len(r.TrustDomains) == 0 {
						t.Errorf("%v %s: %v", from, action, r)
					}
					if !r.Deny && slices.Contains(r.TrustDomains, "eu-west.acme") {
						t.Errorf("allowed without an export: %v", r)
					}
				}
			}
		}
	}
}
