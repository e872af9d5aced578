// SPDX-License-Identifier: Apache-2.0

// Package gateway carries bytes between the sidecars of its cluster and the gateways of other clusters. It decides only from
// the last snapshot that discovery gave it (view), so it goes on without its control plane, and it never holds a key of
// the connections that it relays.
//
//	sidecar ──preface, inner TLS──▶ gateway ══header, inner TLS══▶ far gateway ──inner TLS──▶ sidecar
//	        ◀────local session────▶         ◀═══control lane════▶
//
// As sender it takes a connection from a sidecar with a live local session, and opens a stream to a gateway of the cluster
// that the SNI names. As receiver it checks, before a byte moves: the peer's identity, the grant for service, port and
// export, that the inner SNI names the same thing in this cluster, and that the claimed source lies in the peer's trust
// domain. It routes on service names; addresses come from its own control plane alone.
//
// Every relayed pair and local session stands in the withdrawal registry and is judged again on each change of the view, so
// that withdrawn trust ends what is open too.
//
// A Gateway is made by New and works in Run, which returns after everything it started has ended.
package gateway
