// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"maps"
	"slices"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
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
func stepInputs(p *place, svc *controlpb.Service, tunnels map[spiffeid.TrustDomain]local.Tunnel, known bool,
	evidence map[federation.ClusterName]pool.Evidence,
) (federation.Inputs, error) {
	in, err := wire.InputsFromService(svc, p.proxy, p.cluster, p.locality)
	if err != nil {
		return in, err
	}
	for i := range in.Members {
		m := &in.Members[i]
		m.Observed = observed(evidence[m.Cluster])
		if !m.Local {
			if r := findRemote(svc, m.Cluster); r != nil {
				m.Tunnel = tunnelOf(r, m.Tunnel, tunnels, known)
			}
		}
	}
	return in, nil
}

// tunnelOf: the local sessions are fresher than the control plane. known says that what they do not name cannot be reached.
func tunnelOf(r *controlpb.RemoteCluster, told federation.Tunnel, tunnels map[spiffeid.TrustDomain]local.Tunnel, known bool) federation.Tunnel {
	td, err := spiffeid.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return federation.Tunnel{Known: true}
	}
	if t, ok := tunnels[td]; ok {
		return federation.Tunnel{Known: true, Up: t.Up, Suspect: t.Suspect, RTT: t.RTT, Loss: t.Loss, Transport: t.Transport}
	}
	if known {
		return federation.Tunnel{Known: true, RTT: told.RTT, Transport: told.Transport}
	}
	return told
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

// ejections lists what is out at this caller, for reports.
func ejections(evidence map[federation.ClusterName]pool.Evidence) []*controlpb.EjectionReport {
	var list []*controlpb.EjectionReport
	for _, cluster := range slices.Sorted(maps.Keys(evidence)) {
		for _, e := range evidence[cluster].Ejections {
			x := &controlpb.EjectionReport{Cluster: cluster.String(), Instance: e.Key, Reason: e.Reason.String()}
			if !e.Until.IsZero() {
				x.UntilMs = e.Until.UnixMilli()
			}
			list = append(list, x)
		}
	}
	return list
}
