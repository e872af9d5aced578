// SPDX-License-Identifier: Apache-2.0

// Package wan is a wide-area network in user space and without privilege, between sites on loopback addresses: delay,
// jitter, loss, and links that go dark, per direction. The demo and the end-to-end tests put it between gateways.
//
// Every site has an inside address, where its gateway listens, and an outside address, which the WAN owns and the
// gateway advertises. What arrives at the outside address of X from the inside of Y leaves from the outside address of Y
// to the inside of X, so that both ends see only outside addresses, for UDP and TCP alike:
//
//	gateway Y (inside Y) ──▶ outside X ┄┄ delay Y→X ┄┄ outside Y ──▶ gateway X (inside X)
//
// UDP sources are told apart by address and port, TCP sources by address: sites need distinct loopback addresses. TCP is
// relayed as a stream, so loss does not apply to it; a dark link holds bytes back without an end or a reset, like a path
// that drops everything.
//
// A WAN may be driven from any goroutine.
package wan
