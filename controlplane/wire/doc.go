// SPDX-License-Identifier: Apache-2.0

// Package wire converts between the wire contract (controlpb) and the values of federation and internal/problem. It holds
// no state and does no I/O; all functions may be called concurrently. Both control plane and proxies link it, so it stays
// free of anything but gRPC's status type and the generated messages.
//
// What arrives from another process is judged here once: a conversion returns an error rather than a half-filled value.
package wire
