// SPDX-License-Identifier: Apache-2.0

package proxyclient_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func service(name string, revision uint64) *controlpb.Service {
	return &controlpb.Service{Namespace: "shop", Name: name, Revision: revision}
}

func revision(t *testing.T, c *proxyclient.Client, name string) uint64 {
	t.Helper()
	m, state := c.Get(controlpb.TypeService, name)
	if state != proxyclient.Known {
		return 0
	}
	return m.(*controlpb.Service).GetRevision()
}

// watch records changes as "<name>=<revision>" or "<name>=-", and refuses those whose revision is bad.
type watch struct {
	mu   sync.Mutex
	seen []string
	bad  uint64
}

func (w *watch) apply(ch proxyclient.Change) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch m := ch.Message.(type) {
	case nil:
		if ch.TypeURL == controlpb.TypeService {
			w.seen = append(w.seen, ch.Name+"=-")
		}
	case *controlpb.Service:
		w.seen = append(w.seen, fmt.Sprintf("%s=%d", ch.Name, m.GetRevision()))
		if w.bad != 0 && m.GetRevision() == w.bad {
			return errors.New("cannot have it")
		}
	}
	return nil
}

func (w *watch) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = nil
	return seen
}

func TestRegisterAndFollow(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{"shop/checkout": service("checkout", 1)}))
	must(t, c.discovery.Replace(controlpb.TypeSelf, map[string]proto.Message{"shop/web-1": &controlpb.Self{Name: "shop/web-1"}}))
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))

	client, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t)))
	info := client.Info()
	if info.Name != "shop/web-1" || info.Cluster != "us-east" || info.Federation != "acme" || info.ID.String() != "spiffe://us-east.acme/ns/shop/sa/web" ||
		info.Locality.String() != "us/a" {
		t.Fatalf("info %+v", info)
	}
	if _, state := client.Get(controlpb.TypeService, "shop/checkout"); state != proxyclient.Unknown {
		t.Fatalf("before a subscription: %v", state)
	}
	w := &watch{}
	defer client.Watch(w.apply)()
	client.Subscribe(controlpb.TypeService, "shop/checkout", "shop/none")
	client.Subscribe(controlpb.TypeSelf, "shop/web-1")
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for _, step := range []struct {
		typeURL, name string
		want          proxyclient.State
	}{
		{controlpb.TypeService, "shop/checkout", proxyclient.Known},
		{controlpb.TypeService, "shop/none", proxyclient.Absent},
		{controlpb.TypeSelf, "shop/web-1", proxyclient.Known},
		{controlpb.TypeBundle, "eu-west.acme", proxyclient.Absent}, // all are subscribed, and there are none
	} {
		if _, state, err := client.Wait(ctx, step.typeURL, step.name); err != nil || state != step.want {
			t.Fatalf("%s %s: %v, %v; want %v", step.typeURL, step.name, state, err, step.want)
		}
	}
	must(t, c.discovery.Set(controlpb.TypeService, "shop/none", service("none", 7)))
	eventually(t, "a resource appears", func() bool { return revision(t, client, "shop/none") == 7 })
	c.discovery.Delete(controlpb.TypeService, "shop/checkout")
	eventually(t, "a resource goes", func() bool {
		_, state := client.Get(controlpb.TypeService, "shop/checkout")
		return state == proxyclient.Absent
	})
	want := []string{"shop/checkout=1", "shop/none=-", "shop/none=7", "shop/checkout=-"}
	if seen := w.take(); !slices.Equal(seen, want) {
		t.Fatalf("watcher saw %v, want %v", seen, want)
	}
	eventually(t, "acknowledged", func() bool {
		acked, subscribed, nacks := c.discovery.Acked(controlpb.TypeService, "shop/none")
		return acked == 1 && subscribed == 1 && len(nacks) == 0
	})
	client.Unsubscribe(controlpb.TypeService, "shop/none")
	eventually(t, "unsubscribed", func() bool {
		_, subscribed, _ := c.discovery.Acked(controlpb.TypeService, "shop/none")
		return subscribed == 0
	})
	client.Subscribe(controlpb.TypeService, "shop/none")
	eventually(t, "subscribed again", func() bool { return revision(t, client, "shop/none") == 7 })
}

