// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"encoding/json"
	"fmt"
	"math"
	"time"
)

// What ParseInputs accepts at most.
const (
	MaxInputsSize    = 256 << 10 // bytes
	MaxInputsMembers = 512
)

// Inputs is everything Step looks at besides the clock and its own memory. It is reported as JSON, so that a decision can be
// computed again elsewhere.
type Inputs struct {
	Service  ServiceName `json:"service"`
	Caller   string      `json:"caller,omitempty"` // "<namespace>/<proxy>": seeds the jitter
	Cluster  ClusterName `json:"cluster"`          // the caller's
	Locality Locality    `json:"locality,omitzero"`
	Policy   Policy      `json:"policy"`
	Members  []Member    `json:"members"` // in any order, one for each cluster that has or offers the service
}

// Member is one cluster as a place where the service may be called.
type Member struct {
	Cluster ClusterName `json:"cluster"`
	Region  string      `json:"region,omitempty"`
	Local   bool        `json:"local,omitempty"` // the caller's own cluster
	Same    bool        `json:"same,omitempty"`  // sameness is granted for this namespace (a pinned call sets it for its one member)

	Health    Health    `json:"health"`
	Freshness Freshness `json:"freshness,omitempty"` // of the catalog; ignored for Local
	Tunnel    Tunnel    `json:"tunnel,omitzero"`     // ignored for Local

	Drained        bool   `json:"drained,omitempty"` // by its owner: for everybody
	DrainReason    string `json:"drainReason,omitempty"`
	LocallyDrained bool   `json:"locallyDrained,omitempty"` // here: for local callers only

	Observed Observed `json:"observed,omitzero"`
}

// Health counts instances. Unknown ones have no verdict and count neither way.
type Health struct {
	Healthy   uint32 `json:"healthy"`
	Unhealthy uint32 `json:"unhealthy,omitempty"`
	Unknown   uint32 `json:"unknown,omitempty"`
}

// Total is the number of instances.
func (h Health) Total() uint32 {
	return uint32(min(uint64(h.Healthy)+uint64(h.Unhealthy)+uint64(h.Unknown), math.MaxUint32))
}

// Tunnel is the best path to a remote member as this caller knows it.
type Tunnel struct {
	Known     bool          `json:"known,omitempty"` // false: nothing was heard, assumed to be up
	Up        bool          `json:"up,omitempty"`
	Suspect   bool          `json:"suspect,omitempty"`
	RTT       time.Duration `json:"rtt,omitempty"`
	Loss      float64       `json:"loss,omitempty"` // 0..1
	Transport string        `json:"transport,omitempty"`
}

// Observed is this caller's own evidence about a member.
type Observed struct {
	// Down until Until: its instances failed and agree in it, or its gateway answered no_healthy_instance.
	Down   bool      `json:"down,omitempty"`
	Until  time.Time `json:"until,omitzero"`
	Reason Reason    `json:"reason,omitempty"` // no_endpoints when empty
	Why    string    `json:"why,omitempty"`    // "5xx streak"

	// Ejected instances count as unhealthy for this caller whatever their owner says.
	Ejected uint32 `json:"ejected,omitempty"`
}

// ParseInputs reads what json.Marshal made of Inputs.
func ParseInputs(b []byte) (Inputs, error) {
	var in Inputs
	if len(b) > MaxInputsSize {
		return Inputs{}, fmt.Errorf("failover inputs: %d bytes, at most %d", len(b), MaxInputsSize)
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return Inputs{}, fmt.Errorf("failover inputs: %w", err)
	}
	if len(in.Members) > MaxInputsMembers {
		return Inputs{}, fmt.Errorf("failover inputs: %d members, at most %d", len(in.Members), MaxInputsMembers)
	}
	if err := in.Policy.Validate(); err != nil {
		return Inputs{}, fmt.Errorf("failover inputs: %w", err)
	}
	for _, m := range in.Members {
		if l := m.Tunnel.Loss; math.IsNaN(l) || l < 0 || l > 1 {
			return Inputs{}, fmt.Errorf("failover inputs: %s: tunnel loss %v is not within 0 and 1", m.Cluster, l)
		}
	}
	return in, nil
}

// Freshness is how old the knowledge about a remote member is, judged by the importing control plane.
type Freshness uint8

// The degrees of freshness.
const (
	FreshnessUnspecified Freshness = iota // taken as fresh
	Fresh
	Stale     // older than one ttl: the last verdict is kept
	Withdrawn // older than three and no tunnel alive
)

var freshnessNames = [...]string{"unspecified", "fresh", "stale", "withdrawn"}

func (f Freshness) String() string {
	if int(f) < len(freshnessNames) {
		return freshnessNames[f]
	}
	return "unspecified"
}

// MarshalText returns the word.
func (f Freshness) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText accepts the words of String and "".
func (f *Freshness) UnmarshalText(b []byte) error {
	for i, n := range freshnessNames {
		if n == string(b) {
			*f = Freshness(i)
			return nil
		}
	}
	if len(b) == 0 {
		*f = FreshnessUnspecified
		return nil
	}
	return fmt.Errorf("unknown freshness %.20q", b)
}
