// SPDX-License-Identifier: Apache-2.0

// Package cli is the command tree of strait: newXCmd builds flags into options, and xRun does the work. Results go to
// standard output, everything else to standard error; every error carries a code (internal/problem), and the exit code
// is the code's. A command runs in one goroutine; Run may be called many times in a process.
package cli
