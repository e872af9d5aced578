// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"hash/fnv"
	"slices"
	"strconv"
	"time"
)

// Figures of the machine that are not policy.
const (
	// retripWindow is how soon after traffic came back a trip counts as a relapse, which doubles the hold-down.
	retripWindow = 10 * time.Minute
	// maxRetrips bounds the doubling: 2^5 = 32 times.
	maxRetrips = 5
	// holdJitter spreads the callers' returns: ±20 %.
	holdJitter = 0.2
	// absentFor is how long a member that disappeared is remembered, so that its return is a return and not a start.
	absentFor = 10 * time.Minute
	// clockGrain is how far now may lie before the last call and still be that moment: reports keep milliseconds, clocks are nudged.
	clockGrain = time.Second
	// epsilon is the share below which nothing is left to place.
	epsilon = 1e-9
)

// rampSteps are the shares of its due that a returning member gets before it gets all of it.
var rampSteps = [...]float64{0.10, 0.25, 0.50}

// Step decides where calls of one service go from one caller. It is pure: equal arguments give equal results, and calling it
// again at the same instant with the state it returned changes nothing. The order of in.Members does not matter.
func Step(now time.Time, st State, in Inputs) (State, Decision) {
	e := newEngine(now, st, in)
	e.order()
	for _, s := range e.slots {
		e.judge(s)
	}
	for _, s := range e.ranked {
		e.comeBack(s)
	}
	e.allocate()
	if e.total() < epsilon {
		e.lastResort()
	}
	return e.finish()
}

// slot is one member while Step looks at it.
type slot struct {
	Member
	mem    MemberMemory
	tier   int // -1: in no tier
	weight float64
	ghost  bool // named by the policy, and nobody offers it

	health  Health  // with the caller's own ejections
	percent float64 // healthy among those with a verdict
	judged  bool    // percent is a verdict, present or last
	now     bool    // percent is the present verdict
	stale   bool    // the catalog is stale

	verdict Reason // why it is unfit; "" = fit to stay
	why     string // the sentence for verdict
	suspect bool
	due     float64 // 0..1: the part of its due that it may take
	share   float64
	panic   bool // serves as last resort
}

type engine struct {
	now    time.Time
	in     Inputs
	pol    Policy
	st     State
	slots  []*slot   // by name
	tiers  [][]*slot // the order
	ranked []*slot   // the order, flat
	out    []*slot   // in no tier
}

func newEngine(now time.Time, st State, in Inputs) *engine {
	now = now.Round(0).UTC()
	if early := st.At.Sub(now); early > 0 && early <= clockGrain {
		now = st.At
	}
	e := &engine{now: now, in: in, pol: in.Policy.WithDefaults(), st: rebase(st, now)}
	for _, m := range in.Members {
		i, dup := slices.BinarySearchFunc(e.slots, m.Cluster, func(s *slot, c ClusterName) int { return cmp.Compare(s.Cluster, c) })
		if dup || m.Cluster.IsZero() {
			continue
		}
		s := &slot{Member: m, tier: -1, weight: 1, mem: e.st.Members[m.Cluster]}
		if s.mem.Phase == "" {
			s.mem.Phase = PhaseUp
		}
		s.mem.Gone = false
		e.measure(s)
		e.slots = slices.Insert(e.slots, i, s)
	}
	return e
}

// rebase moves a state whose clock ran ahead of now (the clock was set back), so that what was left of each delay is still left.
func rebase(st State, now time.Time) State {
	members := make(map[ClusterName]MemberMemory, len(st.Members))
	var back time.Duration
	if st.At.After(now) {
		back = now.Sub(st.At)
	}
	shift := func(t time.Time) time.Time {
		if t.IsZero() {
			return t
		}
		return t.Add(back).UTC()
	}
	for c, m := range st.Members {
		m.Since, m.Until, m.Returned = shift(m.Since), shift(m.Until), shift(m.Returned)
		members[c] = m
	}
	st.Members, st.Since, st.At, st.Version = members, shift(st.Since), now, stateVersion
	return st
}

// measure derives a slot's health and round-trip time.
func (e *engine) measure(s *slot) {
	h := s.Health
	moved := min(s.Observed.Ejected, h.Healthy)
	h.Healthy -= moved
	rest := min(s.Observed.Ejected-moved, h.Unknown)
	h.Unknown -= rest
	h.Unhealthy += moved + rest
	s.health = h
	s.stale = !s.Local && (s.Freshness == Stale || s.Freshness == Withdrawn)
	if known := float64(h.Healthy) + float64(h.Unhealthy); known > 0 {
		s.percent, s.judged, s.now = float64(h.Healthy)*100/known, true, true
		s.mem.Judged, s.mem.Healthy = true, s.percent
	} else if h.Unknown > 0 && s.mem.Judged {
		s.percent, s.judged = s.mem.Healthy, true
	}
	if rtt := s.Tunnel.RTT; rtt > 0 && !s.Local {
		if was := s.mem.RTT; was == 0 || (rtt-was).Abs() > max(was/5, 5*time.Millisecond) {
			s.mem.RTT = rtt.Round(100 * time.Microsecond)
		}
	}
}

