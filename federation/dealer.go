// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"slices"
)

// Dealer deals calls to clusters by smooth weighted round robin: any n consecutive calls follow the shares to within one call
// per cluster. It is deterministic and not safe for concurrent use.
type Dealer struct {
	hands []hand
}

type hand struct {
	cluster ClusterName
	share   float64
	credit  float64
}

// NewDealer returns a dealer without shares.
func NewDealer() *Dealer { return &Dealer{} }

// Update takes new shares. Clusters that stay keep their place in the round, so that a small change of the shares does not
// start it again.
func (d *Dealer) Update(shares map[ClusterName]float64) {
	next := make([]hand, 0, len(shares))
	for c, s := range shares {
		if !(s > 0) {
			continue
		}
		h := hand{cluster: c, share: s}
		if i := slices.IndexFunc(d.hands, func(h hand) bool { return h.cluster == c }); i >= 0 {
			h.credit = max(-1, min(1, d.hands[i].credit))
		}
		next = append(next, h)
	}
	slices.SortFunc(next, func(a, b hand) int { return cmp.Compare(a.cluster, b.cluster) })
	d.hands = next
}

// Next deals one call among the clusters that avoid does not name; nil avoids none. It reports false when none is left.
func (d *Dealer) Next(avoid func(ClusterName) bool) (ClusterName, bool) {
	best, total := -1, 0.0
	for i := range d.hands {
		h := &d.hands[i]
		if avoid != nil && avoid(h.cluster) {
			continue
		}
		h.credit += h.share
		total += h.share
		if best < 0 || h.credit > d.hands[best].credit {
			best = i
		}
	}
	if best < 0 {
		return "", false
	}
	d.hands[best].credit -= total
	return d.hands[best].cluster, true
}
