// SPDX-License-Identifier: Apache-2.0

// Package endpoint takes the identities of a process from a SPIFFE Workload API server, SPIRE's agent or another: the consumer's
// side, X.509 only. A Handle chooses the SVIDs that the process needs among those offered, keeps them and the bundle of their
// trust domain in a trust.Source, and follows their changes. DESIGN.md describes what happens when.
//
// It speaks the protocol by go-spiffe's generated messages. go-spiffe's own client (workloadapi) would link a JOSE library and
// its own parsers of certificates, IDs and bundles into every proxy, twenty packages in all; the rules here are those of package
// trust.
//
// Invariants:
//   - Nothing is used that trust.Verify does not accept against the bundle that came with it.
//   - A bundle is its trust domain's alone; a bundle for the own trust domain among the federated ones is not looked at.
//   - Every change of the own bundle raises its sequence number by one, on disk before it is in force, over restarts.
//   - What was good stays in force while the server is away, sends what is refused or offers less: an identity until its end.
//     Then handshakes fail (package trust).
//   - Private keys stay in memory.
//
// All methods of Handle may be called concurrently.
//
// Specifications: SPIFFE Workload API, SPIFFE Workload Endpoint (sections 3, 4, 6), X509-SVID, SPIFFE Trust Domain and Bundle.
package endpoint