func TestRefusedVersionKeepsPrevious(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{
		"shop/checkout": service("checkout", 1), "shop/cart": service("cart", 1),
	}))
	client, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t)))
	first, picky := &watch{}, &watch{bad: 2}
	defer client.Watch(first.apply)()
	defer client.Watch(picky.apply)()
	client.Subscribe(controlpb.TypeService, "shop/checkout", "shop/cart")
	eventually(t, "first versions", func() bool { return revision(t, client, "shop/checkout") == 1 && revision(t, client, "shop/cart") == 1 })
	eventually(t, "watchers told", func() bool { picky.mu.Lock(); defer picky.mu.Unlock(); return len(picky.seen) == 2 })
	first.take()

	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{
		"shop/checkout": service("checkout", 2), "shop/cart": service("cart", 3),
	}))
	eventually(t, "the refusal arrives", func() bool {
		_, _, nacks := c.discovery.Acked(controlpb.TypeService, "shop/checkout")
		return len(nacks) == 1 && strings.Contains(nacks[0].Message, "cannot have it") && nacks[0].Node == "shop/web-1"
	})
	if got := revision(t, client, "shop/checkout"); got != 1 {
		t.Fatalf("revision %d in force, want the previous one", got)
	}
	if acked, _, nacks := c.discovery.Acked(controlpb.TypeService, "shop/cart"); acked != 1 || len(nacks) != 0 {
		t.Fatalf("the other resource of the response: acked %d, nacks %v", acked, nacks)
	}
	want := []string{"shop/cart=3", "shop/checkout=2", "shop/checkout=1"} // told of the new one, then of the previous one again
	if seen := first.take(); !slices.Equal(seen, want) {
		t.Fatalf("the watcher before it saw %v, want %v", seen, want)
	}
	must(t, c.discovery.Set(controlpb.TypeService, "shop/checkout", service("checkout", 4)))
	eventually(t, "a good version repairs it", func() bool {
		acked, _, nacks := c.discovery.Acked(controlpb.TypeService, "shop/checkout")
		return acked == 1 && len(nacks) == 0 && revision(t, client, "shop/checkout") == 4
	})
}

func TestReconnectResumes(t *testing.T) {
	c := newCluster(t)
	c.serve()
	all := map[string]proto.Message{}
	for i := range 50 {
		name := fmt.Sprintf("svc-%02d", i)
		all["shop/"+name] = service(name, 1)
	}
	must(t, c.discovery.Replace(controlpb.TypeService, all))
	client, _ := open(t, c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), newDir(t)))
	w := &watch{}
	defer client.Watch(w.apply)()
	for name := range all {
		client.Subscribe(controlpb.TypeService, name)
	}
	eventually(t, "all known", func() bool { return len(client.List(controlpb.TypeService)) == 50 })
	c.stop()
	eventually(t, "noticed", func() bool { return !client.Status().Connected })

	// The restarted control plane answers before it has compiled: nothing may disappear. Then one resource has changed and one
	// is gone.
	c.newDiscovery()
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeBundle, nil))
	eventually(t, "back", func() bool { return client.Status().Connected })
	if n := len(client.List(controlpb.TypeService)); n != 50 {
		t.Fatalf("%d resources with a control plane that has not compiled, want 50", n)
	}
	eventually(t, "all told", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.seen) == 50 })
	w.take()
	all["shop/svc-07"] = service("svc-07", 2)
	delete(all, "shop/svc-08")
	must(t, c.discovery.Replace(controlpb.TypeService, all))
	eventually(t, "changes arrive", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.seen) == 2 })
	seen := w.take()
	slices.Sort(seen)
	if want := []string{"shop/svc-07=2", "shop/svc-08=-"}; !slices.Equal(seen, want) {
		t.Fatalf("after reconnecting the watcher saw %v, want %v", seen, want)
	}
	eventually(t, "unchanged ones count as acknowledged", func() bool {
		acked, _, _ := c.discovery.Acked(controlpb.TypeService, "shop/svc-01")
		return acked == 1
	})
}

