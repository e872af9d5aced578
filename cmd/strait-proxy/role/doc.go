// SPDX-License-Identifier: Apache-2.0

// Package role composes the two roles of strait-proxy, gateway and sidecar, from their settings: data directory, identity,
// discovery, spans, and the role itself. It is the only place of the data plane that reads flags, files and the environment.
package role
