// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/proxyclient"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/access"
	"github.com/strait-mesh/strait/sidecar/health"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"

	sidecarhttp "github.com/strait-mesh/strait/sidecar/http"
)

// apply takes one change of discovery. An error refuses it (NACK), and what was there stays.
func (s *Sidecar) apply(c proxyclient.Change) error {
	err := s.applyOne(c)
	if c.TypeURL == controlpb.TypeSelf || c.TypeURL == controlpb.TypeDenied && s.self.Load() != nil {
		s.tellWorkloadAPI()
	}
	if err != nil {
		s.log.Error("configuration refused, the previous one stays", "type", c.TypeURL, "name", c.Name, "error", err)
	}
	wake(s.judgeWake)
	return err
}

func (s *Sidecar) applyOne(c proxyclient.Change) error {
	switch c.TypeURL {
	case controlpb.TypeSelf:
		if c.Name != s.cfg.Proxy {
			return nil
		}
		m, _ := c.Message.(*controlpb.Self)
		return s.applySelf(m)
	case controlpb.TypeService:
		name, err := federation.ParseServiceName(c.Name)
		if err != nil {
			return err
		}
		m, _ := c.Message.(*controlpb.Service)
		if m != nil {
			if err := checkService(name, m); err != nil {
				return err
			}
		}
		for _, r := range m.GetRemote() {
			s.learnPeer(r.GetTrustDomain(), r.GetCluster())
		}
		s.services.told(name, m)
	case controlpb.TypeBundle:
		if m, ok := c.Message.(*controlpb.Bundle); ok && m.GetCluster() != "" {
			s.learnPeer(m.GetTrustDomain(), m.GetCluster())
		}
		if m, ok := c.Message.(*controlpb.Bundle); ok {
			s.recallWorkloads(m)
		}
	case controlpb.TypeGateway:
		m, _ := c.Message.(*controlpb.Gateway)
		return s.applyGateway(c.Name, m)
	case controlpb.TypeDenied:
		id, err := spiffeid.Parse(c.Name)
		if err != nil {
			return err
		}
		next := maps.Clone(*s.denied.Load())
		delete(next, id)
		if m, ok := c.Message.(*controlpb.Denied); ok && m != nil {
			d := withdrawal.Denial{Reason: m.GetReason()}
			if ms := m.GetIssuedBeforeMs(); ms != 0 {
				d.IssuedBefore = time.UnixMilli(ms)
			}
			next[id] = d
		}
		s.denied.Store(&next)
	}
	return nil
}

// checkService refuses what could not be decided on.
func checkService(name federation.ServiceName, m *controlpb.Service) error {
	if m.GetNamespace() != name.Namespace || m.GetName() != name.Name {
		return fmt.Errorf("service %s: the resource is of %s/%s", name, m.GetNamespace(), m.GetName())
	}
	// The cluster's own name is not needed to judge the rest: no peer may have the reserved one.
	_, err := wire.InputsFromService(m, "", federation.OwnCluster, federation.Locality{})
	return err
}

// learnPeer keeps the names of clusters by trust domain, for metrics and spans. It is called by one goroutine at a time.
func (s *Sidecar) learnPeer(trustDomain, cluster string) {
	have := *s.peers.Load()
	if have[trustDomain] == cluster {
		return
	}
	next := maps.Clone(have)
	next[trustDomain] = cluster
	s.peers.Store(&next)
}

// applySelf takes what this sidecar is. Its absence means that it answers for nothing any more.
func (s *Sidecar) applySelf(self *controlpb.Self) error {
	if self == nil {
		s.self.Store(nil)
		s.in.set(&controlpb.Self{}, nil)
		s.health.Set(nil)
		return nil
	}
	p, err := placeOf(s.cfg.Proxy, self)
	if err != nil {
		return fmt.Errorf("self: %w", err)
	}
	policies, err := s.in.prepare(self, p.trust)
	if err != nil {
		return fmt.Errorf("self: %w", err)
	}
	s.self.Store(self)
	s.place.Store(p)
	s.health.Set(targets(self))
	s.in.set(self, policies)
	s.selfOnce.Do(func() { close(s.selfReady) })
	wake(s.healthWake) // names and ports of what is reported may have changed
	s.services.kickAll()
	return nil
}

