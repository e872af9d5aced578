// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	maxIntroduced = 64 // unfinished introductions by one introducer
	dialTimeout   = 10 * time.Second
	meetTime      = 45 * time.Second
)

// runIntroductions tells ready members of each other where we issued the token of one of them.
func (m *Manager) runIntroductions() {
	retry := time.NewTicker(m.cfg.IntroduceEvery)
	defer retry.Stop()
	for {
		changed := m.Changed()
		again := m.introduceAll()
		var c <-chan time.Time
		if again {
			c, changed = retry.C, nil // not at every change: a member may be away for long
		}
		select {
		case <-changed:
		case <-c:
		case <-m.ctx.Done():
			return
		}
	}
}

type pair struct{ receiver, subject spiffeid.TrustDomain }

// introduceAll makes the introductions that are due and reports whether some failed for now.
func (m *Manager) introduceAll() (again bool) {
	for _, p := range m.pairs() {
		if err := m.introduce(p.receiver, p.subject); err != nil {
			m.log.Debug("introduction failed for now", "receiver", p.receiver.String(), "subject", p.subject.String(), "error", err)
			again = true
		}
	}
	return again
}

func (m *Manager) pairs() []pair {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []pair
	for r, receiver := range m.peers {
		for s, subject := range m.peers {
			if r != s && receiver.rec.State == StateReady && subject.rec.State == StateReady &&
				(receiver.rec.Role == roleIssuer || subject.rec.Role == roleIssuer) &&
				(!slices.Contains(receiver.rec.Told, s) || receiver.rec.outdated(s, subject.rec)) && m.upLocked(r) {
				out = append(out, pair{r, s})
			}
		}
	}
	return out
}

