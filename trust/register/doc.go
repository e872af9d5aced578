// SPDX-License-Identifier: Apache-2.0

// Package register gives a process its first identity: ALPN strait-register/1, server-authenticated TLS 1.3 pinned by the
// token's bundle hash, one exchange. DESIGN.md has the wire format.
//
// A token works once: redeeming binds it, durably, to the public key of the request, so that the same process may repeat a
// request whose answer was lost, and nobody else may use it. The store keeps a key derived from the secret, never the
// secret. Tokens and Server may be used by any number of goroutines.
package register
