// SPDX-License-Identifier: Apache-2.0

package controlplane

import "github.com/strait-mesh/strait/controlplane/identity"

// jwtSigner signs tokens for applications; nil where identities come from an authority that is not ours, which does so itself.
func (c *ControlPlane) jwtSigner() identity.JWTSigner {
	if c.ca == nil {
		return nil
	}
	return tokenSigner{c}
}