func TestStartsFromSnapshot(t *testing.T) {
	c := newCluster(t)
	c.serve()
	peer := newClusterOf(t, "eu-west.acme")
	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{"shop/checkout": service("checkout", 5)}))
	must(t, c.discovery.Replace(controlpb.TypeGateway, map[string]proto.Message{"gw-1": &controlpb.Gateway{Name: "gw-1"}}))
	other, err := spiffeid.ParseTrustDomain("eu-west.acme")
	must(t, err)
	must(t, c.discovery.Replace(controlpb.TypeBundle, map[string]proto.Message{
		other.String(): &controlpb.Bundle{TrustDomain: other.String(), Jwks: peer.ca.Bundle().Marshal(), Sequence: 1},
	}))
	dir := newDir(t)
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), dir)
	client, stop := open(t, cfg)
	client.Subscribe(controlpb.TypeService, "shop/checkout", "shop/none")
	client.SubscribeAll(controlpb.TypeGateway)
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for _, n := range []string{"shop/checkout", "shop/none"} {
		if _, _, err := client.Wait(ctx, controlpb.TypeService, n); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "gateway and bundle", func() bool {
		return len(client.List(controlpb.TypeGateway)) == 1 && client.Source().Bundles().Get(other) != nil
	})
	stop()
	c.stop()

	// No control plane at all; the second start subscribes to less, the third again to everything.
	for i, subscribe := range []bool{false, true} {
		again, err := proxyclient.Open(ctx, cfg)
		must(t, err)
		stop := run(t, again)
		if again.Source().Bundles().Get(other) == nil {
			t.Fatalf("start %d: the peer's bundle is not in force", i)
		}
		if _, state := again.Get(controlpb.TypeService, "shop/checkout"); state != proxyclient.Unknown {
			t.Fatalf("start %d: %v without a subscription", i, state)
		}
		again.SubscribeAll(controlpb.TypeGateway)
		if _, state := again.Get(controlpb.TypeGateway, "gw-1"); state != proxyclient.Known {
			t.Fatalf("start %d: gateway %v", i, state)
		}
		if _, state := again.Get(controlpb.TypeGateway, "gw-2"); state != proxyclient.Absent {
			t.Fatalf("start %d: a gateway that never was: %v", i, state)
		}
		if subscribe {
			w := &watch{}
			defer again.Watch(w.apply)()
			again.Subscribe(controlpb.TypeService, "shop/checkout", "shop/none")
			if got := revision(t, again, "shop/checkout"); got != 5 {
				t.Fatalf("start %d: revision %d", i, got)
			}
			if _, state := again.Get(controlpb.TypeService, "shop/none"); state != proxyclient.Absent {
				t.Fatalf("start %d: %v", i, state)
			}
			eventually(t, "the watcher hears of it", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return slices.Contains(w.seen, "shop/checkout=5") })
		}
		stop()
	}
}

func TestDamagedSnapshotIsNone(t *testing.T) {
	c := newCluster(t)
	c.serve()
	must(t, c.discovery.Replace(controlpb.TypeService, map[string]proto.Message{"shop/checkout": service("checkout", 5)}))
	dir := newDir(t)
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", c.sidecarToken("shop/web-1", "web"), dir)
	client, stop := open(t, cfg)
	client.Subscribe(controlpb.TypeService, "shop/checkout")
	eventually(t, "known", func() bool { return revision(t, client, "shop/checkout") == 5 })
	stop()
	data, err := os.ReadFile(dir.Path("snapshot", "discovery"))
	must(t, err)
	data[len(data)-1] ^= 1
	must(t, os.WriteFile(dir.Path("snapshot", "discovery"), data, 0o600))
	client, _ = open(t, cfg)
	client.Subscribe(controlpb.TypeService, "shop/checkout")
	eventually(t, "asked for anew", func() bool { return revision(t, client, "shop/checkout") == 5 })
}

