// SPDX-License-Identifier: Apache-2.0

package traces

import (
	"cmp"
	"container/list"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"sync"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/span"
)

// StoreConfig bounds a Store.
type StoreConfig struct {
	MaxSpans int // 60,000
	MaxBytes int // of encoded spans: 32 MiB
}

// Bounds of one trace, and of the sample that says what slow is.
const (
	maxTraceSpans = 2000
	maxTraceBytes = 1 << 20
	traceOverhead = 256 // bytes that a trace costs beside its spans
	spanOverhead  = 48
	window        = 1024
	slowQuantile  = 0.99
	minWindow     = 100
)

// class says why a trace is kept, the most interesting last.
type class int

const (
	plain class = iota
	slow
	failover
	failed
	classes
)

// shares are the parts of the bound that each class may fill while others need theirs.
var shares = [classes]float64{plain: 0.35, slow: 0.10, failover: 0.25, failed: 0.30}

type traceID [16]byte

type stored struct {
	spanID uint64
	body   []byte // controlpb.Span: bytes cost a fifth of the unmarshalled message
}

type trace struct {
	id       traceID
	class    class
	element  *list.Element
	spans    []stored
	bytes    int
	arrived  uint64 // of the newest span
	duration time.Duration
	failed   bool
	failover bool
}

// Store is the ring.
type Store struct {
	cfg StoreConfig

	mu       sync.Mutex
	traces   map[traceID]*trace
	lists    [classes]*list.List // oldest first
	classB   [classes]int
	spans    int
	bytes    int
	arrivals uint64
	sample   []time.Duration // of calls as they entered the mesh here; a ring of window
	sampleAt int
	slowFrom time.Duration // 0: not known yet
}

// NewStore returns an empty Store.
func NewStore(cfg StoreConfig) *Store {
	if cfg.MaxSpans <= 0 {
		cfg.MaxSpans = 60_000
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 32 << 20
	}
	s := &Store{cfg: cfg, traces: map[traceID]*trace{}}
	for c := range s.lists {
		s.lists[c] = list.New()
	}
	return s
}

// Add takes spans in and returns how many were not kept: malformed, or too many of one trace. One that is there already counts
// as kept.
func (s *Store) Add(all []*tracepb.ResourceSpans) (dropped int) {
	for _, rs := range all {
		resource := texts(rs.GetResource().GetAttributes())
		for _, ss := range rs.GetScopeSpans() {
			for _, sp := range ss.GetSpans() {
				if !s.add(resource, sp) {
					dropped++
				}
			}
		}
	}
	return dropped
}

func (s *Store) add(resource map[string]string, sp *tracepb.Span) bool {
	if len(sp.GetTraceId()) != 16 || len(sp.GetSpanId()) != 8 || sp.GetEndTimeUnixNano() < sp.GetStartTimeUnixNano() {
		return false
	}
	kept := convert(resource, sp)
	body, err := proto.Marshal(kept)
	if err != nil {
		return false
	}
	id, spanID := traceID(sp.GetTraceId()), binary.BigEndian.Uint64(sp.GetSpanId())
	size := len(body) + spanOverhead

	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.traces[id]
	if t == nil {
		t = &trace{id: id, bytes: traceOverhead}
		s.traces[id] = t
		t.element = s.lists[plain].PushBack(t)
		s.bytes += t.bytes
		s.classB[plain] += t.bytes
	}
	if slices.ContainsFunc(t.spans, func(o stored) bool { return o.spanID == spanID }) {
		return true
	}
	if len(t.spans) >= maxTraceSpans || t.bytes+size > maxTraceBytes {
		return false
	}
	t.spans = append(t.spans, stored{spanID, body})
	t.bytes += size
	s.spans++
	s.bytes += size
	s.classB[t.class] += size
	s.arrivals++
	t.arrived = s.arrivals
	s.judgeLocked(t, kept)
	s.evictLocked()
	return true
}

// judgeLocked finds the class of a trace anew after one more span.
func (s *Store) judgeLocked(t *trace, sp *controlpb.Span) {
	d := time.Duration(sp.GetEndUnixNano() - sp.GetStartUnixNano())
	t.duration = max(t.duration, d)
	t.failed = t.failed || isFailed(sp)
	t.failover = t.failover || isFailover(sp)
	entry := sp.GetParentId() == "" || sp.GetKind() == "server" && sp.GetAttributes()[span.HopKind] == span.SidecarOut
	if entry {
		s.sampleLocked(d)
	}
	c := plain
	switch {
	case t.failed:
		c = failed
	case t.failover:
		c = failover
	case t.class == slow || s.slowFrom > 0 && t.duration >= s.slowFrom:
		c = slow
	}
	if c == t.class {
		return
	}
	s.lists[t.class].Remove(t.element)
	s.classB[t.class] -= t.bytes
	t.class = c
	t.element = s.lists[c].PushBack(t)
	s.classB[c] += t.bytes
}

func isFailed(sp *controlpb.Span) bool {
	return sp.GetStatus() == "error" || strings.HasPrefix(sp.GetAttributes()[span.HTTPStatus], "5") || sp.GetAttributes()[span.ErrorType] != ""
}

