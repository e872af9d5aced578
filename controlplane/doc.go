// SPDX-License-Identifier: Apache-2.0

// Package controlplane is a cluster's control plane: it turns configuration, sessions and the federation's view into
// snapshots, streams them to proxies, issues identities, and answers operators.
//
//	configuration API ─┐
//	sessions ──────────┼─▶ compile ─▶ discovery ─▶ proxies
//	federate ──────────┘      └─────▶ federate (what peers are offered)
//
// One loop compiles; changes are debounced, and every snapshot is a whole. Everything here may be stopped at any time: proxies
// go on from their last good snapshot.
package controlplane
