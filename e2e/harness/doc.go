// SPDX-License-Identifier: Apache-2.0

// Package harness runs federations of real processes for the end-to-end tests: the built binaries, driven by the command
// line alone, on loopback addresses of their own, with the user-space network of internal/wan between the gateways.
//
// A Federation belongs to one test, which ends everything it started.
package harness
