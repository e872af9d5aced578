// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func serial(c *proxyclient.Client) string {
	return c.Source().Identity().Chain[0].SerialNumber.String()
}

func TestRenewal(t *testing.T) {
	c := newCluster(t)
	c.serve()
	dir := newDir(t)
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), dir)
	cfg.RenewEvery = 50 * time.Millisecond
	client, stop := open(t, cfg)
	seen := map[string]bool{serial(client): true}
	key := client.Source().Identity().Key.Public().(*ecdsa.PublicKey)
	eventually(t, "several renewals", func() bool { seen[serial(client)] = true; return len(seen) >= 4 })
	if key.Equal(client.Source().Identity().Key.Public()) {
		t.Error("the key is still the first one")
	}

	// While the control plane is away the identity stays; when it returns, renewals go on without a restart.
	c.stop()
	eventually(t, "failure noticed", func() bool { return client.Status().LastError != nil })
	held := serial(client)
	c.serve()
	eventually(t, "renewed again", func() bool { return serial(client) != held })
	stop()
	last := serial(client)
	again, err := proxyclient.Open(t.Context(), cfg)
	must(t, err)
	defer again.Close()
	if got := serial(again); got != last {
		t.Errorf("restarted with identity %s, want the last one (%s)", got, last)
	}
}

// TestADayAway is F20 and F22 on the injected clock: an identity holds for more than a day without a control plane, then fails
// closed, and is renewed without a restart.
func TestADayAway(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	cfg.RenewEvery = 100 * time.Millisecond
	client, _ := open(t, cfg)
	eventually(t, "connected", func() bool { return client.Status().Connected })

	c.stop()
	eventually(t, "cut off", func() bool { return !client.Status().Connected })
	c.clock.Advance(24 * time.Hour)
	if err := handshake(t, c, client.Source()); err != nil {
		t.Fatalf("after a day without a control plane: %v", err)
	}
	held := serial(client)
	c.renewOwn()
	c.serve()
	eventually(t, "renewed after a day", func() bool { return serial(client) != held })

	c.stop()
	held = serial(client)
	c.clock.Advance(36*time.Hour + time.Minute)
	c.renewOwn()
	if err := handshake(t, c, client.Source()); err == nil {
		t.Fatal("an expired identity was used")
	}
	c.serve()
	eventually(t, "expiry reported", func() bool { return client.Status().LastError != nil })
	if serial(client) != held {
		t.Fatal("an expired identity was renewed with itself")
	}
	// Only a fresh token can replace it, and nothing needs to be restarted for that.
	replace(t, cfg.TokenFile, c.sidecarToken("shop/web-1", "web"))
	eventually(t, "registered again", func() bool { return serial(client) != held && client.Status().Connected })
	if err := handshake(t, c, client.Source()); err != nil {
		t.Fatalf("after recovery: %v", err)
	}
}

// TestExpiredSnapshotStart opens what is on disk although the identity has ended.
func TestExpiredSnapshotStart(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{"shop/checkout": service("checkout", 1)}))
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	client, stop := open(t, cfg)
	client.Subscribe(controlpb.TypeService, "shop/checkout")
	eventually(t, "known", func() bool { return revision(t, client, "shop/checkout") == 1 })
	stop()
	c.clock.Advance(40 * time.Hour)
	c.renewOwn()
	client, _ = open(t, cfg)
	client.Subscribe(controlpb.TypeService, "shop/checkout")
	if revision(t, client, "shop/checkout") != 1 {
		t.Fatal("the snapshot was not opened")
	}
	if err := handshake(t, c, client.Source()); err == nil {
		t.Fatal("an expired identity was used")
	}
}

func TestOnlyTheControlPlaneIsBelieved(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	client, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t)))
	eventually(t, "connected", func() bool { return client.Status().Connected })
	c.stop()

	// A workload of the same trust domain answers at the control plane's address.
	impostor, err := spiffeid.Workload(c.td, "shop", "evil")
	must(t, err)
	c.serverID = impostor
	c.renewOwn()
	c.serve()
	eventually(t, "refused", func() bool {
		var v *trust.VerifyError
		return errors.As(client.Status().LastError, &v) && v.Reason == "not_authorized"
	})
	if client.Status().Connected {
		t.Fatal("connected to an impostor")
	}
	c.stop()
	c.serverID = spiffeid.ControlPlane(c.td)
	c.renewOwn()
	c.serve()
	eventually(t, "connected to the real one", func() bool { return client.Status().Connected })
}

