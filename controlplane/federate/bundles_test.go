// SPDX-License-Identifier: Apache-2.0

package federate_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// waitBundle waits until c holds exactly b of peer.
func (c *cluster) waitBundle(peer *cluster, b *trust.Bundle) {
	c.w.t.Helper()
	c.eventually(fmt.Sprintf("bundle %d of %s", b.Sequence(), peer.name), func(v *federate.View) bool {
		p := v.Peer(peer.td)
		return p != nil && p.Bundle != nil && p.Bundle.Equal(b) && p.BundleHash == b.Hash() && p.BundleSource == federate.SourceCatalog &&
			p.BundleError == "" && !p.BundleUpdated.IsZero() && v.Bundles.Get(peer.td).Equal(b)
	})
}

// waitSeen waits until c knows that all proxies of peer have acknowledged that sequence of its bundle.
func (c *cluster) waitSeen(peer *cluster, sequence uint64) {
	c.w.t.Helper()
	c.eventually(fmt.Sprintf("%s has seen %d", peer.name, sequence), func(v *federate.View) bool {
		p := v.Peer(peer.td)
		return p != nil && p.SeenOurs == sequence
	})
}

func (c *cluster) waitAlarm(kind string) {
	c.w.t.Helper()
	c.eventually("alarm "+kind, func(v *federate.View) bool {
		return slices.ContainsFunc(v.Alarms, func(a federate.Alarm) bool { return a.Kind == kind })
	})
}

func (c *cluster) waitUp(peer *cluster, up bool) {
	c.w.t.Helper()
	c.eventually(fmt.Sprintf("tunnel to %s: %v", peer.name, up), func(v *federate.View) bool {
		p := v.Peer(peer.td)
		return p != nil && p.TunnelUp == up
	})
}

// TestRotationOfARoot: the root of us-east is rotated in full. eu-west is cut off while it is prepared and activated, and heals without a
// join; ap-south follows each step. Nothing is refused anywhere, and everybody ends with the new root alone, also after a restart.
func TestRotationOfARoot(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west", "ap-south")
	us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
	root := us.rotates()
	w.start()
	admit(t, us, eu)
	admit(t, us, ap)
	for _, c := range []*cluster{eu, ap} {
		c.waitBundle(us, root.Bundle())
		us.waitSeen(c, 1)
	}
	joined := eu.m.View().Peer(us.td).Joined

	w.setCut("us-east", "eu-west", true)
	eu.waitUp(us, false)
	root.prepare()
	ap.waitBundle(us, root.Bundle())
	us.waitSeen(ap, 2)
	if n := us.m.View().Peer(eu.td).SeenOurs; n != 1 {
		t.Errorf("the member that is cut off has seen %d", n)
	}
	root.activate()
	us.m.SetOffers(map[spiffeid.TrustDomain]map[string][]byte{
		ap.td: offer(t, ap, "shop", "activated")[ap.td], eu.td: offer(t, eu, "shop", "healed")[eu.td],
	})
	ap.waitServices("us-east", "activated") // signed by the new issuer
	ap.waitUp(us, true)
	if b := eu.m.View().Peer(us.td).Bundle; b.Sequence() != 1 {
		t.Errorf("eu-west was reached: %d", b.Sequence())
	}

	w.setCut("us-east", "eu-west", false) // it knows the old root only: the sibling certificate verifies
	eu.waitBundle(us, root.Bundle())
	us.waitSeen(eu, 2)
	eu.waitServices("us-east", "healed")

	root.retire()
	for _, c := range []*cluster{eu, ap} {
		c.waitBundle(us, root.Bundle())
		us.waitSeen(c, 3)
		c.waitUp(us, true)
		if n := len(c.m.View().Peer(us.td).Bundle.Roots()); n != 1 {
			t.Errorf("%s: %d roots", c.name, n)
		}
	}
	us.m.SetOffers(offer(t, eu, "shop", "retired"))
	eu.waitServices("us-east", "retired")
	eu.restart()
	eu.waitBundle(us, root.Bundle())
	eu.waitUp(us, true)
	for _, c := range []*cluster{us, eu, ap} {
		if a := c.m.View().Alarms; len(a) != 0 {
			t.Errorf("%s: alarms %v", c.name, a)
		}
	}
	if now := eu.m.View().Peer(us.td).Joined; !now.Equal(joined) {
		t.Error("eu-west has joined again")
	}
}

