// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	acceptTime = 60 * time.Second // of a whole inbound conversation
	frameTime  = 15 * time.Second // for the dialler's next frame
)

// selfLocked is what we tell of ourselves in a conversation.
func (m *Manager) self() join.Self {
	m.mu.Lock()
	records := m.ownRecordsLocked()
	m.mu.Unlock()
	return join.Self{
		Federation: m.cfg.Federation, Cluster: m.cfg.Cluster, TrustDomain: m.cfg.TrustDomain, Region: m.cfg.Region,
		Bundle: m.cfg.Bundle(), Identity: m.cfg.Identity(), Gateways: records, Version: m.cfg.Version, AllowLoopback: m.cfg.AllowLoopback,
	}
}

// accept answers a conversation that a peer's gateway opened with one of ours.
func (m *Manager) accept(c *conv) {
	ctx, cancel := context.WithTimeout(c.link.ctx, acceptTime)
	defer cancel()
	defer c.close()
	err := m.converse(ctx, c)
	if err == nil || c.link.ctx.Err() != nil {
		return
	}
	m.log.Info("join conversation ended", "address", c.opened.GetAddress(), "error", err)
	if b := join.Refusal(err); b != nil {
		_ = c.send(ctx, b) // the conversation is over either way
	}
}

func receive(ctx context.Context, c *conv) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, frameTime)
	defer cancel()
	return c.recv(ctx)
}

// converse is the acceptor's side, from hello to catalogs.
func (m *Manager) converse(ctx context.Context, c *conv) error {
	a, err := join.NewAcceptor(join.AcceptorConfig{
		Self: m.self(), Opened: c.opened, Key: m.tokens.Key, Introduced: m.introduced, Now: m.now,
	})
	if err != nil {
		return err
	}
	hello, err := receive(ctx, c)
	if err != nil {
		return err
	}
	challenge, err := a.Hello(hello)
	if err != nil {
		return err
	}
	if err := c.send(ctx, challenge); err != nil {
		return err
	}
	proof, err := receive(ctx, c)
	if err != nil {
		return err
	}
	claim, err := a.Proof(proof)
	if err != nil {
		return err
	}
	verdict, err := m.decide(claim)
	if err != nil {
		m.alarmRefusal(claim, err)
		return err
	}
	frame, err := a.Verdict(*verdict)
	if err != nil {
		return err
	}
	if err := c.send(ctx, frame); err != nil {
		return err
	}
	if verdict.Outcome == join.Approved {
		if err := m.answerCatalog(ctx, c, claim.TrustDomain); err != nil {
			return err
		}
	}
	if _, err := receive(ctx, c); err != nil && !errors.Is(err, io.EOF) { // the dialler closes
		m.log.Debug("join conversation was not closed by the dialler", "error", err)
	}
	return nil
}

// alarmRefusal tells the operator of refusals that may be somebody's attempt.
func (m *Manager) alarmRefusal(claim *join.Claim, err error) {
	kinds := map[problem.Code]string{problem.NameTaken: "name_taken", problem.TokenBound: "token_misused", problem.TokenScope: "token_misused"}
	var p *problem.Error
	if errors.As(err, &p) && kinds[p.Code] != "" {
		m.alarm(kinds[p.Code], claim.Cluster, p.Error())
	}
}

// decide judges a proven claim, binds its token and writes the peer's record, in one step under the lock.
func (m *Manager) decide(claim *join.Claim) (*join.Verdict, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if claim.TokenID == "" {
		return m.decideIntroducedLocked(claim)
	}
	tok, err := m.tokens.Check(claim.TokenID, claim.Cluster, claim.Binding())
	if err != nil {
		return nil, err
	}
	if err := m.nameFreeLocked(claim.TrustDomain, claim.Cluster, claim.Bundle.Hash(), m.proves(&claim.Counterpart), tok.Issued); err != nil {
		return nil, err
	}
	if p := m.peers[claim.TrustDomain]; tok.State(m.now()) == join.Used && (p == nil || p.rec.TokenID != tok.ID) {
		return nil, problem.New(problem.TokenExpired, "token %s was used: %s joined with it, and has left since", tok.ID, claim.Cluster).
			WithWhy("a token lets a cluster in once").WithState("nothing was changed on either side")
	}
	v := &join.Verdict{Approve: string(tok.Approve), Resumed: tok.IsBound(), Members: m.membersLocked(claim.TrustDomain)}
	if claim.CheckOnly {
		v.Outcome, v.Expires = join.Checked, tok.Expires
		return v, nil
	}
	if tok, err = m.tokens.Redeem(claim.TokenID, claim.Cluster, claim.Binding()); err != nil {
		return nil, err
	}
	v.Expires = tok.BoundAt.Add(join.Resume)
	if err := m.dropNamesakesLocked(claim.TrustDomain, claim.Cluster); err != nil {
		return nil, err
	}
	m.forgetForeignHeadLocked(claim.TrustDomain, claim.Bundle)
	err = m.updateLocked(claim.TrustDomain, func(r *record) error {
		first := r.Role == "" || r.State == StateEvicted || r.TokenID != tok.ID
		if first && r.State != StateReady {
			*r = record{TrustDomain: claim.TrustDomain, State: StateAwaiting, Since: m.now(), Sameness: tok.Sameness}
			if tok.Approve == join.ApproveAuto {
				r.setState(StateJoining, m.now())
			}
		}
		r.Role, r.TokenID = roleIssuer, tok.ID
		if r.State != StateReady {
			r.Expires = m.now().Add(min(m.cfg.JoinExpiry, v.Expires.Sub(m.now())))
		}
		m.fill(r, &claim.Counterpart)
		return nil
	})
	if err != nil {
		return nil, err
	}
	v.Outcome = join.Approved
	if m.peers[claim.TrustDomain].rec.State == StateAwaiting {
		v.Outcome = join.Awaiting
	}
	m.log.Info("token redeemed", "token", tok.ID, "cluster", claim.Cluster.String(), "peer", claim.TrustDomain.String(), "outcome", string(v.Outcome))
	return v, nil
}

