// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"

	"github.com/strait-mesh/strait/controlplane/federate"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
)

const ownBundleFile = "bundles/own.json" // trust/ca writes it

// ReadBundles reads which bundles the control plane of a data directory trusts: its own and those of other members. It needs no lock,
// and no control plane that runs.
func ReadBundles(dataDir string) (*trust.Bundles, error) {
	dir, err := datadir.Open(dataDir, datadir.Options{})
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	facts, err := ReadFacts(dir)
	if err != nil {
		return nil, err
	}
	self, err := facts.parse()
	if err != nil {
		return nil, err
	}
	jwks, err := dir.ReadFile(ownBundleFile)
	if err != nil {
		return nil, fmt.Errorf("own bundle: %w", err)
	}
	own, err := trust.ParseBundle(self.trustDomain, jwks)
	if err != nil {
		return nil, err
	}
	peers, err := federate.StoredBundles(dir)
	if err != nil {
		return nil, err
	}
	return trust.NewBundles(append(peers, own)...)
}
