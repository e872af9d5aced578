// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// MemberState is what a member is to one caller now.
type MemberState string

// The states of a member.
const (
	StateActive   MemberState = "active"   // has a share
	StateStandby  MemberState = "standby"  // fit, not needed
	StateTripped  MemberState = "tripped"  // unfit by health, loss or the caller's own evidence
	StateHold     MemberState = "hold"     // fit again, waiting out the hold-down
	StateRamp     MemberState = "ramp"     // returning in steps
	StateExcluded MemberState = "excluded" // not a candidate at all
)

// Decision says where calls go, and why for every member.
type Decision struct {
	Reason     Reason           `json:"reason"`
	ActiveTier int              `json:"activeTier"` // the tier with the largest share; -1 when nothing has one
	Since      time.Time        `json:"since"`      // when the active tier became what it is
	Tiers      []TierDecision   `json:"tiers"`
	Exclusions []MemberDecision `json:"exclusions,omitempty"` // members that no tier has room for
	Returns    string           `json:"returns,omitempty"`    // "tier 0 when ≥75% healthy for 2m0s (now 25%)"; empty at home
	// Wake is when Step wants to be called again although nothing changed; zero: never.
	Wake time.Time `json:"wake,omitzero"`
}

// TierDecision is one level of the order that was used.
type TierDecision struct {
	Members []MemberDecision `json:"members"`
}

// MemberDecision is one member's part in a decision.
type MemberDecision struct {
	Cluster ClusterName `json:"cluster"`
	Healthy uint32      `json:"healthy"`
	Total   uint32      `json:"total"`
	Share   float64     `json:"share"` // 0..1 of this caller's calls
	State   MemberState `json:"state"`
	Reason  Reason      `json:"reason"`
	Because string      `json:"because"`
}

// Shares returns the members that have a share. They sum to 1, or there is none.
func (d Decision) Shares() map[ClusterName]float64 {
	out := map[ClusterName]float64{}
	for _, t := range d.Tiers {
		for _, m := range t.Members {
			if m.Share > 0 {
				out[m.Cluster] = m.Share
			}
		}
	}
	return out
}

// Member returns one member's part and its tier; the tier of an exclusion is -1.
func (d Decision) Member(c ClusterName) (m MemberDecision, tier int, ok bool) {
	for i, t := range d.Tiers {
		for _, m := range t.Members {
			if m.Cluster == c {
				return m, i, true
			}
		}
	}
	for _, m := range d.Exclusions {
		if m.Cluster == c {
			return m, -1, true
		}
	}
	return MemberDecision{}, -1, false
}

// Fallback returns the first member in tier order that is fit (active, standby, hold or ramp) and not avoided: where a retry
// goes when every member with a share was tried.
func (d Decision) Fallback(avoid func(ClusterName) bool) (m MemberDecision, tier int, ok bool) {
	for i, t := range d.Tiers {
		for _, m := range t.Members {
			if m.State != StateTripped && m.State != StateExcluded && (avoid == nil || !avoid(m.Cluster)) {
				return m, i, true
			}
		}
	}
	return MemberDecision{}, -1, false
}

// Candidates lists every member of the tiers as spans show them: "us-east 1/4 tripped".
func (d Decision) Candidates() []string {
	var out []string
	for _, t := range d.Tiers {
		for _, m := range t.Members {
			out = append(out, fmt.Sprintf("%s %d/%d %s", m.Cluster, m.Healthy, m.Total, m.State))
		}
	}
	return out
}

// Digest changes when the decision does, and not when only a sentence about it changes (a round-trip time in it, say).
func (d Decision) Digest() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %d %d\n", d.Reason, d.ActiveTier, d.Since.UnixNano())
	for i, t := range d.Tiers {
		for _, m := range t.Members {
			fmt.Fprintf(h, "%d %s %d %d %.6f %s %s\n", i, m.Cluster, m.Healthy, m.Total, m.Share, m.State, m.Reason)
		}
	}
	for _, m := range d.Exclusions {
		fmt.Fprintf(h, "x %s %s\n", m.Cluster, m.Reason)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