// TestRetiredWithoutAMember: who missed all of a rotation (retire was forced) trusts nothing of the new root, and neither a token alone
// nor an introduction changes that: its operator evicts and joins again.
func TestRetiredWithoutAMember(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	root := us.rotates()
	w.start()
	admit(t, us, eu)
	eu.waitBundle(us, root.Bundle())
	w.setCut("us-east", "eu-west", true)
	eu.waitUp(us, false)
	held := eu.m.View().Peer(us.td).Bundle
	root.prepare()
	root.activate()
	root.retire()
	w.setCut("us-east", "eu-west", false)
	token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
	if _, err := eu.join(token); !problem.Is(err, problem.NameTaken) {
		t.Fatalf("join under a root that nothing leads to: %v", err)
	}
	if p := eu.m.View().Peer(us.td); p.TunnelUp || !p.Bundle.Equal(held) || p.State != federate.StateReady {
		t.Errorf("after the refusal: %+v", p)
	}
	if list, _ := us.m.TokenList(context.Background()); list[len(list)-1].GetState() != "unused" && list[0].GetState() != "unused" {
		t.Errorf("the refused join used the token up: %v", list)
	}
	for _, side := range [][2]*cluster{{eu, us}, {us, eu}} {
		if _, err := side[0].m.Evict(context.Background(), federation.ClusterName(side[1].name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := eu.join(us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})); err != nil {
		t.Fatal(err)
	}
	eu.waitBundle(us, root.Bundle())
}

// TestBundlesDoNotGoBack is the part of bundles in T33: replays of older catalogs and bundles, by the same gateway, after a restart and
// after the loss of what was stored; two bundles of one number; a control plane restored from before a rotation.
func TestBundlesDoNotGoBack(t *testing.T) {
	newPair := func(t *testing.T) (w *world, us, eu *cluster, root *rotor) {
		w = newWorld(t, "us-east", "eu-west")
		us, eu = w.clusters["us-east"], w.clusters["eu-west"]
		root = us.rotates()
		w.start()
		admit(t, us, eu)
		eu.waitBundle(us, root.Bundle())
		return w, us, eu, root
	}
	replay := func(eu, us *cluster, u *controlpb.CatalogUpdate) {
		eu.gw.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Catalog{Catalog: &controlpb.PeerCatalog{
			OriginTrustDomain: us.td.String(), Update: u,
		}}})
	}
	t.Run("replayed by the gateway", func(t *testing.T) {
		_, us, eu, root := newPair(t)
		old := us.gw.cache.Update(eu.td, 0, 0)
		root.prepare()
		eu.waitBundle(us, root.Bundle())
		replay(eu, us, old)
		eu.waitAlarm("catalog_refused")
		eu.restart()
		eu.waitGateway()
		eu.waitBundle(us, root.Bundle())
		replay(eu, us, old)
		eu.waitAlarm("catalog_refused")
		if p := eu.m.View().Peer(us.td); !p.Bundle.Equal(root.Bundle()) {
			t.Errorf("held: %d", p.Bundle.Sequence())
		}
	})
	t.Run("after the loss of the stored catalog", func(t *testing.T) {
		w, us, eu, root := newPair(t)
		old := us.gw.cache.Update(eu.td, 0, 0)
		root.prepare()
		eu.waitBundle(us, root.Bundle())
		w.setCut("us-east", "eu-west", true)
		eu.kill()
		must(t, eu.dir.Remove("catalogs/"+us.td.String()+".catalog"))
		eu.start()
		eu.waitGateway()
		replay(eu, us, old) // nothing tells that the catalog is old; the bundle in it is
		eu.waitAlarm("bundle_rollback")
		p := eu.m.View().Peer(us.td)
		if !p.Bundle.Equal(root.Bundle()) || p.BundleError == "" || p.Refused != "" {
			t.Errorf("held %d, bundle error %q, catalog refused %q", p.Bundle.Sequence(), p.BundleError, p.Refused)
		}
		w.setCut("us-east", "eu-west", false)
		eu.waitBundle(us, root.Bundle())
	})
	t.Run("two of one number", func(t *testing.T) {
		_, us, eu, root := newPair(t)
		held := root.Bundle()
		root.set(1, root.roots[0], root.newRoot("another"))
		eu.waitAlarm("bundle_fork")
		if p := eu.m.View().Peer(us.td); !p.Bundle.Equal(held) || !strings.Contains(p.BundleError, "two bundles") || p.State != federate.StateReady {
			t.Errorf("held %d roots, %q", len(p.Bundle.Roots()), p.BundleError)
		}
		root.set(2, root.roots...)
		eu.waitBundle(us, root.Bundle())
	})
	t.Run("restored from a backup", func(t *testing.T) {
		_, us, eu, root := newPair(t)
		first := root.roots[0]
		root.prepare()
		eu.waitBundle(us, root.Bundle())
		us.waitSeen(eu, 2)
		held := root.Bundle()
		root.set(1, first)
		eu.waitAlarm("bundle_rollback")
		us.m.SetOffers(offer(t, eu, "shop", "served"))
		eu.waitServices("us-east", "served") // signed under a root that is trusted
		if p := eu.m.View().Peer(us.td); !p.Bundle.Equal(held) {
			t.Errorf("held: %d", p.Bundle.Sequence())
		}
		us.waitAlarm("own_bundle_rollback")
		us.waitSeen(eu, 0) // what it acknowledged is nothing that we know of
	})
	t.Run("restored from a backup, and taken past what members hold", func(t *testing.T) {
		_, us, eu, root := newPair(t)
		first := root.roots[0]
		root.prepare()
		eu.waitBundle(us, root.Bundle())
		us.waitSeen(eu, 2)
		raise := root.raise
		us.raise.Store(&raise)
		root.set(1, first)
		us.waitAlarm("own_bundle_rollback")
		us.waitSeen(eu, 3)
		eu.waitBundle(us, root.Bundle())
	})
}

