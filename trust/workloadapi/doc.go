// SPDX-License-Identifier: Apache-2.0

// Package workloadapi serves the SPIFFE Workload API on a unix socket: X.509-SVIDs, JWT-SVIDs and bundles for the applications of
// one identity. See DESIGN.md for who is served what, and when.
//
//	application ── unix socket ──▶ Listener: SO_PEERCRED, SO_PEERPIDFD, connections per uid
//	                                  │
//	                               Server: security header, selectors, calls per uid
//	                                  │ first caller that is allowed
//	                               keeper ──▶ Issuer: an identity of its own key, renewed hourly ±10 %
//	                                  │
//	                  trust.Source ───┴──▶ messages, pushed at every change
//
// Invariants:
//   - Without a selector that matches nobody is served anything.
//   - The key that applications get is never the key of the process that serves them.
//   - What is withdrawn, and what has ended, is served no more: open streams end.
//   - Bundles of trust domains are never merged.
//
// Server's methods may be called by any number of goroutines. Run is called once; it returns after everything has ended.
//
// Specifications: SPIFFE Workload API, SPIFFE Workload Endpoint section 4-6, SPIFFE X.509-SVID, JWT-SVID.
package workloadapi