// order makes the tiers: those of the policy, or the default order.
func (e *engine) order() {
	named := map[ClusterName]bool{}
	for _, t := range e.pol.Tiers {
		for _, c := range t.Clusters {
			named[e.resolve(c)] = true
		}
	}
	if len(e.pol.Tiers) == 0 {
		for _, s := range e.nearest() {
			if s.Local || s.Same {
				e.addTier(s)
			}
		}
	}
	for _, t := range e.pol.Tiers {
		e.policyTier(t, named)
	}
	for _, s := range e.slots {
		if s.tier < 0 {
			e.out = append(e.out, s)
		}
	}
}

func (e *engine) policyTier(t Tier, named map[ClusterName]bool) {
	var tier []*slot
	for _, c := range t.Clusters {
		s := e.slot(e.resolve(c))
		if s == nil {
			s = &slot{Member: Member{Cluster: e.resolve(c), Same: true}, tier: -1, ghost: true}
		}
		if s.tier >= 0 || slices.Contains(tier, s) {
			continue
		}
		s.weight = 1
		if w := t.Weights[c]; w > 0 {
			s.weight = float64(w)
		}
		tier = append(tier, s)
	}
	if len(tier) > 0 {
		e.addTier(tier...)
	}
	if !t.Any {
		return
	}
	for _, s := range e.nearest() {
		excepted := slices.ContainsFunc(t.Except, func(c ClusterName) bool { return e.resolve(c) == s.Cluster })
		if s.tier < 0 && !named[s.Cluster] && !excepted && (s.Local || s.Same) {
			e.addTier(s)
		}
	}
}

func (e *engine) addTier(members ...*slot) {
	for _, s := range members {
		s.tier = len(e.tiers)
	}
	e.tiers = append(e.tiers, members)
	e.ranked = append(e.ranked, members...)
}

// nearest returns all members: the own cluster, those of its region, the others; each group by round-trip time.
func (e *engine) nearest() []*slot {
	far := func(s *slot) int {
		switch {
		case s.Local:
			return 0
		case s.Region != "" && s.Region == e.in.Locality.Region:
			return 1
		}
		return 2
	}
	unmeasured := func(s *slot) int {
		if s.mem.RTT == 0 {
			return 1
		}
		return 0
	}
	l := slices.Clone(e.slots)
	slices.SortStableFunc(l, func(a, b *slot) int {
		return cmp.Or(cmp.Compare(far(a), far(b)), cmp.Compare(unmeasured(a), unmeasured(b)), cmp.Compare(a.mem.RTT, b.mem.RTT))
	})
	return l
}

// resolve turns OwnCluster into the caller's cluster.
func (e *engine) resolve(c ClusterName) ClusterName {
	if c != OwnCluster {
		return c
	}
	for _, s := range e.slots {
		if s.Local {
			return s.Cluster
		}
	}
	return cmp.Or(e.in.Cluster, OwnCluster)
}

func (e *engine) slot(c ClusterName) *slot {
	i, ok := slices.BinarySearchFunc(e.slots, c, func(s *slot, c ClusterName) int { return cmp.Compare(s.Cluster, c) })
	if !ok {
		return nil
	}
	return e.slots[i]
}

// judge finds out whether a member is unfit, and if so takes it out at once.
func (e *engine) judge(s *slot) {
	s.verdict, s.why = e.decreed(s)
	decreed := s.verdict != ""
	if !decreed {
		s.verdict, s.why = e.condition(s)
	}
	switch {
	case decreed:
		if s.mem.Phase != PhaseOut {
			s.mem = e.enter(s.mem, PhaseOut)
		}
	case s.verdict != "":
		e.trip(&s.mem)
	case s.mem.Phase == PhaseUp:
		s.due = e.capacity(s)
	case s.mem.Phase == PhaseRamp:
		s.due = min(rampSteps[clampStep(s.mem.Step)], e.capacity(s))
	}
}

// trip takes a member out for its condition. Relapsing soon after traffic came back doubles the next hold-down.
func (e *engine) trip(m *MemberMemory) {
	switch m.Phase {
	case PhaseTripped:
		return
	case PhaseUp, PhaseRamp:
		if !m.Returned.IsZero() && e.now.Sub(m.Returned) <= retripWindow {
			m.Retrips = min(m.Retrips+1, maxRetrips)
		} else {
			m.Retrips = 0
		}
		m.Returned = time.Time{}
	}
	*m = e.enter(*m, PhaseTripped)
}

// enter begins a phase now.
func (e *engine) enter(m MemberMemory, p Phase) MemberMemory {
	m.Phase, m.Since, m.Until, m.Step, m.Spoiled = p, e.now, time.Time{}, 0, false
	return m
}

