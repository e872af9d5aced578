// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/internal/datadir"
	"github.com/strait-mesh/strait/trust"
	"github.com/strait-mesh/strait/trust/ca"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Whether a head is really signed does not matter to entries; these heads are not.
type signer struct {
	td   spiffeid.TrustDomain
	h    *held
	seq  uint64
	ep   uint64
	now  time.Time
	want map[string][]byte
}

func newSigner(t interface{ Fatal(...any) }) *signer {
	td, err := spiffeid.ParseTrustDomain("eu-west.acme")
	if err != nil {
		t.Fatal(err)
	}
	return &signer{td: td, ep: 1, now: time.UnixMilli(1e12).UTC(), want: map[string][]byte{}}
}

func (s *signer) sign() {
	s.now = s.now.Add(time.Second)
	var l *ledger
	if s.h != nil && s.h.head.Epoch == s.ep {
		l = s.h.ledger
	} else {
		s.seq = 0
	}
	next, changed := l.advance(s.want, s.seq+1)
	if changed || l == nil {
		if l == nil {
			next = next.clone()
			next.floor = s.seq + 1
		}
		s.seq++
	}
	head := Head{TrustDomain: s.td, Consumer: s.td, Epoch: s.ep, Seq: s.seq, Hash: next.hash(), Count: next.live, IssuedAt: s.now, TTL: time.Minute}
	s.h = &held{head: head, signed: &controlpb.SignedHead{Head: head.Marshal()}, ledger: next}
}

var lim = limits{DefaultMaxEntries, DefaultMaxBytes}

func apply(h *held, u *controlpb.CatalogUpdate) (*held, error) {
	head, err := ParseHead(u.GetHead().GetHead())
	if err != nil {
		return h, err
	}
	next, _, err := h.merge(u, head, lim)
	if err != nil {
		return h, err
	}
	return next, nil
}

func (h *held) bodies() map[string]string {
	m := map[string]string{}
	if h != nil {
		for _, k := range h.ledger.keys() {
			m[k] = string(h.ledger.entries[k].body)
		}
	}
	return m
}

// TestReadersConverge: an origin changes at random; one reader takes snapshots only, one follows by deltas, one reads through a
// gateway's cache, one gets updates late, twice and out of order. All end with the same entries, the origin's, and none ever holds
// something that was not signed or goes back.
func TestReadersConverge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSigner(t)
		s.sign()
		signed := map[string]map[string]string{}
		var snap, delta, far, late *held
		var far1 *held // the cache in between
		var post []*controlpb.CatalogUpdate
		follow := func(h *held, from *held) *held {
			var e, q uint64
			if h != nil {
				e, q = h.head.Epoch, h.head.Seq
			}
			next, err := apply(h, from.update(e, q))
			if err != nil {
				t.Fatalf("following %d.%d from %d.%d: %v", e, q, from.head.Epoch, from.head.Seq, err)
			}
			return next
		}
		for range rapid.IntRange(1, 25).Draw(t, "rounds") {
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				k := fmt.Sprintf("svc/shop/s%d", rapid.IntRange(0, 6).Draw(t, "key"))
				if v := rapid.IntRange(0, 3).Draw(t, "value"); v == 0 {
					delete(s.want, k)
				} else {
					s.want[k] = []byte{byte(v)}
				}
			}
			s.want = maps.Clone(s.want)
			if rapid.IntRange(0, 9).Draw(t, "new epoch") == 0 {
				s.ep += uint64(rapid.IntRange(1, 3).Draw(t, "by"))
			}
			s.sign()
			signed[fmt.Sprint(s.h.head.Epoch, s.h.head.Seq)] = s.h.bodies()

			snap = follow(nil, s.h)
			if rapid.Bool().Draw(t, "delta follows") {
				delta = follow(delta, s.h)
			}
			if rapid.Bool().Draw(t, "cache follows") {
				far1 = follow(far1, s.h)
			}
			if far1 != nil && rapid.Bool().Draw(t, "far follows") {
				far = follow(far, far1)
			}
			var e, q uint64
			if late != nil && rapid.Bool().Draw(t, "from what it has") {
				e, q = late.head.Epoch, late.head.Seq
			} else {
				e, q = s.h.head.Epoch, uint64(rapid.IntRange(0, int(s.h.head.Seq)).Draw(t, "from"))
			}
			post = append(post, s.h.update(e, q))
			for range rapid.IntRange(0, 3).Draw(t, "deliveries") {
				u := rapid.SampledFrom(post).Draw(t, "which")
				was := late
				var err error
				late, err = apply(late, u)
				var rb *RollbackError
				if err != nil && !errors.As(err, &rb) && !errors.Is(err, ErrResync) {
					t.Fatalf("late reader: %v", err)
				}
				if late != nil {
					if was != nil && was.head.Newer(late.head.Epoch, late.head.Seq) {
						t.Fatal("it went back")
					}
					if want := signed[fmt.Sprint(late.head.Epoch, late.head.Seq)]; !maps.Equal(want, late.bodies()) {
						t.Fatalf("late reader holds %v as %d.%d, signed was %v", late.bodies(), late.head.Epoch, late.head.Seq, want)
					}
				}
				if again, err := apply(late, u); err == nil && again != late {
					t.Fatal("the same update twice is not the same as once")
				}
			}
		}
		delta, far1, late = follow(delta, s.h), follow(far1, s.h), follow(late, s.h)
		far = follow(far, far1)
		want := map[string]string{}
		for k, v := range s.want {
			want[k] = string(v)
		}
		for name, h := range map[string]*held{"snapshot": snap, "delta": delta, "through a cache": far, "late": late} {
			if !maps.Equal(h.bodies(), want) || h.ledger.hash() != s.h.head.Hash {
				t.Fatalf("%s reader holds %v, want %v", name, h.bodies(), want)
			}
		}
	})
}

