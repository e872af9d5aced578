// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// TestPeersBundleIsAcknowledgedByEveryProxy: what a peer is told of is the bundle that all live proxies have acknowledged; one that is
// behind, or none at all, and nothing is told.
func TestPeersBundleIsAcknowledgedByEveryProxy(t *testing.T) {
	c := closed(t)
	eu, err := spiffeid.ParseTrustDomain("eu-west.acme")
	if err != nil {
		t.Fatal(err)
	}
	publish := func(sequence uint64) {
		t.Helper()
		all := map[string]proto.Message{eu.String(): &controlpb.Bundle{TrustDomain: eu.String(), Sequence: sequence}}
		if err := c.discovery.Replace(controlpb.TypeBundle, all); err != nil {
			t.Fatal(err)
		}
		c.compiled.Store(&compile.Output{Resources: map[string]map[string]proto.Message{controlpb.TypeBundle: all}})
	}
	want := func(when string, sequence uint64) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			changed := c.discovery.Changed()
			got, ok := c.acked(eu)
			if got == sequence && ok == (sequence > 0) {
				return
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("%s: %d %v, want %d", when, got, ok, sequence)
			}
		}
	}
	want("before anything is compiled", 0)
	publish(1)
	want("without proxies", 0)
	c.publishDenied(t)
	one, two := proxy(t, c, "shop/one-1", "one"), proxy(t, c, "shop/two-1", "two")
	for _, p := range []*ads{one, two} {
		p.ack(t)
		p.in <- &controlpb.DeltaDiscoveryRequest{TypeUrl: controlpb.TypeBundle, ResourceNamesSubscribe: []string{discovery.Wildcard}}
	}
	one.ack(t)
	two.ack(t)
	want("acknowledged by both", 1)
	publish(2)
	one.ack(t)
	want("acknowledged by one", 0)
	two.ack(t)
	want("acknowledged by both again", 2)
	// Joining peers are known to gateways alone, by another resource.
	all := map[string]proto.Message{eu.String(): &controlpb.Peer{TrustDomain: eu.String(), BundleSequence: 2}}
	if err := c.discovery.Replace(controlpb.TypePeer, all); err != nil {
		t.Fatal(err)
	}
	c.compiled.Store(&compile.Output{Resources: map[string]map[string]proto.Message{controlpb.TypePeer: all}})
	want("no gateway is there", 0)
}

// TestOwnDenialsAreTold: what is on the deny list is what members are told, with the time before which it counts.
func TestOwnDenialsAreTold(t *testing.T) {
	c := closed(t)
	web, err := spiffeid.Workload(c.self.trustDomain, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.denied.Add(web, "stolen"); err != nil {
		t.Fatal(err)
	}
	got := c.ownDenials()
	if len(got) != 1 || got[0].ID != web || !got[0].IssuedBefore.IsZero() || got[0].At.IsZero() {
		t.Fatalf("denials %v", got)
	}
	entries, left := catalog.DenialEntries(c.self.trustDomain, got)
	if left != 0 || entries[catalog.DenialKey(web)] == nil {
		t.Errorf("entries %v, %d left out", entries, left)
	}
	if err := c.denied.AddIssued(web, "leaked"); err != nil {
		t.Fatal(err)
	}
	if got = c.ownDenials(); len(got) != 1 || !got[0].IssuedBefore.IsZero() {
		t.Errorf("a withdrawal of older certificates weakened one of all: %v", got)
	}
}
