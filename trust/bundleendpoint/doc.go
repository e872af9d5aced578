// SPDX-License-Identifier: Apache-2.0

// Package bundleendpoint federates trust with domains that are no members: Server publishes the own bundle at an HTTPS endpoint, and
// Follower keeps the bundles of foreign trust domains by asking theirs. See DESIGN.md.
//
// Invariants: a bundle never goes back to a lower sequence, also over a restart; a bundle that was held stays in force while its
// endpoint cannot be reached; the trust domain asked for is the one configured, never one that a document names; nothing of a
// foreign endpoint is believed beyond its own bundle; no address of this machine's own neighbourhood is dialled unless allowed.
//
// All methods may be called concurrently; Run of a Follower and Serve of a Server once.
//
// Specifications: SPIFFE Federation sections 4 and 5 (profiles https_web and https_spiffe), SPIFFE Trust Domain and Bundle section 4.
package bundleendpoint
