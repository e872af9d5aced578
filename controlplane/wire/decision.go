// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
)

// MembersFromService returns the places where a service may be called, as the control plane knows them: the own cluster, if it
// has instances of it, then each that offers it. The caller adds what it knows better: tunnels of its local sessions and its own
// evidence. own is the caller's cluster, region the caller's.
func MembersFromService(m *controlpb.Service, own federation.ClusterName, region string) ([]federation.Member, error) {
	drainedHere := func(c federation.ClusterName) bool {
		return slices.ContainsFunc(m.GetPolicy().GetLocallyDrained(), func(name string) bool {
			return name == string(c) || c == own && name == string(federation.OwnCluster)
		})
	}
	var members []federation.Member
	if len(m.GetLocal()) > 0 {
		members = append(members, federation.Member{
			Cluster: own, Region: region, Local: true, Same: true, Health: localHealth(m.GetLocal()), Freshness: federation.Fresh,
			Drained: m.GetOwnLimits().GetDrained(), DrainReason: m.GetOwnLimits().GetDrainReason(), LocallyDrained: drainedHere(own),
		})
	}
	seen := map[federation.ClusterName]bool{own: true}
	for _, r := range m.GetRemote() {
		c, err := federation.ParseClusterName(r.GetCluster())
		if err != nil {
			return nil, fmt.Errorf("service %s/%s: %w", m.GetNamespace(), m.GetName(), err)
		}
		if seen[c] {
			return nil, fmt.Errorf("service %s/%s: cluster %s stands twice", m.GetNamespace(), m.GetName(), c)
		}
		seen[c] = true
		members = append(members, federation.Member{
			Cluster: c, Region: r.GetRegion(), Same: r.GetSame(), Health: zoneHealth(r.GetZones()),
			Freshness: FreshnessFromProto(r.GetFreshness()), Tunnel: tunnel(r),
			Drained: r.GetLimits().GetDrained(), DrainReason: r.GetLimits().GetDrainReason(), LocallyDrained: drainedHere(c),
		})
	}
	return members, nil
}

// localHealth sums up the instances of this cluster. Those of a draining sidecar are on their way out and not counted, unless
// every sidecar drains.
func localHealth(endpoints []*controlpb.LocalEndpoint) federation.Health {
	var all, staying federation.Health
	for _, e := range endpoints {
		h := HealthFromProto(e.GetHealth())
		all = add(all, h)
		if !e.GetDraining() {
			staying = add(staying, h)
		}
	}
	if staying.Total() == 0 {
		return all
	}
	return staying
}

func zoneHealth(zones map[string]*controlpb.HealthCounts) federation.Health {
	var all federation.Health
	for _, z := range zones {
		all = add(all, HealthFromProto(z))
	}
	return all
}

// add saturates: the figures are a peer's.
func add(a, b federation.Health) federation.Health {
	sum := func(x, y uint32) uint32 { return uint32(min(uint64(x)+uint64(y), math.MaxUint32/4)) }
	return federation.Health{
		Healthy: sum(a.Healthy, b.Healthy), Unhealthy: sum(a.Unhealthy, b.Unhealthy), Unknown: sum(a.Unknown, b.Unknown),
	}
}

// tunnel is what the control plane heard of the path; without a transport it has heard nothing.
func tunnel(r *controlpb.RemoteCluster) federation.Tunnel {
	t := federation.Tunnel{Known: r.GetTunnelUp() || r.GetTransport() != "", Up: r.GetTunnelUp(), Transport: r.GetTransport()}
	if s := r.GetRttSeconds(); s > 0 && s < 3600 {
		t.RTT = time.Duration(s * float64(time.Second))
	}
	return t
}

