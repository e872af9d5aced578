// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"context"
	"encoding/hex"
	"errors"
	"net"
	nethttp "net/http"
	"strings"
	"testing"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/strait-mesh/strait/internal/span"
)

// TestTrace: one request with one retry makes one trace: SERVER at the caller, a CLIENT for each attempt below it, SERVER
// at the callee below the attempt that arrived, a CLIENT below that; and the application is told the last one.
func TestTrace(t *testing.T) {
	const parent = "00f067aa0ba902b7"
	each(t, func(t *testing.T, e engine) {
		told := make(chan nethttp.Header, 1)
		r := newRig(t, e, rigOptions{places: []*place{}})
		unreachable := &place{cluster: "us-east", instance: "l1", dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("no route") }}
		r.picker.places = append(r.picker.places, unreachable, r.callee(rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) { told <- r.Header.Clone() })}}, nil))
		req := newRequest("GET", "/orders/17", nil)
		req.Header.Set("Traceparent", "00-4b1f92ab3577b34da6a3ce929d0e0e47-"+parent+"-01")
		req.Header.Set("Tracestate", "vendor=x,strait=hop:3;c:ap-south")
		req.Header.Set("Baggage", "k=v")
		resp, err := r.client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		spans := r.recorded(5)
		tree := map[string]*tracepb.Span{}
		for _, s := range spans {
			if hex.EncodeToString(s.TraceId) != "4b1f92ab3577b34da6a3ce929d0e0e47" {
				t.Errorf("span %s in trace %x", s.Name, s.TraceId)
			}
			kind := attribute(s, span.HopKind).GetStringValue() + " " + strings.TrimPrefix(s.Kind.String(), "SPAN_KIND_")
			if s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR {
				kind += " failed"
			}
			tree[kind] = s
			if !strings.HasSuffix(s.Name, "GET checkout") {
				t.Errorf("name %q: want low cardinality", s.Name)
			}
			if s.EndTimeUnixNano < s.StartTimeUnixNano || s.StartTimeUnixNano == 0 {
				t.Errorf("span %s from %d to %d", s.Name, s.StartTimeUnixNano, s.EndTimeUnixNano)
			}
		}
		below := func(child, parent string) {
			t.Helper()
			c, p := tree[child], tree[parent]
			if c == nil || p == nil {
				t.Fatalf("no span %q or %q among %v", child, parent, spans)
			}
			if string(c.ParentSpanId) != string(p.SpanId) {
				t.Errorf("%s is not below %s", child, parent)
			}
		}
		below("sidecar_out CLIENT failed", "sidecar_out SERVER")
		below("sidecar_out CLIENT", "sidecar_out SERVER")
		below("sidecar_in SERVER", "sidecar_out CLIENT")
		below("sidecar_in CLIENT", "sidecar_in SERVER")
		out, in, attempt := tree["sidecar_out SERVER"], tree["sidecar_in SERVER"], tree["sidecar_out CLIENT"]
		if hex.EncodeToString(out.ParentSpanId) != parent {
			t.Errorf("the first span is below %x", out.ParentSpanId)
		}
		if a, b := attribute(out, span.HopIndex).GetIntValue(), attribute(in, span.HopIndex).GetIntValue(); a != 4 || b != 7 {
			t.Errorf("hops %d and %d, want 4 and 7 (two gateways between)", a, b)
		}
		if got := attribute(in, span.MTLSPeerID).GetStringValue(); got != callerID.String() {
			t.Errorf("peer %q", got)
		}
		if len(out.Events) != 1 || out.Events[0].Name != span.EventRetry {
			t.Errorf("events %v", out.Events)
		}
		for key, want := range map[string]string{span.DecisionReason: "priority_ok", span.DecisionPolicy: "shop/checkout", span.DstCluster: "eu-west", span.SrcCluster: "us-east"} {
			if got := attribute(attempt, key).GetStringValue(); got != want {
				t.Errorf("attempt: %s = %q, want %q", key, got, want)
			}
		}
		if c := attribute(attempt, span.DecisionCandidates).GetArrayValue(); len(c.GetValues()) != 1 || attribute(attempt, span.HTTPResendCount).GetIntValue() != 1 || attribute(attempt, span.RetryBudgetLeft).GetIntValue() == 0 {
			t.Errorf("attempt: %v", attempt.Attributes)
		}
		h := <-told
		c, ok := span.Extract(h)
		if !ok || string(c.Span[:]) != string(tree["sidecar_in CLIENT"].SpanId) || c.Hop != 7 || c.Cluster != "eu-west" {
			t.Errorf("the application is told %v", h)
		}
		if s := h.Get("Tracestate"); !strings.HasSuffix(s, ",vendor=x") || h.Get("Baggage") != "k=v" {
			t.Errorf("tracestate %q, baggage %q", s, h.Get("Baggage"))
		}
		r.picker.mu.Lock()
		defer r.picker.mu.Unlock()
		if len(r.picker.begun) != 1 || string(r.picker.begun[0].Span[:]) != string(attempt.SpanId) {
			t.Errorf("Begin was told %v", r.picker.begun)
		}
		if m := r.picker.metas[0]; m.Service != service || m.Method != "GET" || m.Path != "/orders/17" || m.Authority != "checkout.shop" || !m.Idempotent || m.Trace.Trace.IsZero() {
			t.Errorf("picker was told %+v", m)
		}
	})
}

