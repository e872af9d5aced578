// SPDX-License-Identifier: Apache-2.0

package discovery_test

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestRoles is T29 and T35: a workload sees its own Self and nothing that is for gateways; a gateway sees no Self.
func TestRoles(t *testing.T) {
	td := webID.TrustDomain()
	s, conn := serve(t, discovery.Config{Authorize: discovery.RoleAuthorize(td, func(name string) (spiffeid.ID, bool) {
		id, ok := map[string]spiffeid.ID{"shop/web-1": webID, "shop/cart-1": cartID}[name]
		return id, ok
	})})
	for typeURL, all := range map[string]map[string]proto.Message{
		controlpb.TypeSelf:    {"shop/web-1": &controlpb.Self{Name: "shop/web-1"}, "shop/cart-1": &controlpb.Self{Name: "shop/cart-1"}},
		controlpb.TypeService: {"shop/a": svc("a", 1)},
		controlpb.TypeGateway: {"gw-1": &controlpb.Gateway{Name: "gw-1"}},
		controlpb.TypeBundle:  {"eu-west.acme": &controlpb.Bundle{TrustDomain: "eu-west.acme"}},
		controlpb.TypePeer:    {"eu-west.acme": &controlpb.Peer{TrustDomain: "eu-west.acme"}},
		controlpb.TypeGrant:   {"eu-west.acme/shop/a": &controlpb.Grant{PeerTrustDomain: "eu-west.acme"}},
		controlpb.TypeDenied:  {"spiffe://us-east.acme/ns/x/sa/y": &controlpb.Denied{}},
	} {
		must(t, s.Replace(typeURL, all))
	}
	operatorID, err := spiffeid.Operator(td, "ann")
	must(t, err)
	foreign, err := spiffeid.Parse("spiffe://eu-west.acme/ns/shop/sa/web")
	must(t, err)
	names := []string{
		controlpb.TypeSelf + " shop/web-1", controlpb.TypeSelf + " shop/cart-1", controlpb.TypeService + " shop/a", controlpb.TypeGateway + " gw-1",
		controlpb.TypeBundle + " eu-west.acme", controlpb.TypePeer + " eu-west.acme", controlpb.TypeGrant + " eu-west.acme/shop/a",
		controlpb.TypeDenied + " spiffe://us-east.acme/ns/x/sa/y",
	}
	for _, tt := range []struct {
		peer     spiffeid.ID
		sees     string // a letter for each of names, and for each as a wildcard
		wildcard string
	}{
		{webID, "y-yyy--y", "---yy--y"},
		{cartID, "-yyyy--y", "---yy--y"},
		{gatewayID, "--yyyyyy", "--yyyyyy"},
		{operatorID, "--------", "--------"},
		{spiffeid.ControlPlane(td), "--------", "--------"},
		{foreign, "--------", "--------"},
	} {
		for i, n := range names {
			typeURL, name, _ := strings.Cut(n, " ")
			d := openDelta(t, conn, tt.peer, "n")
			d.subscribe(typeURL, name)
			if tt.sees[i] == 'y' {
				d.expect(tt.peer.String()+" sees "+n, name)
			} else {
				d.expect(tt.peer.String()+" does not see "+n, "-"+name)
			}
			d.cancel()
			if i == 1 {
				continue // the wildcard of Self was asked for with the first
			}
			d = openDelta(t, conn, tt.peer, "n")
			d.subscribe(typeURL, "*")
			if tt.wildcard[i] == 'y' {
				d.expect(tt.peer.String()+" sees all of "+typeURL, name)
			} else {
				d.expect(tt.peer.String() + " sees none of " + typeURL)
			}
			d.cancel()
		}
	}
	if acked, subscribed, _ := s.Acked(controlpb.TypeSelf, "shop/cart-1"); acked != 0 || subscribed > 1 {
		t.Errorf("who may not see is counted: %d of %d", acked, subscribed)
	}
}

func TestRoleVerifyNode(t *testing.T) {
	verify := discovery.RoleVerifyNode(func(name string) (spiffeid.ID, bool) {
		id, ok := map[string]spiffeid.ID{"shop/web-1": webID, "shop/cart-1": cartID}[name]
		return id, ok
	})
	for _, tt := range []struct {
		peer spiffeid.ID
		node string
		ok   bool
	}{
		{webID, "shop/web-1", true},
		{webID, "shop/new", true}, // not configured yet
		{webID, "shop/cart-1", false},
		{webID, "other/web-1", false},
		{webID, "gw-1", false},
		{webID, "", false},
		{gatewayID, "gw-1", true},
		{gatewayID, "gw-2", false},
		{gatewayID, "shop/web-1", false},
		{spiffeid.ControlPlane(webID.TrustDomain()), "x", false},
	} {
		if err := verify(context.Background(), tt.peer, &controlpb.Node{Id: tt.node}); (err == nil) != tt.ok {
			t.Errorf("%s as %q: %v", tt.peer, tt.node, err)
		}
	}
}
