// SPDX-License-Identifier: Apache-2.0

// Package proxyclient is a proxy's side of the control plane's port (7400): its identity, its connection, its
// subscriptions and the last good state of both on disk. Gateways and sidecars link it, so it stays lean: grpc, the
// minimal discovery messages of controlpb, and nothing of etcd, Kubernetes, Envoy or an SDK.
//
//	                 ┌── token file ──▶ strait-register/1 ──┐ (no usable identity on disk)
//	Open ── identity/ on disk ─────────────────────────────┴─▶ trust.Source ─▶ gRPC over SPIFFE mTLS
//	Run  ── renewal loop: a fresh key each time, hourly ±10 %, backoff while it fails
//	     ── discovery loop: delta ADS, resubscribing with the versions held; answers ACK or NACK
//	     ── snapshot loop: what is subscribed goes to disk, at most once a second
//
// Invariants:
//   - Nothing a control plane sends, and no absence of one, makes a resource disappear: only an explicit removal does.
//   - A resource is known (its message), absent (an explicit removal) or unknown (nobody has said anything yet).
//   - A response that a watcher refuses is answered with a NACK and the previous version stays in force.
//   - Bundles of the Source are the own trust domain's and those that Bundle (sidecar) or Peer (gateway) resources carry.
//   - An expired identity proves nothing to anybody. It is replaced by renewing before it ends; afterwards by renewing on
//     strait-renew/1, while the control plane still accepts that, or by a fresh token. The end is noticed within half a second, also
//     when the wall clock steps over it.
//
// All methods of Client may be called concurrently, also from watchers. Watchers are called one at a time, in order, from one
// goroutine of Run, with no lock held.
//
// Specifications: xDS transport protocol (incremental variant, aggregated); SPIFFE X.509-SVID and trust bundles.
package proxyclient