// introduce tells receiver of subject. A refusal is final, and alarmed: somebody there has the name, or was evicted.
func (m *Manager) introduce(receiver, subject spiffeid.TrustDomain) error {
	m.mu.Lock()
	s, r := m.peers[subject], m.peers[receiver]
	if s == nil || r == nil {
		m.mu.Unlock()
		return nil
	}
	now := m.now()
	in := join.Introduction{
		Federation: m.cfg.Federation, Introducer: m.cfg.TrustDomain, Receiver: receiver, Subject: subject, Cluster: s.rec.Cluster,
		Region: s.rec.Region, BundleHash: s.rec.hash(), TokenID: s.rec.TokenID, Issued: now, Expires: now.Add(join.IntroductionTTL),
	}
	for _, g := range s.rec.Gateways {
		if id, err := spiffeid.Gateway(subject, g.Name); err == nil && len(in.Gateways) < 16 {
			in.Gateways = append(in.Gateways, join.TokenGateway{ID: id, Addresses: g.Addresses})
		}
	}
	names := fmt.Sprintf("%s to %s", s.rec.Cluster, r.rec.Cluster)
	m.mu.Unlock()
	id := m.cfg.Identity()
	if id == nil {
		return errors.New("no identity yet")
	}
	body, err := join.SignIntroduction(in, id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
	defer cancel()
	reply, err := m.Ask(ctx, receiver, methodIntroduce, body)
	if forNow(err) {
		return err
	}
	if err != nil {
		m.alarm("introduction_refused", in.Cluster, fmt.Sprintf("introduction of %s was refused: %v", names, err))
	} else {
		m.log.Info("introduced", "who", names)
	}
	return m.update(receiver, func(rec *record) error {
		if rec.Role == "" {
			return errUnchanged
		}
		if !slices.Contains(rec.Told, subject) {
			rec.Told = append(rec.Told, subject)
		}
		delete(rec.Waiting, subject)
		if err == nil && string(reply.Body) == waiting {
			if rec.Waiting == nil {
				rec.Waiting = map[spiffeid.TrustDomain]string{}
			}
			rec.Waiting[subject] = hexHash(in.BundleHash)
		}
		return nil
	})
}

// handleIntroduce takes a ready member's word that another cluster has become a member.
func (m *Manager) handleIntroduce(_ context.Context, from spiffeid.TrustDomain, body []byte) ([]byte, error) {
	bundles := m.peerBundles(from)
	in, err := join.VerifyIntroduction(body, bundles.Get(from), m.cfg.TrustDomain, m.cfg.Federation, m.cfg.AllowLoopback, m.now())
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	introducer := m.peers[from]
	if introducer == nil {
		return nil, problem.New(problem.TrustRefused, "%s is no member here", from)
	}
	auto := slices.Contains(m.cfg.Introducers(), introducer.rec.Cluster)
	if p := m.peers[in.Subject]; p != nil && p.rec.State != StateEvicted && p.rec.Cluster == in.Cluster {
		switch {
		case pinned(in.BundleHash)(p) && p.bundle == nil:
			return []byte(waiting), nil
		case pinned(in.BundleHash)(p):
			return nil, nil // known already, under the same root
		case p.rec.Role == roleIntroduced && p.rec.IntroducedBy == introducer.rec.Cluster:
			return m.introducedAgainLocked(p, in, body, auto)
		}
	}
	if err := m.nameFreeForIntroductionLocked(in); err != nil {
		m.alarmLocked("introduction_refused", in.Cluster, fmt.Sprintf("introduction by %s refused: %v", introducer.rec.Cluster, err))
		m.changedLocked()
		return nil, err
	}
	if m.introducedByLocked(introducer.rec.Cluster.String()) >= maxIntroduced {
		return nil, problem.New(problem.TrustRefused, "%d introductions by %s wait here already", maxIntroduced, introducer.rec.Cluster)
	}
	err = m.updateLocked(in.Subject, func(r *record) error {
		*r = record{
			TrustDomain: in.Subject, Cluster: in.Cluster, Federation: in.Federation, Region: in.Region, Role: roleIntroduced,
			State: StateAwaiting, Since: m.now(), BundleHash: hexHash(in.BundleHash), TokenID: in.TokenID,
			IntroducedBy: introducer.rec.Cluster, Introduction: body, Expires: in.Expires, Stages: []string{"introduced"},
			Gateways: gatewaysOf(in),
		}
		if auto {
			r.setState(StateJoining, m.now())
			r.stage("approved")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	m.log.Info("member introduced", "cluster", in.Cluster.String(), "introducer", introducer.rec.Cluster.String(), "approved", auto)
	return []byte(waiting), nil
}

func (m *Manager) introducedByLocked(cluster string) int {
	n := 0
	for _, p := range m.peers {
		if unfinished(p.rec.State) && p.rec.IntroducedBy.String() == cluster {
			n++
		}
	}
	return n
}

// nameFreeForIntroductionLocked: besides what holds for everybody, a name for which a token is out, or that is known at all, is not
// for an introduction to take.
func (m *Manager) nameFreeForIntroductionLocked(in *join.Introduction) error {
	if err := m.nameFreeLocked(in.Subject, in.Cluster, in.BundleHash, pinned(in.BundleHash), time.Time{}); err != nil {
		return err
	}
	if m.tokens.Outstanding(in.Cluster) != nil {
		return problem.New(problem.NameTaken, "%s is reserved for the bearer of a join token", in.Cluster)
	}
	return nil
}

// meet dials a peer that was introduced and approved, and sees it prove the bundle of the introduction. It may be the peer that
// dials us instead; one of the two is enough.
func (m *Manager) meet(td spiffeid.TrustDomain) error {
	m.mu.Lock()
	p, l := m.peers[td], m.linkLocked("")
	m.mu.Unlock()
	if p == nil || l == nil {
		return errLinkEnded
	}
	in, err := join.ParseStoredIntroduction(p.rec.Introduction)
	if err != nil {
		return err
	}
	if len(in.Addresses()) == 0 {
		return errors.New("it has no address; it has to dial us")
	}
	ctx, cancel := context.WithTimeout(m.ctx, meetTime)
	defer cancel()
	c, err := l.dial(ctx, joinDial(in.Gateways, in.BundleHash))
	if err != nil {
		return err
	}
	defer c.close()
	d, err := join.NewDialler(join.DiallerConfig{Self: m.self(), Introduction: in, JoinerKey: m.joinKey, Opened: c.opened, Now: m.now})
	if err != nil {
		return err
	}
	other, verdict, _, err := m.greet(ctx, c, d, nil)
	if err != nil {
		return err
	}
	if verdict.Outcome != join.Approved {
		return fmt.Errorf("it answered %q", verdict.Outcome)
	}
	err = m.update(td, func(r *record) error {
		if r.Role != roleIntroduced || !r.trusted() || r.hash() != other.Bundle.Hash() {
			return errors.New("no longer introduced")
		}
		m.fill(r, other)
		return nil
	})
	if err != nil {
		return err
	}
	_, err = m.swapCatalogs(ctx, c, td)
	return err
}

// joinDial asks a gateway to open a conversation with one of those gateways under that pin.
func joinDial(gateways []join.TokenGateway, pin [32]byte) *controlpb.JoinDial {
	d := &controlpb.JoinDial{BundleSha256: pin[:], TimeoutMs: dialTimeout.Milliseconds()}
	for _, g := range gateways {
		d.GatewayIds = append(d.GatewayIds, g.ID.String())
		for _, a := range g.Addresses {
			if !slices.Contains(d.Addresses, a) {
				d.Addresses = append(d.Addresses, a)
			}
		}
	}
	return d
}
