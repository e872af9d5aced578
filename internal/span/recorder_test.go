// SPDX-License-Identifier: Apache-2.0

package span_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/internal/span"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// collector is an exporter that can be made to fail or to hang.
type collector struct {
	mu    sync.Mutex
	fail  int // this many next calls
	spans []*tracepb.Span
	calls int
	hang  chan struct{}
}

func (c *collector) export(ctx context.Context, data *tracepb.TracesData) error {
	c.mu.Lock()
	hang := c.hang
	c.calls++
	c.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail > 0 {
		c.fail--
		return errors.New("not now")
	}
	if _, err := proto.Marshal(data); err != nil {
		return err
	}
	c.spans = append(c.spans, data.ResourceSpans[0].ScopeSpans[0].Spans...)
	return nil
}

func (c *collector) names() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []string
	for _, s := range c.spans {
		names = append(names, s.Name)
	}
	return strings.Join(names, " ")
}

func record(r *span.Recorder, names ...string) {
	for _, name := range names {
		r.Start(span.Context{}, name, span.Internal).End()
	}
}

// run starts r and returns what stops it.
func run(r *span.Recorder) func() {
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() { r.Run(ctx) })
	return func() {
		cancel()
		wait.Wait()
	}
}

func TestRecorderBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &collector{}
		r := span.NewRecorder(span.Config{Export: c.export, Batch: 3, Every: time.Second})
		stop := run(r)
		record(r, "a", "b")
		synctest.Wait()
		if c.names() != "" {
			t.Errorf("an incomplete batch went at once: %q", c.names())
		}
		record(r, "c")
		synctest.Wait()
		if c.names() != "a b c" || c.calls != 1 {
			t.Errorf("a complete batch: %q in %d calls", c.names(), c.calls)
		}
		record(r, "d")
		time.Sleep(time.Second)
		synctest.Wait()
		if c.names() != "a b c d" {
			t.Errorf("after a period: %q", c.names())
		}
		record(r, "e")
		stop()
		if c.names() != "a b c d e" || r.Dropped() != 0 {
			t.Errorf("after the end: %q, %d dropped", c.names(), r.Dropped())
		}
	})
}

func TestRecorderRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &collector{fail: 3}
		r := span.NewRecorder(span.Config{Export: c.export, Batch: 1, Every: time.Second})
		stop := run(r)
		record(r, "a", "b")
		time.Sleep(time.Minute)
		if c.names() != "a b" || c.calls != 5 {
			t.Errorf("%q in %d calls", c.names(), c.calls)
		}
		c.mu.Lock()
		c.fail = 5
		c.mu.Unlock()
		record(r, "poison", "next")
		time.Sleep(5 * time.Minute)
		stop()
		if c.names() != "a b next" || r.Dropped() != 1 {
			t.Errorf("%q, %d dropped: a batch that is always refused must not stop the others", c.names(), r.Dropped())
		}
	})
}

// TestRecorderNeverBlocks: while the exporter hangs, ending spans costs no waiting and the oldest are lost and counted.
func TestRecorderNeverBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &collector{hang: make(chan struct{})}
		lost := 0
		r := span.NewRecorder(span.Config{Export: c.export, Ring: 8, Batch: 2, OnDrop: func(n int) { lost += n }})
		stop := run(r)
		start := time.Now()
		for i := range 100 {
			record(r, fmt.Sprint(i))
			synctest.Wait()
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("recording waited %v", took)
		}
		if r.Dropped() != 90 || lost != 90 {
			t.Errorf("%d dropped, %d reported, want 90: 2 on the way, 8 in the ring", r.Dropped(), lost)
		}
		close(c.hang)
		stop()
		if c.names() != "0 1 92 93 94 95 96 97 98 99" {
			t.Errorf("delivered %q", c.names())
		}
	})
}

