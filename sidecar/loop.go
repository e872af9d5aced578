// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/pool"
)

// runService owns one service's state: it wakes on change or when Step asks to be called again, decides and publishes.
func (s *Sidecar) runService(svc *service) {
	defer svc.closeGroups()
	var st federation.State
	seeded, digest := false, ""
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-svc.ctx.Done():
			return
		case <-svc.wake:
		case <-timer.C:
		}
		res := svc.res.Load()
		p := s.place.Load()
		if res == nil || p == nil {
			continue // nothing is known yet: whoever tells wakes
		}
		if res.svc == nil {
			s.unpublish(svc, res)
			st, digest = federation.State{}, ""
			continue
		}
		if !seeded {
			seeded = true
			st = s.seed(svc.name)
		}
		now := s.cfg.Now()
		in, err := stepInputs(p, res.svc, s.locals.Tunnels(), s.locals.Known(), svc.evidence())
		if err != nil { // apply has refused such resources
			s.log.Error("service not decided on", "service", svc.name, "error", err)
			continue
		}
		next, d := federation.Step(now, st, in)
		st = next
		r := &route{resource: *res, inputs: in, state: st, decision: d, at: now}
		old := svc.route.Load()
		svc.publish(r, p)
		if got := d.Digest() + st.Digest(); got != digest {
			digest = got
			s.decided(svc, old, r)
		}
		wait := time.Hour
		if !d.Wake.IsZero() {
			wait = max(d.Wake.Sub(now), 10*time.Millisecond)
		}
		timer.Reset(wait)
	}
}

// seed returns the state that this sidecar last reported, so that a restart changes no route.
func (s *Sidecar) seed(name federation.ServiceName) federation.State {
	self := s.self.Load()
	if self == nil {
		return federation.State{}
	}
	b := self.GetLastState()[name.String()]
	if len(b) == 0 {
		return federation.State{}
	}
	st, err := federation.ParseState(b)
	if err != nil {
		s.log.Warn("reported state not usable, starting without memory", "service", name, "error", err)
		return federation.State{}
	}
	return st
}

// publish makes r the route of the service.
func (s *service) publish(r *route, p *place) {
	s.mu.Lock()
	s.dealer.Update(r.decision.Shares())
	var gone []*pool.Group
	for key, g := range s.groups {
		if !fit(g, key, r.svc, p) {
			delete(s.groups, key)
			gone = append(gone, g)
		}
	}
	s.mu.Unlock()
	s.route.Store(r)
	s.once.Do(func() { close(s.decided) })
	for _, g := range gone {
		g.Close()
	}
}

// unpublish makes the service absent.
func (s *Sidecar) unpublish(svc *service, res *resource) {
	svc.mu.Lock()
	svc.dealer.Update(nil)
	groups := svc.groups
	svc.groups = map[groupKey]*pool.Group{}
	svc.mu.Unlock()
	svc.route.Store(&route{resource: *res})
	svc.once.Do(func() { close(svc.decided) })
	for _, g := range groups {
		g.Close()
	}
	s.report.forget(svc.name)
	s.metrics.forget(svc.name)
}

// fit tells a group what the resource says; false when its cluster or port has gone.
func fit(g *pool.Group, key groupKey, svc *controlpb.Service, p *place) bool {
	if key.cluster == p.cluster {
		if findPort(svc.GetPorts(), key.port) == nil {
			return false
		}
		g.SetEndpoints(endpoints(svc, key.port, p))
		return true
	}
	for _, r := range svc.GetRemote() {
		if r.GetCluster() == string(key.cluster) && findPort(r.GetPorts(), key.port) != nil {
			healthy := 0
			for _, h := range r.GetZones() {
				healthy += int(h.GetHealthy() + h.GetUnknown())
			}
			g.SetHealthy(healthy)
			return true
		}
	}
	return false
}

// endpoints lists the sidecars of the own cluster for one port, weighted by the instances that may serve.
func endpoints(svc *controlpb.Service, port string, p *place) []pool.Endpoint {
	list := make([]pool.Endpoint, 0, len(svc.GetLocal()))
	for _, e := range svc.GetLocal() {
		ep := pool.Endpoint{
			Key: e.GetProxy(), Draining: e.GetDraining(), Weight: int(e.GetHealth().GetHealthy() + e.GetHealth().GetUnknown()),
			Near: p.locality.Zone != "" && e.GetLocality().GetZone() == p.locality.Zone,
		}
		matched, routable := 0, 0
		for _, in := range e.GetInstances() {
			if in.GetPortName() != port {
				continue
			}
			matched++
			if in.GetHealth() != controlpb.Health_HEALTH_UNHEALTHY {
				routable++
			}
		}
		if matched > 0 {
			ep.Weight = routable
		}
		list = append(list, ep)
	}
	return list
}

func findPort(ports []*controlpb.ServicePort, name string) *controlpb.ServicePort {
	for _, p := range ports {
		if p.GetName() == name {
			return p
		}
	}
	return nil
}

// group returns the ways to one port in one cluster, or nil where the service is not there.
func (s *Sidecar) group(svc *service, r *route, key groupKey) *pool.Group {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	if g := svc.groups[key]; g != nil {
		return g
	}
	p := s.place.Load()
	if svc.gone || p == nil {
		return nil
	}
	passive := r.inputs.Policy.Passive
	g := pool.New(pool.Config{
		Figures: pool.Figures{Streak: int(passive.Consecutive5xx), EjectFor: passive.EjectFor},
		Remote:  key.cluster != p.cluster,
		Dial:    s.dialFor(svc, key), DialTimeout: s.cfg.DialTimeout + time.Second,
		Changed: svc.kick, Now: s.cfg.Now,
		Ejected: func(reason federation.Reason) { s.metrics.ejected(reason, svc.name, key.cluster) },
	})
	if !fit(g, key, r.svc, p) {
		g.Close() // nothing was started in it: does not wait
		return nil
	}
	svc.groups[key] = g
	return g
}