// fill takes what a counterpart proved of itself.
func (m *Manager) fill(r *record, c *join.Counterpart) {
	r.Cluster, r.Federation, r.Region, r.Version = c.Cluster, c.Federation, c.Region, c.Version
	r.SkewMillis = c.Skew.Milliseconds()
	if err := r.proveBundle(c.Bundle, m.now()); err != nil {
		m.alarmLocked("bundle_rollback", c.Cluster, "in a join: "+err.Error()+"; the one that is held stays")
	}
	r.Gateways = gatewaysIn(c.Gateways)
	r.stage("trust")
	if r.trusted() {
		r.stage("approved")
	}
}

// introduced is the bundle by which td, which a third member introduced, has to prove itself: the one held of it, or of the one that it
// shows the part that the introduction pinned. nil: it was not introduced with that bundle, or is of no interest any more.
func (m *Manager) introduced(td spiffeid.TrustDomain, shown *trust.Bundle) *trust.Bundle {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	switch {
	case p == nil || p.rec.Role != roleIntroduced || p.rec.State == StateEvicted:
		return nil
	case p.bundle != nil:
		return p.bundle
	}
	return join.Pinned(shown, p.rec.hash())
}

func (m *Manager) decideIntroducedLocked(claim *join.Claim) (*join.Verdict, error) {
	p := m.peers[claim.TrustDomain]
	switch {
	case p == nil || p.rec.Role != roleIntroduced || p.rec.Cluster != claim.Cluster || !m.continuesLocked(p, claim.Bundle, claim.Chain):
		return nil, problem.New(problem.TrustRefused, "nobody introduced %s (%s) here", claim.Cluster, claim.TrustDomain)
	case p.rec.State == StateAwaiting:
		return nil, problem.New(problem.AwaitingApproval, "%s has not approved %s yet", m.cfg.Cluster, claim.Cluster)
	case p.rec.State == StateEvicted:
		return nil, problem.New(problem.NameTaken, "%s was evicted", claim.Cluster)
	}
	v := &join.Verdict{Outcome: join.Approved, Approve: string(roleIntroduced), Expires: p.rec.Expires, Resumed: p.bundle != nil}
	if claim.CheckOnly {
		v.Outcome = join.Checked
		return v, nil
	}
	return v, m.updateLocked(claim.TrustDomain, func(r *record) error {
		m.fill(r, &claim.Counterpart)
		return nil
	})
}

func (m *Manager) membersLocked(except spiffeid.TrustDomain) []join.Member {
	var out []join.Member
	for td, p := range m.peers {
		if p.rec.State == StateReady && td != except {
			out = append(out, join.Member{Cluster: p.rec.Cluster, TrustDomain: td, Region: p.rec.Region})
		}
	}
	return out
}

// forgetForeignHeadLocked drops the catalog mark that an earlier owner of the trust domain left: its numbers mean nothing under
// another root. Under the same root the mark stays, and with it the guard against old catalogs.
func (m *Manager) forgetForeignHeadLocked(td spiffeid.TrustDomain, bundle *trust.Bundle) {
	sh := m.store.Signed(td)
	if sh == nil {
		return
	}
	set, err := trust.NewBundles(bundle)
	if err != nil {
		return
	}
	if _, err := catalog.VerifyHead(sh, set, td, m.cfg.TrustDomain, m.now()); err == nil {
		return
	}
	if err := m.store.Forget(td); err != nil {
		m.log.Warn("an earlier catalog could not be forgotten", "peer", td.String(), "error", err)
	}
}

// answerCatalog exchanges catalogs as the acceptor.
func (m *Manager) answerCatalog(ctx context.Context, c *conv, td spiffeid.TrustDomain) error {
	frame, err := receive(ctx, c)
	if err != nil {
		return err
	}
	theirs, err := join.ParseCatalogFrame(frame)
	if err != nil {
		return err
	}
	if err := m.takeCatalog(td, theirs); err != nil {
		return err
	}
	return m.sendCatalog(ctx, c, td)
}

// sendCatalog sends our catalog for td, and the head that we hold of its own.
func (m *Manager) sendCatalog(ctx context.Context, c *conv, td spiffeid.TrustDomain) error {
	m.mu.Lock()
	offered := services(m.offers[td])
	m.mu.Unlock()
	frame, err := join.CatalogFrame(m.signedFor(ctx, td), offered, m.store.Signed(td))
	if err != nil {
		return err
	}
	return c.send(ctx, frame)
}

// takeCatalog takes the counterpart's catalog: it proves that its signer works. An update that does not continue what is held is
// left to the tunnel.
func (m *Manager) takeCatalog(td spiffeid.TrustDomain, theirs *controlpb.JoinCatalog) error {
	m.meetHead(td, theirs.GetHeld())
	m.known(td)
	if theirs.GetUpdate() != nil {
		err := m.apply(td, theirs.GetUpdate())
		var rollback *catalog.RollbackError
		switch {
		case err == nil, errors.Is(err, catalog.ErrResync):
		case errors.As(err, &rollback): // it learns our mark from the held head, and signs above it
		default:
			return problem.New(problem.CatalogRefused, "%v", err).Wrap(err)
		}
	}
	return m.update(td, func(r *record) error {
		if r.Role == "" {
			return problem.New(problem.TrustRefused, "%s was withdrawn meanwhile", td)
		}
		r.stage("catalog")
		return nil
	})
}
