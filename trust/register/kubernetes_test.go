// SPDX-License-Identifier: Apache-2.0

package register_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/register"
)

// cluster is a Kubernetes cluster as far as its tokens go: it issues, expires and revokes them, and reviews them. It is a
// register.TokenReviewer itself, the fake that stands for an API server.
type cluster struct {
	mu     sync.Mutex
	now    time.Time
	tokens map[string]projected
}

type projected struct {
	account   register.ServiceAccount
	audiences []string
	expires   time.Time
}

func newCluster() *cluster { return &cluster{now: t0, tokens: map[string]projected{}} }

// project issues a token; the text says nothing, as for any reviewer.
func (c *cluster) project(a register.ServiceAccount, audiences ...string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	token := fmt.Sprintf("eyJ.token-%d.sig", len(c.tokens))
	c.tokens[token] = projected{a, audiences, c.now.Add(time.Hour)}
	return token
}

func (c *cluster) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// deletePod ends the tokens that are bound to it.
func (c *cluster) deletePod(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for text, p := range c.tokens {
		if p.account.Pod == pod {
			delete(c.tokens, text)
		}
	}
}

func (c *cluster) find(token string, audiences []string) (projected, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.tokens[token]
	if !ok || !c.now.Before(p.expires) {
		return projected{}, false
	}
	p.audiences = slices.DeleteFunc(slices.Clone(p.audiences), func(a string) bool { return !slices.Contains(audiences, a) })
	return p, len(p.audiences) > 0
}

// ReviewToken implements register.TokenReviewer.
func (c *cluster) ReviewToken(_ context.Context, token, audience string) (register.ServiceAccount, error) {
	p, ok := c.find(token, []string{audience})
	if !ok {
		return register.ServiceAccount{}, problem.New(problem.RegistrationRefused, "refused")
	}
	return p.account, nil
}

// ServeHTTP is the cluster's API server; reviewers have the token "reviewer".
func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer reviewer" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var in struct {
		APIVersion, Kind string
		Spec             struct {
			Token     string
			Audiences []string
		}
	}
	if r.Method != http.MethodPost || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || json.NewDecoder(r.Body).Decode(&in) != nil ||
		in.APIVersion != "authentication.k8s.io/v1" || in.Kind != "TokenReview" {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	status := map[string]any{"authenticated": false, "error": "[invalid bearer token, token lookup failed]"}
	if p, ok := c.find(in.Spec.Token, in.Spec.Audiences); ok {
		user := map[string]any{
			"username": "system:serviceaccount:" + p.account.Namespace + ":" + p.account.Name, "uid": "6f0e",
			"groups": []string{"system:serviceaccounts", "system:serviceaccounts:" + p.account.Namespace, "system:authenticated"},
		}
		if p.account.Pod != "" {
			user["extra"] = map[string][]string{"authentication.kubernetes.io/pod-name": {p.account.Pod}, "authentication.kubernetes.io/pod-uid": {"ab12"}}
		}
		status = map[string]any{"authenticated": true, "user": user, "audiences": p.audiences}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "metadata": map[string]any{},
		"spec": map[string]any{"token": in.Spec.Token, "audiences": in.Spec.Audiences}, "status": status})
}

