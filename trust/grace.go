// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"errors"
	"slices"
	"time"
)

// RootGrace is how long a connection may go on that was verified by a root which has left its bundle since: long enough to make another
// one first, and to end what runs on it, and short enough for a root that was taken away because it is not trusted any more.
const RootGrace = 4 * time.Second

// LostRoot says whether err, of Verify with these bundles, refuses a chain that a bundle from before has verified because its root has
// left that bundle. A trust domain that has no bundle any more, or one without any root of before, was withdrawn as a whole: nothing of
// it is left that vouches for what came.
func (s *Bundles) LostRoot(before *Bundle, err error) bool {
	if before == nil {
		return false
	}
	var v *VerifyError
	b := s.Get(before.td)
	return b != nil && errors.As(err, &v) && v.Reason == "untrusted" &&
		slices.ContainsFunc(b.roots, func(r *x509.Certificate) bool { return slices.ContainsFunc(before.roots, r.Equal) })
}
