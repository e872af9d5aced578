// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// finish makes the decision and the state to remember.
func (e *engine) finish() (State, Decision) {
	d := Decision{ActiveTier: -1, Tiers: make([]TierDecision, len(e.tiers))}
	most := epsilon
	for i, t := range e.tiers {
		sum := 0.0
		for _, s := range t {
			sum += s.share
		}
		if sum > most+epsilon {
			d.ActiveTier, most = i, sum
		}
	}
	blame := e.blame()
	d.Reason = e.reason(d.ActiveTier, blame)
	for i, t := range e.tiers {
		for _, s := range t {
			d.Tiers[i].Members = append(d.Tiers[i].Members, e.explain(s, d.Reason))
		}
	}
	for _, s := range e.out {
		d.Exclusions = append(d.Exclusions, e.explain(s, d.Reason))
	}
	if blame != nil {
		d.Returns = e.returns(blame)
	}
	d.Wake = e.wake()
	st := e.remember(d.ActiveTier)
	d.Since = st.Since
	return st, d
}

// blame finds the member because of which traffic is not all at the first place: the first in tier order, down to the last tier
// that serves, that does not take all it is due.
func (e *engine) blame() *slot {
	last := -1
	for _, s := range e.ranked {
		if s.share > epsilon {
			last = max(last, s.tier)
		}
	}
	for _, s := range e.ranked {
		if s.tier > last && last >= 0 {
			break
		}
		if s.ghost && s.tier == last {
			continue // its tier serves without it
		}
		if s.ghost || s.mem.Phase != PhaseUp || (s.due < 1 && s.share < 1-epsilon) {
			return s
		}
	}
	return nil
}

func (e *engine) reason(active int, blame *slot) Reason {
	if active < 0 {
		return e.nowhere()
	}
	if slices.ContainsFunc(e.ranked, func(s *slot) bool { return s.panic }) {
		return PanicAllUnhealthy
	}
	if blame != nil {
		return e.blameReason(blame)
	}
	r := PriorityOK
	for _, s := range e.tiers[active] {
		if s.share <= epsilon {
			continue
		}
		if s.stale {
			return CatalogStaleHold
		}
		if s.Local {
			r = LocalOK
		}
	}
	return r
}

// nowhere is the reason when nothing has a share: what all candidates have in common, or no_endpoints.
func (e *engine) nowhere() Reason {
	var r Reason
	for _, s := range slices.Concat(e.ranked, e.out) {
		v := e.blameReason(s)
		if r != "" && v != r {
			return NoEndpoints
		}
		r = v
	}
	if r == "" {
		return NoEndpoints
	}
	return r
}

func (e *engine) blameReason(s *slot) Reason {
	switch {
	case s.ghost:
		return NotExported
	case s.verdict != "":
		return s.verdict
	case s.mem.Phase == PhaseHold:
		return ReturnHold
	case s.mem.Phase == PhaseRamp:
		return ReturnRamp
	}
	return SpillCapacity
}

// explain makes one member's line. overall is the decision's reason, which is also why a lower tier serves.
func (e *engine) explain(s *slot, overall Reason) MemberDecision {
	d := MemberDecision{Cluster: s.Cluster, Healthy: s.health.Healthy, Total: s.health.Total(), Share: s.share}
	switch {
	case s.ghost:
		d.State, d.Reason, d.Because = StateExcluded, NotExported, "offers no such service to this cluster"
	case s.panic:
		d.State, d.Reason, d.Because = StateActive, PanicAllUnhealthy, "last resort, nothing is fit: "+s.why
	case s.verdict != "":
		d.State, d.Reason, d.Because = StateTripped, s.verdict, s.why
		if s.mem.Phase == PhaseOut || s.verdict == PeerUnreachable || s.health.Total() == 0 {
			d.State = StateExcluded
		}
	case s.mem.Phase == PhaseHold:
		d.State, d.Reason = StateHold, ReturnHold
		d.Because = fmt.Sprintf("%s, held down until %s%s", s.counts(), clock(s.mem.Until), relapses(s.mem.Retrips))
	case s.mem.Phase == PhaseRamp:
		d.State, d.Reason, d.Because = StateRamp, ReturnRamp, e.rampLine(s)
	case s.share <= epsilon:
		d.State, d.Reason, d.Because, d.Share = StateStandby, Standby, "not needed", 0
	default:
		d.State, d.Reason, d.Because = StateActive, e.activeReason(s, overall), e.activeLine(s)
	}
	return d
}

func (e *engine) activeReason(s *slot, overall Reason) Reason {
	switch {
	case s.stale:
		return CatalogStaleHold
	case s.due < 1 && s.share < 1-epsilon:
		return SpillCapacity
	case s.tier > 0:
		return overall
	case s.Local:
		return LocalOK
	}
	return PriorityOK
}

