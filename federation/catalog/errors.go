// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"

	"github.com/strait-mesh/strait/trust/spiffeid"
)

// ErrResync says that an update does not continue what is held: ask for a snapshot (have 0, 0).
var ErrResync = errors.New("update does not continue what is held")

// ErrEpochJump says that an epoch is further ahead than any honest signer gets.
var ErrEpochJump = errors.New("epoch is too far ahead")

// RollbackError says that a head is older than one already accepted.
type RollbackError struct {
	Origin             spiffeid.TrustDomain
	Epoch, Seq         uint64 // offered
	HeldEpoch, HeldSeq uint64
}

func (e *RollbackError) Error() string {
	return fmt.Sprintf("head %d.%d of %s is older than %d.%d, which was accepted", e.Epoch, e.Seq, e.Origin, e.HeldEpoch, e.HeldSeq)
}

// ForkError says that an origin signed two different catalogs with the same number. The first is kept, both are evidence.
type ForkError struct {
	Origin     spiffeid.TrustDomain
	Epoch, Seq uint64
}

func (e *ForkError) Error() string {
	return fmt.Sprintf("%s signed two different catalogs as %d.%d", e.Origin, e.Epoch, e.Seq)
}

// QuotaError says that a peer offers more than its quota.
type QuotaError struct {
	Origin      spiffeid.TrustDomain
	Quota       string // entries, bytes, changes, denials
	Have, Limit int
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("%s exceeds its quota of %s: %d, at most %d", e.Origin, e.Quota, e.Have, e.Limit)
}

// ForeignError says that a catalog speaks of something that is not its origin's to speak of, or not in the form it must have.
type ForeignError struct {
	Origin spiffeid.TrustDomain
	Key    string
	Why    string
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("catalog of %s: entry %.120q: %s", e.Origin, e.Key, e.Why)
}

// HeadError says why a signed head is not acceptable.
type HeadError struct {
	Reason string // malformed, signature, signer, consumer, time
	Err    error
}

func (e *HeadError) Error() string { return fmt.Sprintf("catalog head: %s: %v", e.Reason, e.Err) }

// Unwrap returns the cause.
func (e *HeadError) Unwrap() error { return e.Err }