// capacity is the part of its due that a fit member can take: all of it from the spill threshold on.
func (e *engine) capacity(s *slot) float64 {
	if !s.judged || s.percent >= e.pol.SpillBelowPercent || e.pol.SpillBelowPercent <= 0 {
		return 1
	}
	return s.percent / e.pol.SpillBelowPercent
}

// comeBack moves a member that is fit and not home one or more phases on. It is called in tier order, since what a tier takes
// back decides whether the tiers below are needed.
func (e *engine) comeBack(s *slot) {
	if s.ghost || s.verdict != "" || s.mem.Phase == PhaseUp {
		return
	}
	if !e.wanted(s) {
		e.home(s)
		return
	}
	if !e.carried(s) { // nobody else serves: waiting would help no one
		s.mem.Returned = e.now
		e.home(s)
		return
	}
	if s.mem.Phase == PhaseOut { // an operator's decision ended: no hold-down, but in steps
		s.mem.Returned = e.now
		s.mem = e.enter(s.mem, PhaseRamp)
	}
	if s.mem.Phase == PhaseTripped {
		if !e.wellEnough(s) {
			s.verdict, s.why = BelowMinHealthy, e.notYet(s)
			return
		}
		s.mem = e.enter(s.mem, PhaseHold)
		s.mem.Until = e.now.Add(e.holdDown(s))
	}
	if s.mem.Phase == PhaseHold {
		switch {
		case !e.wellEnough(s):
			s.mem = e.enter(s.mem, PhaseTripped)
			s.verdict, s.why = BelowMinHealthy, e.notYet(s)
			return
		case e.now.Before(s.mem.Until):
			return
		}
		s.mem.Returned = e.now
		s.mem = e.enter(s.mem, PhaseRamp)
	}
	e.climb(s)
}

// climb goes up or down the ramp.
func (e *engine) climb(s *slot) {
	interval := e.rampInterval()
	if interval <= 0 {
		e.home(s)
		return
	}
	m := &s.mem
	m.Step = clampStep(m.Step)
	elapsed := !e.now.Before(m.Since.Add(interval))
	switch good := s.judged && s.percent >= e.pol.ReturnPercent; {
	case !good && (!m.Spoiled || elapsed): // one step back, at once and then once an interval
		m.Step, m.Since, m.Spoiled = max(m.Step-1, 0), e.now, true
	case good && m.Spoiled: // the step begins again
		m.Since, m.Spoiled = e.now, false
	case good && elapsed && !s.stale:
		if m.Step == len(rampSteps)-1 {
			e.home(s)
			return
		}
		m.Step, m.Since = m.Step+1, e.now
	}
	s.due = min(rampSteps[m.Step], e.capacity(s))
}

func (e *engine) home(s *slot) {
	s.mem = e.enter(s.mem, PhaseUp)
	s.due = e.capacity(s)
}

// wanted reports whether calls reach this member's tier at all: those that the tiers above leave.
func (e *engine) wanted(s *slot) bool {
	left := 1.0
	for _, t := range e.tiers[:s.tier] {
		left = leftover(t, left)
	}
	return left > epsilon
}

// carried reports whether another member is at home and serves.
func (e *engine) carried(s *slot) bool {
	return slices.ContainsFunc(e.ranked, func(o *slot) bool { return o != s && o.mem.Phase == PhaseUp && o.due > 0 })
}

// wellEnough reports whether a tripped member may return: by a present verdict from fresh knowledge.
func (e *engine) wellEnough(s *slot) bool {
	return s.now && !s.stale && s.percent >= e.pol.ReturnPercent && s.health.Healthy >= e.pol.MinEndpoints
}

// holdDown is how long a member must stay healthy before it returns.
func (e *engine) holdDown(s *slot) time.Duration {
	d := e.nominalHold(s)
	if d <= 0 || e.in.Caller == "" {
		return d
	}
	h := fnv.New64a()
	h.Write([]byte(e.in.Caller + "\x00" + e.in.Service.String() + "\x00" + string(s.Cluster) + "\x00" + strconv.Itoa(s.mem.Retrips)))
	unit := float64(h.Sum64()>>11)/(1<<53)*2 - 1 // −1..1
	return time.Duration(float64(d) * (1 + holdJitter*unit)).Round(time.Millisecond)
}

func (e *engine) nominalHold(s *slot) time.Duration {
	if e.pol.ReturnAfter <= 0 {
		return 0
	}
	return min(e.pol.ReturnAfter, MaxReturnAfter) << min(max(s.mem.Retrips, 0), maxRetrips)
}

// rampInterval is the time on each step of the ramp.
func (e *engine) rampInterval() time.Duration {
	return min(e.pol.Ramp, MaxReturnAfter) / time.Duration(len(rampSteps))
}

func clampStep(i int) int { return min(max(i, 0), len(rampSteps)-1) }
