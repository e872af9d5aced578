// SPDX-License-Identifier: Apache-2.0

package configapi_test

import (
	"crypto/x509"
	"net/http"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/strait-mesh/strait/controlplane/configapi"
	"github.com/strait-mesh/strait/internal/crowd/crowdtest"
)

// testWithdrawn: the open watch of an operator whose certificate is not accepted any more ends, whether the server is told or only
// looks by itself; others' go on. Nothing new is accepted.
func testWithdrawn(t *testing.T, ca *authority, s *configapi.Server) {
	as := func(name string) *rest.Config {
		c := ca.client(t, s.Addr().String(), "")
		c.CertData, c.KeyData = ca.issue(t, name, x509.ExtKeyUsageClientAuth, configapi.RoleViewer)
		return c
	}
	watch := func(c *rest.Config) <-chan struct{} {
		w, err := in(t, client(t, c), "peer", "").Watch(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Stop)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for range w.ResultChan() {
			}
		}()
		return ended
	}
	for _, told := range []bool{true, false} {
		ca.out.Store(nil)
		eve, ada := as("eve"), as("ada")
		eves, adas := watch(eve), watch(ada)
		name := "eve"
		ca.out.Store(&name)
		start := time.Now()
		if told {
			s.Judge()
		}
		select {
		case <-eves:
			t.Logf("ended after %v", time.Since(start))
		case <-time.After(5 * time.Second):
			t.Fatal("the watch stands after 5 s")
		}
		if told && time.Since(start) > 500*time.Millisecond {
			t.Errorf("it took %v although the server was told", time.Since(start))
		}
		if _, err := in(t, client(t, eve), "peer", "").List(t.Context(), metav1.ListOptions{}); err == nil {
			t.Error("a withdrawn operator lists")
		}
		if _, err := in(t, client(t, ada), "peer", "").List(t.Context(), metav1.ListOptions{}); err != nil {
			t.Errorf("another operator: %v", err)
		}
		select {
		case <-adas:
			t.Error("another operator's watch has ended")
		default:
		}
	}
	ca.out.Store(nil)
}

func testSilence(t *testing.T, ca *authority, s *configapi.Server) {
	c := ca.client(t, s.Addr().String(), configapi.RoleViewer)
	h, err := rest.HTTPClientFor(c)
	if err != nil {
		t.Fatal(err)
	}
	crowdtest.Press(t, s.Addr().String(), func() error {
		r, err := h.Get("https://" + s.Addr().String() + "/version")
		if err != nil {
			return err
		}
		defer h.CloseIdleConnections()
		if r.StatusCode != http.StatusOK {
			t.Error(r.Status)
		}
		return r.Body.Close()
	})
}
