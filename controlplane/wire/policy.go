// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
)

// Bounds of a policy on the wire.
const (
	maxTiers    = 64
	maxClusters = 1024
)

// PolicyFromProto returns a policy with its defaults filled in, or why it is not valid. nil is the default policy. The
// clusters drained here (locally_drained) are no part of federation.Policy; MembersFromService reads them.
func PolicyFromProto(m *controlpb.FailoverPolicy) (federation.Policy, error) {
	if m == nil {
		return federation.DefaultPolicy(), nil
	}
	p := federation.Policy{
		Name: m.GetName(), Generation: m.GetGeneration(),
		TripPercent: m.GetTripPercent(), SpillBelowPercent: m.GetSpillBelowPercent(), MinEndpoints: m.GetMinEndpoints(),
		TunnelLossPercent: m.GetTunnelLossPercent(), ReturnPercent: m.GetReturnPercent(),
		ReturnAfter: duration(m.GetReturnAfterMs()), Ramp: duration(m.GetRampMs()),
		Passive: federation.PassiveHealth{
			Consecutive5xx: m.GetPassive().GetConsecutive_5Xx(), EjectFor: duration(m.GetPassive().GetEjectForMs()),
		},
		Active: federation.ActiveHealth{Disabled: m.GetActive().GetDisabled(), Every: duration(m.GetActive().GetEveryMs())},
	}
	if len(m.GetTiers()) > maxTiers {
		return federation.Policy{}, fmt.Errorf("failover policy %s: %d tiers, at most %d", p.Name, len(m.GetTiers()), maxTiers)
	}
	for i, t := range m.GetTiers() {
		tier, err := tierFromProto(t)
		if err != nil {
			return federation.Policy{}, fmt.Errorf("failover policy %s: tier %d: %w", p.Name, i, err)
		}
		p.Tiers = append(p.Tiers, tier)
	}
	p = p.WithDefaults()
	if err := p.Validate(); err != nil {
		return federation.Policy{}, err
	}
	return p, nil
}

// PolicyToProto is the inverse of PolicyFromProto.
func PolicyToProto(p federation.Policy) *controlpb.FailoverPolicy {
	m := &controlpb.FailoverPolicy{
		Name: p.Name, Generation: p.Generation,
		TripPercent: p.TripPercent, SpillBelowPercent: p.SpillBelowPercent, MinEndpoints: p.MinEndpoints,
		TunnelLossPercent: p.TunnelLossPercent, ReturnPercent: p.ReturnPercent,
		ReturnAfterMs: milliseconds(p.ReturnAfter), RampMs: milliseconds(p.Ramp),
		Passive: &controlpb.PassiveHealth{Consecutive_5Xx: p.Passive.Consecutive5xx, EjectForMs: milliseconds(p.Passive.EjectFor)},
		Active:  &controlpb.ActiveHealth{Disabled: p.Active.Disabled, EveryMs: milliseconds(p.Active.Every)},
	}
	for _, t := range p.Tiers {
		mt := &controlpb.Tier{Any: t.Any, Clusters: texts(t.Clusters), Except: texts(t.Except)}
		for c, w := range t.Weights {
			if mt.Weights == nil {
				mt.Weights = map[string]uint32{}
			}
			mt.Weights[string(c)] = w
		}
		m.Tiers = append(m.Tiers, mt)
	}
	return m
}

func tierFromProto(m *controlpb.Tier) (federation.Tier, error) {
	if len(m.GetClusters())+len(m.GetExcept())+len(m.GetWeights()) > maxClusters {
		return federation.Tier{}, errors.New("too many clusters")
	}
	t := federation.Tier{Any: m.GetAny()}
	var err error
	if t.Clusters, err = clusters(m.GetClusters()); err != nil {
		return federation.Tier{}, err
	}
	if t.Except, err = clusters(m.GetExcept()); err != nil {
		return federation.Tier{}, err
	}
	for name, w := range m.GetWeights() {
		c, err := cluster(name)
		if err != nil {
			return federation.Tier{}, err
		}
		if t.Weights == nil {
			t.Weights = map[federation.ClusterName]uint32{}
		}
		t.Weights[c] = w
	}
	return t, nil
}

// cluster parses a cluster's name as tiers write it: OwnCluster stands for the caller's own.
func cluster(name string) (federation.ClusterName, error) {
	if name == string(federation.OwnCluster) {
		return federation.OwnCluster, nil
	}
	return federation.ParseClusterName(name)
}

func clusters(names []string) ([]federation.ClusterName, error) {
	var all []federation.ClusterName
	for _, name := range names {
		c, err := cluster(name)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func texts(names []federation.ClusterName) []string {
	var all []string
	for _, n := range names {
		all = append(all, string(n))
	}
	return all
}

// duration converts milliseconds without overflow.
func duration(ms int64) time.Duration {
	const most = math.MaxInt64 / int64(time.Millisecond)
	return time.Duration(min(max(ms, -most), most)) * time.Millisecond
}

// milliseconds keeps what is not zero from becoming zero, which would mean the default.
func milliseconds(d time.Duration) int64 {
	switch ms := d.Milliseconds(); {
	case ms == 0 && d > 0:
		return 1
	case ms == 0 && d < 0:
		return -1
	default:
		return ms
	}
}
