// SPDX-License-Identifier: Apache-2.0

// Package join makes two clusters that do not trust each other yet members of one federation: join tokens and the issuer's
// store of them, the conversation of the two control planes, and introductions of one member to another.
//
// It is the protocol only. Dialler and Acceptor are state machines without I/O: frames in, frames and facts out, and the caller
// persists what a step returned before it sends the step's frame. DESIGN.md in this directory has the wire, the proofs and the
// states; controlplane/federate drives it.
//
// Tokens may be used concurrently. A Dialler and an Acceptor belong to one goroutine.
package join
