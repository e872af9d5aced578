// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const leaveTimeout = 3 * time.Second

// nameFreeLocked judges whether td may become, or stay, the cluster of that name. consent is when an operator named the cluster in
// a token, zero for an introduction: only that may bring back what was evicted, and nothing replaces what is known. same judges
// whether a known peer of that trust domain is who asks; hash is of the bundle that it shows.
func (m *Manager) nameFreeLocked(
	td spiffeid.TrustDomain, cluster federation.ClusterName, hash [32]byte, same func(*peer) bool, consent time.Time,
) error {
	taken := func(format string, args ...any) error {
		return problem.New(problem.NameTaken, format, args...).WithCluster(cluster.String()).WithState("nothing was changed on either side")
	}
	if td == m.cfg.TrustDomain || cluster == m.cfg.Cluster {
		return taken("%s (%s) has the name or the trust domain of %s itself", cluster, td, m.cfg.Cluster)
	}
	for _, known := range m.domainsLocked() {
		if suffixOf(td, known) {
			return taken("the trust domains %s and %s end in one another", td, known)
		}
	}
	if p := m.peers[td]; p != nil {
		switch {
		case p.rec.State == StateEvicted && !consent.After(p.rec.Since):
			return taken("%s was evicted at %s", p.rec.Cluster, p.rec.Since.UTC().Format(time.RFC3339))
		case p.rec.State == StateEvicted:
		case p.rec.Cluster != cluster:
			return taken("the trust domain %s is known as the cluster %s", td, p.rec.Cluster)
		case !same(p):
			return otherRoots(p, hash)
		}
	}
	for other, p := range m.peers {
		if other != td && p.rec.Cluster == cluster && (p.rec.State != StateEvicted || !consent.After(p.rec.Since)) {
			return taken("%s is the name of a cluster with the trust domain %s (%s)", cluster, other, p.rec.State)
		}
	}
	if consent.IsZero() && slices.Contains(m.cfg.Reserved(), cluster) {
		return taken("%s is reserved", cluster)
	}
	return nil
}

func (m *Manager) domainsLocked() []spiffeid.TrustDomain {
	out := []spiffeid.TrustDomain{m.cfg.TrustDomain}
	for td := range m.peers {
		out = append(out, td)
	}
	return out
}

// suffixOf reports whether one of two different trust domains is a DNS suffix of the other.
func suffixOf(a, b spiffeid.TrustDomain) bool {
	return strings.HasSuffix(a.String(), "."+b.String()) || strings.HasSuffix(b.String(), "."+a.String())
}

