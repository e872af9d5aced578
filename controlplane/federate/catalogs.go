// SPDX-License-Identifier: Apache-2.0

package federate

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation/catalog"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	serviceKey = "svc/"
	gatewayKey = "gw/"
	// signWait is how long a join waits for the first head that is signed for the new consumer.
	signWait = 3 * time.Second
)

// SetOffers replaces what each consumer is offered: entry bodies by catalog key ("svc/<ns>/<name>" → controlpb.CatalogService,
// deterministically marshalled). Consumers that are not in the map are offered nothing; those that are not ready see none of it
// until they are. Own gateway records are added here.
func (m *Manager) SetOffers(offers map[spiffeid.TrustDomain]map[string][]byte) {
	next := make(map[spiffeid.TrustDomain]map[string][]byte, len(offers))
	for td, entries := range offers {
		next[td] = maps.Clone(entries)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.offers = next
	m.changedLocked()
}

func services(entries map[string][]byte) int {
	n := 0
	for key := range entries {
		if strings.HasPrefix(key, serviceKey) {
			n++
		}
	}
	return n
}

// addresses is what a gateway is reached at by peers.
func (m *Manager) addresses(h *controlpb.GatewayHello) []string {
	if a := m.cfg.GatewayAddresses(); len(a) > 0 {
		return a
	}
	return h.GetAdvertise()
}

// ownRecordsLocked are the own gateways as peers are told of them; withdrawn ones are not.
func (m *Manager) ownRecordsLocked() []*controlpb.GatewayRecord {
	var out []*controlpb.GatewayRecord
	for _, name := range sortedKeys(m.gateways) {
		h := m.gateways[name].hello
		if id, err := spiffeid.Gateway(m.cfg.TrustDomain, name); err == nil && m.evicted[id] {
			continue
		}
		out = append(out, &controlpb.GatewayRecord{Name: name, Addresses: m.addresses(h), Zone: h.GetZone()})
	}
	return out
}

// refreshOffersLocked gives the origin what each peer may see: gateway records, and what there is about trust, once it is approved,
// services once it is ready.
func (m *Manager) refreshOffersLocked() {
	records := map[string][]byte{}
	for _, r := range m.ownRecordsLocked() {
		if b, err := (proto.MarshalOptions{Deterministic: true}).Marshal(r); err == nil {
			records[gatewayKey+r.GetName()] = b
		}
	}
	for td, p := range m.peers {
		if !p.rec.trusted() {
			continue
		}
		entries := maps.Clone(records)
		m.trustEntriesLocked(p, entries)
		if p.rec.State == StateReady {
			maps.Copy(entries, m.offers[td])
		}
		print := fingerprint(entries)
		if m.offered[td] == print {
			continue
		}
		if err := m.origin.Set(td, entries); err != nil {
			m.log.Error("offer could not be set", "peer", td.String(), "error", err)
			continue
		}
		m.offered[td] = print
	}
	for td := range m.offered {
		if p := m.peers[td]; p == nil || !p.rec.trusted() {
			m.origin.Drop(td)
			delete(m.offered, td)
		}
	}
}

func fingerprint(entries map[string][]byte) string {
	h := sha256.New()
	for _, key := range sortedKeys(entries) {
		fmt.Fprintf(h, "%d %s %d ", len(key), key, len(entries[key]))
		h.Write(entries[key])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// consumersLocked are the peers whose heads may leave: a ready peer that has told which head of ours it holds. Before it did, a
// signature could collide with one of an earlier life of this cluster.
func (m *Manager) consumersLocked() []spiffeid.TrustDomain {
	var out []spiffeid.TrustDomain
	for td, p := range m.peers {
		if p.rec.State == StateReady && p.headAsked {
			out = append(out, td)
		}
	}
	return out
}

// sentHead is what a link was given last for one consumer.
type sentHead struct {
	epoch, seq uint64
	issued     time.Time
}

type mark struct{ epoch, seq uint64 }

// feed pushes offers to the link's gateway and tells it what is held of peers, whenever either changed.
func (l *link) feed() {
	heads := map[spiffeid.TrustDomain]sentHead{}
	marks := map[spiffeid.TrustDomain]mark{}
	for {
		select {
		case <-l.wake:
		case <-l.ctx.Done():
			return
		}
		if l.feedOffers(heads) != nil || l.feedMarks(marks) != nil {
			return // the link has ended
		}
	}
}

func (l *link) feedOffers(sent map[spiffeid.TrustDomain]sentHead) error {
	l.m.mu.Lock()
	consumers := l.m.consumersLocked()
	l.m.mu.Unlock()
	live := map[spiffeid.TrustDomain]bool{}
	for _, td := range consumers {
		live[td] = true
		head, had := l.m.origin.Head(td), sent[td]
		if head == nil || head.Epoch == had.epoch && head.Seq == had.seq && head.IssuedAt.Equal(had.issued) {
			continue
		}
		update := l.m.origin.Update(td, had.epoch, had.seq)
		if update == nil {
			continue
		}
		offer := &controlpb.Offer{ConsumerTrustDomain: td.String(), Update: update}
		if err := l.put(l.ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Offer{Offer: offer}}); err != nil {
			return err
		}
		h, err := catalog.ParseHead(update.GetHead().GetHead())
		if err != nil {
			return err
		}
		sent[td] = sentHead{h.Epoch, h.Seq, h.IssuedAt}
	}
	for td := range sent {
		if live[td] {
			continue
		}
		delete(sent, td)
		offer := &controlpb.Offer{ConsumerTrustDomain: td.String(), Withdrawn: true}
		if err := l.put(l.ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Offer{Offer: offer}}); err != nil {
			return err
		}
	}
	return nil
}

func (l *link) feedMarks(sent map[spiffeid.TrustDomain]mark) error {
	for _, p := range l.m.View().Peers {
		if !p.Ready() {
			delete(sent, p.TrustDomain)
			continue
		}
		epoch, seq := l.m.store.Have(p.TrustDomain)
		now := mark{epoch, seq}
		if had, ok := sent[p.TrustDomain]; ok && had == now {
			continue
		}
		if err := l.mark(p.TrustDomain, now, false); err != nil {
			return err
		}
		sent[p.TrustDomain] = now
	}
	return nil
}

func (l *link) mark(td spiffeid.TrustDomain, at mark, resync bool) error {
	return l.put(l.ctx, &controlpb.ControlMessage{Message: &controlpb.ControlMessage_Mark{Mark: &controlpb.CatalogMark{
		OriginTrustDomain: td.String(), Epoch: at.epoch, Seq: at.seq, Resync: resync,
	}}})
}

// judge applies what the link's gateway pulled from peers, one update after the other.
func (l *link) judge() {
	for {
		select {
		case c := <-l.catalogs:
			l.applied(c)
		case <-l.ctx.Done():
			return
		}
	}
}

func (l *link) applied(c *controlpb.PeerCatalog) {
	td, ok := parseTD(c.GetOriginTrustDomain())
	if !ok {
		return
	}
	if p := l.m.View().Peer(td); p == nil || !p.Ready() {
		return // an update that crossed the withdrawal
	}
	err := l.m.apply(td, c.GetUpdate())
	if errors.Is(err, catalog.ErrResync) {
		epoch, seq := l.m.store.Have(td)
		_ = l.mark(td, mark{epoch, seq}, true) // fails only when the link ends
	}
}

// apply judges a catalog of td and takes over its gateway records.
func (m *Manager) apply(td spiffeid.TrustDomain, u *controlpb.CatalogUpdate) error {
	bundles := m.peerBundles(td)
	if bundles == nil {
		return problem.New(problem.TrustRefused, "%s is not trusted", td)
	}
	conflict := m.store.Conflict(td) != nil
	res, err := m.store.Apply(td, u, bundles)
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	if p == nil {
		return err
	}
	switch {
	case err == nil:
		p.refused = ""
	case errors.Is(err, catalog.ErrResync):
	default:
		text := err.Error()
		if p.refused != text {
			kind := "catalog_refused"
			if !conflict && m.store.Conflict(td) != nil {
				kind = "catalog_fork"
			}
			m.alarmLocked(kind, p.rec.Cluster, text)
		}
		p.refused = text
	}
	if err == nil {
		m.takeBundleLocked(td)
		m.checkSeenLocked(td)
	}
	if v := m.store.View(td); err == nil && res.Changed && v != nil && len(v.Gateways) > 0 {
		if uerr := m.updateLocked(td, func(r *record) error {
			next := gatewaysIn(v.Gateways)
			if sameRecords(r.Gateways, next) {
				return errUnchanged
			}
			r.Gateways = next
			return nil
		}); uerr != nil {
			m.log.Error("peer's gateways could not be written", "peer", td.String(), "error", uerr)
		}
	}
	m.changedLocked()
	m.wakeLinksLocked()
	return err
}

func sameRecords(a, b []gatewayRecord) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Name != b[i].Name || a[i].Zone != b[i].Zone || strings.Join(a[i].Addresses, " ") != strings.Join(b[i].Addresses, " ") {
			return false
		}
	}
	return true
}

