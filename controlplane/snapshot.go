// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/api"
	"github.com/strait-mesh/strait/controlplane/compile"
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/controlplane/sessions"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/register"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	// debounce gathers changes into one snapshot: so long after the first, whatever else comes.
	debounce      = 20 * time.Millisecond
	lastGoodFile  = "snapshot/last-good.json"
	resyncCompile = 30 * time.Second
)

// compileLoop turns what changed into resources and offers, one whole snapshot at a time.
func (c *ControlPlane) compileLoop(ctx context.Context) error {
	last := c.readLastGood()
	saved := ""
	resync := time.NewTicker(resyncCompile)
	defer resync.Stop()
	for {
		changed := []<-chan struct{}{c.objects.Changed(), c.sessions.Changed(), c.federate.Changed(), c.denied.Changed(), c.authorityChanged(), c.foreign.Changed()}
		revision := c.sessions.View().Revision
		in := c.input(last)
		out := compile.Compile(in)
		last = out.LastGood
		if err := c.apply(&in, &out); err != nil {
			return err
		}
		if text, err := json.Marshal(last); err == nil && string(text) != saved {
			saved = string(text)
			if err := c.dir.WriteState(lastGoodFile, text); err != nil {
				c.log.Error("last good policies not saved", "err", err)
			}
		}
		if !c.waitForChange(ctx, changed, revision, resync.C) {
			return nil
		}
	}
}

// waitForChange returns a moment after something changed that resources depend on, or false at the end of ctx. Decisions that
// sidecars report change nothing for anybody: they are told back at the next snapshot.
func (c *ControlPlane) waitForChange(ctx context.Context, changed []<-chan struct{}, revision uint64, resync <-chan time.Time) bool {
	for waiting := true; waiting; {
		select {
		case <-ctx.Done():
			return false
		case <-changed[0]:
			waiting = false
		case <-changed[1]:
			changed[1] = c.sessions.Changed()
			waiting = c.sessions.View().Revision == revision
		case <-changed[2]:
			waiting = false
		case <-changed[3]:
			waiting = false
		case <-changed[4]:
			waiting = false
		case <-changed[5]:
			waiting = false
		case <-resync:
			waiting = false
		}
	}
	t := time.NewTimer(debounce)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (c *ControlPlane) readLastGood() (l compile.LastGood) {
	data, err := c.dir.ReadState(lastGoodFile)
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Error("last good policies not read", "err", err)
		if !errors.Is(err, datadir.ErrCorrupt) {
			l = compile.LastGood{}
		}
	}
	return l
}

// apply publishes one snapshot. Ownership goes first: a resource may be asked for as soon as it is there.
func (c *ControlPlane) apply(in *compile.Input, out *compile.Output) error {
	owners := map[string]spiffeid.ID{}
	for _, r := range c.tokens.List() {
		if r.Grant.Kind == register.KindSidecar && r.Bound != "" {
			owners[r.Grant.Name] = r.Grant.SPIFFEID
		}
	}
	for name, m := range out.Resources[controlpb.TypeSelf] {
		if id, err := spiffeid.Parse(m.(*controlpb.Self).SpiffeId); err == nil {
			owners[name] = id
		}
	}
	c.owners.Store(&owners)
	for typeURL, all := range out.Resources {
		if err := c.discovery.Replace(typeURL, all); err != nil {
			return err
		}
	}
	offers := make(map[spiffeid.TrustDomain]map[string][]byte, len(out.Catalog))
	for td, entries := range out.Catalog {
		offers[td] = map[string][]byte{}
		for key, m := range entries {
			if !strings.HasPrefix(key, "svc/") {
				continue // gateway records are federate's own
			}
			body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				return err
			}
			offers[td][key] = body
		}
	}
	c.federate.SetOffers(offers)
	c.inputs.Store(in)
	c.compiled.Store(out)
	c.revision.Add(1)
	return nil
}

