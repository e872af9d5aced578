// SPDX-License-Identifier: Apache-2.0

// Package span carries trace context along a call and records spans of it.
//
// It is not a tracing SDK: a proxy makes few kinds of spans, must never wait for telemetry, and ships OTLP messages over
// the connection that it has anyway. A [Context] is parsed from and written to the W3C headers; a [Recorder] keeps ended
// spans in a bounded ring, drops the oldest when the ring is full (counted), and hands batches to an exporter.
//
// The tracestate member of this mesh is "strait=hop:N;c:CLUSTER;r:N": the index of the last hop, its cluster, and how
// many retries the rest of the chain may make.
//
// A Recorder is safe for concurrent use, and so is a nil one, which records nothing. An [Active] span belongs to one
// goroutine at a time.
//
// Specifications: W3C Trace Context level 1 §3.2, §3.3; OTLP 1.x (trace).
package span
