// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"maps"
	"slices"
	"strconv"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// StreamAggregatedResources serves the state-of-the-world variant: each response carries every resource of a type that the
// stream is subscribed to and that exists, so that what it leaves out does not exist.
func (s *Server) StreamAggregatedResources(
	gs grpc.BidiStreamingServer[controlpb.DiscoveryRequest, controlpb.DiscoveryResponse],
) error {
	return serve(s, false, gs, s.sotwRequest, s.sotwResponse)
}

func (s *Server) sotwRequest(st *stream, q *controlpb.DiscoveryRequest) error {
	if err := s.meet(st, q.GetNode()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ts, first, err := st.stateLocked(q.GetTypeUrl())
	if err != nil {
		return err
	}
	if err := s.checkNames(st.namesLocked()-len(ts.names), q.GetResourceNames()); err != nil {
		return err
	}
	if !first && q.GetResponseNonce() != ts.last {
		return nil // answers an older response; what it asks for will be asked again
	}
	t := s.typeLocked(q.GetTypeUrl())
	if q.GetResponseNonce() != "" {
		for nonce := range ts.unanswered { // the newest answer stands for all before it
			if nonce != ts.last {
				delete(ts.unanswered, nonce)
			}
		}
		s.answeredLocked(t, st, ts, q.GetResponseNonce(), q.GetErrorDetail())
	}
	s.sotwNamesLocked(t, st, ts, q.GetResourceNames(), first)
	ts.owed = ts.owed || first
	s.ackedLocked()
	return nil
}

// sotwNamesLocked makes names, which replace all that was asked for before, the subscription.
func (s *Server) sotwNamesLocked(t *typeIndex, st *stream, ts *typeState, names []string, first bool) {
	next := make(map[string]struct{}, len(names))
	for _, name := range names {
		next[name] = struct{}{}
	}
	_, all := next[Wildcard]
	delete(next, Wildcard)
	if len(names) == 0 && (first || ts.legacy) {
		all, ts.legacy = true, true // as long as no name was ever given
	} else {
		ts.legacy = false
	}
	switch {
	case all && !ts.wildcard && !ts.refusedAll:
		s.subscribeAllLocked(t, st, ts, nil)
	case !all && ts.wildcard:
		s.unsubscribeAllLocked(t, st, ts)
	}
	for name := range ts.names {
		if _, keep := next[name]; !keep && !ts.wildcard {
			delete(ts.dirty, name)
			s.unsubscribeLocked(t, st, name)
		}
	}
	for name := range next {
		if _, had := ts.names[name]; !had {
			s.subscribeLocked(t, st, name, "")
			ts.dirty[name] = struct{}{}
			ts.owed = true
		}
	}
	ts.names = next
}

// sotwResponse returns the next response due, or nil.
func (s *Server) sotwResponse(st *stream) *controlpb.DiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, url := range s.dueLocked(st) {
		if r := s.sotwTypeLocked(st, s.types[url], st.types[url]); r != nil {
			return r
		}
	}
	return nil
}

func (s *Server) sotwTypeLocked(st *stream, t *typeIndex, ts *typeState) *controlpb.DiscoveryResponse {
	if !ts.owed && !s.differsLocked(st, t, ts) {
		clear(ts.dirty)
		return nil
	}
	ts.owed = false
	clear(ts.dirty)
	names := slices.Collect(maps.Keys(ts.names))
	if ts.wildcard {
		names = slices.Collect(maps.Keys(t.entries))
	}
	slices.Sort(names)
	r := &controlpb.DiscoveryResponse{TypeUrl: t.url, VersionInfo: strconv.FormatUint(t.revision, 10), Nonce: st.nextNonceLocked()}
	var items []sent
	for _, name := range names {
		e := t.entries[name]
		if e == nil || e.subscribers[st] == nil {
			continue
		}
		sub := e.subscribers[st]
		version := ""
		if res := s.visibleLocked(t, st, name, e, sub); res != nil {
			version = res.wire.GetVersion()
			r.Resources = append(r.Resources, res.wire.GetResource())
		}
		if !sub.told || sub.sent != version {
			sub.acked = false
		}
		sub.sent, sub.told = version, true
		items = append(items, sent{name, version})
	}
	ts.unanswered[r.Nonce], ts.last = items, r.Nonce
	return r
}

// differsLocked reports whether something dirty is not what the stream was told.
func (s *Server) differsLocked(st *stream, t *typeIndex, ts *typeState) bool {
	for name := range ts.dirty {
		e := t.entries[name]
		if e == nil || e.subscribers[st] == nil {
			continue
		}
		sub := e.subscribers[st]
		version := ""
		if res := s.visibleLocked(t, st, name, e, sub); res != nil {
			version = res.wire.GetVersion()
		}
		if !sub.told && version != "" || sub.told && sub.sent != version {
			return true
		}
	}
	return false
}