// TestBundleSurvivesAKill: the catalog is stored, the record is not yet; the next life takes the bundle from the catalog, before any
// gateway is there.
func TestBundleSurvivesAKill(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	root := us.rotates()
	w.start()
	admit(t, us, eu)
	eu.waitBundle(us, root.Bundle())
	file := "peers/" + us.td.String() + ".json"
	record, err := eu.dir.ReadState(file)
	must(t, err)
	root.prepare()
	eu.waitBundle(us, root.Bundle())
	eu.kill()
	us.kill()
	must(t, eu.dir.WriteState(file, record))
	eu.start()
	if p := eu.m.View().Peer(us.td); !p.Bundle.Equal(root.Bundle()) {
		t.Errorf("bundle %d", p.Bundle.Sequence())
	}
	eu.kill()
	now, err := eu.dir.ReadState(file)
	must(t, err)
	if bytes.Equal(now, record) {
		t.Error("the record was not written again")
	}
}

// TestStoredCatalogOfAnEarlierCluster: a cluster is made anew under the same trust domain, and introduced; what is stored of the earlier
// one, with its higher numbers, does not bring the old root back at the next start.
func TestStoredCatalogOfAnEarlierCluster(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	root := us.rotates()
	w.start()
	root.prepare()
	admit(t, us, eu)
	eu.waitBundle(us, root.Bundle())
	eu.kill()
	us.kill()
	fresh := newRotor(t, us.td)
	file := "peers/" + us.td.String() + ".json"
	data, err := eu.dir.ReadState(file)
	must(t, err)
	var record map[string]any
	must(t, json.Unmarshal(data, &record))
	hash := fresh.Bundle().Hash()
	record["bundle"], record["bundleHash"], record["bundleSource"] = json.RawMessage(fresh.Bundle().Marshal()), hex.EncodeToString(hash[:]), "join"
	data, err = json.Marshal(record)
	must(t, err)
	must(t, eu.dir.WriteState(file, data))
	eu.start()
	if p := eu.m.View().Peer(us.td); !p.Bundle.Equal(fresh.Bundle()) {
		t.Errorf("the earlier cluster's bundle %d is back", p.Bundle.Sequence())
	}
}

