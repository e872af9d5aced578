// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// TestOTLPForward hands spans to a collector that speaks OTLP over HTTP, configured by the standard variables alone.
func TestOTLPForward(t *testing.T) {
	got := make(chan *coltracepb.ExportTraceServiceRequest, 1)
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var m coltracepb.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Authorization") != "Bearer x" || proto.Unmarshal(body, &m) != nil {
			t.Errorf("request to %s: %v", r.URL.Path, err)
		}
		got <- &m
	}))
	defer collector.Close()
	vars := map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL, "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20x"}
	for k, v := range vars {
		t.Setenv(k, v)
	}
	getenv := func(k string) (string, bool) { v, ok := vars[k]; return v, ok }
	forward, stop, err := otlpForward(t.Context(), getenv, slog.New(slog.DiscardHandler))
	if err != nil || forward == nil {
		t.Fatalf("no forwarder: %v", err)
	}
	forward([]*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{Name: "GET checkout"}}}}}})
	stop()
	m := <-got
	if name := m.ResourceSpans[0].ScopeSpans[0].Spans[0].Name; name != "GET checkout" {
		t.Errorf("the collector got a span named %q", name)
	}
}

func TestOTLPForwardIsOffByDefault(t *testing.T) {
	for _, vars := range []map[string]string{{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}} {
		forward, stop, err := otlpForward(t.Context(), func(k string) (string, bool) { v, ok := vars[k]; return v, ok }, slog.New(slog.DiscardHandler))
		if forward != nil || err != nil {
			t.Errorf("%v: forwards, %v", vars, err)
		}
		stop()
	}
}
