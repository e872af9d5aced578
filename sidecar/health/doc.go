// SPDX-License-Identifier: Apache-2.0

// Package health keeps the verdicts about the application instances behind one sidecar and picks among them.
//
// A Tracker checks each instance once a second (a TCP connect, or an HTTP GET where a path is configured) and hears from
// the byte paths what live traffic met. The table of states is in ../DESIGN.md. All methods of Tracker may be called
// concurrently; Run owns the goroutines of the checks and waits for them.
//
//	unknown ──first check──▶ healthy ──refused, or two failures──▶ unhealthy ──two successes──▶ healthy
//	                            └────five 5xx running──▶ ejected ──30 s──▶ (what the checks say)
package health