// InputsFromService returns everything that Step needs to know of a service at one caller, from what the control plane says.
func InputsFromService(m *controlpb.Service, caller string, own federation.ClusterName, at federation.Locality,
) (federation.Inputs, error) {
	name, err := federation.NewServiceName(m.GetNamespace(), m.GetName())
	if err != nil {
		return federation.Inputs{}, err
	}
	policy, err := PolicyFromProto(m.GetPolicy())
	if err != nil {
		return federation.Inputs{}, err
	}
	members, err := MembersFromService(m, own, at.Region)
	if err != nil {
		return federation.Inputs{}, err
	}
	return federation.Inputs{Service: name, Caller: caller, Cluster: own, Locality: at, Policy: policy, Members: members}, nil
}

// DecisionToProto returns what a caller reports of one decision: what it decided, from what, and the state it is in now.
func DecisionToProto(at time.Time, in federation.Inputs, st federation.State, d federation.Decision,
	ejections []*controlpb.EjectionReport) (*controlpb.DecisionReport, error) {
	state, err := json.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("decision of %s: %w", in.Service, err)
	}
	inputs, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("decision of %s: %w", in.Service, err)
	}
	m := &controlpb.DecisionReport{
		Service: ServiceToProto(in.Service), Policy: in.Policy.Name, PolicyGeneration: in.Policy.Generation,
		AtMs: at.UnixMilli(), SinceMs: d.Since.UnixMilli(), Reason: string(d.Reason), ActiveTier: int32(d.ActiveTier),
		StateDigest: st.Digest(), StateJson: state, InputsJson: inputs, Returns: d.Returns, Ejections: ejections,
	}
	for i, t := range d.Tiers {
		m.Tiers = append(m.Tiers, &controlpb.TierReport{Tier: int32(i), Members: membersToProto(t.Members)})
	}
	if len(d.Exclusions) > 0 {
		m.Tiers = append(m.Tiers, &controlpb.TierReport{Tier: -1, Members: membersToProto(d.Exclusions)})
	}
	return m, nil
}

func membersToProto(list []federation.MemberDecision) []*controlpb.MemberReport {
	var all []*controlpb.MemberReport
	for _, d := range list {
		all = append(all, &controlpb.MemberReport{
			Cluster: string(d.Cluster), Healthy: d.Healthy, Total: d.Total, Share: d.Share, State: string(d.State), Reason: string(d.Reason),
			Because: d.Because,
		})
	}
	return all
}

// DecisionFromProto is the inverse of DecisionToProto: what was reported, for showing it and for computing it again. The figures
// and words are the reporter's.
func DecisionFromProto(m *controlpb.DecisionReport) (in federation.Inputs, st federation.State, d federation.Decision, err error) {
	fail := func(err error) (federation.Inputs, federation.State, federation.Decision, error) {
		return federation.Inputs{}, federation.State{}, federation.Decision{},
			fmt.Errorf("decision of %s/%s: %w", m.GetService().GetNamespace(), m.GetService().GetName(), err)
	}
	if st, err = federation.ParseState(m.GetStateJson()); err != nil {
		return fail(err)
	}
	if err = json.Unmarshal(m.GetInputsJson(), &in); err != nil {
		return fail(err)
	}
	d = federation.Decision{
		Reason: federation.Reason(m.GetReason()), ActiveTier: int(m.GetActiveTier()), Since: time.UnixMilli(m.GetSinceMs()), Returns: m.GetReturns(),
	}
	for _, t := range m.GetTiers() {
		members, err := membersFromProto(t.GetMembers())
		if err != nil {
			return fail(err)
		}
		if t.GetTier() < 0 {
			d.Exclusions = members
		} else {
			d.Tiers = append(d.Tiers, federation.TierDecision{Members: members})
		}
	}
	return in, st, d, nil
}

func membersFromProto(list []*controlpb.MemberReport) ([]federation.MemberDecision, error) {
	var all []federation.MemberDecision
	for _, r := range list {
		c, err := federation.ParseClusterName(r.GetCluster())
		if err != nil {
			return nil, err
		}
		all = append(all, federation.MemberDecision{
			Cluster: c, Healthy: r.GetHealthy(), Total: r.GetTotal(), Share: r.GetShare(), State: federation.MemberState(r.GetState()),
			Reason: federation.Reason(r.GetReason()), Because: r.GetBecause(),
		})
	}
	return all, nil
}
