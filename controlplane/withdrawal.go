// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"time"

	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
	"github.com/strait-mesh/strait/trust/withdrawal"
)

// guardedIssuer issues what the authority issues, to nobody who is withdrawn.
type guardedIssuer struct {
	c  *ControlPlane
	by string // for the ledger of what was issued
}

// IssueCSR signs an identity unless it is withdrawn: before, or while it is signed.
func (g guardedIssuer) IssueCSR(csrDER []byte, id spiffeid.ID, ttl time.Duration) ([][]byte, error) {
	c := g.c
	if err := c.mayIssue(id); err != nil {
		return nil, err
	}
	if err := c.denied.Issuing(); err != nil {
		c.log.Warn("time of issue not noted", "err", err)
	}
	was, _ := c.denied.Find(id)
	chain, err := c.issueFor(g.by, csrDER, id, ttl)
	if err != nil {
		return nil, err
	}
	if now, _ := c.denied.Find(id); now != was {
		return nil, withdrawnError(id, now.Reason)
	}
	return chain, nil
}

// mayIssue refuses identities whose certificates would be withdrawn at once.
func (c *ControlPlane) mayIssue(id spiffeid.ID) error {
	if reason, denied := c.denied.Issuable(id); denied {
		return withdrawnError(id, reason)
	}
	return nil
}

func withdrawnError(id spiffeid.ID, reason string) error {
	return problem.New(problem.IdentityWithdrawn, "%s was withdrawn", id).WithWhy("%s", reason)
}

// issueAtRegistration is what registrations are answered from: a withdrawn identity makes its token useless.
func (c *ControlPlane) issueAtRegistration(csrDER []byte, id spiffeid.ID) ([][]byte, error) {
	chain, err := guardedIssuer{c, "registration"}.IssueCSR(csrDER, id, c.cfg.SVIDTTL)
	if !problem.Is(err, problem.IdentityWithdrawn) {
		return chain, err
	}
	if d, _ := c.denied.Find(id); d.Rule().Total() {
		return nil, problem.New(problem.RegistrationRefused, "%s was withdrawn", id).WithWhy("the identity was withdrawn: %s", d.Reason).Wrap(err)
	}
	// Readmitted within this second, or by a clock that was ahead: a moment later it works.
	return nil, problem.New(problem.RegistrationBusy, "%s is not admitted again yet", id).WithWhy("the identity was readmitted a moment ago, or the clock has gone back").Wrap(err)
}

// judgeSubject is the rule of the registry of connections.
func (c *ControlPlane) judgeSubject(s withdrawal.Subject) (reason string, ok bool) {
	reason, denied := c.denied.Denied(s.Identity, s.Issued)
	return reason, !denied
}

// judgePeer judges in handshakes.
func (c *ControlPlane) judgePeer(p *trust.Peer) (reason string, withdrawn bool) {
	return c.denied.Denied(p.ID, p.Issued())
}

// judgeAPI ends connections to the configuration API, open watches with them, whose certificate is not accepted any more.
func (c *ControlPlane) judgeAPI() {
	if c.api != nil {
		c.api.Judge()
	}
}
