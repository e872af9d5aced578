// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// forwardQueue is how many batches of spans wait for the collector; more are dropped and counted.
const forwardQueue = 64

// otlpForward returns a function that hands spans to the collector named by the standard OTEL_EXPORTER_OTLP_* variables
// (OpenTelemetry specification, "OTLP exporter configuration"), or nil when none is named. It never blocks its caller.
// stop sends what is queued within ctx and waits.
func otlpForward(ctx context.Context, getenv func(string) (string, bool), log *slog.Logger) (forward func([]*tracepb.ResourceSpans), stop func(), err error) {
	value := func(keys ...string) string {
		for _, k := range keys {
			if v, ok := getenv(k); ok && v != "" {
				return v
			}
		}
		return ""
	}
	if value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT") == "" || value("OTEL_TRACES_EXPORTER") == "none" ||
		strings.EqualFold(value("OTEL_SDK_DISABLED"), "true") {
		return nil, func() {}, nil
	}
	var client otlptrace.Client
	if value("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") == "grpc" {
		client = otlptracegrpc.NewClient()
	} else {
		client = otlptracehttp.NewClient() // http/protobuf is the specification's default
	}
	if err := client.Start(ctx); err != nil {
		return nil, nil, err
	}
	queue, done := make(chan []*tracepb.ResourceSpans, forwardQueue), make(chan struct{})
	var dropped atomic.Int64
	go forwardSpans(context.WithoutCancel(ctx), client, queue, done, &dropped, log)
	forward = func(spans []*tracepb.ResourceSpans) {
		select {
		case queue <- spans:
		default:
			dropped.Add(1)
		}
	}
	return forward, func() { close(queue); <-done }, nil
}

func forwardSpans(ctx context.Context, client otlptrace.Client, queue <-chan []*tracepb.ResourceSpans, done chan<- struct{}, dropped *atomic.Int64, log *slog.Logger) {
	defer close(done)
	failing := false
	for spans := range queue {
		err := client.UploadTraces(ctx, spans)
		if (err != nil) != failing {
			failing = err != nil
			log.Warn("OTLP export", "failing", failing, "err", err, "dropped", dropped.Load())
		}
	}
	_ = client.Stop(ctx)
}
