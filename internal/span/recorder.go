// SPDX-License-Identifier: Apache-2.0

package span

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// Exporter delivers spans; an error makes the recorder try the same batch again.
type Exporter func(ctx context.Context, data *tracepb.TracesData) error

// Config configures a Recorder. The zero value records everything and exports nothing.
type Config struct {
	Resource []Attr   // of every span
	Export   Exporter // nil keeps spans in the ring only
	// Ratio of new traces that are recorded, 0 to 1; 0 means all (1.0), a negative one none. A parent's choice wins.
	Ratio float64
	// Ring is how many ended spans are held, 4096 by default; a span costs about a kilobyte.
	Ring int
	// Batch is how many are sent at once, 512 by default, and Every how long an incomplete batch waits: 1 s by default.
	// Shorter makes `strait trace` fresher for one more message a period.
	Batch int
	Every time.Duration
	// OnDrop is called with the number of spans lost, from any goroutine; it must not block.
	OnDrop func(n int)
	Now    func() time.Time
	Logger *slog.Logger
}

const exportTimeout = 5 * time.Second

// Recorder keeps ended spans until they are exported.
type Recorder struct {
	cfg      Config
	resource *resourcepb.Resource
	dropped  atomic.Uint64
	full     chan struct{} // a batch is complete

	mu    sync.Mutex
	ring  []*tracepb.Span
	first int // index of the oldest
	count int
}

// NewRecorder returns a recorder; Run exports.
func NewRecorder(cfg Config) *Recorder {
	if cfg.Ratio == 0 {
		cfg.Ratio = 1
	}
	if cfg.Ring <= 0 {
		cfg.Ring = 4096
	}
	if cfg.Batch <= 0 {
		cfg.Batch = 512
	}
	cfg.Batch = min(cfg.Batch, cfg.Ring)
	if cfg.Every <= 0 {
		cfg.Every = time.Second
	}
	if cfg.OnDrop == nil {
		cfg.OnDrop = func(int) {}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Recorder{cfg: cfg, resource: &resourcepb.Resource{}, full: make(chan struct{}, 1)}
	var attrs []*commonpb.KeyValue
	for _, at := range cfg.Resource {
		attrs = set(attrs, at)
	}
	r.resource.Attributes = attrs
	return r
}

func (r *Recorder) now() time.Time {
	if r == nil {
		return time.Now()
	}
	return r.cfg.Now()
}

// Start begins a span below parent, or a new trace if parent is invalid. Without a parent the configured ratio decides
// whether it is recorded, with one its flag does.
func (r *Recorder) Start(parent Context, name string, kind Kind) *Active {
	return r.StartAt(parent, name, kind, r.now())
}

// StartAt is Start with the time given.
func (r *Recorder) StartAt(parent Context, name string, kind Kind, at time.Time) *Active {
	c := parent
	c.Span = newID()
	if !parent.IsValid() {
		c.Trace = newTraceID()
		c.Sampled = r != nil && c.Trace.below(r.cfg.Ratio)
	}
	a := &Active{context: c}
	if r == nil || !c.Sampled {
		return a
	}
	a.recorder = r
	a.span = &tracepb.Span{
		TraceId: c.Trace[:], SpanId: c.Span[:], TraceState: c.state,
		Name: clean(name), Kind: tracepb.Span_SpanKind(kind), Flags: flagSampled, StartTimeUnixNano: uint64(at.UnixNano()),
	}
	if parent.IsValid() {
		a.span.ParentSpanId = parent.Span[:]
	}
	return a
}

// Dropped is how many spans were lost.
func (r *Recorder) Dropped() uint64 {
	if r == nil {
		return 0
	}
	return r.dropped.Load()
}

func (r *Recorder) drop(n int) {
	if n > 0 {
		r.dropped.Add(uint64(n))
		r.cfg.OnDrop(n)
	}
}

// add never blocks: when the ring is full the oldest span is lost.
func (r *Recorder) add(s *tracepb.Span) {
	lost := 0
	r.mu.Lock()
	if r.ring == nil {
		r.ring = make([]*tracepb.Span, r.cfg.Ring)
	}
	if r.count == len(r.ring) {
		r.first, r.count, lost = (r.first+1)%len(r.ring), r.count-1, 1
	}
	r.ring[(r.first+r.count)%len(r.ring)] = s
	r.count++
	ready := r.count >= r.cfg.Batch
	r.mu.Unlock()
	r.drop(lost)
	if ready {
		select {
		case r.full <- struct{}{}:
		default:
		}
	}
}

func (r *Recorder) take(n int) []*tracepb.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	n = min(n, r.count)
	if n == 0 {
		return nil
	}
	batch := make([]*tracepb.Span, n)
	for i := range batch {
		batch[i] = r.ring[r.first]
		r.ring[r.first] = nil
		r.first = (r.first + 1) % len(r.ring)
	}
	r.count -= n
	return batch
}

// Take removes up to n spans, oldest first, as the message that an exporter would get; nil when there are none.
func (r *Recorder) Take(n int) *tracepb.TracesData {
	if r == nil {
		return nil
	}
	return r.message(r.take(n))
}

func (r *Recorder) message(batch []*tracepb.Span) *tracepb.TracesData {
	if len(batch) == 0 {
		return nil
	}
	return &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{
		Resource:   r.resource,
		ScopeSpans: []*tracepb.ScopeSpans{{Scope: &commonpb.InstrumentationScope{Name: "strait"}, Spans: batch}},
	}}}
}

// Run exports until ctx ends, then tries once to deliver what is left. While an export fails the ring keeps filling; a
// batch that failed five times is dropped, so that one that is refused for its content does not stop the others.
func (r *Recorder) Run(ctx context.Context) error {
	if r == nil || r.cfg.Export == nil {
		<-ctx.Done()
		return nil
	}
	timer := time.NewTicker(r.cfg.Every)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-r.full:
			r.flush(ctx, r.cfg.Batch)
		case <-timer.C:
			r.flush(ctx, 1)
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), exportTimeout)
	defer cancel()
	for batch := r.take(r.cfg.Batch); batch != nil; batch = r.take(r.cfg.Batch) {
		if err := r.cfg.Export(last, r.message(batch)); err != nil {
			r.drop(len(batch))
			r.cfg.Logger.Debug("last spans not delivered", "error", err)
			return nil
		}
	}
	return nil
}

// flush exports batches while at least least spans wait.
func (r *Recorder) flush(ctx context.Context, least int) {
	for ctx.Err() == nil {
		r.mu.Lock()
		waiting := r.count
		r.mu.Unlock()
		if waiting < least || waiting == 0 {
			return
		}
		r.export(ctx, r.take(r.cfg.Batch))
	}
}

func (r *Recorder) export(ctx context.Context, batch []*tracepb.Span) {
	delay := r.cfg.Every
	for range 5 {
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), exportTimeout)
		err := r.cfg.Export(attempt, r.message(batch))
		cancel()
		if err == nil {
			return
		}
		r.cfg.Logger.Debug("spans not delivered", "error", err)
		select {
		case <-ctx.Done():
			r.drop(len(batch))
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, 30*time.Second)
	}
	r.drop(len(batch))
}

// clean cuts text and makes it valid UTF-8, which protobuf requires: names and attributes may come from a peer.
func clean(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "�")
}
