// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Bounds of entries.
const (
	maxKeySize = 256
	// minTombstones are kept in any case; beyond that, as many as there are entries.
	minTombstones = 1024
)

// entriesDomain keeps the hash of entries from meaning anything else.
const entriesDomain = "strait catalog entries v1\x00"

// entry is one entry; version is the seq at which it last changed.
type entry struct {
	version uint64
	deleted bool
	body    []byte
}

// ledger is a catalog's entries with tombstones. It is immutable once its head is known; next makes another.
type ledger struct {
	entries map[string]entry
	live    int
	size    int    // bytes of keys and bodies that live
	floor   uint64 // deltas can be made from this seq on
}

// clone shares bodies, which nobody writes to.
func (l *ledger) clone() *ledger {
	if l == nil {
		return &ledger{entries: map[string]entry{}}
	}
	c := *l
	c.entries = maps.Clone(l.entries)
	return &c
}

func (l *ledger) put(key string, e entry) {
	if old, ok := l.entries[key]; ok && !old.deleted {
		l.live--
		l.size -= len(key) + len(old.body)
	}
	if !e.deleted {
		l.live++
		l.size += len(key) + len(e.body)
	}
	l.entries[key] = e
}

// prune forgets the oldest tombstones when there are too many.
func (l *ledger) prune() {
	excess := len(l.entries) - l.live - max(minTombstones, l.live)
	if excess <= 0 {
		return
	}
	var dead []string
	for k, e := range l.entries {
		if e.deleted {
			dead = append(dead, k)
		}
	}
	slices.SortFunc(dead, func(a, b string) int { return cmp.Compare(l.entries[a].version, l.entries[b].version) })
	for _, k := range dead[:excess] {
		l.floor = max(l.floor, l.entries[k].version)
		delete(l.entries, k)
	}
}

// hash is over the live entries in the order of their keys.
func (l *ledger) hash() [32]byte {
	h := sha256.New()
	h.Write([]byte(entriesDomain))
	var b []byte
	for _, k := range l.keys() {
		e := l.entries[k]
		b = binary.BigEndian.AppendUint32(b[:0], uint32(len(k)))
		b = append(b, k...)
		b = binary.BigEndian.AppendUint64(b, e.version)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.body)))
		h.Write(b)
		h.Write(e.body)
	}
	return [32]byte(h.Sum(nil))
}

