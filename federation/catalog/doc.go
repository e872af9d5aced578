// SPDX-License-Identifier: Apache-2.0

// Package catalog carries what clusters offer each other: signed by the origin's control plane, served on by gateways that can
// change nothing, verified, judged and stored by the consumer's control plane.
//
//	Origin ──Update──▶ Cache (own gateways) ──▶ Cache (their gateways) ──▶ Store ──▶ View
//	  signs             serves                   pulls, verifies             verifies again, judges, persists
//
// A catalog is a set of entries under a signed Head. Its numbers (epoch, seq) only grow; what is older than something accepted is
// refused, also after a restart, and two heads with the same numbers and different content are a fork, which is kept as evidence.
// A reader says what it has and gets a delta, a snapshot, or the head alone. DESIGN.md has the encodings and the rules.
//
// An origin may speak only of services, gateways, the trust bundle and withdrawn identities of its own, and of what it has
// acknowledged of the consumer's bundle; one entry that is anything else refuses the whole head.
//
// Origin, Store and Cache may be used concurrently. Only Origin.Run signs; nothing else in the package starts a goroutine. Bytes
// that came from a peer cannot make any function of this package panic, nor hold more than the quotas.
package catalog
