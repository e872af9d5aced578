// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Where a peer's bundle came from.
const (
	SourceJoin    = "join"    // the conversation of a join, under its pin
	SourceCatalog = "catalog" // the peer's signed catalog
)

// runTrust follows what our own bundle, acknowledgements and withdrawn identities become.
func (m *Manager) runTrust() {
	changes := func(f func() <-chan struct{}) <-chan struct{} {
		if f == nil {
			return nil // read again at each tick
		}
		return f()
	}
	for {
		bundle, acked, denied := changes(m.cfg.BundleChanged), changes(m.cfg.AckedChanged), changes(m.cfg.DeniedChanged)
		m.refreshTrust()
		select {
		case <-bundle:
		case <-acked:
		case <-denied:
		case <-m.ctx.Done():
			return
		}
	}
}

// refreshTrust reads what this cluster says about trust and publishes what of it has changed.
func (m *Manager) refreshTrust() {
	own, denied := m.cfg.Bundle(), m.ownDenials()
	acked := map[spiffeid.TrustDomain]catalog.Seen{}
	for _, p := range m.View().Peers {
		if p.Bundle == nil {
			continue
		}
		// Only of the bundle that is held now: of another one we know no hash, and the next one will come. One without a sequence
		// is what a joiner pinned; the catalog brings the real one.
		if sequence, ok := m.cfg.Acked(p.TrustDomain); ok && sequence > 0 && sequence == p.Bundle.Sequence() {
			acked[p.TrustDomain] = catalog.Seen{Sequence: sequence, Hash: p.Bundle.Hash()}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := m.setOwnLocked(own)
	if !slices.Equal(m.denied, denied) {
		m.setDeniedLocked(denied)
		changed = true
	}
	for td, seen := range acked {
		if m.seenLocked(td, seen) {
			changed = true
		}
	}
	if changed {
		m.changedLocked()
	}
}

// setOwnLocked makes the entry of our own bundle. One that no catalog can carry is not offered: peers keep the one before.
func (m *Manager) setOwnLocked(own *trust.Bundle) (changed bool) {
	if own == nil || own == m.own {
		return false
	}
	m.own = own
	body, err := catalog.BundleEntry(own)
	if err != nil {
		m.alarmLocked("bundle_too_large", m.cfg.Cluster, fmt.Sprintf("our trust bundle of sequence %d is not told to members: %v", own.Sequence(), err))
		return true
	}
	m.bundleEntry = body
	return true
}

// ownDenials are the withdrawn identities in a fixed order.
func (m *Manager) ownDenials() []catalog.Denial {
	return slices.SortedFunc(slices.Values(m.cfg.Denied()), func(a, b catalog.Denial) int { return strings.Compare(a.ID.String(), b.ID.String()) })
}

// setDeniedLocked makes the entries of withdrawn identities.
func (m *Manager) setDeniedLocked(denied []catalog.Denial) {
	left := 0
	m.denied = denied
	m.denials, left = catalog.DenialEntries(m.cfg.TrustDomain, denied)
	if left > 0 {
		m.log.Warn("withdrawn identities are not told to members", "left_out", left, "told", len(m.denials), "limit", catalog.MaxDenials)
	}
	m.evicted = map[spiffeid.ID]bool{}
	for _, d := range denied {
		if d.IssuedBefore.IsZero() {
			m.evicted[d.ID] = true
		}
	}
}

// seenLocked notes that all our proxies have acknowledged td's bundle. It is on disk before td is told: after a restart nothing is
// taken back before the proxies are here again.
func (m *Manager) seenLocked(td spiffeid.TrustDomain, seen catalog.Seen) bool {
	p := m.peers[td]
	if p == nil || p.bundle == nil || p.bundle.Sequence() != seen.Sequence || p.bundle.Hash() != seen.Hash ||
		p.rec.Seen != nil && p.rec.Seen.Sequence == seen.Sequence && p.rec.Seen.Hash == hexHash(seen.Hash) {
		return false
	}
	err := m.updateLocked(td, func(r *record) error {
		r.Seen = &storedSeen{Sequence: seen.Sequence, Hash: hexHash(seen.Hash)}
		return nil
	})
	if err != nil {
		m.log.Error("acknowledgement of a peer's bundle could not be written", "peer", td.String(), "error", err)
		return false
	}
	m.log.Info("every live proxy has a member's trust bundle", "peer", td.String(), "sequence", seen.Sequence)
	return true
}

// trustEntriesLocked are the entries about trust for one consumer.
func (m *Manager) trustEntriesLocked(p *peer, entries map[string][]byte) {
	if m.bundleEntry != nil {
		entries[catalog.BundleKey] = m.bundleEntry
	}
	if s := p.rec.Seen; s != nil {
		if body, err := catalog.SeenEntry(catalog.Seen{Sequence: s.Sequence, Hash: hashOf(s.Hash)}); err == nil {
			entries[catalog.SeenKey] = body
		}
	}
	for key, body := range m.denials {
		entries[key] = body
	}
}

// takeBundleLocked takes the bundle that td's stored catalog carries, if it is a newer one than is held. It looks at what is stored, not
// at what came: between storing a catalog and writing a record a process may be killed. So the head is verified once more, with the
// bundle that is held, as of its own time: what is stored may be of a cluster that had the trust domain before.
func (m *Manager) takeBundleLocked(td spiffeid.TrustDomain) {
	p, v := m.peers[td], m.store.View(td)
	if p == nil || p.bundle == nil || v == nil || v.Bundle == nil {
		return
	}
	err := p.bundle.CheckUpdate(v.Bundle)
	switch {
	case err == nil && p.bundle.Equal(v.Bundle):
		p.bundleErr = ""
		return
	case err == nil:
	case p.rec.BundleSource != SourceCatalog && !v.Head.IssuedAt.After(p.rec.BundleAt):
		return // signed before the join at which it told us the bundle that we hold
	default:
		if text := err.Error(); p.bundleErr != text {
			kind := "bundle_rollback"
			if v.Bundle.Sequence() == p.bundle.Sequence() {
				kind = "bundle_fork"
			}
			m.alarmLocked(kind, p.rec.Cluster, text+"; the one that is held stays")
			p.bundleErr = text
		}
		return
	}
	held, _ := trust.NewBundles(p.bundle)
	if _, err := catalog.VerifyHead(m.store.Signed(td), held, td, m.cfg.TrustDomain, v.Head.IssuedAt); err != nil {
		m.log.Warn("the trust bundle of a stored catalog is not taken", "peer", td.String(), "error", err)
		return
	}
	was := p.bundle.Sequence()
	err = m.updateLocked(td, func(r *record) error {
		r.setBundle(v.Bundle, SourceCatalog, m.now())
		return nil
	})
	if err != nil {
		m.log.Error("a peer's new trust bundle could not be written; the one before stays", "peer", td.String(), "error", err)
		return
	}
	m.peers[td].bundleErr = ""
	m.log.Info("a member's trust bundle has changed", "peer", td.String(), "sequence", v.Bundle.Sequence(), "was", was, "roots", len(v.Bundle.Roots()))
}

// checkSeenLocked alarms when a peer holds a newer bundle of ours than we have: this control plane was restored from before a rotation,
// and the peer would refuse every bundle of ours up to that sequence. So ours goes past it; a peer that lies gains nothing by that.
func (m *Manager) checkSeenLocked(td spiffeid.TrustDomain) {
	p, v, own := m.peers[td], m.store.View(td), m.cfg.Bundle()
	if p == nil || v == nil || v.Seen == nil || own == nil || v.Seen.Sequence <= own.Sequence() || p.aheadOfUs == v.Seen.Sequence {
		return
	}
	p.aheadOfUs = v.Seen.Sequence
	m.alarmLocked("own_bundle_rollback", p.rec.Cluster,
		fmt.Sprintf("it holds our trust bundle of sequence %d, ours is %d: this control plane was restored from before a rotation", v.Seen.Sequence, own.Sequence()))
	if m.cfg.RaiseSequence == nil {
		return
	}
	if err := m.cfg.RaiseSequence(v.Seen.Sequence); err != nil {
		m.log.Error("the own bundle stays behind what a member holds", "peer", td.String(), "error", err)
	}
}

// trustView fills in what the view says of a trusted peer's bundle.
func (p *peer) trustView(v *Peer, c *catalog.View, own *trust.Bundle) {
	v.Bundle = p.bundle
	v.BundleUpdated, v.BundleSource, v.BundleError = p.rec.BundleAt, p.rec.BundleSource, p.bundleErr
	if v.BundleError == "" {
		v.BundleError = p.refused
	}
	if c == nil {
		return
	}
	if p.bundle != nil && c.Bundle != nil && p.bundle.Equal(c.Bundle) && c.ReceivedAt.After(v.BundleUpdated) {
		v.BundleUpdated, v.BundleSource = c.ReceivedAt, SourceCatalog
	}
	v.Denied = c.Denied
	if s := c.Seen; s != nil && own != nil && (s.Sequence < own.Sequence() || s.Sequence == own.Sequence() && s.Hash == own.Hash()) {
		v.SeenOurs = s.Sequence
	}
}

// setBundle takes what the peer proved or signed.
func (r *record) setBundle(b *trust.Bundle, source string, now time.Time) {
	r.Bundle, r.BundleHash = b.Marshal(), hexHash(b.Hash())
	r.BundleSource, r.BundleAt = source, now.UTC()
}

// proveBundle takes the bundle that a counterpart proved in a join. What is held of a known peer does not go back for it: a joiner
// learns only the roots that it pinned, without a sequence, and the catalog brings the rest.
func (r *record) proveBundle(b *trust.Bundle, now time.Time) error {
	if len(r.Bundle) > 0 {
		if held, err := trust.ParseBundle(r.TrustDomain, r.Bundle); err == nil && held.CheckUpdate(b) != nil {
			if b.Sequence() == 0 {
				return nil
			}
			return held.CheckUpdate(b)
		}
	}
	r.setBundle(b, SourceJoin, now)
	return nil
}
