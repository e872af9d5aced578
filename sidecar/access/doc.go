// SPDX-License-Identifier: Apache-2.0

// Package access evaluates the compiled access policy of one inbound port: who may call it, and for HTTP with which
// method and path. It is pure: no I/O, no clock, no regular expressions. A Policy is immutable and safe for concurrent use.
//
// Rules: without a policy, callers of the default trust domains are allowed. With one, any matching deny rule denies,
// otherwise any matching allow rule allows, otherwise the caller is denied. Identities are compared as parsed values. A
// rule that this version cannot understand wholly refuses the whole policy (Compile returns an error), and the caller of
// Compile keeps the previous one.
package access
