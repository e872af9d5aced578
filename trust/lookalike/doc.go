// SPDX-License-Identifier: Apache-2.0

// Package lookalike is a peer whose CA signs whatever resembles somebody else's identity, and whatever a leaf must not be: the
// corpus of certificates that no listener and no dialler may accept. It is for tests; no binary links it.
//
// SplitConn cuts a ClientHello in two, for listeners that choose by what they read of it.
//
// The peer is a proper one otherwise: its bundle is known to the verifier, and Honest shows that its own identities pass.
package lookalike
