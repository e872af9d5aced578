// SPDX-License-Identifier: Apache-2.0

// Package identity is the door of the control plane's port (7400): it says who is calling and which RPCs that kind of caller may
// use, renews identities, and lets newcomers register.
//
//	accept ─▶ TLS handshake (5 s, bounded number, the oldest pending one gives way)
//	           ├─ ALPN h2: client certificate of the own trust domain, not denied ─▶ gRPC, trust.Peer in the context
//	           ├─ ALPN strait-register/1: server-authenticated only ─▶ trust/register
//	           └─ anything else: refused inside the handshake
//
// Invariants:
//   - A caller's role follows from its SPIFFE ID alone, never from having a certificate.
//   - An RPC without a row in the table of roles is refused, and a test fails.
//   - Renew issues the caller's own ID and never another; only the public key is taken from the request.
//   - A connection ends when its peer's certificate does, and when its peer is denied (withdrawal registry).
//
// Everything here may be called concurrently.
package identity
