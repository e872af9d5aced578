// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"maps"
	"math/bits"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// emitMembers makes what concerns members as such: bundles, peers, gateways, and our gateways' records for them.
func (r *run) emitMembers() {
	self := r.in.Self
	if len(self.Bundle) > 0 {
		own := &controlpb.Bundle{TrustDomain: self.TrustDomain.String(), Jwks: self.Bundle, Sequence: self.BundleSeq, Cluster: string(self.Cluster)}
		if !self.RenewIssuedBefore.IsZero() {
			own.RenewIssuedBeforeMs = self.RenewIssuedBefore.UnixMilli()
		}
		r.put(controlpb.TypeBundle, self.TrustDomain.String(), own)
	}
	for _, p := range r.peers {
		m := &controlpb.Peer{
			TrustDomain: p.TrustDomain.String(), Cluster: string(p.Cluster), Federation: string(p.Federation), Region: p.Region,
			State: controlpb.PeerState_PEER_STATE_JOINING, BundleJwks: p.Bundle, BundleSequence: p.BundleSeq,
		}
		if p.Ready {
			m.State = controlpb.PeerState_PEER_STATE_READY
			if len(p.Bundle) > 0 {
				r.put(controlpb.TypeBundle, p.TrustDomain.String(),
					&controlpb.Bundle{TrustDomain: p.TrustDomain.String(), Jwks: p.Bundle, Sequence: p.BundleSeq, Cluster: string(p.Cluster)})
			}
		}
		for _, g := range p.Gateways {
			m.Gateways = append(m.Gateways, proto.CloneOf(g))
		}
		slices.SortFunc(m.Gateways, func(a, b *controlpb.GatewayRecord) int { return cmp.Compare(a.Name, b.Name) })
		r.put(controlpb.TypePeer, p.TrustDomain.String(), m)
	}
	r.emitForeign()
	for _, g := range r.in.Gateways {
		id, err := spiffeid.Gateway(self.TrustDomain, g.Name)
		if err != nil {
			r.problem("gateway %q: %v", g.Name, err)
			continue
		}
		if r.denied[id] {
			continue
		}
		r.put(controlpb.TypeGateway, g.Name, &controlpb.Gateway{Name: g.Name, LocalAddress: g.LocalAddress, SpiffeId: id.String(), Draining: g.Draining})
	}
}

// catalogOf begins what one peer sees of us: the gateways.
func (r *run) catalogOf(*peer) map[string]proto.Message {
	entries := map[string]proto.Message{}
	for _, g := range r.in.Gateways {
		if _, ok := r.out.Resources[controlpb.TypeGateway][g.Name]; ok {
			entries["gw/"+g.Name] = &controlpb.GatewayRecord{Name: g.Name, Addresses: slices.Clone(g.Advertise), Zone: g.Zone}
		}
	}
	return entries
}

// emitServices makes a Service for each one that is here or offered to us.
func (r *run) emitServices() {
	remote := r.remotes()
	names := map[federation.ServiceName]bool{}
	for n := range r.services {
		names[n] = true
	}
	for n := range remote {
		names[n] = true
	}
	for n := range names {
		m := &controlpb.Service{Namespace: n.Namespace, Name: n.Name, Remote: remote[n]}
		policy, own := r.policyFor(n)
		m.Policy, m.OwnLimits = policy, limits(own)
		if s := r.services[n]; s != nil {
			s.drained = own
			m.Local = r.localEndpoints(s)
			if p := r.failoverOf[n]; p != nil {
				s.revisions = append(s.revisions, p.obj.ResourceVersion)
			}
			m.Revision = s.revision()
			for _, p := range s.ports {
				m.Ports = append(m.Ports, p.proto())
			}
		} else {
			m.Ports = remotePorts(m.Remote)
		}
		r.put(controlpb.TypeService, n.String(), m)
	}
}

func (s *service) limits() *controlpb.OwnerLimits { return limits(s.drained) }

