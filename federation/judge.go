// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"fmt"
	"strconv"
	"time"
)

// decreed says whether somebody's decision keeps a member out.
func (e *engine) decreed(s *slot) (Reason, string) {
	switch {
	case !s.Local && !s.Same:
		return NotGranted, fmt.Sprintf("no sameness granted to %s for namespace %s", s.Cluster, cmp.Or(e.in.Service.Namespace, "?"))
	case s.tier < 0:
		return ResidencyExcluded, e.policyName() + " leaves it out"
	case s.Drained:
		return Drained, "drained by its owner" + detail(s.DrainReason)
	case s.LocallyDrained:
		return Drained, "drained here, for callers of " + string(e.in.Cluster)
	}
	return "", ""
}

// condition says whether a member's own condition keeps it out: what is worst first.
func (e *engine) condition(s *slot) (Reason, string) {
	if !s.Local {
		alive := s.Tunnel.Known && s.Tunnel.Up && !s.Tunnel.Suspect
		switch {
		case s.Tunnel.Known && !s.Tunnel.Up:
			return PeerUnreachable, e.tunnelName(s) + " is down"
		case s.Tunnel.Known && s.Tunnel.Suspect:
			s.suspect = true
			return PeerUnreachable, e.tunnelName(s) + " is suspect: pings go unanswered"
		case s.Freshness == Withdrawn && !alive:
			return PeerUnreachable, "its catalog is older than three ttl and no tunnel is known to be alive"
		}
	}
	if o := s.Observed; o.Down && (o.Until.IsZero() || e.now.Before(o.Until)) {
		r := cmp.Or(o.Reason, NoEndpoints)
		return r, "this caller's own calls fail there: " + cmp.Or(o.Why, string(r))
	}
	if s.health.Total() == 0 {
		return NoEndpoints, "no instances"
	}
	if r, why := e.lossy(s); r != "" {
		return r, why
	}
	if s.judged && s.percent < e.pol.TripPercent {
		return BelowMinHealthy, fmt.Sprintf("%s < trip %s%%%s", s.counts(), num(e.pol.TripPercent), s.ejections())
	}
	if uint64(s.health.Healthy)+uint64(s.health.Unknown) < uint64(e.pol.MinEndpoints) {
		return BelowMinHealthy, fmt.Sprintf("%d healthy, at least %d wanted%s", s.health.Healthy, e.pol.MinEndpoints, s.ejections())
	}
	return "", ""
}

// lossy judges the tunnel's loss: out above the limit, back at half of it.
func (e *engine) lossy(s *slot) (Reason, string) {
	loss, limit := s.Tunnel.Loss*100, e.pol.TunnelLossPercent
	s.mem.Lossy = !s.Local && s.Tunnel.Known && (loss > limit || s.mem.Lossy && loss > limit/2)
	if !s.mem.Lossy {
		return "", ""
	}
	return TunnelDegraded, fmt.Sprintf("%s loses %.1f%%, limit %s%% (back at %s%%)", e.tunnelName(s), loss, num(limit), num(limit/2))
}

// notYet is the sentence for a member that is no longer bad and not yet good.
func (e *engine) notYet(s *slot) string {
	if s.stale {
		return s.counts() + "; its catalog is stale, so it does not return yet"
	}
	if s.now && s.health.Healthy < e.pol.MinEndpoints {
		return fmt.Sprintf("%d healthy, at least %d wanted", s.health.Healthy, e.pol.MinEndpoints)
	}
	return fmt.Sprintf("%s, returns at ≥%s%%%s", s.counts(), num(e.pol.ReturnPercent), s.ejections())
}

// counts is the health in words: "1 of 4 healthy = 25%".
func (s *slot) counts() string {
	h := s.health
	known := uint64(h.Healthy) + uint64(h.Unhealthy)
	switch {
	case known == 0 && s.judged:
		return fmt.Sprintf("%d unknown, last verdict %s%%", h.Unknown, num(s.percent))
	case known == 0:
		return fmt.Sprintf("%d without a verdict yet", h.Unknown)
	case h.Unknown > 0:
		return fmt.Sprintf("%d of %d healthy = %s%% (%d unknown)", h.Healthy, known, num(s.percent), h.Unknown)
	}
	return fmt.Sprintf("%d of %d healthy = %s%%", h.Healthy, known, num(s.percent))
}

func (s *slot) ejections() string {
	if s.Observed.Ejected == 0 {
		return ""
	}
	return fmt.Sprintf("; %d ejected%s (outlier)", s.Observed.Ejected, detail(s.Observed.Why))
}

func (e *engine) tunnelName(s *slot) string {
	return fmt.Sprintf("tunnel %s→%s", cmp.Or(e.in.Cluster, OwnCluster), s.Cluster)
}

func (e *engine) policyName() string {
	if e.pol.Name == "" {
		return "the order"
	}
	return "FailoverPolicy " + e.pol.Name
}

func detail(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}

// num prints a percentage without needless digits.
func num(f float64) string {
	if f == float64(int64(f)) {
		return strconv.FormatInt(int64(f), 10)
	}
	if f < 10 {
		return strconv.FormatFloat(f, 'f', 1, 64)
	}
	return strconv.FormatFloat(f, 'f', 0, 64)
}

// clock prints a moment of the day; sentences name moments, never how long it is until then, so that they do not change by
// themselves.
func clock(t time.Time) string { return t.UTC().Format("15:04:05") + " UTC" }
