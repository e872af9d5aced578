// SPDX-License-Identifier: Apache-2.0

package configapi_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/strait-mesh/strait/controlplane/configapi"
)

// testRoles is the matrix of roles and verbs.
func testRoles(t *testing.T, ca *authority, s *configapi.Server) {
	ctx := t.Context()
	for _, c := range []struct {
		role                             string
		read, service, peer, crd, status bool
	}{
		{configapi.RoleViewer, true, false, false, false, false},
		{configapi.RoleOperator, true, true, false, false, false},
		{configapi.RoleAdmin, true, true, true, true, true},
	} {
		t.Run(c.role, func(t *testing.T) {
			d := client(t, ca.client(t, s.Addr().String(), c.role))
			check := func(what string, want bool, err error) {
				t.Helper()
				if want != (err == nil) || !want && !apierrors.IsForbidden(err) {
					t.Errorf("%s: %v, want allowed %v", what, err, want)
				}
			}
			_, err := in(t, d, "peer", "").List(ctx, metav1.ListOptions{})
			check("list peers", c.read, err)
			o := object(t, workload)
			o.SetName("by-" + c.role)
			_, err = in(t, d, "workload", "shop").Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "x", Force: true})
			check("apply workload", c.service, err)
			_, err = in(t, d, "workload", "shop").Patch(ctx, "checkout-vm-1", types.MergePatchType, []byte(`{"status":{"observedGeneration":1}}`), metav1.PatchOptions{}, "status")
			check("patch status", c.status, err)
			_, err = in(t, d, "peer", "").Patch(ctx, "eu-west", types.MergePatchType, []byte(`{"spec":{"sameness":["shop"]}}`), metav1.PatchOptions{})
			check("patch peer", c.peer, err)
			_, err = in(t, d, "federation", "").Patch(ctx, "acme", types.MergePatchType, []byte(`{"spec":{"introducers":["eu-west"]}}`), metav1.PatchOptions{})
			check("patch federation", c.peer, err)
			err = d.Resource(crdResource).Delete(ctx, "none.strait.dev", metav1.DeleteOptions{})
			if c.crd && !apierrors.IsNotFound(err) || !c.crd && !apierrors.IsForbidden(err) {
				t.Errorf("delete schema: %v", err)
			}
			imp := ca.client(t, s.Addr().String(), c.role)
			imp.Impersonate = rest.ImpersonationConfig{UserName: "root", Groups: []string{configapi.RoleAdmin}}
			_, err = in(t, client(t, imp), "peer", "").Patch(ctx, "eu-west", types.MergePatchType, []byte(`{}`), metav1.PatchOptions{})
			check("impersonate", c.peer, err)
		})
	}
}

// testStrangers: whoever has no certificate of the API CA with a role gets nothing.
func testStrangers(t *testing.T, ca *authority, s *configapi.Server) {
	addr := s.Addr().String()
	foreign := newAuthority(t)
	noRole := ca.client(t, addr, "system:masters")
	serving := ca.client(t, addr, "")
	serving.CertData, serving.KeyData = ca.issue(t, "server", x509.ExtKeyUsageServerAuth, configapi.RoleAdmin)
	other := ca.client(t, addr, "")
	other.CertData, other.KeyData = foreign.issue(t, "ada", x509.ExtKeyUsageClientAuth, configapi.RoleAdmin)
	nameless := ca.client(t, addr, "")
	nameless.CertData, nameless.KeyData = ca.issue(t, "", x509.ExtKeyUsageClientAuth, configapi.RoleAdmin)
	token := ca.client(t, addr, "")
	token.BearerToken = "admin"
	for name, c := range map[string]*rest.Config{"no certificate": ca.client(t, addr, ""), "foreign CA": other, "no role": noRole,
		"serving certificate": serving, "no name": nameless, "bearer token": token} {
		t.Run(name, func(t *testing.T) {
			h, err := rest.HTTPClientFor(c)
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{"/", "/api", "/apis", "/version", "/healthz", "/metrics", "/debug/pprof/", "/openapi/v3", "/api/v1/namespaces"} {
				r, err := h.Get("https://" + addr + path)
				if err != nil {
					continue
				}
				_ = r.Body.Close()
				if r.StatusCode != http.StatusUnauthorized && r.StatusCode != http.StatusForbidden {
					t.Errorf("%s: %d", path, r.StatusCode)
				}
			}
		})
	}
	t.Run("old TLS", func(t *testing.T) {
		cert, key := ca.issue(t, "ada", x509.ExtKeyUsageClientAuth, configapi.RoleAdmin)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(ca.cert)
		if c, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12}); err == nil {
			_ = c.Close()
			t.Error("TLS 1.2 was accepted")
		}
	})
	for _, role := range []string{configapi.RoleViewer, configapi.RoleAdmin} {
		h, err := rest.HTTPClientFor(ca.client(t, addr, role))
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]int{"/version": 200, "/metrics": 0, "/debug/pprof/": 0, "/debug/flags/v": 0} {
			r, err := h.Get("https://" + addr + path)
			if err != nil {
				t.Fatal(err)
			}
			_ = r.Body.Close()
			if want == 200 && r.StatusCode != 200 || want == 0 && r.StatusCode == 200 {
				t.Errorf("%s as %s: %d", path, role, r.StatusCode)
			}
		}
	}
}