// isFailover reports whether a call went elsewhere than it would on a good day.
func isFailover(sp *controlpb.Span) bool {
	switch federation.Reason(sp.GetAttributes()[span.DecisionReason]) {
	case "", federation.LocalOK, federation.PriorityOK, federation.RouteSplit, federation.HeaderOverride, federation.SessionSticky:
	default:
		return true
	}
	return slices.ContainsFunc(sp.GetEvents(), func(e *controlpb.SpanEvent) bool { return e.GetName() == span.EventFailover })
}

// sampleLocked keeps the durations of the last calls, and from them what is slow.
func (s *Store) sampleLocked(d time.Duration) {
	if len(s.sample) < window {
		s.sample = append(s.sample, d)
	} else {
		s.sample[s.sampleAt] = d
	}
	s.sampleAt = (s.sampleAt + 1) % window
	if len(s.sample) >= minWindow && s.sampleAt%(window/16) == 0 || len(s.sample) == minWindow {
		sorted := slices.Sorted(slices.Values(s.sample))
		s.slowFrom = max(sorted[int(slowQuantile*float64(len(sorted)-1))], 1)
	}
}

// evictLocked drops traces until the bounds hold: from the class that is most over its share, the oldest; of the slow ones, the
// fastest.
func (s *Store) evictLocked() {
	for s.bytes > s.cfg.MaxBytes || s.spans > s.cfg.MaxSpans {
		worst, most := plain, -1.0
		for c := range classes {
			if over := float64(s.classB[c]) / shares[c]; s.lists[c].Len() > 0 && over > most {
				worst, most = c, over
			}
		}
		victim := s.lists[worst].Front()
		if worst == slow {
			for e := victim.Next(); e != nil; e = e.Next() {
				if e.Value.(*trace).duration < victim.Value.(*trace).duration {
					victim = e
				}
			}
		}
		t := victim.Value.(*trace)
		s.lists[worst].Remove(victim)
		delete(s.traces, t.id)
		s.classB[worst] -= t.bytes
		s.bytes -= t.bytes
		s.spans -= len(t.spans)
	}
}

// Query says which traces are asked for.
type Query struct {
	ID     string // hexadecimal, or the beginning of one; empty: any
	Filter string // "slow", "errors", "failover"; empty: any
	Limit  int    // 20
}

// Query returns traces, the newest first; with filter "slow" the slowest first.
func (s *Store) Query(q Query) []*controlpb.Trace {
	if q.Limit <= 0 {
		q.Limit = 20
	}
	id := strings.ToLower(q.ID)
	s.mu.Lock()
	var found []*trace
	for tid, t := range s.traces {
		if id != "" && !strings.HasPrefix(hex.EncodeToString(tid[:]), id) {
			continue
		}
		if q.Filter == "errors" && !t.failed || q.Filter == "failover" && !t.failover {
			continue
		}
		found = append(found, t)
	}
	slices.SortFunc(found, func(a, b *trace) int {
		if q.Filter == "slow" {
			return cmp.Or(cmp.Compare(b.duration, a.duration), cmp.Compare(b.arrived, a.arrived))
		}
		return cmp.Compare(b.arrived, a.arrived)
	})
	found = found[:min(len(found), q.Limit)]
	ids, bodies := make([]traceID, len(found)), make([][]stored, len(found))
	for i, t := range found {
		ids[i], bodies[i] = t.id, slices.Clone(t.spans)
	}
	s.mu.Unlock()

	all := make([]*controlpb.Trace, 0, len(ids))
	for i, tid := range ids {
		all = append(all, &controlpb.Trace{Id: hex.EncodeToString(tid[:]), Spans: decode(bodies[i])})
	}
	return all
}

// Stats says how full the store is.
type Stats struct{ Traces, Spans, Bytes int }

// Stats returns the present figures.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{len(s.traces), s.spans, s.bytes}
}

// withheld are attributes that stay in the cluster: where workloads are, and how others are doing.
var withheld = []string{
	span.ClientAddress, span.NetworkPeer, span.ServerAddress, span.ServerPort, span.DecisionCandidates, span.RetryBudgetLeft,
	span.ServiceInstance, Reporter,
}

// SpansFor returns the spans of one trace that a peer may see: of calls that it was an end of. id must be a whole trace id.
func (s *Store) SpansFor(id string, asking federation.ClusterName) []*controlpb.Span {
	raw, err := hex.DecodeString(id)
	if err != nil || len(raw) != 16 || asking.IsZero() {
		return nil
	}
	s.mu.Lock()
	var bodies []stored
	if t := s.traces[traceID(raw)]; t != nil {
		bodies = slices.Clone(t.spans)
	}
	s.mu.Unlock()
	var all []*controlpb.Span
	for _, sp := range decode(bodies) {
		a := sp.GetAttributes()
		if a[span.SrcCluster] != string(asking) && a[span.DstCluster] != string(asking) {
			continue
		}
		for _, key := range withheld {
			delete(a, key)
		}
		all = append(all, sp)
	}
	return all
}

// decode returns spans sorted by start.
func decode(bodies []stored) []*controlpb.Span {
	all := make([]*controlpb.Span, 0, len(bodies))
	for _, b := range bodies {
		sp := &controlpb.Span{}
		if proto.Unmarshal(b.body, sp) == nil { // we have marshalled it
			all = append(all, sp)
		}
	}
	slices.SortFunc(all, func(a, b *controlpb.Span) int {
		return cmp.Or(cmp.Compare(a.GetStartUnixNano(), b.GetStartUnixNano()), cmp.Compare(a.GetSpanId(), b.GetSpanId()))
	})
	return all
}
