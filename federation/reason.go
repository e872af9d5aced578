// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"fmt"
	"slices"
	"strings"
)

// Reason is the one word that says why a decision was taken. The same words appear in metrics, spans, logs, the command line
// and, in CamelCase, in conditions.
type Reason string

// The reasons. This list is the whole vocabulary; Step itself uses those of the first two groups.
const (
	// Where traffic goes.
	LocalOK           Reason = "local_ok"            // the caller's own cluster serves
	PriorityOK        Reason = "priority_ok"         // the first tier of the policy serves, and it is another cluster
	Standby           Reason = "standby"             // could serve and is not needed
	SpillCapacity     Reason = "spill_capacity"      // a weakened tier keeps what it can, the rest goes on
	ReturnHold        Reason = "return_hold"         // healthy again, waiting out the hold-down
	ReturnRamp        Reason = "return_ramp"         // traffic returns in steps
	CatalogStaleHold  Reason = "catalog_stale_hold"  // what is known is stale: the last verdict is kept
	PanicAllUnhealthy Reason = "panic_all_unhealthy" // nothing is fit, the least bad serves
	RouteSplit        Reason = "route_split"         // a route divides by weight
	HeaderOverride    Reason = "header_override"     // the request chose
	SessionSticky     Reason = "session_sticky"      // the session stays where it was
	ShedOverload      Reason = "shed_overload"       // refused to protect what is left

	// Why a member gets nothing.
	BelowMinHealthy   Reason = "below_min_healthy"  // too few healthy instances
	NoEndpoints       Reason = "no_endpoints"       // no instance at all, or the far side said so
	PeerUnreachable   Reason = "peer_unreachable"   // no live tunnel
	TunnelDegraded    Reason = "tunnel_degraded"    // the tunnel loses too much
	Drained           Reason = "drained"            // by its owner, or here for local callers
	OwnerLimit        Reason = "owner_limit"        // outside what its owner allows
	ResidencyExcluded Reason = "residency_excluded" // the policy's order leaves it out
	NotGranted        Reason = "not_granted"        // no sameness granted to that peer for this namespace
	NotExported       Reason = "not_exported"       // its owner does not offer it to us
	OutlierEjected    Reason = "outlier_ejected"    // this caller's own calls failed there
	UpstreamReset     Reason = "upstream_reset"     // connections broke

	// Why a request was refused.
	PolicyDenied     Reason = "policy_denied"
	TrustRefused     Reason = "trust_refused"
	IdentityExpired  Reason = "identity_expired"
	RateLimited      Reason = "rate_limited"
	CircuitOpen      Reason = "circuit_open"
	DeadlineExceeded Reason = "deadline_exceeded"
	RetryBudgetEmpty Reason = "retry_budget_empty"
	ConfigMissing    Reason = "config_missing"
)

var reasons = []Reason{
	LocalOK, PriorityOK, Standby, BelowMinHealthy, NoEndpoints, PeerUnreachable, TunnelDegraded, SpillCapacity, ShedOverload,
	ReturnHold, ReturnRamp, Drained, OwnerLimit, ResidencyExcluded, NotGranted, RouteSplit, HeaderOverride, SessionSticky,
	CatalogStaleHold, PanicAllUnhealthy, OutlierEjected, UpstreamReset, PolicyDenied, NotExported, TrustRefused, IdentityExpired,
	RateLimited, CircuitOpen, DeadlineExceeded, RetryBudgetEmpty, ConfigMissing,
}

// Reasons returns every reason, in the order of the documentation.
func Reasons() []Reason { return slices.Clone(reasons) }

// Valid reports whether r is one of Reasons.
func (r Reason) Valid() bool { return slices.Contains(reasons, r) }

func (r Reason) String() string { return string(r) }

// CamelCase returns the reason as conditions spell it: "BelowMinHealthy", "LocalOK".
func (r Reason) CamelCase() string {
	var b strings.Builder
	for w := range strings.SplitSeq(string(r), "_") {
		if w == "ok" {
			b.WriteString("OK")
		} else if w != "" {
			b.WriteString(strings.ToUpper(w[:1]) + w[1:])
		}
	}
	return b.String()
}

// ParseReason accepts the words of Reasons.
func ParseReason(s string) (Reason, error) {
	if r := Reason(s); r.Valid() {
		return r, nil
	}
	return "", fmt.Errorf("unknown reason %.40q", s)
}
