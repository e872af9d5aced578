// SPDX-License-Identifier: Apache-2.0

package rotation

import (
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Held is what one process was last issued.
type Held struct {
	Name        string
	ID          spiffeid.ID
	Own         Identity
	Application *Identity // nil: none
	Seen        time.Time
}

// Held lists what processes hold, sorted by name.
func (t *Tracker) Held() []Held {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Held, 0, len(t.processes))
	for name, p := range t.processes {
		h := Held{Name: name, ID: p.ID, Own: p.Own, Seen: p.Seen}
		if p.Application != nil {
			a := *p.Application
			h.Application = &a
		}
		out = append(out, h)
	}
	slices.SortFunc(out, func(a, b Held) int { return strings.Compare(a.Name, b.Name) })
	return out
}