// TestSeenWaitsForProxies: an acknowledgement is told when every proxy has given it, not when the control plane has the bundle; it
// survives a restart, and is never taken back for one that is not known.
func TestSeenWaitsForProxies(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	root := us.rotates()
	eu.say(func() { eu.trust.acks = map[spiffeid.TrustDomain]uint64{} })
	w.start()
	admit(t, us, eu)
	eu.waitBundle(us, root.Bundle())
	if n := us.m.View().Peer(eu.td).SeenOurs; n != 0 {
		t.Errorf("seen %d before any proxy", n)
	}
	eu.say(func() { eu.trust.acks[us.td] = 1 })
	us.waitSeen(eu, 1)
	root.prepare()
	eu.waitBundle(us, root.Bundle())
	us.m.SetOffers(offer(t, eu, "shop", "a"))
	eu.waitServices("us-east", "a")
	eu.m.SetOffers(offer(t, us, "shop", "b"))
	us.waitServices("eu-west", "b") // whatever eu-west says of the bundle is here with it
	if n := us.m.View().Peer(eu.td).SeenOurs; n != 1 {
		t.Errorf("seen %d: the control plane has it, the proxies have not", n)
	}
	eu.say(func() { delete(eu.trust.acks, us.td) }) // no proxy is connected
	eu.restart()
	eu.waitGateway()
	eu.m.SetOffers(offer(t, us, "shop", "c"))
	us.waitServices("eu-west", "c")
	if n := us.m.View().Peer(eu.td).SeenOurs; n != 1 {
		t.Errorf("seen %d after a restart", n)
	}
	eu.say(func() { eu.trust.acks[us.td] = 2 })
	us.waitSeen(eu, 2)
}

// TestDenialCrosses: what a member withdraws of its own is known to its peers, also after their restart, and ends when it is admitted
// again. A withdrawn gateway is advertised to nobody, and its tunnels end.
func TestDenialCrosses(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west")
	us, eu := w.clusters["us-east"], w.clusters["eu-west"]
	w.start()
	admit(t, us, eu)
	pay, err := spiffeid.Workload(us.td, "shop", "pay")
	must(t, err)
	foreign, err := spiffeid.Workload(eu.td, "shop", "pay")
	must(t, err)
	gateway, err := spiffeid.Gateway(us.td, "gateway-1")
	must(t, err)
	eu.eventually("a gateway", func(v *federate.View) bool { return len(v.Peer(us.td).Gateways) == 1 })
	is := func(want ...catalog.Denial) func(v *federate.View) bool {
		return func(v *federate.View) bool { return slices.Equal(v.Peer(us.td).Denied, want) }
	}
	us.say(func() { us.trust.denied = []catalog.Denial{{ID: pay, At: time.Now()}, {ID: foreign}} })
	eu.eventually("denied", is(catalog.Denial{ID: pay}))
	before := time.UnixMilli(1_700_000_000_123).UTC()
	us.say(func() { us.trust.denied = []catalog.Denial{{ID: pay, IssuedBefore: before}} })
	eu.eventually("admitted again", is(catalog.Denial{ID: pay, IssuedBefore: before}))
	eu.restart()
	if !is(catalog.Denial{ID: pay, IssuedBefore: before})(eu.m.View()) {
		t.Errorf("after a restart: %v", eu.m.View().Peer(us.td).Denied)
	}
	eu.waitUp(us, true)
	us.say(func() { us.trust.denied = nil })
	eu.eventually("ended", is())
	// its key was stolen before it was made anew: older certificates alone are out
	us.say(func() { us.trust.denied = []catalog.Denial{{ID: gateway, IssuedBefore: before}} })
	eu.eventually("gateway renewed", is(catalog.Denial{ID: gateway, IssuedBefore: before}))
	if _, err := us.m.TokenIssue(context.Background(), &controlpb.TokenIssueRequest{Cluster: "ap-south"}); err != nil {
		t.Errorf("a gateway that was admitted again is not advertised: %v", err)
	}
	us.say(func() { us.trust.denied = []catalog.Denial{{ID: gateway}} })
	eu.eventually("gateway withdrawn", is(catalog.Denial{ID: gateway}))
	eu.waitUp(us, false)
	if v := eu.m.View().Peer(us.td).Catalog; len(v.Gateways) != 0 {
		t.Errorf("advertised: %v", v.Gateways)
	}
	if _, err := us.m.TokenIssue(context.Background(), &controlpb.TokenIssueRequest{Cluster: "ap-south"}); !problem.Is(err, problem.NoGateway) {
		t.Errorf("a token names a withdrawn gateway: %v", err)
	}
}