// TestTraceUnsampled: an unsampled parent is passed on unsampled and records nothing.
func TestTraceUnsampled(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		told := make(chan nethttp.Header, 1)
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) { told <- r.Header.Clone() })}})
		req := newRequest("GET", "/", nil)
		req.Header.Set("Traceparent", "00-4b1f92ab3577b34da6a3ce929d0e0e47-00f067aa0ba902b7-00")
		resp, err := r.client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if c, ok := span.Extract(<-told); !ok || c.Sampled || c.Trace.String() != "4b1f92ab3577b34da6a3ce929d0e0e47" {
			t.Errorf("told %+v", c)
		}
		// A second, recorded request must be the first to appear.
		if resp, err = r.client().Do(newRequest("GET", "/", nil)); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if s := r.recorded(1)[0]; hex.EncodeToString(s.TraceId) == "4b1f92ab3577b34da6a3ce929d0e0e47" {
			t.Error("an unsampled request was recorded")
		}
	})
}

// TestRequestMetrics: both ends count the same request, each by what it has verified, and no path or method of a client
// makes a new series.
func TestRequestMetrics(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{backend(t, func(w nethttp.ResponseWriter, r *nethttp.Request) { w.Write([]byte("12345")) })}})
		c := r.client()
		for i := range 50 {
			req := newRequest([]string{"GET", "POST", "FOO"}[i%3], "/"+strings.Repeat("x", i), nil)
			req.Header.Set("X-Forwarded-Client-Cert", "By=evil")
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
		}
		r.picker.await(t, 50)
		source := map[string]string{"reporter": "source", "src_service": "shop/web", "src_cluster": "us-east", "dst_service": "shop/checkout", "dst_cluster": "eu-west",
			"route": "other", "protocol": "http1", "code": "200", "classification": "success", "reason": "priority_ok", "scope": "cross_region", "mtls": "true"}
		destination := map[string]string{"reporter": "destination", "src_service": "shop/web", "src_cluster": "us-east", "dst_service": "shop/checkout", "dst_cluster": "eu-west",
			"protocol": "h2", "code": "200"}
		for _, labels := range []map[string]string{source, destination} {
			for r.awaitMetric("strait_requests_total", labels) < 50 {
				if t.Context().Err() != nil {
					t.Fatal("requests are missing")
				}
			}
		}
		families, err := r.metrics.Gather().Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if n := len(f.Metric); n > 4 && f.GetName() != "strait_series_dropped_total" {
				t.Errorf("%s has %d series", f.GetName(), n)
			}
		}
		if r.metric("strait_bytes_total", map[string]string{"direction": "received"}) < 250 {
			t.Errorf("bytes received: %v", r.metric("strait_bytes_total", map[string]string{"direction": "received"}))
		}
	})
}