// input gathers the views.
func (c *ControlPlane) input(last compile.LastGood) compile.Input {
	view := c.federate.View()
	own := c.issuer.Bundle()
	in := compile.Input{
		Self: compile.Self{
			Federation: c.self.federation, Cluster: c.self.cluster, Locality: c.self.locality, TrustDomain: c.self.trustDomain,
			Bundle: own.Marshal(), BundleSeq: own.Sequence(), RenewIssuedBefore: c.recall(),
		},
		Objects: c.objects.Objects(), LastGood: last, Foreign: c.foreignInput(),
	}
	for _, s := range c.sessions.View().Sessions {
		in.Sessions = append(in.Sessions, sessionInput(s))
	}
	for _, g := range view.Gateways {
		in.Gateways = append(in.Gateways, compile.Gateway{Name: g.Name, LocalAddress: g.LocalAddress, Advertise: g.Advertise, Zone: g.Zone})
	}
	for _, p := range view.Peers {
		if peer, ok := peerInput(p); ok {
			in.Peers = append(in.Peers, peer)
		}
	}
	for id, d := range c.denied.All() {
		in.Denied = append(in.Denied, compile.Denied{ID: id, Reason: d.Reason, IssuedBefore: d.IssuedBefore})
	}
	return in
}

func sessionInput(s *sessions.Session) compile.Session {
	ns, proxy, _ := strings.Cut(s.Proxy, "/")
	out := compile.Session{
		Namespace: ns, Proxy: proxy, ID: s.ID, InboundAddress: s.InboundAddress, Locality: s.Locality, Silent: s.Silent,
		Draining: s.Draining, LastState: map[string][]byte{},
	}
	for _, i := range s.Instances {
		out.Instances = append(out.Instances, compile.InstanceHealth{Workload: i.Workload, Port: i.PortName, Health: i.Health, Reason: i.Reason})
	}
	for name, d := range s.Decisions {
		if len(d.Report.StateJson) > 0 {
			out.LastState[name.String()] = d.Report.StateJson
		}
	}
	return out
}

func peerInput(p *federate.Peer) (compile.Peer, bool) {
	if !p.Trusted() || p.Bundle == nil {
		return compile.Peer{}, false
	}
	out := compile.Peer{
		TrustDomain: p.TrustDomain, Cluster: p.Cluster, Federation: p.Federation, Region: p.Region, Ready: p.Ready(),
		Sameness: p.Sameness, Bundle: p.Bundle.Marshal(), BundleSeq: p.Bundle.Sequence(), Gateways: p.Gateways,
		Denied: deniedInput(p),
	}
	for _, t := range p.Tunnels {
		rtt := time.Duration(t.RttSeconds * float64(time.Second))
		if t.State == "up" && (!out.Tunnel.Up || rtt < out.Tunnel.RTT) {
			out.Tunnel = compile.Tunnel{Up: true, RTT: rtt, Transport: t.Transport}
		}
	}
	if p.Catalog != nil {
		out.Catalog = &compile.Catalog{Epoch: p.Catalog.Head.Epoch, Seq: p.Catalog.Head.Seq, Freshness: wire.FreshnessToProto(p.Freshness)}
		for _, s := range p.Catalog.Services {
			out.Catalog.Services = append(out.Catalog.Services, compile.Offered{Service: s})
		}
	}
	return out, true
}

// gatewayAddresses and introducers are read from the Federation object, where an operator may edit them.
func (c *ControlPlane) gatewayAddresses() []string {
	if f := c.federationObject(); f != nil && len(f.Spec.GatewayAddresses) > 0 {
		return f.Spec.GatewayAddresses
	}
	return c.facts.GatewayAddresses
}

func (c *ControlPlane) introducers() []federation.ClusterName {
	var out []federation.ClusterName
	if f := c.federationObject(); f != nil {
		for _, s := range f.Spec.Introducers {
			if name, err := federation.ParseClusterName(s); err == nil {
				out = append(out, name)
			}
		}
	}
	return out
}

func (c *ControlPlane) federationObject() *api.Federation {
	if c.objects == nil {
		return nil
	}
	for _, f := range c.objects.Objects().Federations {
		if f.Name == c.facts.Federation {
			return f
		}
	}
	return nil
}
