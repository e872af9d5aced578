// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// changedLocked gives the origin what is offered now and publishes a new view if anything in it differs.
func (m *Manager) changedLocked() {
	m.refreshOffersLocked()
	next := m.buildLocked()
	if old := m.view.Load(); old != nil && sameView(old, next) {
		return
	}
	m.revision++
	next.Revision = m.revision
	m.view.Store(next)
	close(m.changed)
	m.changed = make(chan struct{})
	m.wakeLinksLocked()
}

func (m *Manager) buildLocked() *View {
	now := m.now()
	v := &View{
		Federation: m.cfg.Federation, Cluster: m.cfg.Cluster, TrustDomain: m.cfg.TrustDomain, Region: m.cfg.Region, Version: m.cfg.Version,
		Alarms: m.alarms, ownBundle: m.cfg.Bundle(),
	}
	var bundles []*trust.Bundle
	if v.ownBundle != nil {
		bundles = append(bundles, v.ownBundle)
	}
	for _, p := range m.peers {
		vp := m.peerViewLocked(p, now)
		if vp.Bundle != nil {
			bundles = append(bundles, vp.Bundle)
		}
		v.Peers = append(v.Peers, vp)
	}
	slices.SortFunc(v.Peers, func(a, b *Peer) int {
		return cmp.Or(strings.Compare(a.Cluster.String(), b.Cluster.String()), strings.Compare(a.TrustDomain.String(), b.TrustDomain.String()))
	})
	v.Bundles, _ = trust.NewBundles(bundles...) // one per trust domain by construction
	for _, name := range sortedKeys(m.gateways) {
		g := m.gateways[name]
		id, err := spiffeid.Gateway(m.cfg.TrustDomain, name)
		if err != nil {
			continue
		}
		v.Gateways = append(v.Gateways, &Gateway{
			Name: name, ID: id, LocalAddress: g.hello.GetLocalAddress(), Advertise: m.addresses(g.hello), Zone: g.hello.GetZone(),
			Version: g.hello.GetVersion(), Connected: g.connected, LastSeen: g.lastSeen,
		})
	}
	return v
}

func (m *Manager) peerViewLocked(p *peer, now time.Time) *Peer {
	r := p.rec
	v := &Peer{
		TrustDomain: r.TrustDomain, Cluster: r.Cluster, Federation: r.Federation, Region: r.Region, State: r.State,
		BundleHash: r.hash(), Gateways: gatewaysOut(r.Gateways), Sameness: r.Sameness, Refused: p.refused, IntroducedBy: r.IntroducedBy,
		Stages: r.Stages, Since: r.Since, Joined: r.Joined, Version: r.Version, ClockSkew: time.Duration(r.SkewMillis) * time.Millisecond,
	}
	if unfinished(r.State) {
		v.Expires = r.Expires
	}
	if r.trusted() {
		p.trustView(v, m.store.View(r.TrustDomain), m.cfg.Bundle())
		v.Tunnels = m.tunnelsLocked(r.TrustDomain)
		v.TunnelUp = slices.ContainsFunc(v.Tunnels, func(t Tunnel) bool { return t.GetState() == "up" })
	}
	if v.TunnelUp {
		p.lastUp = now
	}
	if r.State == StateReady {
		alive := v.TunnelUp || now.Sub(p.lastUp) < freshnessGrace || now.Sub(m.started) < freshnessGrace
		v.Catalog = m.store.View(r.TrustDomain)
		v.Freshness = m.store.Freshness(r.TrustDomain, alive)
		v.Conflict = m.store.Conflict(r.TrustDomain) != nil
		v.OfferedByUs = services(m.offers[r.TrustDomain])
	}
	v.Reason = reason(v, r, now)
	return v
}

// reason says why a peer is not simply ready.
func reason(v *Peer, r *record, now time.Time) string {
	switch {
	case v.State == StateAwaiting && r.Role == roleJoiner:
		return "its operator has to approve us"
	case v.State == StateAwaiting && r.Role == roleIntroduced:
		return "introduced by " + r.IntroducedBy.String() + "; waits for strait member approve " + r.Cluster.String()
	case v.State == StateAwaiting:
		return "waits for strait member approve " + r.Cluster.String()
	case v.State == StateJoining && v.Bundle == nil:
		return "approved; it has not proven its bundle yet"
	case v.State == StateJoining:
		return "the probes have not crossed both ways yet"
	case v.State == StateEvicted:
		return "evicted; the name stays reserved"
	case v.Conflict:
		return "it signed two catalogs with the same number"
	case !v.TunnelUp:
		return "no live tunnel"
	case v.Refused != "":
		return "its catalog was refused: " + v.Refused
	}
	return ""
}

func (m *Manager) tunnelsLocked(td spiffeid.TrustDomain) []Tunnel {
	var out []Tunnel
	for _, name := range sortedKeys(m.gateways) {
		for _, t := range m.gateways[name].tunnels {
			if t.GetPeerTrustDomain() == td.String() {
				out = append(out, Tunnel{Gateway: name, Tunnel: t})
			}
		}
	}
	return out
}

func (m *Manager) upLocked(td spiffeid.TrustDomain) bool {
	return slices.ContainsFunc(m.tunnelsLocked(td), func(t Tunnel) bool { return t.GetState() == "up" })
}