// localEndpoints groups the instances of s by sidecar.
func (r *run) localEndpoints(s *service) []*controlpb.LocalEndpoint {
	type group struct {
		proxy     *proxy
		workloads map[string]*workload
		ports     map[string]bool
	}
	groups := map[proxyKey]*group{}
	for _, p := range s.ports {
		for _, i := range p.instances {
			x := i.proxy.session
			if x == nil || x.InboundAddress == "" || r.denied[i.id] {
				continue
			}
			g := groups[i.proxy.key]
			if g == nil {
				g = &group{i.proxy, map[string]*workload{}, map[string]bool{}}
				groups[i.proxy.key] = g
			}
			g.workloads[i.obj.Name] = i.workload
			g.ports[string(p.name)] = true
		}
	}
	var out []*controlpb.LocalEndpoint
	for _, k := range slices.SortedFunc(maps.Keys(groups), compareProxies) {
		g := groups[k]
		x := g.proxy.session
		e := &controlpb.LocalEndpoint{
			Proxy: k.String(), InboundAddress: x.InboundAddress, SpiffeId: g.proxy.id.String(),
			Locality: &controlpb.Locality{Region: cmp.Or(x.Locality.Region, r.in.Self.Locality.Region), Zone: cmp.Or(x.Locality.Zone, r.in.Self.Locality.Zone)},
			Health:   &controlpb.HealthCounts{}, Draining: x.Draining, ReporterSilent: x.Silent,
		}
		active := 0
		for _, name := range slices.Sorted(maps.Keys(g.workloads)) {
			w := g.workloads[name]
			if !w.obj.Spec.Drain {
				active++
				count(e.Health, w, g.ports)
			}
			e.Instances = append(e.Instances, instanceHealth(w, g.ports)...)
		}
		e.Draining = e.Draining || active == 0
		out = append(out, e)
	}
	return out
}

func instanceHealth(w *workload, ports map[string]bool) []*controlpb.InstanceHealth {
	var out []*controlpb.InstanceHealth
	for _, v := range w.proxy.verdicts[w.obj.Name] {
		if v.Port == "" || ports[v.Port] {
			out = append(out, &controlpb.InstanceHealth{Workload: v.Workload, PortName: v.Port, Health: v.Health, Reason: v.Reason})
		}
	}
	slices.SortFunc(out, func(a, b *controlpb.InstanceHealth) int {
		return cmp.Or(cmp.Compare(a.PortName, b.PortName), cmp.Compare(a.Health, b.Health), cmp.Compare(a.Reason, b.Reason))
	})
	if len(out) == 0 {
		out = append(out, &controlpb.InstanceHealth{Workload: w.obj.Name})
	}
	return out
}

// remotes collects what ready peers offer, by service, each list sorted by cluster.
func (r *run) remotes() map[federation.ServiceName][]*controlpb.RemoteCluster {
	out := map[federation.ServiceName][]*controlpb.RemoteCluster{}
	for _, p := range r.peers {
		if !p.Ready || p.Catalog == nil {
			continue
		}
		seen := map[federation.ServiceName]bool{}
		for _, o := range p.Catalog.Services {
			n, ok := r.judge(p, o.Service)
			if !ok || seen[n] {
				continue
			}
			seen[n] = true
			out[n] = append(out[n], r.remote(p, n, o))
		}
	}
	return out
}

// judge says whether an entry speaks only of what its peer may speak of.
func (r *run) judge(p *peer, s *controlpb.CatalogService) (federation.ServiceName, bool) {
	n, err := federation.NewServiceName(s.GetService().GetNamespace(), s.GetService().GetName())
	if err != nil {
		r.problem("peer %s offers a service without a proper name", p.Cluster)
		return n, false
	}
	for _, id := range s.GetSpiffeIds() {
		v, err := spiffeid.Parse(id)
		if err != nil || v.TrustDomain() != p.TrustDomain {
			r.problem("peer %s offers %s with an identity outside its trust domain: the entry is dropped", p.Cluster, n)
			return n, false
		}
	}
	for _, port := range s.GetPorts() {
		if _, err := federation.ParsePortName(port.GetName()); err != nil {
			r.problem("peer %s offers %s with a port without a proper name: the entry is dropped", p.Cluster, n)
			return n, false
		}
	}
	return n, true
}

