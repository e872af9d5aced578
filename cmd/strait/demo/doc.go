// SPDX-License-Identifier: Apache-2.0

// Package demo runs a federation of three regions on this machine, without root: real control planes, gateways and sidecars
// as processes of their own on addresses 127.10/20/30.0.x, a wide-area network between the gateways (internal/wan, in this
// process), and a small shop with a load source (in this process, too: an instance is a listener).
//
//	load ─▶ web (us-east) ─▶ catalog, checkout ─▶ payments        us-east ─80 ms─ eu-west ─130 ms─ ap-south ─198 ms─ us-east
//
// It does everything through the command line that a user would use, drives its own faults through a unix socket, and leaves
// nothing behind: children die with this process, even by kill -9 (PR_SET_PDEATHSIG), and Down ends what a pid file still
// names.
package demo
