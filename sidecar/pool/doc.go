// SPDX-License-Identifier: Apache-2.0

// Package pool chooses and keeps the ways to one port of one service in one cluster.
//
// A Group knows its endpoints: the sidecars of the own cluster by name, or, for a remote cluster, whatever instance handles
// the gateways have led to. It keeps books on each (work in flight, peak EWMA of latency, streaks, ejections), picks the
// better of two, holds the pooled connections, and probes what could not be reached until it can. The rules are in
// ../DESIGN.md. A Group does no I/O of its own: connections come from Config.Dial. All methods may be called concurrently;
// Close ends every goroutine and connection of the Group and waits for them.
package pool