// TestTombstonesArePruned: past the floor a delta would forget removals, so a snapshot is sent.
func TestTombstonesArePruned(t *testing.T) {
	s := newSigner(t)
	s.want["svc/shop/stays"] = nil
	s.sign()
	first := s.h
	for i := range minTombstones + 10 {
		k := fmt.Sprintf("svc/shop/s%d", i)
		s.want[k] = nil
		s.sign()
		delete(s.want, k)
		s.sign()
	}
	if n := len(s.h.ledger.entries); n != minTombstones+1 {
		t.Errorf("%d entries and tombstones are kept, want %d", n, minTombstones+1)
	}
	u := s.h.update(first.head.Epoch, first.head.Seq)
	if !u.GetSnapshot() {
		t.Error("a reader below the floor gets a delta")
	}
	if h, err := apply(first, u); err != nil || len(h.bodies()) != 1 {
		t.Errorf("after it: %v, %v", h.bodies(), err)
	}
	if u := s.h.update(s.h.head.Epoch, s.h.ledger.floor); u.GetSnapshot() {
		t.Error("a reader at the floor gets a snapshot")
	}
}

func TestCache(t *testing.T) {
	s := newSigner(t)
	s.want["svc/shop/a"] = []byte{1}
	s.sign()
	c := NewCache(0, 0)
	if c.Update(s.td, 0, 0) != nil {
		t.Error("an empty cache answers")
	}
	changed := c.Changed(s.td)
	if r, err := c.Apply(s.td, s.h.update(0, 0)); err != nil || !r.Changed || !r.Fresh {
		t.Fatalf("%+v, %v", r, err)
	}
	<-changed
	changed = c.Changed(s.td)
	old := s.h.update(0, 0)
	if r, err := c.Apply(s.td, old); err != nil || r.Fresh {
		t.Errorf("the same again: %+v, %v", r, err)
	}
	select {
	case <-changed:
		t.Error("nothing new wakes readers")
	default:
	}
	s.want = map[string][]byte{"svc/shop/a": {2}}
	s.sign()
	e, q := c.Mark(s.td)
	if _, err := c.Apply(s.td, s.h.update(e, q)); err != nil {
		t.Fatal(err)
	}
	<-changed
	var rb *RollbackError
	if _, err := c.Apply(s.td, old); !errors.As(err, &rb) {
		t.Errorf("an older update: %v", err)
	}
	if u := c.Update(s.td, 1, 1); u.GetSnapshot() || len(u.GetEntries()) != 1 {
		t.Errorf("the cache answers %v", u)
	}
	if len(c.Keys()) != 1 || c.Signed(s.td) == nil {
		t.Error("keys or head are missing")
	}
	changed = c.Changed(s.td)
	c.Drop(s.td)
	<-changed
	if c.Update(s.td, 0, 0) != nil || len(c.Keys()) != 0 {
		t.Error("what was dropped is served")
	}
}

