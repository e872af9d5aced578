// SPDX-License-Identifier: Apache-2.0

// Package ca is a cluster's certificate authority: a P-256 root for ten years, an issuer below it that signs identities, a key that signs
// JWT-SVIDs, and a separate CA for the configuration API, whose certificates browsers and kubectl verify. Keys are files, 0600, below
// ca/ of the data directory. DESIGN.md says which, and how each step survives a crash.
//
//	root (10 y, trust domain URI) ── issuer (1 y, path length 0, this trust domain alone) ── X509-SVIDs (36 h)
//	JWT key                       ── JWT-SVIDs (5 min)
//	API root (10 y)               ── serving and client certificates of the configuration API
//
// The root rotates in three steps, and loses nobody on the way; its key can be kept offline; or an external CA takes its place:
//
//	        Prepare              Activate               Retire
//	steady ────────▶ prepared ──────────────▶ activated ────────▶ steady
//
// From a certificate request only the public key is taken: what an identity says is decided by the caller. What was issued stands in a
// ledger before it leaves, under a serial that this data directory has never given out. A CA may be used by any number of goroutines.
package ca
