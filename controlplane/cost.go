// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/federation"
)

// whyNotes says what it costs that traffic is not at home, and where to look next. It is empty while everybody is at home.
func whyNotes(groups []*controlpb.WhyGroup) []string {
	for _, g := range groups { // most callers first
		switch federation.Reason(g.Decision.GetReason()) {
		case federation.LocalOK, federation.PriorityOK, federation.CatalogStaleHold:
			continue
		}
		var notes []string
		if in, _, d, err := wire.DecisionFromProto(g.Decision); err == nil {
			notes = append(notes, costOf(in, d)...)
		}
		return append(notes, "Check the cause: strait trace --failover")
	}
	return nil
}

// costOf compares the round trips between the gateways with those to the first tier, and counts the requests that leave the region.
func costOf(in federation.Inputs, d federation.Decision) []string {
	members := map[federation.ClusterName]federation.Member{}
	for _, m := range in.Members {
		members[m.Cluster] = m
	}
	rtt := func(c federation.ClusterName) time.Duration {
		if m := members[c]; !m.Local {
			return m.Tunnel.RTT
		}
		return 0
	}
	if len(d.Tiers) == 0 || len(d.Tiers[0].Members) == 0 || len(d.Shares()) == 0 {
		return nil
	}
	var home time.Duration
	for _, m := range d.Tiers[0].Members {
		home += rtt(m.Cluster) / time.Duration(len(d.Tiers[0].Members))
	}
	here, away := -home.Seconds(), 0.0
	for c, share := range d.Shares() {
		here += share * rtt(c).Seconds()
		if m := members[c]; !m.Local && m.Region != in.Locality.Region {
			away += share
		}
	}
	return []string{fmt.Sprintf("Cost of being here: %+.0fms rtt, %.0f%% of requests cross-region", here*1000, away*100)}
}
