// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/jwtsvid"
)

// TestApplication: the application's identity has the sidecar's ID and a key of its own, and leaves the sidecar's as it is.
func TestApplication(t *testing.T) {
	c := newCluster(t)
	c.serve()
	dir := newDir(t)
	client, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), dir))
	own := client.Source().Identity()
	disk, err := dir.ReadFile("identity/svid.pem")
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	id, err := client.RequestIdentity(ctx)
	must(t, err)
	if id.ID != own.ID || id.Chain[0].Equal(own.Chain[0]) {
		t.Errorf("got %s", id.ID)
	}
	mine, err := trust.NewIdentity(id.ChainDER(), own.Key)
	if err == nil {
		t.Errorf("the application has the sidecar's key: %s", mine.ID)
	}
	if _, err := client.Source().Verify(id.Chain); err != nil {
		t.Error(err)
	}
	if r := c.renewed.Load(); r == nil || !r.Application || r.Proxy != "shop/web-1" {
		t.Errorf("the control plane heard of %+v", r)
	}
	after, err := dir.ReadFile("identity/svid.pem")
	must(t, err)
	if client.Source().Identity() != own || !bytes.Equal(disk, after) {
		t.Error("the sidecar's own identity has changed")
	}

	audience := []string{"spiffe://eu-west.acme/ns/shop/sa/checkout", "b"}
	token, notAfter, err := client.RequestJWT(ctx, audience)
	must(t, err)
	claims, err := jwtsvid.Verify(token, "b", client.Source().Bundles(), c.clock.Now())
	must(t, err)
	if claims.ID != own.ID || !claims.NotAfter.Equal(notAfter) {
		t.Errorf("%+v until %v", claims, notAfter)
	}

	// Withdrawn: nothing more. Away: at once, not after a wait.
	must(t, c.denied.Add(own.ID, "stolen"))
	if _, err := client.RequestIdentity(ctx); !problem.Is(err, problem.IdentityWithdrawn) {
		t.Errorf("withdrawn: %v", err)
	}
	if _, _, err := client.RequestJWT(ctx, audience); !problem.Is(err, problem.IdentityWithdrawn) {
		t.Errorf("withdrawn: %v", err)
	}
	c.stop()
	began := time.Now()
	if _, err := client.RequestIdentity(ctx); err == nil {
		t.Error("an identity without a control plane")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("failed after %v", took)
	}
}

func TestGatewaysHaveNoApplication(t *testing.T) {
	c := newCluster(t)
	c.serve()
	client, _ := open(t, c.config(proxyclient.Gateway, "gw-1", c.gatewayToken("gw-1"), newDir(t)))
	if _, err := client.RequestIdentity(t.Context()); err == nil {
		t.Error("a gateway got an identity for an application")
	}
	if _, _, err := client.RequestJWT(t.Context(), []string{"a"}); !problem.Is(err, problem.AccessDenied) {
		t.Errorf("a gateway asked for a token: %v", err)
	}
}
