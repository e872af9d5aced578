// SPDX-License-Identifier: Apache-2.0

package proxyclient

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
)

// wildcard is the name that stands for all resources of a type (xDS, "wildcard subscription").
const wildcard = "*"

type key struct{ typeURL, name string }

// item is what is held of one resource.
type item struct {
	state   State
	version string
	msg     proto.Message
}

// subscriptions are the names wanted of one type. The number is raised by each Subscribe after an Unsubscribe, so that a
// stream notices that it has to ask again.
type subscriptions map[string]uint64

func (s subscriptions) covers(name string) bool {
	_, one := s[name]
	_, all := s[wildcard]
	return one || all
}

type watcher struct {
	id   uint64
	f    func(Change) error
	told bool // has been told of everything known when it came
}

// store holds subscriptions, what is known of them, and who wants to hear of changes. Everything but deliver and apply,
// which belong to the applying goroutine, may be called from anywhere.
type store struct {
	now func() time.Time

	mu       sync.RWMutex
	wanted   map[string]subscriptions
	items    map[key]item
	synced   map[string]bool // types whose wildcard subscription was answered in full
	parked   map[key]parked  // from the snapshot, not subscribed so far
	announce []key           // became visible from the snapshot
	watchers []*watcher
	nextID   uint64
	changed  chan struct{} // closed at the next change of items
	dirty    bool          // items or subscriptions changed since the last snapshot

	applyKick  chan struct{} // something to announce
	streamKick chan struct{} // subscriptions changed
	saveKick   chan struct{} // dirty
}

// parked is a resource of the snapshot that nobody has asked for in this process.
type parked struct {
	item
	wanted time.Time
}

func newStore(now func() time.Time) *store {
	return &store{
		now: now, wanted: map[string]subscriptions{}, items: map[key]item{}, synced: map[string]bool{}, parked: map[key]parked{},
		changed: make(chan struct{}), applyKick: make(chan struct{}, 1), streamKick: make(chan struct{}, 1), saveKick: make(chan struct{}, 1),
	}
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *store) subscribe(typeURL string, names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	subs := s.wanted[typeURL]
	if subs == nil {
		subs = subscriptions{}
		s.wanted[typeURL] = subs
	}
	for _, name := range names {
		if _, ok := subs[name]; ok {
			continue
		}
		s.nextID++
		subs[name] = s.nextID
		s.unparkLocked(typeURL, name)
	}
	kick(s.streamKick)
	kick(s.applyKick)
	s.markDirtyLocked()
}

// unparkLocked makes visible what the snapshot holds for a new subscription.
func (s *store) unparkLocked(typeURL, name string) {
	take := func(k key, p parked) {
		delete(s.parked, k)
		if k.name == wildcard {
			s.synced[typeURL] = true
			return
		}
		if _, newer := s.items[k]; !newer {
			s.items[k] = p.item
			s.announce = append(s.announce, k)
		}
	}
	if name != wildcard {
		k := key{typeURL, name}
		if p, ok := s.parked[k]; ok {
			take(k, p)
		}
	} else {
		for _, k := range slices.SortedFunc(maps.Keys(s.parked), compareKeys) {
			if k.typeURL == typeURL {
				take(k, s.parked[k])
			}
		}
	}
	s.changedLocked()
}

func (s *store) unsubscribe(typeURL string, names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	subs := s.wanted[typeURL]
	for _, name := range names {
		if _, ok := subs[name]; !ok {
			continue
		}
		delete(subs, name)
		if name == wildcard {
			delete(s.synced, typeURL)
			for k := range s.items {
				if k.typeURL == typeURL && !subs.covers(k.name) {
					delete(s.items, k)
				}
			}
		} else if !subs.covers(name) {
			delete(s.items, key{typeURL, name})
		}
	}
	kick(s.streamKick)
	s.markDirtyLocked()
}

func (s *store) get(typeURL, name string) (proto.Message, State) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.getLocked(typeURL, name)
}

func (s *store) getLocked(typeURL, name string) (proto.Message, State) {
	if it, ok := s.items[key{typeURL, name}]; ok {
		return it.msg, it.state
	}
	if s.synced[typeURL] {
		return nil, Absent
	}
	return nil, Unknown
}

func (s *store) list(typeURL string) map[string]proto.Message {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := map[string]proto.Message{}
	for k, it := range s.items {
		if k.typeURL == typeURL && it.state == Known {
			all[k.name] = it.msg
		}
	}
	return all
}

func (s *store) wait(ctx context.Context, typeURL, name string) (proto.Message, State, error) {
	for {
		s.mu.RLock()
		msg, state := s.getLocked(typeURL, name)
		changed := s.changed
		s.mu.RUnlock()
		if state != Unknown {
			return msg, state, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, Unknown, ctx.Err()
		}
	}
}

func (s *store) changedLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *store) markDirtyLocked() {
	s.dirty = true
	kick(s.saveKick)
}

