// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/identity"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// closed is a control plane that does not run.
func closed(t *testing.T) *ControlPlane {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "d")
	if _, err := Init(InitConfig{DataDir: dir, Federation: "acme", Cluster: "us-east", Region: "us-east-1"}); err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.dir.Close() })
	return c
}

func TestWithdrawnIdentityLosesItsConnections(t *testing.T) {
	c := closed(t)
	web, err := spiffeid.Workload(c.self.trustDomain, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	cart, err := spiffeid.Workload(c.self.trustDomain, "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 1)
	c.registry.Add(withdrawal.Subject{Identity: web}, func(reason string) { ended <- reason })
	c.registry.Add(withdrawal.Subject{Identity: cart}, func(string) { t.Error("another identity's connection was ended") })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.denyLoop(ctx) }()
	if err := c.denied.Add(web, "stolen"); err != nil {
		t.Fatal(err)
	}
	select {
	case reason := <-ended:
		if reason != "stolen" {
			t.Errorf("ended for %q", reason)
		}
	case <-time.After(5 * time.Second):
		t.Error("the connection stands after 5 s")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAPICertificateFollowsItsOperator(t *testing.T) {
	c := closed(t)
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: "alice", Organization: []string{"admin"}}}
	if c.allowAPIClient(leaf) == nil {
		t.Error("allowed without a role")
	}
	for _, step := range []struct {
		role string
		want bool
	}{{"admin", true}, {"viewer", false}, {"admin", true}} {
		if err := c.roles.grant("alice", step.role, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if err := c.allowAPIClient(leaf); (err == nil) != step.want {
			t.Errorf("an admin's certificate while alice is %s: %v", step.role, err)
		}
	}
	id, err := spiffeid.Operator(c.self.trustDomain, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.denied.Add(id, "left"); err != nil {
		t.Fatal(err)
	}
	if c.allowAPIClient(leaf) == nil {
		t.Error("allowed after alice was withdrawn")
	}
}

func TestWhoMayWithdrawWhom(t *testing.T) {
	c := closed(t)
	as := func(role string) context.Context {
		if err := c.roles.grant(role, role, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		id, err := spiffeid.Operator(c.self.trustDomain, role)
		if err != nil {
			t.Fatal(err)
		}
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: identity.AuthInfo{Peer: trust.Peer{ID: id}}})
	}
	for _, tt := range []struct {
		path, role string
		want       bool
	}{
		{"ns/shop/sa/web", "operator", true},
		{"strait/gateway/gateway-1", "operator", false},
		{"strait/gateway/gateway-1", "admin", true},
		{"strait/operator/admin", "operator", false},
		{"strait/controlplane", "admin", false},
		{"strait/catalog-signer", "admin", false},
	} {
		req := &controlpb.WorkloadEvictRequest{SpiffeId: "spiffe://" + c.self.trustDomain.String() + "/" + tt.path}
		if _, err := (&operator{c: c}).WorkloadEvict(as(tt.role), req); (err == nil) != tt.want {
			t.Errorf("%s withdraws %s: %v", tt.role, tt.path, err)
		}
	}
}
