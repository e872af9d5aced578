// SPDX-License-Identifier: Apache-2.0

// Package federation is the pure model of a federation: its names, what is known of each member, the failover policy, and
// the one function that decides where calls go.
//
//	(state', decision) = Step(now, state, inputs)
//
// Step is a state machine without I/O, clock or goroutine. The sidecar runs it to route, the command line runs it again on
// what a sidecar reported to explain or simulate, and tests run it against a deliberately dumb model. DESIGN.md beside this
// file describes the machine; the order of tiers, the thresholds and the hold-down are policy, everything else is fixed.
//
// Values are immutable once made and may be shared between goroutines. The exception is Dealer, which deals calls to members
// according to the shares and belongs to one goroutine or one lock.
//
// The package imports the standard library and nothing else; what feeds it (gossip, catalogs, joining) lives in packages
// below this one.
package federation
