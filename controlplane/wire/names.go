// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
)

// ServiceFromProto parses a service's name.
func ServiceFromProto(m *controlpb.ServiceRef) (federation.ServiceName, error) {
	return federation.NewServiceName(m.GetNamespace(), m.GetName())
}

// ServiceToProto is the inverse of ServiceFromProto.
func ServiceToProto(s federation.ServiceName) *controlpb.ServiceRef {
	return &controlpb.ServiceRef{Namespace: s.Namespace, Name: s.Name}
}

// LocalityFromProto returns a locality; nil is an empty one.
func LocalityFromProto(m *controlpb.Locality) federation.Locality {
	return federation.Locality{Region: m.GetRegion(), Zone: m.GetZone()}
}

// LocalityToProto is the inverse of LocalityFromProto.
func LocalityToProto(l federation.Locality) *controlpb.Locality {
	return &controlpb.Locality{Region: l.Region, Zone: l.Zone}
}

// HealthFromProto returns counts; nil is none.
func HealthFromProto(m *controlpb.HealthCounts) federation.Health {
	return federation.Health{Healthy: m.GetHealthy(), Unhealthy: m.GetUnhealthy(), Unknown: m.GetUnknown()}
}

// HealthToProto is the inverse of HealthFromProto.
func HealthToProto(h federation.Health) *controlpb.HealthCounts {
	return &controlpb.HealthCounts{Healthy: h.Healthy, Unhealthy: h.Unhealthy, Unknown: h.Unknown}
}

// FreshnessFromProto returns a freshness; one that is not known here is taken as unspecified.
func FreshnessFromProto(f controlpb.Freshness) federation.Freshness {
	switch f {
	case controlpb.Freshness_FRESHNESS_FRESH:
		return federation.Fresh
	case controlpb.Freshness_FRESHNESS_STALE:
		return federation.Stale
	case controlpb.Freshness_FRESHNESS_WITHDRAWN:
		return federation.Withdrawn
	}
	return federation.FreshnessUnspecified
}

// FreshnessToProto is the inverse of FreshnessFromProto.
func FreshnessToProto(f federation.Freshness) controlpb.Freshness {
	switch f {
	case federation.Fresh:
		return controlpb.Freshness_FRESHNESS_FRESH
	case federation.Stale:
		return controlpb.Freshness_FRESHNESS_STALE
	case federation.Withdrawn:
		return controlpb.Freshness_FRESHNESS_WITHDRAWN
	}
	return controlpb.Freshness_FRESHNESS_UNSPECIFIED
}
