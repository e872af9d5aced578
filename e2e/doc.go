// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the end-to-end tests: the built binaries as processes, real clients and servers from Debian, and real
// faults. make e2e runs them.
package e2e
