// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"maps"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/gateway/tunnel"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// Classes of subjects in the withdrawal registry.
const (
	classIn     withdrawal.Class = "stream_in"  // from a peer: peer, source identity, export
	classOut    withdrawal.Class = "stream_out" // to a peer: peer, source identity
	classCallee withdrawal.Class = "callee"     // the local end of a stream from a peer
	classLocal                   = withdrawal.LocalSession
)

// view is an immutable snapshot of what discovery said.
type view struct {
	peers     map[spiffeid.TrustDomain]*peer
	byCluster map[federation.ClusterName]*peer
	grants    map[grantKey]*grant
	services  map[federation.ServiceName]*controlpb.Service
	denied    withdrawal.Denials
}

type peer struct {
	td       spiffeid.TrustDomain
	cluster  federation.ClusterName
	ready    bool
	gateways []tunnel.Gateway
}

type grantKey struct {
	peer    spiffeid.TrustDomain
	service federation.ServiceName
}

type grant struct {
	ports  map[string]bool
	export string
}

func newView() *view {
	return &view{
		peers: map[spiffeid.TrustDomain]*peer{}, byCluster: map[federation.ClusterName]*peer{},
		grants: map[grantKey]*grant{}, services: map[federation.ServiceName]*controlpb.Service{},
		denied: withdrawal.Denials{},
	}
}

// changes says which parts of a view a set of changes touched.
type changes struct{ peers, grants, services, denied bool }

func (c changes) trust() bool { return c.peers || c.grants || c.denied }

// apply changes v, which nobody else sees yet; maps that it touches are copied first. own is the gateway's own cluster.
func (v *view) apply(c proxyclient.Change, own federation.ClusterName, touched *changes) {
	switch c.TypeURL {
	case controlpb.TypePeer:
		if !touched.peers {
			v.peers, touched.peers = maps.Clone(v.peers), true
		}
		td, err := spiffeid.ParseTrustDomain(c.Name)
		if err != nil {
			return
		}
		delete(v.peers, td)
		if p := parsePeer(c.Message, td, own); p != nil {
			v.peers[td] = p
		}
		v.byCluster = make(map[federation.ClusterName]*peer, len(v.peers))
		for _, p := range v.peers {
			v.byCluster[p.cluster] = p
		}
	case controlpb.TypeGrant:
		if !touched.grants {
			v.grants, touched.grants = maps.Clone(v.grants), true
		}
		key, ok := parseGrantName(c.Name)
		if !ok {
			return
		}
		delete(v.grants, key)
		if g := parseGrant(c.Message, key); g != nil {
			v.grants[key] = g
		}
	case controlpb.TypeService:
		if !touched.services {
			v.services, touched.services = maps.Clone(v.services), true
		}
		name, err := federation.ParseServiceName(c.Name)
		if err != nil {
			return
		}
		delete(v.services, name)
		if s, ok := c.Message.(*controlpb.Service); ok && s != nil {
			v.services[name] = s
		}
	case controlpb.TypeDenied:
		if !touched.denied {
			v.denied, touched.denied = maps.Clone(v.denied), true
		}
		id, err := spiffeid.Parse(c.Name)
		if err != nil {
			return
		}
		delete(v.denied, id)
		if d, ok := c.Message.(*controlpb.Denied); ok && d != nil {
			v.denied[id] = parseDenied(d)
		}
	}
}

func parsePeer(m proto.Message, td spiffeid.TrustDomain, own federation.ClusterName) *peer {
	r, ok := m.(*controlpb.Peer)
	if !ok || r == nil || r.TrustDomain != td.String() {
		return nil
	}
	cluster, err := federation.ParseClusterName(r.Cluster)
	if err != nil || cluster == own {
		return nil
	}
	p := &peer{td: td, cluster: cluster, ready: r.State == controlpb.PeerState_PEER_STATE_READY}
	for _, g := range r.Gateways {
		p.gateways = append(p.gateways, tunnel.Gateway{Name: g.Name, Addresses: g.Addresses})
	}
	return p
}

func parseDenied(d *controlpb.Denied) withdrawal.Denial {
	out := withdrawal.Denial{Reason: d.Reason}
	if d.IssuedBeforeMs != 0 {
		out.IssuedBefore = time.UnixMilli(d.IssuedBeforeMs)
	}
	return out
}

// parseGrantName takes "<trust domain>/<namespace>/<name>".
func parseGrantName(name string) (grantKey, bool) {
	td, service, ok := strings.Cut(name, "/")
	if !ok {
		return grantKey{}, false
	}
	t, err := spiffeid.ParseTrustDomain(td)
	if err != nil {
		return grantKey{}, false
	}
	s, err := federation.ParseServiceName(service)
	return grantKey{t, s}, err == nil
}

func parseGrant(m proto.Message, key grantKey) *grant {
	r, ok := m.(*controlpb.Grant)
	if !ok || r == nil || r.PeerTrustDomain != key.peer.String() || r.Service.GetNamespace() != key.service.Namespace ||
		r.Service.GetName() != key.service.Name {
		return nil
	}
	g := &grant{ports: make(map[string]bool, len(r.Ports)), export: r.ExportId}
	for _, p := range r.Ports {
		g.ports[p.Name] = true
	}
	return g
}

// exportOf is how a service's port is named in the registry.
func exportOf(s federation.ServiceName, port string) string { return s.String() + ":" + port }

func splitExport(e string) (federation.ServiceName, string, bool) {
	i := strings.LastIndexByte(e, ':')
	if i < 0 {
		return federation.ServiceName{}, "", false
	}
	s, err := federation.ParseServiceName(e[:i])
	return s, e[i+1:], err == nil
}

// granted reports whether peer td may reach port of s; an export id that is given must be the grant's.
func (v *view) granted(td spiffeid.TrustDomain, s federation.ServiceName, port, export string) bool {
	g := v.grants[grantKey{td, s}]
	return g != nil && g.ports[port] && (export == "" || export == g.export)
}

func (v *view) ready(td spiffeid.TrustDomain) bool {
	p := v.peers[td]
	return p != nil && p.ready
}

// judge is the rule of the withdrawal registry: whether what was let in under an earlier view still stands.
func (v *view) judge(s withdrawal.Subject) (reason string, ok bool) {
	if _, denied := v.denied.Judge(s.Identity, s.Issued); denied {
		return "identity_withdrawn", false
	}
	switch s.Class {
	case classIn:
		if !v.ready(s.Peer) {
			return "peer_withdrawn", false
		}
		service, port, ok := splitExport(s.Export)
		if !ok || !v.granted(s.Peer, service, port, "") {
			return "export_withdrawn", false
		}
	case classOut, classCallee:
		if !v.ready(s.Peer) {
			return "peer_withdrawn", false
		}
	}
	return "", true
}

// judgePeer is the rule of every handshake of this process.
func (g *Gateway) judgePeer(p *trust.Peer) (reason string, withdrawn bool) {
	return g.view.Load().denied.Judge(p.ID, p.Issued())
}

// tunnelPeers is the view as the tunnel wants it.
func (v *view) tunnelPeers() []tunnel.Peer {
	out := make([]tunnel.Peer, 0, len(v.peers))
	for _, p := range v.peers {
		out = append(out, tunnel.Peer{TrustDomain: p.td, Cluster: string(p.cluster), Ready: p.ready, Gateways: p.gateways})
	}
	return out
}
