// SPDX-License-Identifier: Apache-2.0

// Package bench measures the built binaries beside what a user would otherwise pick, in the same run on the same machine, and
// prints ratios: absolute figures of a shared machine mean little. make bench runs it.
//
// CPU is user and system time of the proxies' processes, from /proc, over the requests that they carried. It cannot show what
// a busy network card, NUMA or many cores would change.
package bench