// peerBundles is the set with which a peer's signatures are verified, or nil when it is not trusted.
func (m *Manager) peerBundles(td spiffeid.TrustDomain) *trust.Bundles {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[td]
	if p == nil || !p.rec.trusted() || p.bundle == nil {
		return nil
	}
	set, _ := trust.NewBundles(p.bundle)
	return set
}

// ownBundles is the set with which our own old heads are verified.
func (m *Manager) ownBundles() *trust.Bundles {
	b := m.cfg.Bundle()
	if b == nil {
		return nil
	}
	set, _ := trust.NewBundles(b)
	return set
}

// waitHeads waits until every ready peer has said which head of ours it holds, at most EpochWait.
func (m *Manager) waitHeads(ctx context.Context) {
	timer := time.NewTimer(m.cfg.EpochWait)
	defer timer.Stop()
	for {
		changed := m.Changed()
		if m.headsKnown() {
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (m *Manager) headsKnown() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.peers {
		if p.rec.State == StateReady && !p.headAsked {
			return false
		}
	}
	return true
}

// askHead asks a peer which head of ours it holds. Any answer will do: without one its heads wait.
func (m *Manager) askHead(td spiffeid.TrustDomain) error {
	ctx, cancel := context.WithTimeout(m.ctx, defaultTimeout)
	defer cancel()
	r, err := m.Ask(ctx, td, methodHeadOf, nil)
	if forNow(err) {
		return err
	}
	if err == nil && len(r.Body) > 0 {
		var sh controlpb.SignedHead
		if uerr := proto.Unmarshal(r.Body, &sh); uerr == nil {
			m.meetHead(td, &sh)
		}
	}
	m.known(td)
	return nil
}

// meetHead takes a head that a peer says we signed.
func (m *Manager) meetHead(td spiffeid.TrustDomain, sh *controlpb.SignedHead) {
	own := m.ownBundles()
	if sh == nil || len(sh.GetHead()) == 0 || own == nil {
		return
	}
	if err := m.origin.Meet(sh, own); err != nil {
		m.log.Warn("peer holds a head in our name that is not ours", "peer", td.String(), "error", err)
	}
}

// known notes that td has said which head of ours it holds.
func (m *Manager) known(td spiffeid.TrustDomain) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.peers[td]; p != nil && !p.headAsked {
		p.headAsked = true
		close(m.changed) // wakes waitHeads
		m.changed = make(chan struct{})
		m.wakeLinksLocked()
	}
}

// handleHeadOf tells a peer the newest head of its own that we hold.
func (m *Manager) handleHeadOf(_ context.Context, from spiffeid.TrustDomain, _ []byte) ([]byte, error) {
	sh := m.store.Signed(from)
	if sh == nil {
		return nil, nil
	}
	return proto.Marshal(sh)
}

// signedFor waits for the first head for td and returns the whole catalog with it; nil if there is none in time.
func (m *Manager) signedFor(ctx context.Context, td spiffeid.TrustDomain) *controlpb.CatalogUpdate {
	timer := time.NewTimer(signWait)
	defer timer.Stop()
	for {
		changed := m.origin.Changed()
		if m.origin.Head(td) != nil {
			return m.origin.Update(td, 0, 0)
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}
