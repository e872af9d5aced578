// SPDX-License-Identifier: Apache-2.0

// Package tunnel keeps authenticated sessions between gateways of different clusters and opens streams over them. It
// knows peers, transports, liveness and the framing on the wire; what a stream is for is decided by its callers.
// DESIGN.md beside this file is the protocol.
//
// An Endpoint owns the UDP socket and the TCP listener; Run does all the work and returns when everything it started has
// ended. Sessions come to be inside Run. All methods may be called by any number of goroutines.
//
// Specifications: RFC 9000, RFC 9221 (QUIC and datagrams), RFC 8446 (TLS 1.3), yamux (hashicorp) for the TCP fallback.
package tunnel
