// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

const typeService = controlpb.TypeService

// mirror is a watcher that knows only what it is told.
type mirror struct {
	held   map[string]uint64
	refuse bool // the next change that is no removal
}

func (m *mirror) apply(ch Change) error {
	if ch.Message == nil {
		delete(m.held, ch.Name)
		return nil
	}
	if m.refuse {
		m.refuse = false
		return errors.New("refused")
	}
	m.held[ch.Name] = ch.Message.(*controlpb.Service).GetRevision()
	return nil
}

// TestStoreModel: whatever is subscribed, received, refused, saved and loaded in whatever order, watchers that only listen know the
// same as those who ask, and both what a plain map says.
func TestStoreModel(t *testing.T) {
	names := []string{"a", "b", "c", "d"}
	rapid.Check(t, func(t *rapid.T) {
		s := newStore(time.Now)
		log := slog.New(slog.DiscardHandler)
		first, picky := &mirror{held: map[string]uint64{}}, &mirror{held: map[string]uint64{}}
		watchers := []*mirror{first, picky}
		s.watch(first.apply)
		s.watch(picky.apply)
		asked, want := map[string]bool{}, map[string]uint64{}
		covered := func(n string) bool { return asked[n] || asked[wildcard] }
		one := rapid.SampledFrom(names)
		withAll := rapid.SampledFrom(append([]string{wildcard}, names...))
		revision := uint64(0)
		t.Repeat(map[string]func(*rapid.T){
			"subscribe": func(t *rapid.T) {
				n := withAll.Draw(t, "name")
				asked[n] = true
				s.subscribe(typeService, []string{n})
				s.deliver(log)
			},
			"unsubscribe": func(t *rapid.T) {
				n := withAll.Draw(t, "name")
				delete(asked, n)
				s.unsubscribe(typeService, []string{n})
				for _, n := range names {
					if !covered(n) { // nobody is told of what nobody asked for any more
						delete(want, n)
						for _, w := range watchers {
							delete(w.held, n)
						}
					}
				}
			},
			"response": func(t *rapid.T) {
				var updates []update
				for _, n := range rapid.SliceOfDistinct(one, rapid.ID[string]).Draw(t, "names") {
					revision++
					u := update{name: n}
					if rapid.Bool().Draw(t, "exists") {
						u.version, u.msg = fmt.Sprint(revision), &controlpb.Service{Revision: revision}
					}
					updates = append(updates, u)
				}
				picky.refuse = rapid.Bool().Draw(t, "refuse")
				refused := s.apply(typeService, updates, true)
				picky.refuse = false
				for _, u := range updates {
					switch {
					case refused[u.name] != nil && u.msg == nil:
						t.Fatalf("the removal of %s was refused", u.name)
					case refused[u.name] != nil || !covered(u.name):
					case u.msg == nil:
						delete(want, u.name)
					default:
						want[u.name] = u.msg.(*controlpb.Service).GetRevision()
					}
				}
				if len(refused) > 1 {
					t.Fatalf("refused %v, at most one was", refused)
				}
			},
			"watch": func(*rapid.T) {
				if len(watchers) < 5 {
					w := &mirror{held: map[string]uint64{}}
					watchers = append(watchers, w)
					s.watch(w.apply)
					s.deliver(log)
				}
			},
			"": func(t *rapid.T) {
				s.deliver(log)
				have := map[string]uint64{}
				for n, m := range s.list(typeService) {
					have[n] = m.(*controlpb.Service).GetRevision()
				}
				if !maps.Equal(have, want) {
					t.Fatalf("asked %v: the store has %v, want %v", asked, have, want)
				}
				for i, w := range watchers {
					if !maps.Equal(w.held, want) {
						t.Fatalf("asked %v: watcher %d was told %v, want %v", asked, i, w.held, want)
					}
				}
				checkSnapshot(t, s, asked, want)
			},
		})
	})
}

// checkSnapshot restarts from what would be saved now and subscribes to the same.
func checkSnapshot(t *rapid.T, s *store, asked map[string]bool, want map[string]uint64) {
	s.dirty = true
	snap, ok := s.snapshot()
	if !ok {
		t.Fatal("nothing to save")
	}
	data, err := proto.Marshal(snap)
	if err != nil {
		t.Fatal(err)
	}
	loaded := &controlpb.DiscoverySnapshot{}
	if err := proto.Unmarshal(data, loaded); err != nil {
		t.Fatal(err)
	}
	again := newStore(time.Now)
	if err := again.load(loaded); err != nil {
		t.Fatal(err)
	}
	again.subscribe(typeService, slices.Collect(maps.Keys(asked)))
	for name, rev := range want {
		if m, state := again.get(typeService, name); state != Known || m.(*controlpb.Service).GetRevision() != rev {
			t.Fatalf("after a restart %s is %v %v, want %d", name, state, m, rev)
		}
	}
	if len(again.list(typeService)) != len(want) {
		t.Fatalf("after a restart there are %d resources, want %d", len(again.list(typeService)), len(want))
	}
}

func TestUnreadableSnapshotEntries(t *testing.T) {
	s := newStore(time.Now)
	err := s.load(&controlpb.DiscoverySnapshot{Resources: []*controlpb.SnapshotResource{
		{TypeUrl: "type.googleapis.com/strait.v9.Later", Name: "x", Body: []byte{1}},
		{TypeUrl: typeService, Name: "broken", Body: []byte{0xff}},
		{TypeUrl: typeService, Name: "good"},
	}})
	if err == nil {
		t.Error("what could not be read was not reported")
	}
	s.subscribe(typeService, []string{"good", "broken"})
	if _, state := s.get(typeService, "good"); state != Known {
		t.Errorf("good: %v", state)
	}
	if _, state := s.get(typeService, "broken"); state != Unknown {
		t.Errorf("broken: %v", state)
	}
}

// TestParkedResourcesEnd: what nobody subscribes any more leaves the snapshot after a day.
func TestParkedResourcesEnd(t *testing.T) {
	now := time.Now()
	s := newStore(func() time.Time { return now })
	saved := &controlpb.DiscoverySnapshot{Resources: []*controlpb.SnapshotResource{
		{TypeUrl: typeService, Name: "recent", WantedMs: now.Add(-23 * time.Hour).UnixMilli()},
		{TypeUrl: typeService, Name: "old", WantedMs: now.Add(-25 * time.Hour).UnixMilli()},
	}}
	if err := s.load(saved); err != nil {
		t.Fatal(err)
	}
	s.dirty = true
	snap, _ := s.snapshot()
	if len(snap.GetResources()) != 1 || snap.GetResources()[0].GetName() != "recent" {
		t.Fatalf("kept %v", snap.GetResources())
	}
	if got := snap.GetResources()[0].GetWantedMs(); got != now.Add(-23*time.Hour).UnixMilli() {
		t.Errorf("keeping it has made it younger: %d", got)
	}
}