// TestLyingMember: a member that withdraws the identities of others, or shows their bundles, is refused with its whole catalog.
func TestLyingMember(t *testing.T) {
	w := newWorld(t, "us-east", "eu-west", "ap-south")
	w.start()
	us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
	admit(t, us, eu)
	admit(t, us, ap)
	eu.m.SetOffers(offer(t, us, "shop", "honest"))
	us.waitServices("eu-west", "honest")
	signer := eu.identity(spiffeid.CatalogSigner(eu.td))
	epoch := us.m.View().Peer(eu.td).Catalog.Head.Epoch
	foreignBundle, err := catalog.BundleEntry(ap.ca.Bundle())
	must(t, err)
	eu.kill() // the honest one would be heard between two lies, and what was refused forgotten
	deny := func(id string) (key string, body []byte) {
		body, err := proto.Marshal(&controlpb.DeniedIdentity{SpiffeId: id})
		must(t, err)
		_, path, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
		return "deny/" + path, body
	}
	for i, id := range []string{"spiffe://us-east.acme/strait/gateway/gateway-1", "spiffe://ap-south.acme/ns/shop/sa/pay", "spiffe://us-east.acme/strait/controlplane", ""} {
		key, body := "bundle", foreignBundle
		if id != "" {
			key, body = deny(id)
		}
		lie := publish(t, eu.td, us.td, signer, epoch+uint64(i)+1, map[string][]byte{key: body})
		us.gw.send(&controlpb.GatewayMessage{Message: &controlpb.GatewayMessage_Catalog{Catalog: &controlpb.PeerCatalog{
			OriginTrustDomain: eu.td.String(), Update: lie,
		}}})
		us.eventually("refusal of "+key, func(v *federate.View) bool {
			return strings.Contains(v.Peer(eu.td).Refused, fmt.Sprintf("entry %q", key))
		})
		p := us.m.View().Peer(eu.td)
		if len(p.Denied) != 0 || !p.Bundle.Equal(eu.ca.Bundle()) || p.BundleError == "" {
			t.Errorf("%s: denied %v, bundle %v, error %q", key, p.Denied, p.Bundle, p.BundleError)
		}
	}
	us.waitAlarm("catalog_refused")
}

// publish signs entries as td's origin would, whatever they are.
func publish(t *testing.T, td, consumer spiffeid.TrustDomain, signer func() *trust.Identity, epoch uint64, entries map[string][]byte) *controlpb.CatalogUpdate {
	t.Helper()
	o, err := catalog.NewOrigin(catalog.OriginConfig{
		Self: td, Signer: signer, Debounce: time.Nanosecond, Epoch: func(context.Context, uint64) (uint64, error) { return epoch, nil },
	})
	must(t, err)
	must(t, o.Set(consumer, entries))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = o.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for {
		changed := o.Changed()
		if u := o.Update(consumer, 0, 0); u != nil {
			return u
		}
		<-changed
	}
}

// TestJoinDuringARotation: tokens pin the roots of the moment; they work until the root that they name is retired, and the joiner ends with
// the whole present bundle.
func TestJoinDuringARotation(t *testing.T) {
	for _, c := range []struct {
		name         string
		before, then func(*rotor)
		refused      bool
	}{
		{"prepared since", func(*rotor) {}, (*rotor).prepare, false},
		{"activated since", func(*rotor) {}, func(r *rotor) { r.prepare(); r.activate() }, false},
		{"issued while prepared", (*rotor).prepare, (*rotor).activate, false},
		{"issued while activated", func(r *rotor) { r.prepare(); r.activate() }, func(*rotor) {}, false},
		{"retired since", func(*rotor) {}, func(r *rotor) { r.prepare(); r.activate(); r.retire() }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "us-east", "eu-west")
			us, eu := w.clusters["us-east"], w.clusters["eu-west"]
			root := us.rotates()
			w.start()
			c.before(root)
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			c.then(root)
			eu.waitGateway()
			_, err := eu.join(token)
			if c.refused {
				if !problem.Is(err, problem.IdentityMismatch) {
					t.Errorf("got %v", err)
				}
				return
			}
			must(t, err)
			eu.waitBundle(us, root.Bundle())
			us.waitSeen(eu, root.Bundle().Sequence())
			if len(eu.m.View().Alarms)+len(us.m.View().Alarms) != 0 {
				t.Errorf("alarms %v %v", eu.m.View().Alarms, us.m.View().Alarms)
			}
		})
	}
}

