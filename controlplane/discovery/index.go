// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// resource is one published version, immutable and shared by all responses that carry it.
type resource struct{ wire *controlpb.Resource }

func newResource(typeURL, name string, msg proto.Message) (*resource, error) {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
	if err != nil {
		return nil, fmt.Errorf("discovery: %s %s: %w", typeURL, name, err)
	}
	if name == "" || name == Wildcard {
		return nil, fmt.Errorf("discovery: %s: name %q", typeURL, name)
	}
	sum := sha256.Sum256(body)
	return &resource{&controlpb.Resource{
		Name: name, Version: hex.EncodeToString(sum[:16]), Resource: &anypb.Any{TypeUrl: typeURL, Value: body},
	}}, nil
}

// typeIndex leads from the names of one type to their subscribers.
type typeIndex struct {
	url      string
	open     bool // answered
	revision uint64
	entries  map[string]*entry
	all      map[*stream]struct{} // wildcard subscribers
}

// entry is one name: published, subscribed, or both.
type entry struct {
	resource    *resource // nil: does not exist
	subscribers map[*stream]*subscription
}

// subscription is what one stream was sent of one resource.
type subscription struct {
	sent    string // version; "" none or told to be absent
	told    bool   // sent is what the subscriber was told
	acked   bool   // and it has acknowledged that
	hidden  bool   // not authorised: looks absent and is not counted
	refused *Nack  // of the version it names
}

func (e *entry) version() string {
	if e.resource == nil {
		return ""
	}
	return e.resource.wire.GetVersion()
}

func (s *Server) typeLocked(url string) *typeIndex {
	t := s.types[url]
	if t == nil {
		t = &typeIndex{url: url, open: s.open, entries: map[string]*entry{}, all: map[*stream]struct{}{}}
		s.types[url] = t
	}
	return t
}

func (s *Server) openTypeLocked(t *typeIndex) {
	if t.open {
		return
	}
	t.open = true
	for st := range s.streams {
		if st.types[t.url] != nil {
			st.kick()
		}
	}
}

// putLocked publishes r under name, or its absence, and marks it for those who subscribed to it.
func (s *Server) putLocked(t *typeIndex, name string, r *resource) {
	e := t.entries[name]
	if e == nil {
		if r == nil {
			return
		}
		e = &entry{subscribers: map[*stream]*subscription{}}
		t.entries[name] = e
		for st := range t.all {
			e.subscribers[st] = &subscription{}
		}
	}
	next := ""
	if r != nil {
		next = r.wire.GetVersion()
	}
	if e.version() == next {
		return
	}
	e.resource = r
	t.revision++
	for st := range e.subscribers {
		st.types[t.url].dirty[name] = struct{}{}
		st.kick()
	}
	s.dropUnusedLocked(t, name, e)
	s.ackedLocked()
}

// dropUnusedLocked forgets a name that neither exists nor interests anybody.
func (s *Server) dropUnusedLocked(t *typeIndex, name string, e *entry) {
	if e.resource == nil && len(e.subscribers) == 0 {
		delete(t.entries, name)
	}
}

// subscribeLocked adds st to the subscribers of name and returns its subscription. has says which version st holds already.
func (s *Server) subscribeLocked(t *typeIndex, st *stream, name, has string) *subscription {
	e := t.entries[name]
	if e == nil {
		e = &entry{subscribers: map[*stream]*subscription{}}
		t.entries[name] = e
	}
	sub := e.subscribers[st]
	if sub == nil {
		sub = &subscription{}
		e.subscribers[st] = sub
	}
	if has != "" { // it put that version in force in an earlier stream
		sub.sent, sub.told, sub.acked = has, true, true
	}
	return sub
}

// unsubscribeLocked removes st from the subscribers of name.
func (s *Server) unsubscribeLocked(t *typeIndex, st *stream, name string) {
	if e := t.entries[name]; e != nil {
		delete(e.subscribers, st)
		s.dropUnusedLocked(t, name, e)
	}
}

// removeLocked forgets everything about st.
func (s *Server) removeLocked(st *stream) {
	delete(s.streams, st)
	for url, ts := range st.types {
		t := s.typeLocked(url)
		for name := range ts.names {
			s.unsubscribeLocked(t, st, name)
		}
		if _, all := t.all[st]; all {
			delete(t.all, st)
			for name := range t.entries {
				s.unsubscribeLocked(t, st, name)
			}
		}
	}
	s.ackedLocked()
}
