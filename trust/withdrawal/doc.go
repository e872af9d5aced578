// SPDX-License-Identifier: Apache-2.0

// Package withdrawal is the registry of everything that stands on trust: each stream, spliced pair, session, subscription
// and inner connection of a process, keyed by whose it is. When trust, grants or policies change, the owner judges all of
// it again; what is refused is ended, and so is what outlives its certificate.
//
// A Registry may be used by any number of goroutines. End functions are called without the registry's lock, once each, and
// must not block.
package withdrawal