// keys are the live ones, sorted.
func (l *ledger) keys() []string {
	keys := make([]string, 0, l.live)
	for k, e := range l.entries {
		if !e.deleted {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// advance returns the ledger in which exactly want lives, with seq as the version of what changed, or l itself when nothing did.
func (l *ledger) advance(want map[string][]byte, seq uint64) (next *ledger, changed bool) {
	next = l.clone()
	for k, body := range want {
		if e, ok := next.entries[k]; !ok || e.deleted || !bytes.Equal(e.body, body) {
			next.put(k, entry{version: seq, body: body})
			changed = true
		}
	}
	for k, e := range next.entries {
		if _, ok := want[k]; !ok && !e.deleted {
			next.put(k, entry{version: seq, deleted: true})
			changed = true
		}
	}
	if !changed {
		return l, false
	}
	next.prune()
	return next, true
}

// held is a catalog as somebody holds it: a ledger under its newest signed head. Immutable.
type held struct {
	head   Head
	signed *controlpb.SignedHead
	ledger *ledger
}

// update answers a reader that has (epoch, seq).
func (h *held) update(epoch, seq uint64) *controlpb.CatalogUpdate {
	if h == nil {
		return nil
	}
	u := &controlpb.CatalogUpdate{Head: h.signed}
	if epoch != h.head.Epoch || seq > h.head.Seq || seq < h.ledger.floor || seq == 0 {
		u.Snapshot = true
		for _, k := range h.ledger.keys() {
			e := h.ledger.entries[k]
			u.Entries = append(u.Entries, &controlpb.CatalogEntry{Key: k, Version: e.version, Body: e.body})
		}
		return u
	}
	u.FromEpoch, u.FromSeq = epoch, seq
	for k, e := range h.ledger.entries {
		if e.version > seq {
			u.Entries = append(u.Entries, &controlpb.CatalogEntry{Key: k, Version: e.version, Deleted: e.deleted, Body: e.body})
		}
	}
	slices.SortFunc(u.Entries, func(a, b *controlpb.CatalogEntry) int { return cmp.Compare(a.Key, b.Key) })
	return u
}

// limits of what one peer may offer.
type limits struct {
	entries, bytes int
}

// merge applies an update whose head has been verified to what is held (nil: nothing). It returns the new catalog and how many
// entries changed; the result is h itself when the update says nothing new.
func (h *held) merge(u *controlpb.CatalogUpdate, head *Head, lim limits) (next *held, changes int, err error) {
	if h != nil && head.Epoch == h.head.Epoch && head.Seq == h.head.Seq {
		return h.refresh(u, head)
	}
	if h != nil && !head.Newer(h.head.Epoch, h.head.Seq) {
		return nil, 0, &RollbackError{Origin: head.TrustDomain, Epoch: head.Epoch, Seq: head.Seq, HeldEpoch: h.head.Epoch, HeldSeq: h.head.Seq}
	}
	if n := len(u.GetEntries()); n > 2*lim.entries+minTombstones {
		return nil, 0, &QuotaError{Origin: head.TrustDomain, Quota: "entries", Have: n, Limit: lim.entries}
	}
	l := &ledger{entries: make(map[string]entry, len(u.GetEntries())), floor: head.Seq}
	after := uint64(0)
	if !u.GetSnapshot() {
		after = u.GetFromSeq()
		if h == nil || u.GetFromEpoch() != h.head.Epoch || head.Epoch != h.head.Epoch || after > h.head.Seq {
			return nil, 0, ErrResync
		}
		l = h.ledger.clone()
	}
	changed, err := l.take(u, head, after)
	if err != nil {
		return nil, 0, err
	}
	if l.live > lim.entries {
		return nil, 0, &QuotaError{Origin: head.TrustDomain, Quota: "entries", Have: l.live, Limit: lim.entries}
	}
	if l.size > lim.bytes {
		return nil, 0, &QuotaError{Origin: head.TrustDomain, Quota: "bytes", Have: l.size, Limit: lim.bytes}
	}
	if l.live != head.Count || l.hash() != head.Hash {
		if !u.GetSnapshot() {
			return nil, 0, fmt.Errorf("%w: entries do not add up to the head", ErrResync)
		}
		return nil, 0, &HeadError{Reason: "entries", Err: errors.New("the snapshot's entries are not those that were signed")}
	}
	if u.GetSnapshot() {
		changed = l.differences(h)
	}
	l.prune()
	return &held{head: *head, signed: u.GetHead(), ledger: l}, changed, nil
}

// take puts the update's entries into l and counts those that changed it.
func (l *ledger) take(u *controlpb.CatalogUpdate, head *Head, after uint64) (changed int, err error) {
	seen := make(map[string]bool, len(u.GetEntries()))
	for _, e := range u.GetEntries() {
		k, v := e.GetKey(), e.GetVersion()
		switch {
		case k == "" || len(k) > maxKeySize || seen[k]:
			return 0, &ForeignError{Origin: head.TrustDomain, Key: k, Why: "empty, too long or doubled key"}
		case v <= after || v > head.Seq:
			return 0, &ForeignError{Origin: head.TrustDomain, Key: k, Why: "version outside the update"}
		case e.GetDeleted() && (u.GetSnapshot() || len(e.GetBody()) > 0):
			return 0, &ForeignError{Origin: head.TrustDomain, Key: k, Why: "misplaced tombstone"}
		}
		seen[k] = true
		if old, ok := l.entries[k]; ok && old.version >= v {
			continue // we are ahead of this part of the delta
		}
		l.put(k, entry{version: v, deleted: e.GetDeleted(), body: e.GetBody()})
		changed++
	}
	return changed, nil
}

// differences counts the keys whose bodies differ from what was held.
func (l *ledger) differences(h *held) (n int) {
	if h == nil {
		return l.live
	}
	for k, e := range l.entries {
		if old, ok := h.ledger.entries[k]; !ok || old.deleted || !bytes.Equal(old.body, e.body) {
			n++
		}
	}
	for k, old := range h.ledger.entries {
		if _, ok := l.entries[k]; !ok && !old.deleted {
			n++
		}
	}
	return n
}

// refresh takes a head with the numbers that are held: the same catalog signed again, or a fork.
func (h *held) refresh(u *controlpb.CatalogUpdate, head *Head) (*held, int, error) {
	if head.Hash != h.head.Hash || head.Count != h.head.Count {
		return nil, 0, &ForkError{Origin: head.TrustDomain, Epoch: head.Epoch, Seq: head.Seq}
	}
	if !head.IssuedAt.After(h.head.IssuedAt) {
		return h, 0, nil
	}
	return &held{head: *head, signed: u.GetHead(), ledger: h.ledger}, 0, nil
}

// mark is the newest head of an origin that was accepted.
type mark struct {
	epoch, seq uint64
	hash       [32]byte
}

func (m mark) judge(head *Head, td spiffeid.TrustDomain) error {
	switch {
	case m.epoch == 0:
		return nil
	case head.Epoch > m.epoch && head.Epoch-m.epoch > MaxEpochJump:
		return fmt.Errorf("head %d.%d of %s after %d.%d: %w", head.Epoch, head.Seq, td, m.epoch, m.seq, ErrEpochJump)
	case head.Epoch == m.epoch && head.Seq == m.seq && head.Hash != m.hash:
		return &ForkError{Origin: td, Epoch: head.Epoch, Seq: head.Seq}
	case head.Epoch == m.epoch && head.Seq == m.seq, head.Newer(m.epoch, m.seq):
		return nil
	}
	return &RollbackError{Origin: td, Epoch: head.Epoch, Seq: head.Seq, HeldEpoch: m.epoch, HeldSeq: m.seq}
}
