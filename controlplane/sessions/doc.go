// SPDX-License-Identifier: Apache-2.0

// Package sessions keeps what each sidecar of this cluster last said of itself: where it listens, how its instances are, and
// what it decided for the services it calls. It lives in memory and in the snapshot, never in the configuration API.
//
//	               report                      silent for 3 intervals, or stream lost
//	(nothing) ───────────────▶ live ─────────────────────────────────────────────────▶ silent
//	    ▲                        ▲────────────────────────── report ◀─────────────────────┘
//	    └── a week without a report, or Forget
//
// Invariants:
//   - One live session per proxy; the newest wins.
//   - Silence changes no verdict: the last one stays, and the session is marked silent.
//   - Unknown never replaces a verdict: it is said to be stale and stays.
//   - After a restart, sessions of the snapshot keep every healthy instance healthy until two full report intervals have
//     passed since the restart, whatever is reported meanwhile: a restart of any part changes no route.
//
// Server's methods may be called concurrently. A View and all it holds are immutable.
package sessions