// TestDenied is the withdrawal of one identity: its connection ends and it does not come back, nor is it renewed.
func TestDenied(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t))
	client, _ := open(t, cfg)
	eventually(t, "connected", func() bool { return client.Status().Connected })
	must(t, c.denied.Add(client.Info().ID, "laptop lost"))
	if n := c.withdrawals.Judge(c.judge); n != 1 {
		t.Fatalf("%d connections ended, want 1", n)
	}
	eventually(t, "cut off", func() bool { s := client.Status(); return !s.Connected && s.LastError != nil })
	if n := len(c.discovery.Subscribers()); n != 0 {
		eventually(t, "no subscriber", func() bool { return len(c.discovery.Subscribers()) == 0 })
	}
	must(t, c.denied.Readmit(client.Info().ID))
	d, _ := c.denied.Find(client.Info().ID)
	if _, denied := c.denied.Denied(client.Info().ID, d.IssuedBefore.Add(-time.Second)); !denied {
		t.Error("what was issued before is admitted again")
	}
}

// handshake makes a connection with the client's identity to a listener of its own trust domain.
func handshake(t *testing.T, c *cluster, source *trust.Source) error {
	t.Helper()
	server := trust.NewSource(trust.SourceConfig{Now: c.clock.Now})
	bundles, err := trust.NewBundles(c.ca.Bundle())
	must(t, err)
	server.SetBundles(bundles)
	id, err := c.ca.IssueKey(spiffeid.ControlPlane(c.td), 0)
	must(t, err)
	server.SetIdentity(id)
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		s := tls.Server(b, server.ServerTLS(trust.TLSOptions{Authorize: trust.AuthorizeTrustDomain(c.td)}))
		err := s.HandshakeContext(ctx)
		failed <- err
	}()
	err = tls.Client(a, source.ClientTLS(trust.TLSOptions{Authorize: trust.AuthorizeControlPlane(c.td)})).HandshakeContext(ctx)
	a.Close()
	return errors.Join(err, <-failed)
}

// TestOthersSelfIsNotThere is T29 and T35 with real certificates: what is another's, or for gateways, does not exist for a
// workload, by name or as a whole.
func TestOthersSelfIsNotThere(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeSelf, map[string]proto.Message{
		"shop/web-1": &controlpb.Self{Name: "shop/web-1"}, "shop/cart-1": &controlpb.Self{Name: "shop/cart-1"},
	}))
	must(t, c.discovery.Replace(controlpb.TypeGrant, map[string]proto.Message{"eu-west.acme/shop/cart": &controlpb.Grant{}}))
	must(t, c.discovery.Replace(controlpb.TypePeer, map[string]proto.Message{}))
	web, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t)))
	cart, _ := open(t, c.config(proxyclient.Sidecar, "shop/cart-1", c.sidecarToken("shop/cart-1", "cart"), newDir(t)))
	gateway, _ := open(t, c.config(proxyclient.Gateway, "gw-1", c.gatewayToken("gw-1"), newDir(t)))
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for _, client := range []*proxyclient.Client{web, cart, gateway} {
		client.Subscribe(controlpb.TypeSelf, "shop/cart-1")
		client.SubscribeAll(controlpb.TypeGrant)
		want := map[string]proxyclient.State{controlpb.TypeSelf: proxyclient.Absent, controlpb.TypeGrant: proxyclient.Absent}
		if client == cart {
			want[controlpb.TypeSelf] = proxyclient.Known
		}
		if client == gateway {
			want[controlpb.TypeGrant] = proxyclient.Known
		}
		for typeURL, name := range map[string]string{controlpb.TypeSelf: "shop/cart-1", controlpb.TypeGrant: "eu-west.acme/shop/cart"} {
			if _, state, err := client.Wait(ctx, typeURL, name); err != nil || state != want[typeURL] {
				t.Errorf("%s, %s %s: %v, %v; want %v", client.Info().Name, typeURL, name, state, err, want[typeURL])
			}
		}
	}
	if _, subscribed, _ := c.discovery.Acked(controlpb.TypeSelf, "shop/cart-1"); subscribed != 1 {
		t.Errorf("%d subscribers of one proxy's Self are counted", subscribed)
	}
}
