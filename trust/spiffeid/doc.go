// SPDX-License-Identifier: Apache-2.0

// Package spiffeid has SPIFFE IDs and trust domains as comparable values that only a strict parser makes (SPIFFE-ID,
// https://spiffe.io/docs/latest/spiffe-specs/spiffe-id/). It is a leaf: standard library only. Values are immutable and
// may be used by any number of goroutines.
package spiffeid
