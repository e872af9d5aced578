// SPDX-License-Identifier: Apache-2.0

// Package inner makes the mTLS connections between sidecars: straight to a sidecar of the own cluster, or through a
// gateway to a sidecar of another one.
//
// A connection is TLS 1.3 with the SNI of one port of one service in one cluster; the callee must prove exactly one of the
// SPIFFE IDs that the caller was told to expect. Dial returns after the handshake, which a TLS 1.3 client finishes before
// the server has judged it: see ../DESIGN.md for what that means to users of the connection. Every connection stands in
// the withdrawal registry until it is closed.
//
// Dial may be called concurrently. A Conn may be used like a *tls.Conn.
package inner
