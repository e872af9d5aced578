// SPDX-License-Identifier: Apache-2.0

// Package compile turns the configuration, the live sessions of the sidecars and the view of the federation into the resources
// that proxies subscribe to and into what each peer may see of us. It is a pure function: no I/O, no clock, no randomness, and
// the same input gives the same output byte for byte, so that only real changes are pushed.
//
// Rules it keeps:
//
//   - Keys are (cluster, namespace, name). What a peer offers never changes what is known of local workloads, of another peer, or
//     of a namespace that was not granted to it; an entry that speaks of identities outside its peer's trust domain is dropped whole.
//   - A service leaves only with a ServiceExport and a rule of an ExportPolicy of its namespace that names it, to ready peers only.
//   - An AccessPolicy narrows who may call and never widens it beyond the own trust domain and those the port is exported to.
//     One that is not fully understood is not applied: the last good version stays, and without one nobody may call.
//   - A sidecar stands for a workload only if its proven identity is the one that the Workload's configuration gives.
//   - Only ready peers' bundles, services and grants come out; joining peers come out as Peer alone.
package compile
