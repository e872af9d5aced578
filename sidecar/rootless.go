// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"crypto/x509"
	"slices"

	"github.com/strait-mesh/strait/sidecar/inner"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// replaceRootless has everything that we dialled made anew in time where a root has left a bundle: what was verified by that root ends
// soon, here or at the other end. Which root verified which is not asked: making a connection costs less than missing one.
func (s *Sidecar) replaceRootless(before, now *trust.Bundles) {
	lost := map[spiffeid.TrustDomain]bool{}
	for _, td := range before.TrustDomains() {
		b := now.Get(td)
		lost[td] = b != nil && slices.ContainsFunc(before.Get(td).Roots(), func(r *x509.Certificate) bool { return !slices.ContainsFunc(b.Roots(), r.Equal) })
	}
	id := s.source.Identity()
	own := id != nil && lost[id.ID.TrustDomain()]
	if own {
		s.locals.Replace()
	}
	s.retire(func(c *inner.Conn) bool { return own || lost[c.Peer.ID.TrustDomain()] })
}
