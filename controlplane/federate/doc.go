// SPDX-License-Identifier: Apache-2.0

// Package federate is a control plane's side of the federation: the links of its own gateways, the peers and how they became
// peers (join, introduction, approval, eviction, leave), the catalogs offered to them and received from them, and questions
// asked across clusters.
//
// A Manager is the only writer of all that. Everything else reads View, an immutable snapshot, and waits on Changed:
//
//	gateways ──Link──▶ Manager ──View──▶ compile, operator API
//	   ▲                 │ ▲
//	   └─ offers, marks, ┘ └─ SetOffers, Approve, Evict, Leave, Join, tokens
//	      queries, join frames
//
// Invariants: a peer's bundle is in View.Bundles only while the peer is joining (approved) or ready; what is told to the other
// side was on disk before; nothing about a peer is believed because another peer said so, except that it may be dialled, after
// approval, under the pin of the introduction. A peer's bundle changes only by what the peer signed under the one that is held, never
// back; a peer is known by what it proves under that bundle, and withdraws identities of its own trust domain alone.
//
// All exported methods may be called concurrently. Run does the background work and must run for links to be served.
package federate
