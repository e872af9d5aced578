// SPDX-License-Identifier: Apache-2.0

package register

import "github.com/strait-mesh/strait/trust/spiffeid"

// RevokeFor ends every token for an identity, used and unused: what was handed out before it was withdrawn must not bring it back
// once it is admitted again.
func (t *Tokens) RevokeFor(id spiffeid.ID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.records {
		if r.Grant.SPIFFEID != id || r.Revoked {
			continue
		}
		r.Revoked = true
		if err := t.saveLocked(r); err != nil {
			return err
		}
	}
	return nil
}

// stands reports whether a token may still be redeemed, after the identity was signed: it may have been revoked meanwhile.
func (t *Tokens) stands(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.usable(t.records[id])
}
