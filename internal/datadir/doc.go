// SPDX-License-Identifier: Apache-2.0

// Package datadir is a process's directory on disk: private (0700, files 0600), locked by one process, versioned by a
// FORMAT file, and written so that a crash leaves the old file or the new one: temporary file, fsync, rename, fsync of the
// directory. State files carry a checksum; a damaged one is set aside and reported, never used.
//
// A Dir may be used by any number of goroutines; two writers of one file leave one of the two contents.
package datadir
