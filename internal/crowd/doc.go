// SPDX-License-Identifier: Apache-2.0

// Package crowd bounds connections that have not said who they are. When there are too many, the oldest gives way to the new one,
// so that those who say nothing cannot keep out those who do: refusing the newest would. It is the oldest of the address that has
// the most, so that one address does not push out the others. An address is a /32 of IPv4 and a /64 of IPv6, which is what a site has.
//
// Everything here may be called concurrently.
package crowd
