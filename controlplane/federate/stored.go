// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
)

// StoredBundles reads the bundles of the peers that a data directory trusts, also while a Manager has it. A peer whose record is
// damaged is left out.
func StoredBundles(dir *datadir.Dir) ([]*trust.Bundle, error) {
	peers, err := readRecords(dir, func(string, error) {})
	if err != nil {
		return nil, err
	}
	var out []*trust.Bundle
	for _, p := range peers {
		if p.rec.trusted() && p.bundle != nil {
			out = append(out, p.bundle)
		}
	}
	return out, nil
}
