// SPDX-License-Identifier: Apache-2.0

package discovery

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const (
	maxUnanswered = 8   // responses of a type in flight to one stream; further changes wait and coalesce
	maxTypes      = 64  // types of one stream
	maxName       = 512 // bytes of a name or type URL
	maxMessage    = 512 // bytes kept of a NACK's text
)

// stream is one subscriber. Its goroutine alone receives from and sends to it; what follows peer is guarded by Server.mu.
type stream struct {
	server *Server
	ctx    context.Context
	peer   spiffeid.ID
	since  time.Time
	delta  bool
	wake   chan struct{}

	node  string
	known bool // the first request was seen
	types map[string]*typeState
	nonce uint64
}

// typeState is what one stream wants of one type and what it was sent.
type typeState struct {
	names      map[string]struct{} // by name, without Wildcard
	wildcard   bool
	refusedAll bool                // wildcard was asked for and refused
	legacy     bool                // wildcard by an empty list (state of the world)
	dirty      map[string]struct{} // to be looked at
	owed       bool                // an answer is owed even if it is empty
	unanswered map[string][]sent   // by nonce
	last       string              // newest nonce (state of the world)
}

// sent is one resource of one response. An empty version is its absence.
type sent struct{ name, version string }

func (st *stream) kick() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// serve runs one stream to its end: handle takes a request, collect returns the next response or nil.
func serve[Q, R any](s *Server, delta bool, gs grpc.BidiStreamingServer[Q, R],
	handle func(*stream, *Q) error, collect func(*stream) *R) error {
	ctx := gs.Context()
	peer, err := s.cfg.Peer(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	st := &stream{
		server: s, ctx: ctx, peer: peer, since: s.cfg.Now(), delta: delta, wake: make(chan struct{}, 1), types: map[string]*typeState{},
	}
	s.mu.Lock()
	s.streams[st] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.removeLocked(st)
	}()

	requests, failed := make(chan *Q), make(chan error, 1)
	go receive(gs, requests, failed) // ends with the stream, which ends when this function returns
	for {
		if r := collect(st); r != nil {
			if err := gs.Send(r); err != nil {
				return err
			}
			st.kick() // there may be more
		}
		select {
		case q := <-requests:
			if err := handle(st, q); err != nil {
				return err
			}
		case <-st.wake:
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func receive[Q, R any](gs grpc.BidiStreamingServer[Q, R], requests chan<- *Q, failed chan<- error) {
	for {
		q, err := gs.Recv()
		if err != nil {
			failed <- err
			return
		}
		select {
		case requests <- q:
		case <-gs.Context().Done():
			return
		}
	}
}

// meet judges the first request of a stream.
func (s *Server) meet(st *stream, node *controlpb.Node) error {
	if st.known {
		return nil
	}
	if len(node.GetId()) > maxName {
		return status.Error(codes.InvalidArgument, "node id is too long")
	}
	if s.cfg.VerifyNode != nil {
		if err := s.cfg.VerifyNode(st.ctx, st.peer, node); err != nil {
			s.log.Warn("discovery refused", "peer", st.peer, "node", node.GetId(), "err", err)
			return status.Error(codes.PermissionDenied, err.Error())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.node, st.known = node.GetId(), true
	s.log.Debug("discovery opened", "peer", st.peer, "node", st.node)
	return nil
}

// stateLocked returns what st wants of a type, and whether this is the first request for it.
func (st *stream) stateLocked(url string) (ts *typeState, first bool, err error) {
	if ts = st.types[url]; ts != nil {
		return ts, false, nil
	}
	if url == "" || len(url) > maxName {
		return nil, false, status.Error(codes.InvalidArgument, "request without a type URL, or with one that is too long")
	}
	if len(st.types) >= maxTypes {
		return nil, false, status.Errorf(codes.ResourceExhausted, "more than %d types on one stream", maxTypes)
	}
	ts = &typeState{names: map[string]struct{}{}, dirty: map[string]struct{}{}, unanswered: map[string][]sent{}}
	st.types[url] = ts
	return ts, true, nil
}

// checkNames bounds what a stream may ask for.
func (s *Server) checkNames(have int, names []string) error {
	if have+len(names) > s.cfg.MaxNames {
		return status.Errorf(codes.ResourceExhausted, "more than %d names on one stream", s.cfg.MaxNames)
	}
	for _, n := range names {
		if n == "" || len(n) > maxName {
			return status.Error(codes.InvalidArgument, "an empty name, or one that is too long")
		}
	}
	return nil
}

func (st *stream) namesLocked() int {
	n := 0
	for _, ts := range st.types {
		n += len(ts.names)
	}
	return n
}

// subscribeAllLocked makes st a wildcard subscriber. has are the versions that it holds.
func (s *Server) subscribeAllLocked(t *typeIndex, st *stream, ts *typeState, has map[string]string) {
	if err := s.cfg.Authorize(st.ctx, st.peer, st.node, t.url, Wildcard); err != nil {
		s.refuse(st, t.url, Wildcard, err)
		ts.refusedAll, ts.owed = true, true // an empty answer
		return
	}
	ts.wildcard, ts.refusedAll, ts.owed = true, false, true
	t.all[st] = struct{}{}
	for name := range t.entries {
		s.subscribeLocked(t, st, name, has[name])
		ts.dirty[name] = struct{}{}
	}
	for name, version := range has { // held, and perhaps gone meanwhile
		s.subscribeLocked(t, st, name, version)
		ts.dirty[name] = struct{}{}
	}
}

// unsubscribeAllLocked ends a wildcard subscription; names subscribed one by one stay.
func (s *Server) unsubscribeAllLocked(t *typeIndex, st *stream, ts *typeState) {
	ts.wildcard, ts.legacy = false, false
	delete(t.all, st)
	for name := range t.entries {
		if _, keep := ts.names[name]; !keep {
			s.unsubscribeLocked(t, st, name)
			delete(ts.dirty, name)
		}
	}
}

func (s *Server) refuse(st *stream, url, name string, err error) {
	s.log.Warn("subscription refused", "peer", st.peer, "node", st.node, "type", url, "name", name, "err", err)
}

// visibleLocked returns what st may see of an entry: its resource, or nil for "does not exist".
func (s *Server) visibleLocked(t *typeIndex, st *stream, name string, e *entry, sub *subscription) *resource {
	if e.resource == nil {
		return nil // what does not exist is nobody's secret
	}
	err := s.cfg.Authorize(st.ctx, st.peer, st.node, t.url, name)
	if err != nil && !sub.hidden {
		s.refuse(st, t.url, name, err)
	}
	if sub.hidden = err != nil; sub.hidden {
		return nil
	}
	return e.resource
}

func (st *stream) nextNonceLocked() string {
	st.nonce++
	return strconv.FormatUint(st.nonce, 36)
}

// answeredLocked notes the answer to a response: err nil is an ACK.
func (s *Server) answeredLocked(t *typeIndex, st *stream, ts *typeState, nonce string, err *controlpb.RpcStatus) {
	items, ok := ts.unanswered[nonce]
	if !ok {
		return
	}
	delete(ts.unanswered, nonce)
	only := rejectedNames(err)
	for _, it := range items {
		e := t.entries[it.name]
		if e == nil || e.subscribers[st] == nil {
			continue
		}
		sub := e.subscribers[st]
		if sub.sent != it.version {
			continue // a newer one is under way
		}
		_, named := only[it.name]
		if err != nil && (only == nil || named) {
			sub.refused = &Nack{Peer: st.peer, Node: st.node, Version: it.version, Message: bounded(err.GetMessage()), At: s.cfg.Now()}
			continue
		}
		sub.acked, sub.refused = true, nil
		if _, byName := ts.names[it.name]; it.version == "" && !byName && e.resource == nil {
			s.unsubscribeLocked(t, st, it.name) // a wildcard subscriber knows that it is gone
		}
	}
	if err != nil {
		s.log.Warn("response refused", "peer", st.peer, "node", st.node, "type", t.url, "err", bounded(err.GetMessage()))
	}
	s.ackedLocked()
	st.kick()
}

// rejectedNames returns the names that a NACK means; nil means all of the response.
func rejectedNames(err *controlpb.RpcStatus) map[string]struct{} {
	for _, d := range err.GetDetails() {
		r := &controlpb.Rejected{}
		if d.MessageIs(r) && d.UnmarshalTo(r) == nil && len(r.GetNames()) > 0 {
			names := make(map[string]struct{}, len(r.GetNames()))
			for _, n := range r.GetNames() {
				names[n] = struct{}{}
			}
			return names
		}
	}
	return nil
}

func bounded(s string) string { return s[:min(len(s), maxMessage)] }

// dueLocked returns the types that may be answered now and have something to say, in order.
func (s *Server) dueLocked(st *stream) []string {
	var due []string
	for _, url := range slices.Sorted(maps.Keys(st.types)) {
		ts := st.types[url]
		if (len(ts.dirty) > 0 || ts.owed) && len(ts.unanswered) < maxUnanswered && s.typeLocked(url).open {
			due = append(due, url)
		}
	}
	return due
}
