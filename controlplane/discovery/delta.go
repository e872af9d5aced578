// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"maps"
	"slices"

	"google.golang.org/grpc"

	"github.com/strait-mesh/strait/controlplane/controlpb"
)

// morePart is the system version of a response that is not the last part of an answer. Others ignore that field.
const morePart = "more"

// DeltaAggregatedResources serves the incremental variant.
func (s *Server) DeltaAggregatedResources(
	gs grpc.BidiStreamingServer[controlpb.DeltaDiscoveryRequest, controlpb.DeltaDiscoveryResponse],
) error {
	return serve(s, true, gs, s.deltaRequest, s.deltaResponse)
}

func (s *Server) deltaRequest(st *stream, q *controlpb.DeltaDiscoveryRequest) error {
	if err := s.meet(st, q.GetNode()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ts, first, err := st.stateLocked(q.GetTypeUrl())
	if err != nil {
		return err
	}
	if err := s.checkNames(st.namesLocked()+len(q.GetInitialResourceVersions()), q.GetResourceNamesSubscribe()); err != nil {
		return err
	}
	t := s.typeLocked(q.GetTypeUrl())
	if q.GetResponseNonce() != "" {
		s.answeredLocked(t, st, ts, q.GetResponseNonce(), q.GetErrorDetail())
	}
	has := map[string]string(nil)
	subscribe := q.GetResourceNamesSubscribe()
	if first {
		has = q.GetInitialResourceVersions()
		if len(subscribe) == 0 && len(q.GetResourceNamesUnsubscribe()) == 0 {
			subscribe = []string{Wildcard} // the older way to say so
		}
	}
	for _, name := range subscribe {
		if name == Wildcard {
			s.subscribeAllLocked(t, st, ts, has)
			continue
		}
		sub := s.subscribeLocked(t, st, name, has[name])
		if !first || has[name] == "" {
			sub.told = false // asked for again: answered again
		}
		ts.names[name] = struct{}{}
		ts.dirty[name] = struct{}{}
	}
	for _, name := range q.GetResourceNamesUnsubscribe() {
		s.deltaUnsubscribeLocked(t, st, ts, name)
	}
	s.ackedLocked()
	return nil
}

func (s *Server) deltaUnsubscribeLocked(t *typeIndex, st *stream, ts *typeState, name string) {
	if name == Wildcard {
		s.unsubscribeAllLocked(t, st, ts)
		return
	}
	if _, ok := ts.names[name]; !ok {
		return
	}
	delete(ts.names, name)
	e := t.entries[name]
	if !ts.wildcard || e == nil {
		delete(ts.dirty, name)
		s.unsubscribeLocked(t, st, name)
		return
	}
	e.subscribers[st].told = false // still covered by the wildcard: said once more, as the protocol asks
	ts.dirty[name] = struct{}{}
}

// deltaResponse returns the next response due, or nil.
func (s *Server) deltaResponse(st *stream) *controlpb.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, url := range s.dueLocked(st) {
		if r := s.deltaTypeLocked(st, s.types[url], st.types[url]); r != nil {
			return r
		}
	}
	return nil
}

func (s *Server) deltaTypeLocked(st *stream, t *typeIndex, ts *typeState) *controlpb.DeltaDiscoveryResponse {
	r := &controlpb.DeltaDiscoveryResponse{TypeUrl: t.url}
	var items []sent
	size := 0
	for _, name := range slices.Sorted(maps.Keys(ts.dirty)) {
		if size >= s.cfg.MaxResponse {
			r.SystemVersionInfo = morePart
			break
		}
		delete(ts.dirty, name)
		e := t.entries[name]
		if e == nil || e.subscribers[st] == nil {
			continue
		}
		sub := e.subscribers[st]
		res := s.visibleLocked(t, st, name, e, sub)
		version := ""
		if res != nil {
			version = res.wire.GetVersion()
		}
		if sub.told && sub.sent == version {
			continue
		}
		_, byName := ts.names[name]
		if res == nil && sub.sent == "" && !byName {
			if e.resource == nil {
				s.unsubscribeLocked(t, st, name) // the wildcard's subscriber never had it, or knows that it is gone
			}
			continue
		}
		if res != nil {
			r.Resources = append(r.Resources, res.wire)
			size += len(res.wire.GetResource().GetValue())
		} else {
			r.RemovedResources = append(r.RemovedResources, name)
		}
		size += len(name)
		sub.sent, sub.told, sub.acked = version, true, false
		items = append(items, sent{name, version})
	}
	if len(items) == 0 && !ts.owed {
		return nil
	}
	if r.SystemVersionInfo == "" {
		ts.owed = false
	}
	r.Nonce = st.nextNonceLocked()
	ts.unanswered[r.Nonce] = items
	return r
}
