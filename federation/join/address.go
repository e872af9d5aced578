// SPDX-License-Identifier: Apache-2.0

package join

import (
	"errors"
	"fmt"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of what the other side says of its gateways.
const (
	maxRecords         = 32
	maxRecordAddresses = 8
	maxZone            = 63
)

var errAddress = errors.New("not an address of a gateway")

// checkAddress accepts "host:port" where a gateway of another cluster can be: what a catalog may name, a token and an
// introduction may.
func checkAddress(s string, allowLoopback bool) error {
	if err := catalog.CheckAddress(s, allowLoopback); err != nil {
		return fmt.Errorf("%w: %w", errAddress, err)
	}
	return nil
}

// CheckRecords judges what a cluster says of its own gateways.
func CheckRecords(td spiffeid.TrustDomain, records []*controlpb.GatewayRecord, allowLoopback bool) error {
	if len(records) > maxRecords {
		return fmt.Errorf("%d gateways; at most %d", len(records), maxRecords)
	}
	seen := map[string]bool{}
	for _, r := range records {
		if _, err := spiffeid.Gateway(td, r.GetName()); err != nil || seen[r.GetName()] {
			return fmt.Errorf("gateway name %.80q: invalid, or twice", r.GetName())
		}
		seen[r.GetName()] = true
		if len(r.GetAddresses()) > maxRecordAddresses || len(r.GetZone()) > maxZone {
			return fmt.Errorf("gateway %s: too many addresses, or a zone that is too long", r.GetName())
		}
		for _, a := range r.GetAddresses() {
			if err := checkAddress(a, allowLoopback); err != nil {
				return fmt.Errorf("gateway %s: %w", r.GetName(), err)
			}
		}
	}
	return nil
}