func (s *store) watch(f func(Change) error) (cancel func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	w := &watcher{id: s.nextID, f: f}
	s.watchers = append(s.watchers, w)
	kick(s.applyKick)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watchers = slices.DeleteFunc(slices.Clone(s.watchers), func(o *watcher) bool { return o.id == w.id })
	}
}

// deliver tells watchers what became visible without a response: everything known to new watchers, and what the snapshot held
// for new subscriptions to the others. What they refuse here came from disk, so there is nobody to refuse it to.
func (s *store) deliver(log *slog.Logger) {
	s.mu.Lock()
	fresh := slices.Clone(s.watchers)
	fresh = slices.DeleteFunc(fresh, func(w *watcher) bool { return w.told })
	old := slices.DeleteFunc(slices.Clone(s.watchers), func(w *watcher) bool { return !w.told })
	for _, w := range fresh {
		w.told = true
	}
	announce := s.announce
	s.announce = nil
	var all []Change
	if len(fresh) > 0 {
		for _, k := range slices.SortedFunc(maps.Keys(s.items), compareKeys) {
			all = append(all, Change{TypeURL: k.typeURL, Name: k.name, Message: s.items[k].msg})
		}
	}
	var some []Change
	for _, k := range announce {
		if it, ok := s.items[k]; ok {
			some = append(some, Change{TypeURL: k.typeURL, Name: k.name, Message: it.msg})
		}
	}
	s.mu.Unlock()
	tellAll(log, fresh, all)
	tellAll(log, old, some)
}

func tellAll(log *slog.Logger, watchers []*watcher, changes []Change) {
	for i, ch := range changes {
		ch.More = i < len(changes)-1
		for _, w := range watchers {
			if err := w.f(ch); err != nil {
				log.Warn("resource of the snapshot refused", "type", ch.TypeURL, "name", ch.Name, "err", err)
			}
		}
	}
}

// update is one resource of a response: a new version, or a removal (msg nil).
type update struct {
	name    string
	version string
	msg     proto.Message
}

// apply puts the updates of one response in force, one after the other, and returns those that a watcher refused. last says
// that a wildcard subscription is now answered in full.
func (s *store) apply(typeURL string, updates []update, last bool) (refused map[string]error) {
	for i, u := range updates {
		if err := s.applyOne(typeURL, u, i < len(updates)-1); err != nil {
			if refused == nil {
				refused = map[string]error{}
			}
			refused[u.name] = err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, all := s.wanted[typeURL][wildcard]; all && last {
		s.synced[typeURL] = true
	}
	s.changedLocked()
	s.markDirtyLocked()
	return refused
}

func (s *store) applyOne(typeURL string, u update, more bool) error {
	k := key{typeURL, u.name}
	s.mu.Lock()
	subs := s.wanted[typeURL]
	_, byName := subs[u.name]
	prev, had := s.items[k]
	if !subs.covers(u.name) || had && u.msg != nil && prev.state == Known && prev.version == u.version ||
		u.msg == nil && (had && prev.state == Absent || !had && !byName) {
		s.mu.Unlock()
		return nil
	}
	switch {
	case u.msg != nil:
		s.items[k] = item{state: Known, version: u.version, msg: u.msg}
	case byName:
		s.items[k] = item{state: Absent}
	default:
		delete(s.items, k) // the wildcard's answer says that it is absent
	}
	watchers := s.watchers
	s.mu.Unlock()

	for j, w := range watchers {
		if !w.told {
			continue // hears of it with everything else
		}
		err := w.f(Change{TypeURL: typeURL, Name: u.name, Message: u.msg, More: more})
		if err == nil {
			continue
		}
		s.restore(k, prev, had)
		for _, told := range watchers[:j] {
			if told.told {
				_ = told.f(Change{TypeURL: typeURL, Name: u.name, Message: prev.msg, More: more}) // it accepted this one before
			}
		}
		return err
	}
	return nil
}

// restore puts back what was held before a refused update, unless the subscription has ended meanwhile.
func (s *store) restore(k key, prev item, had bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if had && s.wanted[k.typeURL].covers(k.name) {
		s.items[k] = prev
	} else {
		delete(s.items, k)
	}
}

// versions returns what is wanted of each type and the versions held, for the first requests of a stream.
func (s *store) versions() (map[string]subscriptions, map[string]map[string]string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	wanted := make(map[string]subscriptions, len(s.wanted))
	for t, subs := range s.wanted {
		wanted[t] = maps.Clone(subs)
	}
	held := map[string]map[string]string{}
	for k, it := range s.items {
		if it.state == Known {
			if held[k.typeURL] == nil {
				held[k.typeURL] = map[string]string{}
			}
			held[k.typeURL][k.name] = it.version
		}
	}
	return wanted, held
}

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.typeURL, b.typeURL), cmp.Compare(a.name, b.name))
}
