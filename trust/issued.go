// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"crypto/x509"
	"errors"
	"time"
)

// Backdate is how far NotBefore of an identity lies before the time at which it was issued, for clocks that differ.
const Backdate = 10 * time.Minute

// Issued is when an identity was issued, to the second: certificates carry no fractions of one.
func Issued(leaf *x509.Certificate) time.Time { return leaf.NotBefore.Add(Backdate) }

// Issued is when the certificate that the peer has presented was issued; zero without one.
func (p *Peer) Issued() time.Time {
	if len(p.Chain) == 0 {
		return time.Time{}
	}
	return Issued(p.Chain[0])
}

// SetWithdrawn has judge asked about every peer that Verify has found genuine, in handshakes of either side and wherever else
// Verify is used; a reason refuses it. nil: nobody was withdrawn. judge must not block.
func (s *Source) SetWithdrawn(judge func(*Peer) (reason string, withdrawn bool)) {
	if judge == nil {
		s.out.Store(nil)
		return
	}
	f := func(p *Peer) error {
		if reason, withdrawn := judge(p); withdrawn {
			return &VerifyError{Reason: "withdrawn", ID: p.ID, Err: errors.New(reason)}
		}
		return nil
	}
	s.out.Store(&f)
}

func (s *Source) judgeWithdrawn(p *Peer) error {
	if f := s.out.Load(); f != nil {
		return (*f)(p)
	}
	return nil
}