// dropNamesakesLocked removes evicted records whose name a newcomer takes with the operator's consent.
func (m *Manager) dropNamesakesLocked(td spiffeid.TrustDomain, cluster federation.ClusterName) error {
	for other, p := range m.peers {
		if other != td && p.rec.Cluster == cluster {
			if err := m.removeLocked(other); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Manager) byClusterLocked(cluster federation.ClusterName) *peer {
	for _, p := range m.peers {
		if p.rec.Cluster == cluster || p.rec.TrustDomain.String() == cluster.String() {
			return p
		}
	}
	return nil
}

func (m *Manager) unknown(cluster federation.ClusterName) error {
	return problem.New(problem.NotFound, "no member %s is known here", cluster).WithFix("strait member list").WithObject("member/"+cluster.String(), "")
}

// Approve lets an awaiting peer in.
func (m *Manager) Approve(_ context.Context, cluster federation.ClusterName) (*controlpb.Member, error) {
	m.mu.Lock()
	p := m.byClusterLocked(cluster)
	if p == nil {
		m.mu.Unlock()
		return nil, m.unknown(cluster)
	}
	err := m.updateLocked(p.rec.TrustDomain, func(r *record) error {
		switch {
		case r.State == StateEvicted:
			return problem.New(problem.NameTaken, "%s was evicted", cluster).WithFix("strait token issue --cluster %s lets it join again", cluster)
		case r.State == StateAwaiting && r.Role == roleJoiner:
			return problem.New(problem.AwaitingApproval, "%s has to approve this cluster, not the other way round", cluster)
		case r.State != StateAwaiting:
			return errUnchanged
		}
		r.setState(StateJoining, m.now())
		r.stage("approved")
		return nil
	})
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	m.log.Info("member approved", "cluster", cluster.String())
	return m.member(cluster), nil
}

// Evict withdraws a peer at once and keeps its name reserved. Its bundle, grants and tunnels go with the next view.
func (m *Manager) Evict(_ context.Context, cluster federation.ClusterName) (*controlpb.Member, error) {
	m.mu.Lock()
	p := m.byClusterLocked(cluster)
	if p == nil {
		m.mu.Unlock()
		return nil, m.unknown(cluster)
	}
	token := p.rec.TokenID
	issued := p.rec.Role == roleIssuer && unfinished(p.rec.State)
	err := m.updateLocked(p.rec.TrustDomain, func(r *record) error {
		if r.State == StateEvicted {
			return errUnchanged
		}
		r.setState(StateEvicted, m.now())
		r.Bundle, r.Introduction, r.Told, r.Waiting, r.Sameness, r.Seen = nil, nil, nil, nil, nil, nil
		r.ProbeIn, r.ProbeOut, r.Expires = false, false, time.Time{}
		return nil
	})
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if issued && token != "" {
		if err := m.tokens.Revoke(token); err != nil {
			m.log.Warn("token of an evicted joiner could not be revoked", "token", token, "error", err)
		}
	}
	m.log.Info("member evicted", "cluster", cluster.String())
	return m.member(cluster), nil
}

// SetSameness replaces the namespaces in which a peer's services are the same as ours; AllNamespaces for all.
func (m *Manager) SetSameness(td spiffeid.TrustDomain, namespaces []string) error {
	namespaces, err := parseSameness(namespaces)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.peers[td] == nil {
		return problem.New(problem.NotFound, "no member of the trust domain %s is known here", td)
	}
	return m.updateLocked(td, func(r *record) error {
		if slices.Equal(r.Sameness, namespaces) {
			return errUnchanged
		}
		r.Sameness = namespaces
		return nil
	})
}

// parseSameness accepts namespaces, and "all" or "*" for every one.
func parseSameness(in []string) ([]string, error) {
	var out []string
	for _, ns := range in {
		if ns == AllNamespaces || ns == "all" {
			return []string{AllNamespaces}, nil
		}
		if _, err := federation.NewServiceName(ns, "x"); err != nil {
			return nil, problem.New(problem.Usage, "sameness %.80q is no namespace", ns).WithFix("--sameness NAMESPACE[,NAMESPACE…] or --sameness all")
		}
		if !slices.Contains(out, ns) {
			out = append(out, ns)
		}
	}
	slices.Sort(out)
	return out, nil
}

// Leave withdraws all offers, tells every peer, and drops them all: trust, tunnels and imports go with the next view. A peer that
// cannot be told is named; it will see the tunnel end.
func (m *Manager) Leave(ctx context.Context, progress func(*controlpb.JoinProgress)) error {
	began := m.now()
	var members []*Peer
	for _, p := range m.View().Peers {
		if p.Trusted() {
			members = append(members, p)
		}
	}
	m.SetOffers(nil)
	progress(&controlpb.JoinProgress{Stage: "withdraw", State: "ok", Title: "exports withdrawn", Detail: fmt.Sprintf("from %d members", len(members))})
	told, silent := m.tellAll(ctx, members)
	p := &controlpb.JoinProgress{Stage: "tell", State: "ok", Title: "members told", Detail: strings.Join(told, ", ")}
	if len(silent) > 0 {
		p.State = "skip"
		p.Detail = strings.TrimPrefix(p.Detail+"; not confirmed: "+strings.Join(silent, ", "), "; ")
	}
	progress(p)
	if err := m.dropAll(); err != nil {
		return err
	}
	progress(&controlpb.JoinProgress{
		Stage: "drop", State: "ok", Title: "trust dropped", Detail: fmt.Sprintf("%s trusts only itself", m.cfg.Cluster),
		Done: true, ElapsedSeconds: m.now().Sub(began).Seconds(),
	})
	m.log.Info("left the federation", "told", told, "not_confirmed", silent)
	return nil
}

// dropAll forgets every peer but the evicted ones, whose names stay reserved.
func (m *Manager) dropAll() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for td, p := range m.peers {
		if p.rec.State == StateEvicted {
			continue
		}
		if err := m.removeLocked(td); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) tellAll(ctx context.Context, members []*Peer) (told, silent []string) {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	errs := make([]error, len(members))
	var wg sync.WaitGroup
	for i, p := range members {
		wg.Go(func() { _, errs[i] = m.Ask(ctx, p.TrustDomain, methodLeave, nil) })
	}
	wg.Wait()
	for i, p := range members {
		if errs[i] == nil {
			told = append(told, p.Cluster.String())
		} else {
			silent = append(silent, p.Cluster.String())
		}
	}
	return told, silent
}

// handleLeave agrees; left is called once the answer is on its way.
func (m *Manager) handleLeave(context.Context, spiffeid.TrustDomain, []byte) ([]byte, error) {
	return nil, nil
}

// left forgets a peer that said it leaves. What was imported goes; the newest catalog number is kept against replays.
func (m *Manager) left(td spiffeid.TrustDomain) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	if p == nil || p.rec.State == StateEvicted {
		return
	}
	if err := m.removeLocked(td); err != nil {
		m.log.Error("peer that left could not be removed", "peer", td.String(), "error", err)
		return
	}
	m.log.Info("member left", "cluster", p.rec.Cluster.String())
}