// testBrowsers: T35. A page elsewhere cannot use the operator's certificate.
func testBrowsers(t *testing.T, ca *authority, s *configapi.Server) {
	h, err := rest.HTTPClientFor(ca.client(t, s.Addr().String(), configapi.RoleAdmin))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, host, header, value string
		ok                        bool
	}{
		{"plain", "", "", "", true},
		{"own name", "strait.test", "", "", true},
		{"other name", "evil.test", "", "", false},
		{"rebound", "localhost", "", "", false},
		{"foreign origin", "", "Origin", "https://evil.test", false},
		{"null origin", "", "Origin", "null", false},
		{"own origin", "", "Origin", "https://" + s.Addr().String(), true},
		{"plain origin", "", "Origin", "http://" + s.Addr().String(), false},
		{"cross-site", "", "Sec-Fetch-Site", "cross-site", false},
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodOptions} {
			r, _ := http.NewRequestWithContext(t.Context(), method, "https://"+s.Addr().String()+"/api/v1/namespaces", strings.NewReader("{}"))
			r.Host = c.host
			if c.header != "" {
				r.Header.Set(c.header, c.value)
			}
			resp, err := h.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			refused := resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusMisdirectedRequest
			if c.ok == refused {
				t.Errorf("%s %s: %d", method, c.name, resp.StatusCode)
			}
			if resp.Header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s: CORS allowed", c.name)
			}
		}
	}
}

func testHandler(t *testing.T, s *configapi.Server) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: s.Handler()}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	defer func() { _ = srv.Close(); <-done }()
	d := client(t, &rest.Config{Host: "http://strait", Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}})
	if _, err := in(t, d, "peer", "").Patch(t.Context(), "eu-west", types.MergePatchType, []byte(`{"spec":{"sameness":["*"]}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// testGarbage: no byte of a stranger ends the server or leaves a goroutine.
func testGarbage(t *testing.T, ca *authority, s *configapi.Server) {
	before := runtime.NumGoroutine()
	random := make([]byte, 64<<10)
	_, _ = rand.Read(random)
	for name, data := range map[string][]byte{
		"random":       random,
		"http":         []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"half a hello": {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
		"nothing":      nil,
		"h2 preface":   []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
	} {
		for range 20 {
			c, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			_, _ = c.Write(data)
			if name != "half a hello" {
				_ = c.(*net.TCPConn).CloseWrite()
			}
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			n, err := io.Copy(io.Discard, c)
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				t.Fatalf("%s: the connection is held", name)
			}
			if n > 200 {
				t.Errorf("%s was answered with %d bytes", name, n)
			}
			_ = c.Close()
			if name == "half a hello" {
				break // five seconds each
			}
		}
	}
	h, err := rest.HTTPClientFor(ca.client(t, s.Addr().String(), configapi.RoleAdmin))
	if err != nil {
		t.Fatal(err)
	}
	r, _ := http.NewRequest(http.MethodGet, "https://"+s.Addr().String()+"/version", nil)
	r.Header.Set("X-Big", strings.Repeat("a", 10<<20))
	if resp, err := h.Do(r); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("a header of 10 MiB: %d", resp.StatusCode)
		}
	}
	h.CloseIdleConnections()
	if _, err := in(t, client(t, ca.client(t, s.Addr().String(), configapi.RoleViewer)), "peer", "").List(t.Context(), metav1.ListOptions{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		if n := runtime.NumGoroutine(); n <= before+20 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", n, before)
		}
	}
}
