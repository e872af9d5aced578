// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// DefaultTTL is how long a head speaks for its catalog.
const DefaultTTL = 60 * time.Second

// Head says what one origin offers to one consumer, at one moment.
type Head struct {
	TrustDomain    spiffeid.TrustDomain // the origin
	Consumer       spiffeid.TrustDomain
	Epoch, Seq     uint64
	Hash           [32]byte // of the sorted entries
	Count          int
	IssuedAt       time.Time // whole milliseconds
	TTL            time.Duration
	BundleSequence uint64
}

// Marshal returns the canonical encoding, which is what is signed.
func (h Head) Marshal() []byte { return nil }

// ParseHead is the inverse of Marshal and refuses every other encoding.
func ParseHead(b []byte) (*Head, error) { return nil, nil }

// Sign signs h with a catalog signer's identity.
func Sign(h Head, id *trust.Identity) (*controlpb.SignedHead, error) { return nil, nil }

// VerifyHead returns the head if its signer is the catalog signer of origin and it is meant for consumer.
func VerifyHead(sh *controlpb.SignedHead, bundles *trust.Bundles, origin, consumer spiffeid.TrustDomain, now time.Time) (*Head, error) {
	return nil, nil
}