// TestIntroducedWhileItRotates: the subject's root rotates between the introduction and its approval.
func TestIntroducedWhileItRotates(t *testing.T) {
	for _, c := range []struct {
		name string
		then func(*rotor)
	}{
		{"prepared", (*rotor).prepare},
		{"activated", func(r *rotor) { r.prepare(); r.activate() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "us-east", "eu-west", "ap-south")
			us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
			root := ap.rotates()
			w.start()
			admit(t, us, eu)
			admit(t, us, ap)
			eu.waitState("ap-south", federate.StateAwaiting)
			ap.waitState("eu-west", federate.StateAwaiting)
			c.then(root)
			us.waitBundle(ap, root.Bundle())
			eu.eventually("introduced again", func(v *federate.View) bool { return v.Peer(ap.td).BundleHash == root.Bundle().Hash() })
			approve(t, eu, "ap-south")
			approve(t, ap, "eu-west")
			eu.waitState("ap-south", federate.StateReady)
			ap.waitState("eu-west", federate.StateReady)
			eu.waitBundle(ap, root.Bundle())
			ap.waitSeen(eu, 2)
		})
	}
	t.Run("retired, after approval by one side", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, "us-east", "eu-west", "ap-south")
		us, eu, ap := w.clusters["us-east"], w.clusters["eu-west"], w.clusters["ap-south"]
		root := ap.rotates()
		w.start()
		admit(t, us, eu)
		admit(t, us, ap)
		eu.waitState("ap-south", federate.StateAwaiting)
		ap.waitState("eu-west", federate.StateAwaiting)
		approve(t, eu, "ap-south")
		root.prepare()
		us.waitBundle(ap, root.Bundle())
		root.activate()
		root.retire()
		us.waitBundle(ap, root.Bundle())
		// the fingerprint that was approved is another one now
		eu.eventually("introduced again", func(v *federate.View) bool {
			p := v.Peer(ap.td)
			return p.BundleHash == root.Bundle().Hash() && p.State == federate.StateAwaiting
		})
		approve(t, eu, "ap-south")
		approve(t, ap, "eu-west")
		eu.waitState("ap-south", federate.StateReady)
		ap.waitState("eu-west", federate.StateReady)
		for _, c := range []*cluster{us, eu, ap} {
			for _, a := range c.m.View().Alarms {
				if a.Kind != "catalog_refused" { // both sides dial, and catalogs on two ways overtake each other
					t.Errorf("%s: alarm %v", c.name, a)
				}
			}
		}
	})
}

func approve(t *testing.T, c *cluster, peer federation.ClusterName) {
	t.Helper()
	if _, err := c.m.Approve(context.Background(), peer); err != nil {
		t.Fatal(err)
	}
}

// TestWhoIsKnown: a member that rotated its root is itself, with a token for its name as well; another cluster that takes its name and trust
// domain is not, whatever old roots it shows.
func TestWhoIsKnown(t *testing.T) {
	t.Run("rotated", func(t *testing.T) {
		w := newWorld(t, "us-east", "eu-west")
		us, eu := w.clusters["us-east"], w.clusters["eu-west"]
		root := eu.rotates()
		w.start()
		admit(t, us, eu)
		us.waitBundle(eu, root.Bundle())
		w.setCut("us-east", "eu-west", true)
		us.waitUp(eu, false)
		root.prepare()
		root.activate()
		token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
		w.setCut("us-east", "eu-west", false)
		if _, err := eu.join(token); err != nil {
			t.Fatalf("a member that rotated its root: %v", err)
		}
		us.waitBundle(eu, root.Bundle())
		if a := us.m.View().Alarms; len(a) != 0 {
			t.Errorf("alarms %v", a)
		}
	})
	for _, shows := range []string{"its own root", "the member's root beside it"} {
		t.Run("another cluster with "+shows, func(t *testing.T) {
			w := newWorld(t, "us-east", "eu-west")
			us, eu := w.clusters["us-east"], w.clusters["eu-west"]
			root := eu.rotates()
			w.start()
			admit(t, us, eu)
			us.waitBundle(eu, root.Bundle())
			held := us.m.View().Peer(eu.td).Bundle
			eu.kill()
			thief := w.add("eu-west", "eu-west.acme")
			fake := thief.rotates()
			if shows != "its own root" {
				fake.set(9, root.roots[0], fake.roots[0])
			}
			thief.start()
			t.Cleanup(thief.kill)
			token := us.issue(&controlpb.TokenIssueRequest{Cluster: "eu-west"})
			thief.waitGateway()
			if _, err := thief.join(token); !problem.Is(err, problem.NameTaken) {
				t.Errorf("got %v", err)
			}
			us.waitAlarm("name_taken")
			if p := us.m.View().Peer(eu.td); !p.Bundle.Equal(held) || p.State != federate.StateReady {
				t.Errorf("the member was changed: %+v", p)
			}
		})
	}
}
