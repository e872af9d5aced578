// SPDX-License-Identifier: Apache-2.0

package configapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	"github.com/strait-mesh/strait/controlplane/api"
)

// trusted is the context key under which our own code says who calls. No request from outside can set it.
type trusted struct{}

// as wraps h so that each request is made by u.
func as(u user.Info, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), trusted{}, u)))
	})
}

// authenticate says who calls: what our own code says, else the client certificate, which TLS has verified against the API CA.
// Names come from the certificate's subject, roles from its organization; nothing else in it or in a header counts.
func authenticate(allow func(*x509.Certificate) error, now func() time.Time) authenticator.RequestFunc {
	return func(r *http.Request) (*authenticator.Response, bool, error) {
		if u, ok := r.Context().Value(trusted{}).(user.Info); ok {
			return &authenticator.Response{User: u}, true, nil
		}
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
			return nil, false, nil
		}
		leaf := r.TLS.VerifiedChains[0][0]
		if err := acceptable(r.TLS.VerifiedChains, allow, now()); err != nil {
			return nil, false, err
		}
		name := leaf.Subject.CommonName
		if name == "" || strings.HasPrefix(name, "system:") {
			return nil, false, errors.New("the client certificate names nobody")
		}
		u := &user.DefaultInfo{Name: name}
		for _, g := range leaf.Subject.Organization {
			if g == RoleViewer || g == RoleOperator || g == RoleAdmin {
				u.Groups = append(u.Groups, g)
			}
		}
		if len(u.Groups) == 0 {
			return nil, false, errors.New("the client certificate has no role")
		}
		return &authenticator.Response{User: u}, true, nil
	}
}

// acceptable judges a verified client certificate as of now: the connection may have outlived it.
func acceptable(chains [][]*x509.Certificate, allow func(*x509.Certificate) error, now time.Time) error {
	if len(chains) == 0 || len(chains[0]) == 0 {
		return errors.New("no client certificate")
	}
	for _, c := range chains[0] {
		if now.After(c.NotAfter) {
			return errors.New("the client certificate has expired")
		}
	}
	if allow != nil {
		if err := allow(chains[0][0]); err != nil {
			return fmt.Errorf("the client certificate is not accepted: %w", err)
		}
	}
	return nil
}

// readablePaths are what a viewer may read besides resources.
var readablePaths = []string{"/api", "/apis", "/openapi", "/version", "/healthz", "/livez", "/readyz"}

// operatorResources are what an operator may write.
var operatorResources = func() map[string]bool {
	m := map[string]bool{}
	for _, k := range api.Kinds() {
		if k.Kind != api.KindPeer && k.Kind != api.KindFederation {
			m[k.Group+"/"+k.Plural] = true
		}
	}
	return m
}()

// authorize: a viewer reads, an operator writes all but members and schemas, an admin does everything.
func authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	groups := a.GetUser().GetGroups()
	has := func(g string) bool { return slices.Contains(groups, g) }
	read := a.IsReadOnly()
	switch {
	case has(RoleAdmin):
		return authorizer.DecisionAllow, "", nil
	case !has(RoleViewer) && !has(RoleOperator):
		return authorizer.DecisionDeny, "no role", nil
	case !a.IsResourceRequest():
		known := slices.ContainsFunc(readablePaths, func(p string) bool { return a.GetPath() == p || strings.HasPrefix(a.GetPath(), p+"/") })
		if known && (a.GetVerb() == "get" || a.GetVerb() == "head") {
			return authorizer.DecisionAllow, "", nil
		}
	case read:
		return authorizer.DecisionAllow, "", nil
	case has(RoleOperator) && a.GetSubresource() == "" && operatorResources[a.GetAPIGroup()+"/"+a.GetResource()]:
		return authorizer.DecisionAllow, "", nil
	}
	return authorizer.DecisionDeny, fmt.Sprintf("role %s may not", strings.Join(groups, ",")), nil
}

// strict makes every write refuse unknown and doubled fields, whatever the client asks for: a policy with a field that is dropped
// in silence would be another policy.
func strict(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost, http.MethodPut, http.MethodPatch:
			q := r.URL.Query()
			q.Set("fieldValidation", "Strict")
			u := *r.URL
			u.RawQuery = q.Encode()
			r2 := *r
			r2.URL = &u
			r = &r2
		}
		h.ServeHTTP(w, r)
	})
}

// sameSite refuses what a page of another site makes a browser send, and a Host that is not ours (DNS rebinding).
func sameSite(names func() *x509.Certificate, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		host = strings.Trim(host, "[]")
		if net.ParseIP(host) == nil {
			if leaf := names(); leaf == nil || leaf.VerifyHostname(host) != nil {
				http.Error(w, "unknown host", http.StatusMisdirectedRequest)
				return
			}
		}
		if o := r.Header.Get("Origin"); o != "" {
			if u, err := url.Parse(o); err != nil || u.Scheme != "https" || u.Host != r.Host {
				http.Error(w, "foreign origin", http.StatusForbidden)
				return
			}
		}
		if s := r.Header.Get("Sec-Fetch-Site"); s != "" && s != "same-origin" && s != "none" {
			http.Error(w, "foreign site", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}
