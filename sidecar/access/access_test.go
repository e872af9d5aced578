// SPDX-License-Identifier: Apache-2.0

package access_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/sidecar/access"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func td(t testing.TB, s string) spiffeid.TrustDomain {
	t.Helper()
	d, err := spiffeid.ParseTrustDomain(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func id(t testing.TB, s string) spiffeid.ID {
	t.Helper()
	v, err := spiffeid.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

const (
	web   = "spiffe://us-east.acme/ns/shop/sa/web"
	batch = "spiffe://us-east.acme/ns/shop/sa/batch"
	euWeb = "spiffe://eu-west.acme/ns/shop/sa/web"
	other = "spiffe://ap-south.acme/ns/shop/sa/web"
)

func TestJudge(t *testing.T) {
	own := td(t, "us-east.acme")
	rules := func(r ...*controlpb.AccessRule) *controlpb.Access {
		return &controlpb.Access{HasPolicy: true, DefaultTrustDomains: []string{"us-east.acme"}, Rules: r}
	}
	for _, tc := range []struct {
		name         string
		access       *controlpb.Access
		caller       string
		method, path string // empty: a TCP connection
		want         bool
	}{
		{"nil access, own domain", nil, web, "", "", true},
		{"nil access, foreign domain", nil, euWeb, "", "", false},
		{"default, listed domain", &controlpb.Access{DefaultTrustDomains: []string{"eu-west.acme"}}, euWeb, "GET", "/", true},
		{"default, unlisted domain", &controlpb.Access{DefaultTrustDomains: []string{"eu-west.acme"}}, other, "GET", "/", false},
		{"policy without rules denies", rules(), web, "GET", "/", false},
		{"exact identity", rules(&controlpb.AccessRule{SpiffeIds: []string{web}}), web, "GET", "/", true},
		{"another identity of the same domain", rules(&controlpb.AccessRule{SpiffeIds: []string{web}}), batch, "GET", "/", false},
		{"same path, another domain", rules(&controlpb.AccessRule{SpiffeIds: []string{web}}), euWeb, "GET", "/", false},
		{"trust domain", rules(&controlpb.AccessRule{TrustDomains: []string{"eu-west.acme"}}), euWeb, "GET", "/", true},
		{"any caller", rules(&controlpb.AccessRule{}), other, "GET", "/", true},
		{"method", rules(&controlpb.AccessRule{Methods: []string{"GET"}}), web, "POST", "/", false},
		{"exact path", rules(&controlpb.AccessRule{Paths: []string{"/a"}}), web, "GET", "/a", true},
		{"exact path is no prefix", rules(&controlpb.AccessRule{Paths: []string{"/a"}}), web, "GET", "/a/b", false},
		{"prefix", rules(&controlpb.AccessRule{Paths: []string{"/a/*"}}), web, "GET", "/a/b/c", true},
		{"prefix is not itself", rules(&controlpb.AccessRule{Paths: []string{"/a/*"}}), web, "GET", "/a", false},
		{"prefix ends at a slash", rules(&controlpb.AccessRule{Paths: []string{"/a/*"}}), web, "GET", "/ab", false},
		{"everything", rules(&controlpb.AccessRule{Paths: []string{"/*"}}), web, "GET", "/", true},
		{
			"deny before allow", rules(&controlpb.AccessRule{}, &controlpb.AccessRule{Deny: true, SpiffeIds: []string{batch}}),
			batch, "GET", "/", false,
		},
		{
			"deny of a path", rules(&controlpb.AccessRule{}, &controlpb.AccessRule{Deny: true, Paths: []string{"/admin/*"}}),
			web, "GET", "/admin/x", false,
		},
		{
			"the rest of the paths", rules(&controlpb.AccessRule{}, &controlpb.AccessRule{Deny: true, Paths: []string{"/admin/*"}}),
			web, "GET", "/", true,
		},
		{"tcp: identity rule allows", rules(&controlpb.AccessRule{SpiffeIds: []string{web}}), web, "", "", true},
		{"tcp: a rule of methods never allows", rules(&controlpb.AccessRule{Methods: []string{"GET"}}), web, "", "", false},
		{"tcp: a rule of paths never allows", rules(&controlpb.AccessRule{Paths: []string{"/*"}}), web, "", "", false},
		{
			"tcp: a deny of some requests denies all", rules(&controlpb.AccessRule{}, &controlpb.AccessRule{Deny: true, Methods: []string{"POST"}}),
			web, "", "", false,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := access.Compile(tc.access, own)
			if err != nil {
				t.Fatal(err)
			}
			r := access.Request{Caller: id(t, tc.caller), HTTP: tc.method != "", Method: tc.method, Path: tc.path}
			if got := p.Judge(r); got.Allowed != tc.want {
				t.Errorf("Judge(%+v) = %+v, want allowed %v", r, got, tc.want)
			}
			if tc.want && !p.MayConnect(r.Caller) {
				t.Error("MayConnect refuses a caller whose request is allowed")
			}
		})
	}
}

func TestAuditNeverBlocks(t *testing.T) {
	p, err := access.Compile(&controlpb.Access{HasPolicy: true, Audit: true}, td(t, "us-east.acme"))
	if err != nil {
		t.Fatal(err)
	}
	v := p.Judge(access.Request{Caller: id(t, web), HTTP: true, Method: "GET", Path: "/"})
	if !v.Allowed || !v.Audited {
		t.Errorf("got %+v, want allowed and audited", v)
	}
	stranger, err := spiffeid.Workload(td(t, "ap-south.acme"), "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	if v := p.Judge(access.Request{Caller: stranger, HTTP: true, Method: "GET", Path: "/"}); v.Allowed || p.MayConnect(stranger) {
		t.Errorf("an audit lets in a cluster that the port is not open to: %+v", v)
	}
}

func TestCompileRefusesWhatItDoesNotUnderstand(t *testing.T) {
	unknown := &controlpb.AccessRule{}
	unknown.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	for name, r := range map[string]*controlpb.AccessRule{
		"unknown field":       unknown,
		"bad identity":        {SpiffeIds: []string{"spiffe://US-EAST.acme/x"}},
		"pattern as identity": {SpiffeIds: []string{"spiffe://us-east.acme/ns/*/sa/web"}},
		"bad trust domain":    {TrustDomains: []string{"us east"}},
		"lower-case method":   {Methods: []string{"get"}},
		"relative path":       {Paths: []string{"a"}},
		"star in the middle":  {Paths: []string{"/a/*/b"}},
		"star after a letter": {Paths: []string{"/a*"}},
		"two stars":           {Paths: []string{"/*/*"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := access.Compile(&controlpb.Access{HasPolicy: true, Rules: []*controlpb.AccessRule{{}, r}}, td(t, "us-east.acme"))
			if err == nil {
				t.Error("compiled")
			}
		})
	}
	if _, err := access.Compile(&controlpb.Access{Rules: []*controlpb.AccessRule{{}}}, td(t, "us-east.acme")); err == nil {
		t.Error("rules without a policy compiled")
	}
}

// TestAgainstReference holds the evaluator to one written from the sentences of the package comment alone.
func TestAgainstReference(t *testing.T) {
	ids := []string{web, batch, euWeb, other}
	tds := []string{"us-east.acme", "eu-west.acme", "ap-south.acme"}
	methods := []string{"GET", "POST"}
	paths := []string{"/", "/a", "/a/*", "/*", "/a/b"}
	own := td(t, "us-east.acme")
	rapid.Check(t, func(t *rapid.T) {
		some := func(label string, from []string) []string {
			return rapid.SliceOfNDistinct(rapid.SampledFrom(from), 0, 2, rapid.ID[string]).Draw(t, label)
		}
		a := &controlpb.Access{HasPolicy: true}
		for range rapid.IntRange(0, 4).Draw(t, "rules") {
			a.Rules = append(a.Rules, &controlpb.AccessRule{
				Deny: rapid.Bool().Draw(t, "deny"), SpiffeIds: some("ids", ids), TrustDomains: some("tds", tds),
				Methods: some("methods", methods), Paths: some("paths", paths),
			})
		}
		caller := rapid.SampledFrom(ids).Draw(t, "caller")
		http := rapid.Bool().Draw(t, "http")
		method := rapid.SampledFrom(methods).Draw(t, "method")
		path := rapid.SampledFrom([]string{"/", "/a", "/a/b", "/ab"}).Draw(t, "path")
		parsed, _ := spiffeid.Parse(caller)
		p, err := access.Compile(a, own)
		if err != nil {
			t.Fatal(err)
		}
		got := p.Judge(access.Request{Caller: parsed, HTTP: http, Method: method, Path: path}).Allowed
		if want := reference(a, caller, http, method, path); got != want {
			t.Fatalf("got %v, want %v for %v", got, want, a)
		}
		if got && !p.MayConnect(parsed) {
			t.Fatal("allowed, but may not connect")
		}
	})
}

func reference(a *controlpb.Access, caller string, http bool, method, path string) bool {
	contains := func(list []string, s string) bool {
		for _, x := range list {
			if x == s {
				return true
			}
		}
		return false
	}
	domain := strings.Split(strings.TrimPrefix(caller, "spiffe://"), "/")[0]
	matches := func(r *controlpb.AccessRule) bool {
		who := len(r.SpiffeIds)+len(r.TrustDomains) == 0 || contains(r.SpiffeIds, caller) || contains(r.TrustDomains, domain)
		if !http {
			return who && (r.Deny || len(r.Methods)+len(r.Paths) == 0)
		}
		where := len(r.Paths) == 0
		for _, p := range r.Paths {
			if p == path || strings.HasSuffix(p, "/*") && strings.HasPrefix(path, strings.TrimSuffix(p, "*")) {
				where = true
			}
		}
		return who && where && (len(r.Methods) == 0 || contains(r.Methods, method))
	}
	allowed := false
	for _, r := range a.Rules {
		if matches(r) && r.Deny {
			return false
		}
		allowed = allowed || matches(r) && !r.Deny
	}
	return allowed
}