func TestActive(t *testing.T) {
	now := time.Unix(100, 0)
	r := span.NewRecorder(span.Config{Resource: []span.Attr{span.String(span.Cluster, "us-east"), span.String("empty", "")}, Now: func() time.Time { return now }})
	root := r.Start(span.Context{}, "GET checkout", span.Server)
	root.SetHop(1, "us-east")
	root.SetRetries(2)
	child := r.Start(root.Context(), "bad \xff name", span.Client)
	if c := child.Context(); c.Trace != root.Context().Trace || c.Span == root.Context().Span || c.Hop != 1 {
		t.Errorf("child's context %+v", c)
	}
	now = time.Unix(101, 5)
	child.Set(span.String("k", "v"), span.String("k", "w"), span.String("none", ""), span.Int("n", 3), span.Strings("list", []string{"a", "b"}), span.Float("f", 1.5), span.Bool("b", true),
		span.Millis("ms", 1500*time.Microsecond), span.String("long", strings.Repeat("x", 5000)))
	for i := range 100 {
		child.Set(span.Int(fmt.Sprint("many", i), i))
		child.Event(span.EventRetry, span.String("cause", "reset"))
	}
	child.Fail("broken", "it broke")
	child.End()
	child.End()
	child.Set(span.String("late", "x"))
	root.EndAt(time.Unix(1, 0))
	data := r.Take(10)
	spans := data.ResourceSpans[0].ScopeSpans[0].Spans
	if len(spans) != 2 || len(data.ResourceSpans[0].Resource.Attributes) != 1 {
		t.Fatalf("%v", data)
	}
	s := spans[0]
	if string(s.ParentSpanId) != string(spans[1].SpanId) || s.StartTimeUnixNano != 100e9 || s.EndTimeUnixNano != 101e9+5 || s.Status.Message != "it broke" ||
		len(s.Attributes) != 64 || len(s.Events) != 32 || s.DroppedEventsCount != 68 || s.Name != "bad � name" {
		t.Errorf("span %v with %d attributes, %d events", s, len(s.Attributes), len(s.Events))
	}
	if spans[1].EndTimeUnixNano < spans[1].StartTimeUnixNano {
		t.Error("a span ends before it starts")
	}
	if r.Take(10) != nil {
		t.Error("spans were taken twice")
	}
}

func TestSampling(t *testing.T) {
	sampled := func(r *span.Recorder, parent span.Context) (n int) {
		for range 4000 {
			if a := r.Start(parent, "x", span.Server); a.Recording() && a.Context().Sampled {
				n++
			} else if a.Recording() != a.Context().Sampled {
				t.Fatal("recording and the flag differ")
			}
		}
		return n
	}
	if n := sampled(span.NewRecorder(span.Config{}), span.Context{}); n != 4000 {
		t.Errorf("by default %d of 4000", n)
	}
	if n := sampled(span.NewRecorder(span.Config{Ratio: -1}), span.Context{}); n != 0 {
		t.Errorf("with none %d of 4000", n)
	}
	if n := sampled(span.NewRecorder(span.Config{Ratio: 0.25}), span.Context{}); n < 800 || n > 1200 {
		t.Errorf("a quarter: %d of 4000", n)
	}
	yes, no := span.New(), span.New()
	yes.Sampled = true
	if n := sampled(span.NewRecorder(span.Config{Ratio: -1}), yes); n != 4000 {
		t.Errorf("the parent's yes: %d of 4000", n)
	}
	if n := sampled(span.NewRecorder(span.Config{}), no); n != 0 {
		t.Errorf("the parent's no: %d of 4000", n)
	}
}

// TestNil: without a recorder context still travels.
func TestNil(t *testing.T) {
	var r *span.Recorder
	a := r.Start(span.Context{}, "x", span.Server)
	a.Set(span.String("k", "v"))
	a.Event("e")
	a.Fail("a", "b")
	a.End()
	if !a.Context().IsValid() || a.Context().Sampled || r.Dropped() != 0 || r.Take(1) != nil {
		t.Errorf("context %+v", a.Context())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Error(err)
	}
	var none *span.Active
	none.End()
	none.SetHop(1, "x")
	if none.Recording() || none.Context().IsValid() {
		t.Error("a nil span records")
	}
}
