// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"time"

	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// authority is where the identities of the own trust domain come from: our CA, or a SPIFFE Workload API server (then
// ControlPlane.ca is nil, and IssueCSR refuses).
type authority interface {
	Bundle() *trust.Bundle
	IssueCSR(csrDER []byte, id spiffeid.ID, ttl time.Duration) (chainDER [][]byte, err error)
	IssuerNotAfter() time.Time // zero: not known
}

var _ authority = (*ca.CA)(nil)