func (r *run) remote(p *peer, n federation.ServiceName, o Offered) *controlpb.RemoteCluster {
	m := &controlpb.RemoteCluster{
		Cluster: string(p.Cluster), Federation: string(p.Federation), TrustDomain: p.TrustDomain.String(), Region: p.Region,
		SpiffeIds: sorted(o.Service.GetSpiffeIds()), Zones: map[string]*controlpb.HealthCounts{}, Same: p.sameIn(n.Namespace),
		Freshness: p.Catalog.Freshness, CatalogEpoch: p.Catalog.Epoch, CatalogSeq: o.Version,
		TunnelUp: p.Tunnel.Up, RttSeconds: coarse(p.Tunnel.RTT).Seconds(), Transport: p.Tunnel.Transport, Spare: o.Service.GetSpare(),
	}
	m.Ports = clonePorts(o.Service.GetPorts())
	for z, c := range o.Service.GetZones() {
		m.Zones[z] = proto.CloneOf(c)
	}
	if l := o.Service.GetLimits(); l != nil {
		m.Limits = proto.CloneOf(l)
	}
	return m
}

// coarse rounds a round-trip time to about an eighth, so that its jitter does not push every service.
func coarse(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	step := max(time.Millisecond, (time.Duration(1) << bits.Len64(uint64(d)) / 8).Truncate(time.Millisecond))
	return max(step, d.Round(step))
}

func clonePorts(ports []*controlpb.ServicePort) []*controlpb.ServicePort {
	out := make([]*controlpb.ServicePort, 0, len(ports))
	for _, p := range ports {
		out = append(out, proto.CloneOf(p))
	}
	slices.SortFunc(out, func(a, b *controlpb.ServicePort) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// remotePorts are the ports of a service that is only elsewhere: those of the clusters that are the same service, the first by
// name deciding. Clusters without sameness say nothing here: their own lists serve calls pinned to them.
func remotePorts(list []*controlpb.RemoteCluster) []*controlpb.ServicePort {
	var out []*controlpb.ServicePort
	seen := map[string]bool{}
	for _, c := range list {
		if !c.Same {
			continue
		}
		for _, p := range c.Ports {
			if !seen[p.Name] {
				seen[p.Name] = true
				out = append(out, p)
			}
		}
	}
	return clonePorts(out)
}

// emitSelves says to each sidecar what it is.
func (r *run) emitSelves() {
	inbound := map[proxyKey][]*controlpb.InboundPort{}
	for _, s := range r.order {
		for _, p := range s.ports {
			var access *controlpb.Access
			byProxy := map[proxyKey][]*controlpb.Instance{}
			for _, i := range p.instances {
				byProxy[i.proxy.key] = append(byProxy[i.proxy.key], r.instance(i))
			}
			for k, list := range byProxy {
				if access == nil {
					access = r.accessOf(s, p)
				}
				inbound[k] = append(inbound[k], &controlpb.InboundPort{
					Service: s.ref(), PortName: string(p.name), PortNumber: uint32(p.spec.Port), Protocol: p.protocol,
					Sni:       federation.SNI(p.name, s.name, r.in.Self.Cluster, r.in.Self.Federation),
					Instances: list, Access: access,
				})
			}
		}
	}
	for k, p := range r.proxies {
		self := &controlpb.Self{
			Name: k.String(), SpiffeId: p.id.String(), Federation: string(r.in.Self.Federation), Cluster: string(r.in.Self.Cluster),
			TrustDomain: r.in.Self.TrustDomain.String(),
			Locality:    &controlpb.Locality{Region: r.in.Self.Locality.Region, Zone: r.in.Self.Locality.Zone},
			Inbound:     inbound[k],
			WorkloadApi: p.selectors(),
		}
		if x := p.session; x != nil {
			if !x.Locality.IsZero() {
				self.Locality = &controlpb.Locality{Region: cmp.Or(x.Locality.Region, r.in.Self.Locality.Region), Zone: cmp.Or(x.Locality.Zone, r.in.Self.Locality.Zone)}
			}
			self.LastState = maps.Clone(x.LastState)
		}
		slices.SortFunc(self.Inbound, func(a, b *controlpb.InboundPort) int {
			return cmp.Or(cmp.Compare(a.Service.Namespace, b.Service.Namespace), cmp.Compare(a.Service.Name, b.Service.Name), cmp.Compare(a.PortName, b.PortName))
		})
		r.put(controlpb.TypeSelf, k.String(), self)
	}
}

func (r *run) instance(i *instance) *controlpb.Instance {
	m := &controlpb.Instance{
		Workload: i.obj.Name, Address: joinHostPort(i.obj.Host(), i.number), Zone: i.zone(r.in.Self.Locality), Draining: i.obj.Spec.Drain,
	}
	if i.obj.Spec.Health != nil {
		m.HealthPath = i.obj.Spec.Health.Path
	}
	return m
}

func joinHostPort(host string, port int32) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
