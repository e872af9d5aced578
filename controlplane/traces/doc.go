// SPDX-License-Identifier: Apache-2.0

// Package traces receives spans from this cluster's proxies as OTLP and keeps the interesting ones in a ring: errors,
// failovers, the slowest hundredth, and the latest, each within its share of a fixed number of bytes.
//
// Invariants:
//   - A span's cluster and reporter are what the caller's certificate says, whatever the span claims.
//   - Memory is bounded in spans and bytes; so is a single trace. What is most over its share goes first.
//   - A peer is given only spans of calls that it was an end of, by full trace id, without addresses of workloads.
//
// Store and Receiver may be used concurrently.
//
// Specification: OTLP/gRPC 1.x, TraceService/Export.
package traces
