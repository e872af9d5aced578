// SPDX-License-Identifier: Apache-2.0

// Package jwtsvid judges JWT-SVIDs (SPIFFE JWT-SVID sections 2-4; RFC 7515, RFC 7519).
//
// A token says of itself which key and which algorithm it is to be judged by, so nothing that it says is believed: the key is
// the one that the bundle of the trust domain of its subject holds under its kid, the algorithm one that fits that key, and nothing
// is ever fetched. Only the compact serialization is read, within 16 KiB, and each of its parts in one spelling only.
//
// Functions may be called by any number of goroutines.
package jwtsvid
