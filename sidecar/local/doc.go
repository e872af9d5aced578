// SPDX-License-Identifier: Apache-2.0

// Package local is the sidecar's end of local sessions: one mTLS session (ALPN strait-local/1) to every gateway of the
// own cluster. A session carries what the gateway knows of peers, its drain and withdrawal notices, and this sidecar's
// health; its TLS exporter keys the prefaces of inner connections.
//
// Set keeps a session to each gateway it is given, with backoff and jitter, and replaces one before its certificate
// ends. A session counts only after the gateway's welcome, because a TLS 1.3 client sees its handshake succeed before it
// has been judged. All methods of Set and Session may be called concurrently; Run owns every goroutine and waits.
//
//	idle ──dial, TLS──▶ hello ──welcome──▶ live ──no message for Dead, error, withdrawn──▶ backoff ──▶ dial
//	                                        └─half of the certificate's life─▶ retiring (a new one is live)
package local
