// SPDX-License-Identifier: Apache-2.0

// Package http is the sidecar's HTTP engine behind a narrow seam: it turns bytes of an application into requests, asks
// a [Picker] where each attempt goes, and carries it there and back.
//
// It is not a router, a balancer or a policy engine: names are resolved, destinations chosen, callers judged and
// instances picked by the functions in [OutboundConfig] and [InboundConfig]. What it owns is the protocol: HTTP/1.1,
// HTTP/2 and gRPC in and out, streaming, cancellation, retries with their budget, identity headers, limits, generated
// errors, spans and metrics.
//
//	application ─▶ Outbound ─(Leg.Conn: mTLS, h2 or http/1.1)─▶ Inbound ─▶ application
//
// Invariants:
//   - a request is sent a second time only if no byte of the first can have reached the application, or if it is
//     idempotent, its body was kept whole, and no byte of a response was delivered (retry.go);
//   - a stream that broke is never ended cleanly towards the other side: RST_STREAM, or the connection is cut;
//   - the path that an access policy judged is, byte for byte, the path that is forwarded (path.go);
//   - the identity headers an application sees were written by its own sidecar (identity.go).
//
// Outbound and Inbound are safe for concurrent use; ServeConn blocks and owns the connection. The end of its context
// asks for a graceful end (GOAWAY, or "Connection: close" after the response in progress); after the grace period, or
// on Close, what is left is cut. ServeConn returns only when nothing of the connection runs any more.
//
// Specifications: RFC 9110, 9112, 9113, 9209 (Proxy-Status), W3C Trace Context, gRPC over HTTP/2. The retry table is in
// DESIGN.md beside this file.
package http
