// SPDX-License-Identifier: Apache-2.0

// Package rotation knows how far a rotation of the cluster's root has come: which process has acknowledged which bundle, which
// holds an identity of the new issuer, and whether the next step may be taken. The steps themselves are the CA's (trust/ca).
//
//	steady ──prepare──▶ prepared ──activate──▶ activated ──retire──▶ steady
//	            abort ◀────┘   │                    │
//	                           │                    └ every member and every process that may still be used has the bundle with the
//	                           │                      new root, and every process holds an identity issued after activate
//	                           └ every process connected now has the bundle with the new root
//
// What is known of a process: the identities that it was issued (Renew), the one that it came with (the leaf of its connection), and
// the bundle that it acknowledged (discovery). All of it is on disk within SaveEvery, and what a crash loses comes back with the
// process's next connection.
//
// A process counts for activate while it is connected: who is away knows the old root, and what is issued then verifies by that, too.
// It counts for retire while it is connected or the newest identity that it is known to hold has not ended: a process gone for good
// is listed, and waited for until then. Withdrawn identities count for nothing. JWT-SVIDs of the old key are waited for until they end
// (5 minutes at most).
//
// A Tracker may be used concurrently.
package rotation
