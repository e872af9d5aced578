// SPDX-License-Identifier: Apache-2.0

// Package sidecar carries bytes between one workload and the mesh: it stands beside some application instances, takes in
// what other sidecars send them under mutual TLS, and carries what the applications send to wherever the service lives
// now, in this cluster or another one.
//
//	application ──upstream, HTTP proxy──▶ outbound ──Step, dealer, pool──▶ inner connection ──▶ sidecar or gateway
//	application ◀──instance picked by health── inbound ◀──SNI, identity, access── inner connection ◀── other sidecars
//
// It decides only from the last snapshot of discovery, so it goes on without its control plane. Server shape: New starts
// nothing, Run does everything and returns after every goroutine has ended.
//
// Invariants:
//   - a port is reached by its exact SNI and a verified client certificate; there is no default port;
//   - a callee is accepted only with a SPIFFE ID that discovery lists for that endpoint or cluster;
//   - every connection is in one withdrawal registry and is judged again on each change of what allowed it;
//   - a broken connection is passed on as a reset, never as an end.
//
// States, pools and verdicts: DESIGN.md beside this file.
package sidecar
