// SPDX-License-Identifier: Apache-2.0

package catalog

import "github.com/strait-mesh/strait/controlplane/controlpb"

// EntriesHash is the hash that a head over those entries has.
func EntriesHash(entries []*controlpb.CatalogEntry) [32]byte {
	l := (*ledger)(nil).clone()
	for _, e := range entries {
		l.put(e.GetKey(), entry{version: e.GetVersion(), body: e.GetBody()})
	}
	return l.hash()
}
