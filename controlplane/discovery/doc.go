// SPDX-License-Identifier: Apache-2.0

// Package discovery serves resources to their subscribers over the xDS transport (ADS, incremental and state of the world).
// It knows nothing of what the resources mean: who may see which is asked of Config.Authorize.
//
// One index leads from each resource to its subscribers, so a change costs its subscribers and nothing else; a resource is
// marshalled once and its bytes are shared by all responses.
//
//	Set/Replace ──▶ index: (type, name) ─▶ body, version (content hash), subscribers
//	                                         │ mark dirty, wake
//	                                         ▼
//	              stream: dirty names ── at most 8 unanswered responses per type ──▶ response ──▶ ACK / NACK ──▶ index
//
// Invariants:
//   - A type is answered only after its first Replace, or Open: a control plane that has not compiled yet tells nobody that
//     something does not exist.
//   - A name that was asked for and does not exist, or must not be seen, is an explicit removal, also if it never existed.
//   - A stream holds names, never bodies: a slow one costs bounded memory and gets the newest version only.
//   - Versions are hashes of the content: after a restart, or from another replica, nothing unchanged is sent again.
//   - What the subscriber refused (NACK) is not sent to it again until it changes.
//
// Server's methods may be called concurrently.
//
// Specification: xDS REST and gRPC protocol (envoyproxy.io, api-docs/xds_protocol), variants "Aggregated" and "Incremental".
package discovery
