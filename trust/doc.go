// SPDX-License-Identifier: Apache-2.0

// Package trust goes from SPIFFE material to a ready *tls.Config: bundles per trust domain, the process's own identity, and
// the one Verify that TLS, QUIC and gossip share.
//
// Invariants: TLS 1.3 only; verification in VerifyConnection, which also runs where VerifyPeerCertificate would not; the
// bundle is chosen by the trust domain that the certificate claims, never from a merged pool; identities are compared as
// whole texts; no session tickets, no session cache and no early data, so that nothing outlives a withdrawn bundle.
//
// A chain is leaf first; each certificate after it is the issuer of the one before, or a sibling of it: the same subject and key,
// certified by another root, so that a rotation of roots cuts nobody off. Times are those of the leaf and of the one path to a root
// that is used: a sibling that has ended concerns only those who need it. What one chain costs is bounded: a stranger's one
// signature of a root, at most four; a friend's one path, at most four. Pins are hashes of roots; a server sends all its roots, oldest
// first, and a pin may name any run of them.
//
// A TLS 1.3 client sees its handshake succeed before the server has judged its certificate: treat a session as usable
// only after the server's first message.
//
// A Source may be used and changed by any number of goroutines. Configs made from it follow its changes.
//
// Specifications: SPIFFE X.509-SVID sections 2-5, SPIFFE Trust Domain and Bundle section 4, RFC 5280, RFC 8446.
package trust
