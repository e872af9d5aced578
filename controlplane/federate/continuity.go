// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"crypto/x509"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/join"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// continuesLocked reports whether a counterpart that proved chain, and shows bundle, is the peer that is known: what is held of the
// peer verifies the chain. Bundles are not compared: a member that rotated its root has another one, and anybody can show a bundle in
// which an old root of the member stands beside his own. Of a peer that has not proven anything yet only a pin is known.
func (m *Manager) continuesLocked(p *peer, bundle *trust.Bundle, chain []*x509.Certificate) bool {
	known := p.bundle
	if known == nil {
		known = join.Pinned(bundle, p.rec.hash())
	}
	if known == nil {
		return false
	}
	set, err := trust.NewBundles(known)
	if err != nil {
		return false
	}
	proven, err := trust.Verify(chain, set, m.now())
	return err == nil && proven.ID.TrustDomain() == p.rec.TrustDomain
}

// proves is continuesLocked for nameFreeLocked.
func (m *Manager) proves(c *join.Counterpart) func(*peer) bool {
	return func(p *peer) bool { return m.continuesLocked(p, c.Bundle, c.Chain) }
}

// pinned is what a pin alone says about a known peer: it names the roots that are held, or some of them.
func pinned(hash [32]byte) func(*peer) bool {
	return func(p *peer) bool { return p.rec.hash() == hash || join.Pinned(p.bundle, hash) != nil }
}

// knownAs refuses the owner of a chain, which showed bundle, that is not the peer known under its trust domain. It is asked before
// anything is said to that side.
func (m *Manager) knownAs(td spiffeid.TrustDomain, bundle *trust.Bundle, chain []*x509.Certificate) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	if p == nil || p.rec.State == StateEvicted || m.continuesLocked(p, bundle, chain) {
		return nil
	}
	return otherRoots(p, bundle.Hash())
}

func otherRoots(p *peer, hash [32]byte) error {
	return problem.New(problem.NameTaken, "%s is known with the fingerprint %s; this one has %s and proves nothing under what is known",
		p.rec.Cluster, join.Fingerprint(p.rec.hash()), join.Fingerprint(hash)).WithCluster(p.rec.Cluster.String()).
		WithWhy("it is another cluster, or one that was made anew, or its root was rotated without us").
		WithFix("if it is the same cluster:  strait member evict %s   then join again", p.rec.Cluster).
		WithState("nothing was changed on either side")
}

// waiting is the answer to an introduction whose subject has not proven itself to the receiver yet: the introducer tells it again when the
// subject's bundle changes. Any other answer means that there is no need to.
const waiting = "waiting"

// introducedAgainLocked takes the second introduction of a subject by the same introducer. What a peer proved itself counts for more; one
// that has proven nothing yet gets the new pin, and needs the operator's approval again if it had it for the old one.
func (m *Manager) introducedAgainLocked(p *peer, in *join.Introduction, body []byte, auto bool) ([]byte, error) {
	if p.bundle != nil {
		return nil, nil
	}
	err := m.updateLocked(in.Subject, func(r *record) error {
		r.BundleHash, r.Introduction, r.Expires = hexHash(in.BundleHash), body, in.Expires
		r.Gateways = gatewaysOf(in)
		if r.State == StateJoining && !auto {
			r.setState(StateAwaiting, m.now())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	m.log.Info("member introduced with another bundle", "cluster", in.Cluster.String(), "introducer", p.rec.IntroducedBy.String())
	return []byte(waiting), nil
}

func gatewaysOf(in *join.Introduction) []gatewayRecord {
	var out []*controlpb.GatewayRecord
	for _, g := range in.Gateways {
		name, _ := g.ID.Gateway()
		out = append(out, &controlpb.GatewayRecord{Name: name, Addresses: g.Addresses})
	}
	return gatewaysIn(out)
}
