// SPDX-License-Identifier: Apache-2.0

package federation

// allocate gives out shares tier by tier. What no tier can take goes back to those that serve, in proportion: calls are never
// refused for want of a healthier place.
func (e *engine) allocate() {
	left := 1.0
	for _, t := range e.tiers {
		if left < epsilon {
			break
		}
		left = divide(t, left)
	}
	if placed := e.total(); placed > epsilon {
		for _, s := range e.ranked {
			s.share /= placed
		}
	}
}

// divide gives the members of one tier their shares of left and returns what remains for the next tier. Each is due its part by
// weight among those that take anything, and takes as much of it as it is fit for; what the weak ones leave goes to the whole
// ones of the same tier first.
func divide(t []*slot, left float64) float64 {
	var weights, whole, taken float64
	for _, s := range t {
		if s.due > 0 {
			weights += s.weight
		}
		if s.due >= 1 {
			whole += s.weight
		}
	}
	if weights == 0 {
		return left
	}
	for _, s := range t {
		s.share = left * s.weight / weights * s.due
		taken += s.share
	}
	if whole == 0 {
		return left - taken
	}
	for _, s := range t {
		if s.due >= 1 {
			s.share += (left - taken) * s.weight / whole
		}
	}
	return 0
}

// leftover is what divide would return, without dividing.
func leftover(t []*slot, left float64) float64 {
	var weights, takes float64
	for _, s := range t {
		if s.due >= 1 {
			return 0
		}
		if s.due > 0 {
			weights += s.weight
			takes += s.weight * s.due
		}
	}
	if weights == 0 {
		return left
	}
	return left * (1 - takes/weights)
}

func (e *engine) total() float64 {
	sum := 0.0
	for _, s := range e.ranked {
		sum += s.share
	}
	return sum
}

// How desperate a place is, when none is fit. Lower is better; hopeless places get nothing.
const (
	lossyTunnel = iota
	someHealthy
	suspectTunnel
	ownEvidence
	noneHealthy
	hopeless
)

// lastResort serves from the least bad places when nothing is fit. Where some instances are healthy every such member serves in
// proportion to them, so that each instance gets the same; otherwise the best tier does.
func (e *engine) lastResort() {
	best := hopeless
	for _, s := range e.ranked {
		best = min(best, desperation(s))
	}
	if best == hopeless {
		return
	}
	var chosen []*slot
	var sum float64
	for _, s := range e.ranked {
		if desperation(s) != best || (best != someHealthy && len(chosen) > 0 && chosen[0].tier != s.tier) {
			continue
		}
		s.panic, s.share = true, s.weight
		if best == someHealthy {
			s.share = float64(s.health.Healthy) + float64(s.health.Unknown)
		}
		chosen = append(chosen, s)
		sum += s.share
	}
	for _, s := range chosen {
		s.share /= sum
	}
}

func desperation(s *slot) int {
	some := s.health.Healthy > 0 || s.health.Unknown > 0
	switch {
	case s.ghost || s.health.Total() == 0 || s.mem.Phase == PhaseOut:
		return hopeless
	case s.verdict == TunnelDegraded && some:
		return lossyTunnel
	case s.verdict == BelowMinHealthy && some:
		return someHealthy
	case s.verdict == PeerUnreachable && s.suspect && some:
		return suspectTunnel
	case s.verdict == PeerUnreachable && !s.suspect:
		return hopeless
	case s.verdict == BelowMinHealthy || s.verdict == TunnelDegraded || s.verdict == PeerUnreachable:
		return noneHealthy
	}
	return ownEvidence
}
