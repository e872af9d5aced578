// SPDX-License-Identifier: Apache-2.0

package withdrawal

import (
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Denial is the withdrawal of one identity.
type Denial struct {
	Reason string
	// IssuedBefore is set once the identity was admitted again: certificates issued before stay out. Zero: every certificate.
	IssuedBefore time.Time
}

// Total reports whether the identity is withdrawn altogether, whatever it presents.
func (d Denial) Total() bool { return d.IssuedBefore.IsZero() }

// Covers reports whether a certificate issued at that time is withdrawn. The zero time stands for an identity that is known by
// name only, from a header or a list: whoever sees its certificate judges that.
func (d Denial) Covers(issued time.Time) bool {
	return d.Total() || !issued.IsZero() && issued.Before(d.IssuedBefore)
}

// Denials are the withdrawn identities as one process knows them. Treat it as immutable.
type Denials map[spiffeid.ID]Denial

// Judge reports whether a certificate of id issued at that time (trust.Issued) is withdrawn, and why.
func (d Denials) Judge(id spiffeid.ID, issued time.Time) (reason string, denied bool) {
	one, ok := d[id]
	if !ok || !one.Covers(issued) {
		return "", false
	}
	return one.Reason, true
}