// FuzzMerge: whatever update a peer sends, a reader that holds something refuses it or holds something whose hash was in the head.
func FuzzMerge(f *testing.F) {
	f.Add("svc/shop/a", uint64(1), false, []byte{1}, uint64(0), true)
	f.Add("svc/shop/a", uint64(2), true, []byte{}, uint64(1), false)
	f.Fuzz(func(t *testing.T, key string, version uint64, deleted bool, body []byte, from uint64, snapshot bool) {
		s := newSigner(t)
		s.want["svc/shop/a"] = []byte{1}
		s.sign()
		h, err := apply(nil, s.h.update(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		s.want = map[string][]byte{"svc/shop/a": {2}}
		s.sign()
		u := &controlpb.CatalogUpdate{Head: s.h.signed, Snapshot: snapshot, FromEpoch: 1, FromSeq: from,
			Entries: []*controlpb.CatalogEntry{{Key: key, Version: version, Deleted: deleted, Body: body}}}
		if next, err := apply(h, u); err == nil && (next.ledger.hash() != s.h.head.Hash || next.ledger.live != 1) {
			t.Errorf("%v was accepted", u)
		}
	})
}

// FuzzJudgeEntry: no entry a peer can send panics, and what is accepted says what its key says.
func FuzzJudgeEntry(f *testing.F) {
	f.Add("svc/shop/a", []byte("\x0a\x09\x0a\x04shop\x12\x01a"))
	f.Add("gw/g", []byte("\x0a\x01g\x12\x10198.51.100.4:443"))
	f.Add("bundle", []byte("\x0a\x23{\"keys\":[],\"spiffe_sequence\":1    }\x10\x01"))
	f.Add("seen", append([]byte("\x08\x01\x12\x20"), make([]byte, 32)...))
	f.Add("deny/ns/shop/sa/a", []byte("\x0a\x24spiffe://eu-west.acme/ns/shop/sa/aaa\x10\x05"))
	f.Add("deny/strait/gateway/g", encodeDenial("spiffe://eu-west.acme/strait/gateway/g", 0))
	td, err := spiffeid.ParseTrustDomain("eu-west.acme")
	if err != nil {
		f.Fatal(err)
	}
	dir, err := datadir.Create(filepath.Join(f.TempDir(), "ca"))
	if err != nil {
		f.Fatal(err)
	}
	defer dir.Close()
	authority, err := ca.Create(dir, ca.Config{TrustDomain: td})
	if err != nil {
		f.Fatal(err)
	}
	body, err := BundleEntry(authority.Bundle())
	if err != nil {
		f.Fatal(err)
	}
	f.Add("bundle", body)
	f.Fuzz(func(t *testing.T, key string, body []byte) {
		m, err := judgeEntry(td, key, body, false)
		if err != nil {
			return
		}
		switch m := m.(type) {
		case *controlpb.CatalogService:
			if key != "svc/"+m.GetService().GetNamespace()+"/"+m.GetService().GetName() {
				t.Errorf("%q speaks of %v", key, m)
			}
		case *controlpb.GatewayRecord:
			if key != "gw/"+m.GetName() {
				t.Errorf("%q speaks of %v", key, m)
			}
		case *trust.Bundle:
			if key != "bundle" || m.TrustDomain() != td || m.Sequence() == 0 || len(m.Roots()) == 0 {
				t.Errorf("%q speaks of %s", key, m.Marshal())
			}
		case *Seen:
			if key != "seen" || m.Sequence == 0 {
				t.Errorf("%q speaks of %v", key, m)
			}
		case *Denial:
			if m.ID.TrustDomain() != td || key != "deny"+m.ID.Path() || !m.IssuedBefore.IsZero() && m.IssuedBefore.UnixMilli() <= 0 {
				t.Errorf("%q speaks of %v", key, m)
			}
		default:
			t.Errorf("%q is a %T", key, m)
		}
	})
}

func encodeDenial(id string, before int64) []byte {
	b, err := proto.Marshal(&controlpb.DeniedIdentity{SpiffeId: id, IssuedBeforeMs: before})
	if err != nil {
		panic(err)
	}
	return b
}
