// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"time"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// RootGrace is how long a connection may go on that was verified by a root which has left its bundle since: long enough to make another
// one first, and to end what runs on it, and short enough for a root that was taken away because it is not trusted any more.
const RootGrace = 4 * time.Second

// LostRoot says whether err, of Verify with these bundles, refuses a chain of td because no root of td's bundle signed it: of a chain
// that was verified before, that its root has left the bundle. A trust domain without a bundle, or with one that has no roots, was
// withdrawn as a whole.
func (s *Bundles) LostRoot(td spiffeid.TrustDomain, err error) bool {
	var v *VerifyError
	b := s.Get(td)
	return b != nil && len(b.roots) > 0 && errors.As(err, &v) && v.Reason == "untrusted"
}
