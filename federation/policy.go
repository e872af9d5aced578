// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// ErrReturnNotAboveTrip is wrapped by Policy.Validate when a policy would flap.
var ErrReturnNotAboveTrip = errors.New("return threshold must be above trip")

// MaxReturnAfter bounds the hold-down (before doubling) and the ramp of a policy.
const MaxReturnAfter = 24 * time.Hour

// Policy is a compiled FailoverPolicy. A zero number means the default.
type Policy struct {
	Name       string `json:"name,omitempty"` // "<namespace>/<name>"; empty: the defaults
	Generation int64  `json:"generation,omitempty"`
	Tiers      []Tier `json:"tiers,omitempty"` // empty: the default order

	TripPercent       float64       `json:"tripPercent,omitempty"`       // below it a member is out (50)
	SpillBelowPercent float64       `json:"spillBelowPercent,omitempty"` // below it a part spills to the next tier (70)
	MinEndpoints      uint32        `json:"minEndpoints,omitempty"`      // fewer healthy instances: out (1)
	TunnelLossPercent float64       `json:"tunnelLossPercent,omitempty"` // above it a remote member is out (5)
	ReturnPercent     float64       `json:"returnPercent,omitempty"`     // from it on a tripped member may return (75)
	ReturnAfter       time.Duration `json:"returnAfter,omitempty"`       // hold-down before it does (2 min); negative: none
	Ramp              time.Duration `json:"ramp,omitempty"`              // the steps 10, 25, 50, 100 % spread over it (60 s); negative: none

	Passive PassiveHealth `json:"passive,omitzero"`
	Active  ActiveHealth  `json:"active,omitzero"`
}

// Tier is one level of an explicit order.
type Tier struct {
	// Clusters share by weight. OwnCluster stands for the caller's own.
	Clusters []ClusterName `json:"clusters,omitempty"`
	// Weights by name as written in Clusters; one that is absent or zero is 1.
	Weights map[ClusterName]uint32 `json:"weights,omitempty"`
	// Any adds every member that no tier names, nearest first, each as a tier of its own.
	Any bool `json:"any,omitempty"`
	// Except is left out of Any.
	Except []ClusterName `json:"except,omitempty"`
}

// PassiveHealth says when a caller ejects an instance by what it sees itself.
type PassiveHealth struct {
	Consecutive5xx uint32        `json:"consecutive5xx,omitempty"` // 5
	EjectFor       time.Duration `json:"ejectFor,omitempty"`       // 30 s
}

// ActiveHealth says how an instance's own sidecar checks it.
type ActiveHealth struct {
	Disabled bool          `json:"disabled,omitempty"`
	Every    time.Duration `json:"every,omitempty"` // 1 s
}

// DefaultPolicy is what applies without any FailoverPolicy.
func DefaultPolicy() Policy {
	return Policy{
		TripPercent: 50, SpillBelowPercent: 70, MinEndpoints: 1, TunnelLossPercent: 5,
		ReturnPercent: 75, ReturnAfter: 2 * time.Minute, Ramp: time.Minute,
		Passive: PassiveHealth{Consecutive5xx: 5, EjectFor: 30 * time.Second},
		Active:  ActiveHealth{Every: time.Second},
	}
}

// WithDefaults fills zero numbers with those of DefaultPolicy.
func (p Policy) WithDefaults() Policy {
	d := DefaultPolicy()
	for _, f := range []struct{ have, def *float64 }{
		{&p.TripPercent, &d.TripPercent}, {&p.SpillBelowPercent, &d.SpillBelowPercent},
		{&p.TunnelLossPercent, &d.TunnelLossPercent}, {&p.ReturnPercent, &d.ReturnPercent},
	} {
		if *f.have == 0 {
			*f.have = *f.def
		}
	}
	for _, f := range []struct{ have, def *time.Duration }{
		{&p.ReturnAfter, &d.ReturnAfter}, {&p.Ramp, &d.Ramp}, {&p.Passive.EjectFor, &d.Passive.EjectFor}, {&p.Active.Every, &d.Active.Every},
	} {
		if *f.have == 0 {
			*f.have = *f.def
		}
	}
	if p.MinEndpoints == 0 {
		p.MinEndpoints = d.MinEndpoints
	}
	if p.Passive.Consecutive5xx == 0 {
		p.Passive.Consecutive5xx = d.Passive.Consecutive5xx
	}
	return p
}

// Validate judges the policy with its defaults filled in.
func (p Policy) Validate() error {
	p = p.WithDefaults()
	for _, f := range []struct {
		name string
		v    float64
	}{
		{"trip percentage", p.TripPercent}, {"spill percentage", p.SpillBelowPercent},
		{"tunnel loss percentage", p.TunnelLossPercent}, {"return percentage", p.ReturnPercent},
	} {
		if math.IsNaN(f.v) || f.v < 0 || f.v > 100 {
			return fmt.Errorf("failover policy %s: %s %v is not within 0 and 100", p.Name, f.name, f.v)
		}
	}
	if p.ReturnPercent <= p.TripPercent {
		return fmt.Errorf("failover policy %s: %w: %v is not above %v", p.Name, ErrReturnNotAboveTrip, p.ReturnPercent, p.TripPercent)
	}
	if p.SpillBelowPercent < p.TripPercent {
		return fmt.Errorf("failover policy %s: spill percentage %v is below trip %v", p.Name, p.SpillBelowPercent, p.TripPercent)
	}
	if p.ReturnAfter > MaxReturnAfter || p.Ramp > MaxReturnAfter {
		return fmt.Errorf("failover policy %s: hold-down or ramp is longer than %v", p.Name, MaxReturnAfter)
	}
	seen := map[ClusterName]int{}
	for i, t := range p.Tiers {
		if len(t.Clusters) == 0 && !t.Any {
			return fmt.Errorf("failover policy %s: tier %d names no cluster", p.Name, i)
		}
		for _, c := range t.Clusters {
			if first, dup := seen[c]; dup {
				return fmt.Errorf("failover policy %s: %s is in tier %d and in tier %d", p.Name, c, first, i)
			}
			seen[c] = i
		}
		for c := range t.Weights {
			if at, ok := seen[c]; !ok || at != i {
				return fmt.Errorf("failover policy %s: tier %d has a weight for %s, which it does not name", p.Name, i, c)
			}
		}
	}
	return nil
}
