// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"io"
	"time"

	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// IssuerRequest is a certificate request (PEM) for the next issuer, for SignIssuerRequest where the root's key is. Until its
// certificate is imported, asking again gives the same request.
func (c *CA) IssuerRequest() (csrPEM []byte, err error) { return nil, errNotYet }

// ImportIssuer takes what SignIssuerRequest made of IssuerRequest: certificates of the requested issuer, PEM; while a rotation is
// under way one by each root whose key is not here. In phase Steady and Activated the issuer is used at once, in Prepared by Activate.
func (c *CA) ImportIssuer(chainPEM []byte) error { return errNotYet }

// ExportRoot writes the active root, certificate and key, to w, and then removes the key from the data directory, which must be
// locked by the caller. sync is called between the two: the key must be durable where it went. nil: w needs none.
func ExportRoot(dir *datadir.Dir, w io.Writer, sync func() error) error { return errNotYet }

// ImportRoot puts back a key that ExportRoot removed. The data directory must be locked by the caller.
func ImportRoot(dir *datadir.Dir, r io.Reader) error { return errNotYet }

// SignIssuerRequest signs an issuer's request offline: rootPEM holds a root of td, certificate and key. The result is the issuer's
// certificate, followed by the root's.
func SignIssuerRequest(rootPEM, csrPEM []byte, td spiffeid.TrustDomain, now time.Time) (chainPEM []byte, err error) {
	return nil, errNotYet
}
