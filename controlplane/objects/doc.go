// SPDX-License-Identifier: Apache-2.0

// Package objects reads the configuration through any Kubernetes API and keeps it as one immutable snapshot of typed values.
//
// Open lists and watches every kind of controlplane/api. Objects returns the newest snapshot and never blocks; Changed says that
// there is a newer one. Bursts are gathered: a snapshot is made after a short quiet, and at the latest after a bounded delay.
// Objects are read strictly: one with a field that this version does not know comes out as Unreadable rather than half read.
// The helpers write: apply by field owner, delete, and conditions, which are merged by type and written only where they differ.
// Everything may be called concurrently.
package objects
