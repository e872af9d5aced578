// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/sidecar/local"
	"github.com/strait-mesh/strait/sidecar/pool"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// place is what of Self the decision needs.
type place struct {
	proxy      string
	cluster    federation.ClusterName
	federation federation.FederationName
	trust      spiffeid.TrustDomain
	id         spiffeid.ID
	locality   federation.Locality
	service    string // "<ns>/<name>" that it answers for first; may be empty
}

// stepInputs puts together what Step looks at: the resource, the local sessions' word on tunnels, and the evidence of
// this sidecar's own calls.
func stepInputs(p place, svc *controlpb.Service, tunnels map[spiffeid.TrustDomain]local.Tunnel, known bool,
	evidence map[federation.ClusterName]pool.Evidence,
) federation.Inputs {
	in := federation.Inputs{
		Service: federation.ServiceName{Namespace: svc.GetNamespace(), Name: svc.GetName()},
		Caller:  p.proxy, Cluster: p.cluster, Locality: p.locality, Policy: policyOf(svc.GetPolicy()),
	}
	drained := svc.GetPolicy().GetLocallyDrained()
	if len(svc.GetLocal()) > 0 {
		m := federation.Member{
			Cluster: p.cluster, Region: p.locality.Region, Local: true, Same: true,
			Drained: svc.GetOwnLimits().GetDrained(), DrainReason: svc.GetOwnLimits().GetDrainReason(),
			LocallyDrained: slices.Contains(drained, string(p.cluster)),
			Observed:       observed(evidence[p.cluster]),
		}
		for _, e := range svc.GetLocal() {
			if !e.GetDraining() {
				m.Health = add(m.Health, e.GetHealth())
			}
		}
		in.Members = append(in.Members, m)
	}
	for _, r := range svc.GetRemote() {
		cluster := federation.ClusterName(r.GetCluster())
		m := federation.Member{
			Cluster: cluster, Region: r.GetRegion(), Same: r.GetSame(),
			Freshness: federation.Freshness(r.GetFreshness()), Tunnel: tunnelOf(r, tunnels, known),
			Drained: r.GetLimits().GetDrained(), DrainReason: r.GetLimits().GetDrainReason(),
			LocallyDrained: slices.Contains(drained, r.GetCluster()),
			Observed:       observed(evidence[cluster]),
		}
		for _, h := range r.GetZones() {
			m.Health = add(m.Health, h)
		}
		in.Members = append(in.Members, m)
	}
	return in
}

// tunnelOf: the local sessions are fresher than the control plane. Where none is open, nothing can cross.
func tunnelOf(r *controlpb.RemoteCluster, tunnels map[spiffeid.TrustDomain]local.Tunnel, known bool) federation.Tunnel {
	td, err := spiffeid.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return federation.Tunnel{Known: true}
	}
	if t, ok := tunnels[td]; ok {
		return federation.Tunnel{
			Known: true, Up: t.Up, Suspect: t.Suspect, RTT: t.RTT, Loss: t.Loss, Transport: t.Transport,
		}
	}
	return federation.Tunnel{
		Known: known, Up: !known && r.GetTunnelUp(),
		RTT: time.Duration(r.GetRttSeconds() * float64(time.Second)), Transport: r.GetTransport(),
	}
}

func observed(e pool.Evidence) federation.Observed {
	if !e.Active {
		return federation.Observed{}
	}
	o := federation.Observed{Ejected: uint32(e.Ejected)}
	if e.Down {
		o.Down, o.Until, o.Reason, o.Why = true, e.Until, e.Reason, e.Why
	}
	return o
}

func add(h federation.Health, c *controlpb.HealthCounts) federation.Health {
	return federation.Health{
		Healthy: h.Healthy + c.GetHealthy(), Unhealthy: h.Unhealthy + c.GetUnhealthy(), Unknown: h.Unknown + c.GetUnknown(),
	}
}

func policyOf(p *controlpb.FailoverPolicy) federation.Policy {
	out := federation.Policy{
		Name: p.GetName(), Generation: p.GetGeneration(),
		TripPercent: p.GetTripPercent(), SpillBelowPercent: p.GetSpillBelowPercent(), MinEndpoints: p.GetMinEndpoints(),
		TunnelLossPercent: p.GetTunnelLossPercent(), ReturnPercent: p.GetReturnPercent(),
		ReturnAfter: time.Duration(p.GetReturnAfterMs()) * time.Millisecond,
		Ramp:        time.Duration(p.GetRampMs()) * time.Millisecond,
		Passive: federation.PassiveHealth{
			Consecutive5xx: p.GetPassive().GetConsecutive_5Xx(),
			EjectFor:       time.Duration(p.GetPassive().GetEjectForMs()) * time.Millisecond,
		},
		Active: federation.ActiveHealth{
			Disabled: p.GetActive().GetDisabled(), Every: time.Duration(p.GetActive().GetEveryMs()) * time.Millisecond,
		},
	}
	for _, t := range p.GetTiers() {
		tier := federation.Tier{Any: t.GetAny()}
		for _, c := range t.GetClusters() {
			tier.Clusters = append(tier.Clusters, federation.ClusterName(c))
		}
		for c, w := range t.GetWeights() {
			if tier.Weights == nil {
				tier.Weights = map[federation.ClusterName]uint32{}
			}
			tier.Weights[federation.ClusterName(c)] = w
		}
		for _, c := range t.GetExcept() {
			tier.Except = append(tier.Except, federation.ClusterName(c))
		}
		out.Tiers = append(out.Tiers, tier)
	}
	return out.WithDefaults()
}