func placeOf(proxy string, self *controlpb.Self) (*place, error) {
	cluster, err := federation.ParseClusterName(self.GetCluster())
	if err != nil {
		return nil, err
	}
	fed, err := federation.ParseFederationName(self.GetFederation())
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.ParseTrustDomain(self.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	p := &place{
		proxy: proxy, cluster: cluster, federation: fed, trust: td,
		locality: federation.Locality{Region: self.GetLocality().GetRegion(), Zone: self.GetLocality().GetZone()},
	}
	if text := self.GetSpiffeId(); text != "" {
		if p.id, err = spiffeid.Parse(text); err != nil {
			return nil, err
		}
	}
	for _, ip := range self.GetInbound() {
		p.service = ip.GetService().GetNamespace() + "/" + ip.GetService().GetName()
		break
	}
	return p, nil
}

func targets(self *controlpb.Self) []health.Target {
	var list []health.Target
	for _, ip := range self.GetInbound() {
		for _, in := range ip.GetInstances() {
			list = append(list, health.Target{
				Key: health.Key{Port: ip.GetSni(), Workload: in.GetWorkload()}, Address: in.GetAddress(),
				Path: in.GetHealthPath(), Zone: in.GetZone(), Draining: in.GetDraining(),
			})
		}
	}
	return list
}

func (s *Sidecar) applyGateway(name string, m *controlpb.Gateway) error {
	next := maps.Clone(*s.gateways.Load())
	delete(next, name)
	if m != nil {
		id, err := spiffeid.Parse(m.GetSpiffeId())
		if err != nil {
			return fmt.Errorf("gateway %s: %w", name, err)
		}
		next[name] = local.Gateway{Name: name, Address: m.GetLocalAddress(), ID: id, Draining: m.GetDraining()}
	}
	s.gateways.Store(&next)
	s.locals.SetGateways(slices.Collect(maps.Values(next)))
	return nil
}

// isDenied reports whether a certificate of id issued at that time was withdrawn; the zero time asks by name alone.
func (s *Sidecar) isDenied(id spiffeid.ID, issued time.Time) (reason string, denied bool) {
	return s.denied.Load().Judge(id, issued)
}

// judgeAll judges every connection again.
func (s *Sidecar) judgeAll() {
	if n := s.ledger.registry.Judge(s.judge); n > 0 {
		s.log.Info("connections withdrawn", "connections", n)
	}
}

// judge says whether what a connection was allowed by still stands.
func (s *Sidecar) judge(sub withdrawal.Subject) (reason string, ok bool) {
	if _, denied := s.isDenied(sub.Identity, sub.Issued); denied {
		return "identity withdrawn", false
	}
	if s.source.Bundles().Get(sub.Peer) == nil {
		return "trust domain withdrawn", false
	}
	switch sub.Class {
	case withdrawal.LocalSession:
		for _, g := range *s.gateways.Load() {
			if g.ID == sub.Identity {
				return "", true
			}
		}
		return "gateway is gone", false
	case withdrawal.Inbound:
		return s.judgeInbound(sub)
	case withdrawal.Outbound:
		return s.judgeOutbound(sub)
	}
	return "", true
}

func (s *Sidecar) judgeInbound(sub withdrawal.Subject) (reason string, ok bool) {
	p := (*s.in.ports.Load())[sub.Export]
	if p == nil {
		return "port is gone", false
	}
	policy := p.policy.Load()
	if p.engine != nil {
		if !policy.MayConnect(sub.Identity) {
			return "access denied by policy", false
		}
		return "", true
	}
	if !policy.Judge(access.Request{Caller: sub.Identity}).Allowed {
		return "access denied by policy", false
	}
	return "", true
}

func (s *Sidecar) judgeOutbound(sub withdrawal.Subject) (reason string, ok bool) {
	name, cluster, valid := parseExport(sub.Export)
	p := s.place.Load()
	if !valid || p == nil {
		return "", true
	}
	svc, inUse := s.services.known(name)
	switch {
	case !inUse:
		return "", true // its own pool ends it
	case svc == nil:
		return "service is gone", false
	case cluster == p.cluster:
		return "", true
	}
	r := findRemote(svc, cluster)
	if r == nil {
		return "not exported", false
	}
	if !slices.Contains(r.GetSpiffeIds(), sub.Identity.String()) {
		return "identity is not listed any more", false
	}
	return "", true
}

// parseExport is the inverse of exportName.
func parseExport(export string) (federation.ServiceName, federation.ClusterName, bool) {
	rest, cluster, ok := strings.Cut(export, "@")
	service, _, ok2 := strings.Cut(rest, ":")
	name, err := federation.ParseServiceName(service)
	return name, federation.ClusterName(cluster), ok && ok2 && err == nil
}

// What the engines and metrics are told about who we are.

func (s *Sidecar) ownID() spiffeid.ID {
	if id := s.source.Identity(); id != nil {
		return id.ID
	}
	return spiffeid.ID{}
}

func (s *Sidecar) clusterName() string {
	if p := s.place.Load(); p != nil {
		return p.cluster.String()
	}
	return ""
}

func (s *Sidecar) engineName() string { return s.clusterName() + "/" + s.cfg.Proxy }

func (s *Sidecar) engineSelf() sidecarhttp.Local {
	p := s.place.Load()
	if p == nil {
		return sidecarhttp.Local{Service: s.cfg.Proxy}
	}
	l := sidecarhttp.Local{Service: p.service, Cluster: p.cluster, Region: p.locality.Region, Zone: p.locality.Zone}
	if l.Service == "" {
		l.Service = s.cfg.Proxy
	}
	return l
}

// peerCluster names the cluster of a trust domain where this sidecar has met it, else the trust domain.
func (s *Sidecar) peerCluster(id spiffeid.ID) string {
	td := id.TrustDomain()
	if p := s.place.Load(); p != nil && td == p.trust {
		return p.cluster.String()
	}
	if c, ok := (*s.peers.Load())[td.String()]; ok {
		return c
	}
	return td.String()
}

func (s *Sidecar) scopeOf(id spiffeid.ID) string {
	if p := s.place.Load(); p != nil && id.TrustDomain() == p.trust {
		return "local"
	}
	return "cross_cluster"
}