// reviewer is a KubernetesReviewer for an API server of the test.
func reviewer(t *testing.T, h http.Handler) register.KubernetesReviewer {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	dir := t.TempDir()
	k := register.KubernetesReviewer{Server: s.URL, CAFile: filepath.Join(dir, "ca.crt"), TokenFile: filepath.Join(dir, "token")}
	if err := os.WriteFile(k.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.TokenFile, []byte("reviewer\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return k
}

const audience = "strait:us-east.acme"

// TestTokenReviewers: the contract that the fake and the client of a real API server both keep.
func TestTokenReviewers(t *testing.T) {
	for name, open := range map[string]func(*testing.T, *cluster) register.TokenReviewer{
		"fake": func(_ *testing.T, c *cluster) register.TokenReviewer { return c },
		"http": func(t *testing.T, c *cluster) register.TokenReviewer { return reviewer(t, c) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster()
			r := open(t, c)
			web := register.ServiceAccount{Namespace: "shop", Name: "web", Pod: "web-7d9f-x2x"}
			plain := register.ServiceAccount{Namespace: "shop", Name: "cart"}
			good, unbound := c.project(web, audience), c.project(plain, "https://kubernetes.default.svc", audience)
			accepted := func(token string, want register.ServiceAccount) {
				t.Helper()
				if got, err := r.ReviewToken(t.Context(), token, audience); err != nil || got != want {
					t.Errorf("got %+v, %v; want %+v", got, err, want)
				}
			}
			refused := func(what, token, audience string) {
				t.Helper()
				if got, err := r.ReviewToken(t.Context(), token, audience); !problem.Is(err, problem.RegistrationRefused) || got != (register.ServiceAccount{}) {
					t.Errorf("%s: %+v, %v", what, got, err)
				}
			}
			accepted(good, web)
			accepted(good, web) // reviewing uses nothing up
			accepted(unbound, plain)
			refused("another audience", c.project(web, "https://kubernetes.default.svc"), audience)
			refused("another cluster's audience", good, "strait:eu-west.acme")
			refused("part of the audience", good, "strait:us-east")
			refused("no token of ours", "eyJ.made-up.sig", audience)
			refused("no token", "", audience)
			c.deletePod(web.Pod)
			refused("the pod is gone", good, audience)
			c.pass(59 * time.Minute)
			accepted(unbound, plain)
			c.pass(time.Minute)
			refused("expired", unbound, audience)
		})
	}
}

// TestAPIServerLies: whatever answers at the address, and whatever it answers, a service account comes from a complete answer alone.
func TestAPIServerLies(t *testing.T) {
	user := func(name string, groups ...string) string {
		g, _ := json.Marshal(groups)
		return fmt.Sprintf(`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":true,"audiences":["%s"],"user":{"username":%q,"groups":%s}}}`, audience, name, g)
	}
	shop := []string{"system:serviceaccounts", "system:serviceaccounts:shop"}
	proper := user("system:serviceaccount:shop:web", shop...)
	for _, tt := range []struct {
		name   string
		status int
		body   string
		want   problem.Code // "": accepted
	}{
		{"proper", 201, proper, ""},
		{"proper, 200", 200, proper, ""},
		{"not authenticated", 201, strings.Replace(proper, `"authenticated":true`, `"authenticated":false`, 1), problem.RegistrationRefused},
		{"authenticated and an error", 201, strings.Replace(proper, `"authenticated":true`, `"authenticated":true,"error":"x"`, 1), problem.RegistrationRefused},
		{"without audiences", 201, strings.Replace(proper, `["`+audience+`"]`, `[]`, 1), problem.RegistrationRefused},
		{"other audiences", 201, strings.Replace(proper, audience, "x", 1), problem.RegistrationRefused},
		{"a user", 201, user("alice", shop...), problem.RegistrationRefused},
		{"a node", 201, user("system:node:n1", shop...), problem.RegistrationRefused},
		{"three parts", 201, user("system:serviceaccount:shop:web:x", shop...), problem.RegistrationRefused},
		{"one part", 201, user("system:serviceaccount:shop", shop...), problem.RegistrationRefused},
		{"no namespace", 201, user("system:serviceaccount::web", shop...), problem.RegistrationRefused},
		{"upper case", 201, user("system:serviceaccount:Shop:web", "system:serviceaccounts", "system:serviceaccounts:Shop"), problem.RegistrationRefused},
		{"a path in the name", 201, user("system:serviceaccount:shop:web/../x", shop...), problem.RegistrationRefused},
		{"prefix in another case", 201, user("System:serviceaccount:shop:web", shop...), problem.RegistrationRefused},
		{"not in the group", 201, user("system:serviceaccount:shop:web", "system:serviceaccounts"), problem.RegistrationRefused},
		{"in another namespace's group", 201, user("system:serviceaccount:shop:web", "system:serviceaccounts", "system:serviceaccounts:other"), problem.RegistrationRefused},
		{"two pods", 201, strings.Replace(proper, `"username"`, `"extra":{"authentication.kubernetes.io/pod-name":["a","b"]},"username"`, 1), problem.RegistrationRefused},
		{"a pod's name that is none", 201, strings.Replace(proper, `"username"`, `"extra":{"authentication.kubernetes.io/pod-name":["a/b"]},"username"`, 1), problem.RegistrationRefused},
		{"no status", 201, `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview"}`, problem.RegistrationRefused},
		{"another kind", 201, strings.Replace(proper, `"TokenReview"`, `"Status"`, 1), problem.RegistrationBusy},
		{"another version", 201, strings.Replace(proper, "k8s.io/v1", "k8s.io/v1beta1", 1), problem.RegistrationBusy},
		{"no JSON", 201, "hello", problem.RegistrationBusy},
		{"nothing", 201, "", problem.RegistrationBusy},
		{"something after it", 201, proper + proper, problem.RegistrationBusy},
		{"too large", 201, proper + strings.Repeat(" ", 64<<10), problem.RegistrationBusy},
		{"unauthorized", 401, proper, problem.RegistrationBusy},
		{"forbidden", 403, proper, problem.RegistrationBusy},
		{"broken", 500, proper, problem.RegistrationBusy},
		{"redirect", 307, proper, problem.RegistrationBusy},
	} {
		k := reviewer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if tt.status == 307 {
				w.Header().Set("Location", "/elsewhere")
			}
			w.WriteHeader(tt.status)
			_, _ = w.Write([]byte(tt.body))
		}))
		got, err := k.ReviewToken(t.Context(), "secret-token", audience)
		if tt.want == "" {
			if err != nil || got != (register.ServiceAccount{Namespace: "shop", Name: "web"}) {
				t.Errorf("%s: %+v, %v", tt.name, got, err)
			}
			continue
		}
		if !problem.Is(err, tt.want) || got != (register.ServiceAccount{}) {
			t.Errorf("%s: %+v, %v; want %s", tt.name, got, err, tt.want)
		}
		if text := fmt.Sprintf("%v %v", err, problem.From(err)); strings.Contains(text, "secret-token") || strings.Contains(text, "Bearer") {
			t.Errorf("%s: the error shows a token: %s", tt.name, text)
		}
	}
}

