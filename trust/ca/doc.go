// SPDX-License-Identifier: Apache-2.0

// Package ca is a cluster's certificate authority: a P-256 root for ten years, an issuer below it that signs identities,
// and a separate CA for the configuration API, whose certificates browsers and kubectl verify. Keys are files, 0600, below
// ca/ of the data directory.
//
//	root (10 y, trust domain URI) ── issuer (1 y, path length 0) ── X509-SVIDs (36 h)
//	API root (10 y)               ── serving and client certificates of the configuration API
//
// From a certificate request only the public key is taken: what an identity says is decided by the caller. A CA may be used
// by any number of goroutines.
package ca