func (e *engine) activeLine(s *slot) string {
	var parts []string
	if s.stale {
		parts = append(parts, "its catalog is stale: last verdict kept")
	}
	if s.due < 1 {
		p := fmt.Sprintf("%s < %s%%", s.counts(), num(e.pol.SpillBelowPercent))
		if s.share < 1-epsilon {
			p += fmt.Sprintf(": keeps %s%%, the rest spills", num(s.due*100))
		}
		parts = append(parts, p)
	}
	switch {
	case !s.Local && s.Tunnel.Known:
		via := ""
		if s.Tunnel.Transport != "" {
			via = " " + s.Tunnel.Transport
		}
		parts = append(parts, fmt.Sprintf("%s%s rtt %s loss %.1f%%", e.tunnelName(s), via, millis(s.mem.RTT), s.Tunnel.Loss*100))
	case s.due >= 1:
		parts = append(parts, s.counts())
	}
	return strings.Join(parts, "; ") + s.ejections()
}

func (e *engine) rampLine(s *slot) string {
	line := fmt.Sprintf("returning: %s%% since %s", num(rampSteps[clampStep(s.mem.Step)]*100), clock(s.mem.Since))
	if s.mem.Spoiled {
		return line + fmt.Sprintf(", one step back: %s, good is ≥%s%%", s.counts(), num(e.pol.ReturnPercent))
	}
	return line + ", " + s.counts()
}

// returns says when and how traffic goes back to the place that is to blame.
func (e *engine) returns(s *slot) string {
	tier := fmt.Sprintf("tier %d ", s.tier)
	good := fmt.Sprintf("≥%s%% healthy", num(e.pol.ReturnPercent))
	if e.pol.MinEndpoints > 1 {
		good += fmt.Sprintf(" and at least %d", e.pol.MinEndpoints)
	}
	held := ""
	if d := e.nominalHold(s); d > 0 {
		held = " for " + d.String()
	}
	now := ""
	if s.judged {
		now = fmt.Sprintf(" (now %s%%)", num(s.percent))
	}
	switch e.blameReason(s) {
	case ReturnHold:
		return tier + "at " + clock(s.mem.Until) + " if it stays " + good + now
	case ReturnRamp:
		next := "100"
		if i := clampStep(s.mem.Step) + 1; i < len(rampSteps) {
			next = num(rampSteps[i] * 100)
		}
		return fmt.Sprintf("%sin steps: next %s%% at %s if it stays %s%s", tier, next, clock(s.mem.Since.Add(e.rampInterval())), good, now)
	case SpillCapacity:
		return fmt.Sprintf("%swhole when ≥%s%% healthy%s", tier, num(e.pol.SpillBelowPercent), now)
	case BelowMinHealthy:
		return tier + "when " + good + held + now
	case PeerUnreachable:
		return tier + "when its tunnel is up and " + good + held
	case TunnelDegraded:
		return fmt.Sprintf("%swhen its tunnel loses ≤%s%%%s (now %.1f%%)", tier, num(e.pol.TunnelLossPercent/2), held, s.Tunnel.Loss*100)
	case Drained:
		return tier + "when it is no longer drained"
	case NotGranted:
		return tier + "when sameness is granted"
	case NotExported:
		return tier + "when it is exported to this cluster"
	case NoEndpoints:
		if s.health.Total() == 0 {
			return tier + "when it has instances, " + good + held
		}
	}
	return tier + "when its instances answer again, " + good + held + now
}

func relapses(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" (%d times as long after relapse)", 1<<n)
}

// millis prints a round-trip time.
func millis(d time.Duration) string {
	if d < 10*time.Millisecond {
		return num(float64(d)/float64(time.Millisecond)) + "ms"
	}
	return d.Round(time.Millisecond).String()
}

// wake is the next moment at which time alone changes something.
func (e *engine) wake() time.Time {
	var w time.Time
	at := func(t time.Time) {
		if t.After(e.now) && (w.IsZero() || t.Before(w)) {
			w = t
		}
	}
	for _, s := range e.slots {
		switch s.mem.Phase {
		case PhaseHold:
			at(s.mem.Until)
		case PhaseRamp:
			at(s.mem.Since.Add(e.rampInterval()))
		}
		if s.Observed.Down {
			at(s.Observed.Until.Round(0).UTC())
		}
	}
	return w
}

// remember makes the state after this call.
func (e *engine) remember(active int) State {
	st := State{Version: stateVersion, At: e.now, Active: e.st.Active, Since: e.st.Since, Members: map[ClusterName]MemberMemory{}}
	for c, m := range e.st.Members {
		if e.slot(c) != nil {
			continue
		}
		if !m.Gone {
			e.trip(&m)
			m.Gone, m.Since = true, e.now
		}
		if e.now.Sub(m.Since) < absentFor {
			st.Members[c] = m
		}
	}
	for _, s := range e.slots {
		st.Members[s.Cluster] = s.mem
	}
	key := "none"
	if active >= 0 {
		var names []string
		for _, s := range e.tiers[active] {
			if s.share > epsilon {
				names = append(names, string(s.Cluster))
			}
		}
		slices.Sort(names)
		key = strings.Join(names, ",")
	}
	if key != st.Active || st.Since.IsZero() {
		st.Active, st.Since = key, e.now
	}
	return st
}
