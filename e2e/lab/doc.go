// SPDX-License-Identifier: Apache-2.0

// Package lab is a network of test sites: each site is a network namespace with addresses of its own, and a wide-area network in
// user space joins them over TUN devices. Every direction of every pair has a Shape: delay, jitter, loss, bursts of loss, reordering,
// duplication, corruption, a rate with a queue, an MTU hole, dropped UDP or TCP, and darkness. Shapes change while packets flow.
//
//	site A (netns)               this process                site B (netns)
//	processes ── wan0 (TUN) ──▶ Shape A→B ──▶ heap by time ──▶ wan0 (TUN) ── processes
//	                        ◀── heap by time ◀── Shape B→A ◀──
//
// There is no tc netem where the tests run, and loopback knows neither MTU holes nor packets that are lost. Sites have addresses
// out of 198.18.0.0/15 (RFC 2544, benchmarking): site n is 198.18.n.0/24. A namespace has no other way out than the lab.
//
// Root is required. Namespaces, devices and sockets end with the process that made them, however it ends: nothing is mounted and
// nothing has a name outside of it.
//
// What it cannot show: packets pass this process, so that a path costs a few microseconds of its CPU each; beyond about 500 Mbit/s
// the lab is the bottleneck, and a stalled host delays packets (Net.Late says by how much).
//
// A Net may be used from any goroutine.
package lab