func TestGatewayBundlesComeFromPeers(t *testing.T) {
	c := newCluster(t)
	c.serve()
	peer := newClusterOf(t, "eu-west.acme")
	good := &controlpb.Peer{TrustDomain: "eu-west.acme", Cluster: "eu-west", BundleJwks: peer.ca.Bundle().Marshal(), State: controlpb.PeerState_PEER_STATE_READY}
	must(t, c.discovery.Replace(controlpb.TypePeer, map[string]proto.Message{"eu-west.acme": good}))
	client, _ := open(t, c.config(proxyclient.Gateway, "gw-1", c.gatewayToken("gw-1"), newDir(t)))
	td, _ := spiffeid.ParseTrustDomain("eu-west.acme")
	eventually(t, "bundle", func() bool { return client.Source().Bundles().Get(td) != nil })

	// Nobody but the own cluster speaks of the own trust domain, and a damaged bundle changes nothing.
	own := client.Source().Bundles().Get(c.td).Hash()
	must(t, c.discovery.Replace(controlpb.TypePeer, map[string]proto.Message{
		"eu-west.acme": &controlpb.Peer{TrustDomain: "eu-west.acme", BundleJwks: []byte("{")},
		"us-east.acme": &controlpb.Peer{TrustDomain: "us-east.acme", BundleJwks: peer.ca.Bundle().Marshal()},
	}))
	for _, name := range []string{"eu-west.acme", "us-east.acme"} {
		eventually(t, name+" refused", func() bool {
			_, _, nacks := c.discovery.Acked(controlpb.TypePeer, name)
			return len(nacks) == 1
		})
	}
	if client.Source().Bundles().Get(td).Hash() != peer.ca.Bundle().Hash() || client.Source().Bundles().Get(c.td).Hash() != own {
		t.Fatal("a refused resource has changed the bundles")
	}
	c.discovery.Delete(controlpb.TypePeer, "eu-west.acme")
	eventually(t, "withdrawn", func() bool { return client.Source().Bundles().Get(td) == nil })
}

func TestOpenRefuses(t *testing.T) {
	c := newCluster(t)
	c.serve()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	dir := newDir(t)
	token := c.sidecarToken("shop/web-1", "web")
	client, err := proxyclient.Open(ctx, c.config(proxyclient.Sidecar, "shop/web-1", token, dir))
	must(t, err)
	must(t, client.Close())
	must(t, client.Close())

	cfg := c.config(proxyclient.Sidecar, "shop/web-2", token, newDir(t))
	for _, tt := range []struct {
		name string
		cfg  proxyclient.Config
		code problem.Code
	}{
		{"used token", c.config(proxyclient.Sidecar, "shop/web-1", token, newDir(t)), problem.RegistrationRefused},
		{"another proxy's token", cfg, problem.RegistrationRefused},
		{"no token", c.config(proxyclient.Sidecar, "shop/web-1", "", newDir(t)), problem.RegistrationRefused},
		{"another proxy's directory", c.config(proxyclient.Sidecar, "shop/web-2", "", dir), problem.ConfigInvalid},
		{"another role's directory", c.config(proxyclient.Gateway, "shop/web-1", "", dir), problem.ConfigInvalid},
	} {
		_, err := proxyclient.Open(ctx, tt.cfg)
		if !problem.Is(err, tt.code) {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.code)
		}
	}
}

func TestRegistrationWaits(t *testing.T) {
	c := newCluster(t)
	c.serve()
	c.stop()
	token := c.sidecarToken("shop/web-1", "web")
	opened := make(chan error, 1)
	cfg := c.config(proxyclient.Sidecar, "shop/web-1", token, newDir(t))
	go func() {
		client, err := proxyclient.Open(t.Context(), cfg)
		if err == nil {
			err = client.Close()
		}
		opened <- err
	}()
	c.serve()
	select {
	case err := <-opened:
		must(t, err)
	case <-time.After(within):
		t.Fatal("the control plane came, the registration did not")
	}
}
