// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// acked is the sequence of td's bundle that every live proxy has acknowledged; not ok while one has not, and while there is none.
func (c *ControlPlane) acked(td spiffeid.TrustDomain) (sequence uint64, ok bool) {
	out := c.compiled.Load() // before the acknowledgements: what is published later only makes them fewer
	if out == nil {
		return 0, false
	}
	name := td.String()
	if b, is := out.Resources[controlpb.TypeBundle][name].(*controlpb.Bundle); is {
		sequence = b.Sequence
	} else if p, is := out.Resources[controlpb.TypePeer][name].(*controlpb.Peer); is {
		sequence = p.BundleSequence
	}
	live := 0
	for _, url := range []string{controlpb.TypeBundle, controlpb.TypePeer} { // gateways judge a peer's tunnels by the latter
		if out.Resources[url][name] == nil {
			continue
		}
		n, subscribed, _ := c.discovery.Acked(url, name)
		if n < subscribed {
			return 0, false
		}
		live += subscribed
	}
	if live == 0 || sequence == 0 {
		return 0, false
	}
	return sequence, true
}

// ownDenials are this cluster's withdrawn identities, as members are told of them.
func (c *ControlPlane) ownDenials() []catalog.Denial {
	var out []catalog.Denial
	for id, d := range c.denied.All() {
		out = append(out, catalog.Denial{ID: id, IssuedBefore: d.IssuedBefore, At: d.At})
	}
	return out
}

// deniedInput is what a peer withdrew of its own.
func deniedInput(p *federate.Peer) []compile.Denied {
	var out []compile.Denied
	for _, d := range p.Denied {
		out = append(out, compile.Denied{ID: d.ID, Reason: "withdrawn by " + p.Cluster.String(), IssuedBefore: d.IssuedBefore})
	}
	return out
}
