// SPDX-License-Identifier: Apache-2.0

// Package relay moves bytes between two streams until both directions have ended.
//
// An end of file on one side becomes a half-close of the other; a broken stream becomes a reset of the other, never a
// clean end. A direction that waits for bytes holds no buffer where its stream can say when bytes are there. Two bare
// *net.TCPConn are handed to the kernel (splice); any wrapper would disable that, so TCP keeps the connection bare.
//
// Pair blocks and owns both streams; Reset of either from any goroutine ends it. Counters may be read at any time.
package relay
