// SPDX-License-Identifier: Apache-2.0

// Package objects keeps the whole configuration in memory, as one immutable snapshot that informers follow, and writes what
// the control plane itself has to say into it: its own objects by server-side apply, and conditions.
//
// A Store's methods may be called concurrently. Bursts of changes become one new snapshot.
package objects
