// SPDX-License-Identifier: Apache-2.0

// Package preface is what a sidecar says to a gateway of its own cluster at the start of each inner connection: a PROXY
// protocol v2 header whose TLVs carry the session, a counter, the authority and trace context, under a MAC keyed by the
// local session's TLS exporter, followed by the inner TLS ClientHello; and the one status frame that the gateway answers
// before it relays.
//
//	sidecar                                   gateway
//	  PROXY v2 {TLVs, HMAC} ‖ ClientHello  →    judged as a whole, once per (session, counter)
//	                                       ←  status {code, reason, handle}, at most 64 bytes
//	  inner TLS                            ↔  relayed unread
//
// Nothing is encrypted twice and no clock is involved. The MAC covers every byte of the header and the SHA-256 of the
// ClientHello message, so a preface cannot be moved to another connection or another hello.
//
// The gateway reads the whole ClientHello, reassembled over records, at most MaxHello bytes, and refuses a missing or
// doubled server name and encrypted_client_hello. Everything after it, a HelloRetryRequest included, passes unread.
//
// Conn may be used by one reader and one writer at a time; Window by any number of goroutines; the rest are values.
//
// Specifications: PROXY protocol 2.x (§2.2), RFC 8446 §4.1.2 and §5.1, RFC 6066 §3.
package preface