// sameView compares everything but the revision. Catalogs and tunnels are immutable and compared by pointer.
func sameView(a, b *View) bool {
	if len(a.Peers) != len(b.Peers) || len(a.Gateways) != len(b.Gateways) || len(a.Alarms) != len(b.Alarms) || !sameBundle(a.ownBundle, b.ownBundle) {
		return false
	}
	if n := len(a.Alarms); n > 0 && a.Alarms[n-1] != b.Alarms[n-1] {
		return false
	}
	for i := range a.Gateways {
		if !reflect.DeepEqual(a.Gateways[i], b.Gateways[i]) {
			return false
		}
	}
	for i := range a.Peers {
		if !samePeer(a.Peers[i], b.Peers[i]) {
			return false
		}
	}
	return true
}

func sameBundle(a, b *trust.Bundle) bool {
	return a == b || a != nil && b != nil && a.Equal(b)
}

func samePeer(a, b *Peer) bool {
	return a.TrustDomain == b.TrustDomain && a.Cluster == b.Cluster && a.Federation == b.Federation && a.Region == b.Region &&
		a.State == b.State && a.Reason == b.Reason && sameBundle(a.Bundle, b.Bundle) && a.BundleHash == b.BundleHash &&
		a.Catalog == b.Catalog && a.Freshness == b.Freshness && a.Conflict == b.Conflict && a.Refused == b.Refused &&
		a.TunnelUp == b.TunnelUp && a.OfferedByUs == b.OfferedByUs && a.IntroducedBy == b.IntroducedBy &&
		a.BundleUpdated.Equal(b.BundleUpdated) && a.BundleSource == b.BundleSource && a.BundleError == b.BundleError &&
		a.SeenOurs == b.SeenOurs && slices.Equal(a.Denied, b.Denied) && a.Since.Equal(b.Since) && a.Joined.Equal(b.Joined) && a.Expires.Equal(b.Expires) && a.Version == b.Version && a.ClockSkew == b.ClockSkew &&
		slices.Equal(a.Sameness, b.Sameness) && slices.Equal(a.Stages, b.Stages) && slices.Equal(a.Tunnels, b.Tunnels) &&
		slices.EqualFunc(a.Gateways, b.Gateways, func(x, y *controlpb.GatewayRecord) bool {
			return x.GetName() == y.GetName() && x.GetZone() == y.GetZone() && slices.Equal(x.GetAddresses(), y.GetAddresses())
		})
}

// Members lists the own cluster first, then the peers, as the operator API shows them at now.
func (v *View) Members(now time.Time) []*controlpb.Member {
	self := &controlpb.Member{
		Cluster: v.Cluster.String(), TrustDomain: v.TrustDomain.String(), Region: v.Region, State: "self", Version: v.Version,
		CatalogAgeSeconds: -1,
	}
	if v.ownBundle != nil {
		self.BundleSha256 = hexHash(v.ownBundle.Hash())
		self.RootNotAfterUnix = v.ownBundle.NotAfter().Unix()
	}
	for _, g := range v.Gateways {
		self.Gateways = append(self.Gateways, &controlpb.GatewayRecord{Name: g.Name, Addresses: g.Advertise, Zone: g.Zone})
	}
	out := []*controlpb.Member{self}
	for _, p := range v.Peers {
		out = append(out, p.Member(now))
	}
	return out
}

// Member is the peer as the operator API shows it at now.
func (p *Peer) Member(now time.Time) *controlpb.Member {
	m := &controlpb.Member{
		Cluster: p.Cluster.String(), TrustDomain: p.TrustDomain.String(), Region: p.Region, State: string(p.State), Reason: p.Reason,
		Sameness: p.Sameness, Gateways: p.Gateways, CatalogAgeSeconds: -1, ServicesOfferedByUs: uint32(p.OfferedByUs),
		BundleSha256: hexHash(p.BundleHash), IntroducedBy: p.IntroducedBy.String(), Version: p.Version,
		ClockSkewSeconds: p.ClockSkew.Seconds(), Conflict: p.Conflict, Stages: p.Stages,
	}
	for _, t := range p.Tunnels {
		m.Tunnels = append(m.Tunnels, t.Tunnel)
	}
	if !p.Joined.IsZero() {
		m.JoinedUnix = p.Joined.Unix()
	}
	if p.Bundle != nil {
		m.RootNotAfterUnix = p.Bundle.NotAfter().Unix()
	}
	if p.State == StateReady {
		if !p.TunnelUp {
			m.State = "unreachable"
		}
		m.Freshness = p.Freshness.String()
	}
	if c := p.Catalog; c != nil {
		m.CatalogEpoch, m.CatalogSeq = c.Head.Epoch, c.Head.Seq
		m.CatalogAgeSeconds = max(0, now.Sub(c.Head.IssuedAt).Seconds())
		m.ServicesOfferedToUs = uint32(len(c.Services))
	}
	return m
}

// member is the newest view of one peer for an answer to an operator.
func (m *Manager) member(cluster federation.ClusterName) *controlpb.Member {
	if p := m.View().ByCluster(cluster); p != nil {
		return p.Member(m.now())
	}
	return &controlpb.Member{Cluster: cluster.String()}
}