// TestReviewerConfiguration: what is wrong at our end, or stands in between, keeps the reviewer from judging, and no token leaves.
func TestReviewerConfiguration(t *testing.T) {
	c := newCluster()
	token := c.project(register.ServiceAccount{Namespace: "shop", Name: "web"}, audience)
	good := reviewer(t, c)
	elsewhere := reviewer(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request reached somebody else") }))
	dir := t.TempDir()
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 300<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*register.KubernetesReviewer){
		"another server behind the address": func(k *register.KubernetesReviewer) {
			k.Server, k.CAFile = elsewhere.Server, selfSignedPEM(t)
		},
		"http":            func(k *register.KubernetesReviewer) { k.Server = strings.Replace(k.Server, "https", "http", 1) },
		"a user in it":    func(k *register.KubernetesReviewer) { k.Server = strings.Replace(k.Server, "//", "//u:p@", 1) },
		"no address":      func(k *register.KubernetesReviewer) { k.Server = "" },
		"no CA":           func(k *register.KubernetesReviewer) { k.CAFile = filepath.Join(dir, "none") },
		"empty CA":        func(k *register.KubernetesReviewer) { k.CAFile = os.DevNull },
		"CA too large":    func(k *register.KubernetesReviewer) { k.CAFile = big },
		"no own token":    func(k *register.KubernetesReviewer) { k.TokenFile = filepath.Join(dir, "none") },
		"wrong own token": func(k *register.KubernetesReviewer) { k.TokenFile = os.DevNull },
		"certificate ends": func(k *register.KubernetesReviewer) {
			k.Now = func() time.Time { return time.Now().AddDate(100, 0, 0) }
		},
	} {
		k := good
		change(&k)
		if a, err := k.ReviewToken(t.Context(), token, audience); !problem.Is(err, problem.RegistrationBusy) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	for name, bad := range map[string]string{"a line break": token + "\nX: y", "a space": token + " x", "NUL": token + "\x00", "not ASCII": token + "é", "too long": strings.Repeat("a", 16<<10+1)} {
		if a, err := good.ReviewToken(t.Context(), bad, audience); !problem.Is(err, problem.RegistrationRefused) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	if _, err := good.ReviewToken(t.Context(), token, ""); err == nil {
		t.Error("a review for no audience in particular")
	}
	// The files are read each time: a renewed token works without a restart.
	if err := os.WriteFile(good.TokenFile, []byte("stale"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := good.ReviewToken(t.Context(), token, audience); !problem.Is(err, problem.RegistrationBusy) {
		t.Errorf("a stale reviewer: %v", err)
	}
	if err := os.WriteFile(good.TokenFile, []byte("reviewer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := good.ReviewToken(t.Context(), token, audience); err != nil {
		t.Errorf("a renewed reviewer: %v", err)
	}
}

// selfSignedPEM is the certificate of a server that nobody runs.
func selfSignedPEM(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ca.crt")
	cert := newIssuer(t).ca.Bundle().Roots()[0]
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestSilentAPIServer: an API server that does not answer costs a bounded time.
func TestSilentAPIServer(t *testing.T) {
	release := make(chan struct{})
	k := reviewer(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer close(release)
	start := time.Now()
	_, err := k.ReviewToken(t.Context(), "a", audience)
	if took := time.Since(start); !problem.Is(err, problem.RegistrationBusy) || took < register.ReviewTimeout || took > register.ReviewTimeout+2*time.Second {
		t.Errorf("%v after %v", err, took)
	}
}

func TestServiceAccountGrant(t *testing.T) {
	for _, tt := range []struct {
		account  register.ServiceAccount
		id, name string
	}{
		{register.ServiceAccount{Namespace: "shop", Name: "web", Pod: "web-7d9f-x2x"}, "/ns/shop/sa/web", "shop/web-7d9f-x2x"},
		{register.ServiceAccount{Namespace: "shop", Name: "web"}, "/ns/shop/sa/web", "shop/web"},
		{register.ServiceAccount{Namespace: "shop", Name: "web.v2"}, "/ns/shop/sa/web.v2", "shop/web.v2"},
		{register.ServiceAccount{Namespace: "shop"}, "", ""},
		{register.ServiceAccount{Name: "web"}, "", ""},
		{register.ServiceAccount{Namespace: "shop/sa/x", Name: "web"}, "", ""},
		{register.ServiceAccount{Namespace: "..", Name: "web"}, "", ""},
		{register.ServiceAccount{Namespace: "Shop", Name: "web"}, "", ""},
		{register.ServiceAccount{Namespace: "shop", Name: "-web"}, "", ""},
		{register.ServiceAccount{Namespace: "shop", Name: "web", Pod: "a/b"}, "", ""},
		{register.ServiceAccount{Namespace: "shop", Name: strings.Repeat("a", 64)}, "", ""},
	} {
		g, err := tt.account.Grant(td)
		if tt.id == "" {
			if !problem.Is(err, problem.RegistrationRefused) || g != (register.Grant{}) {
				t.Errorf("%+v becomes %+v, %v", tt.account, g, err)
			}
			continue
		}
		if want := (register.Grant{Kind: register.KindSidecar, Name: tt.name, SPIFFEID: g.SPIFFEID}); err != nil || g != want || g.SPIFFEID.String() != "spiffe://"+td.String()+tt.id {
			t.Errorf("%+v becomes %+v, %v", tt.account, g, err)
		}
	}
}

// FuzzTokenReview: an answer either names a service account that can register, or none.
func FuzzTokenReview(f *testing.F) {
	for _, seed := range []string{
		`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":true,"audiences":["strait:us-east.acme"],"user":{"username":"system:serviceaccount:shop:web","groups":["system:serviceaccounts","system:serviceaccounts:shop"],"extra":{"authentication.kubernetes.io/pod-name":["web-1"]}}}}`,
		`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"error":"x"}}`, `{}`, `null`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := register.ParseReview(data, audience)
		if err != nil {
			if a != (register.ServiceAccount{}) {
				t.Fatalf("refused, and yet %+v", a)
			}
			return
		}
		if g, err := a.Grant(td); err != nil || g.SPIFFEID.String() != "spiffe://"+td.String()+"/ns/"+a.Namespace+"/sa/"+a.Name {
			t.Fatalf("%+v becomes %+v, %v", a, g, err)
		}
	})
}
