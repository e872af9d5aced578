// SPDX-License-Identifier: Apache-2.0

// Package schema judges configuration without an API server, by the same schemas and the same code as the API: strict YAML
// (duplicate keys and unknown fields are refused), the structural schema, and the CEL rules of the CustomResourceDefinitions in
// controlplane/api. Errors carry file, line, column and field.
//
// Input is bounded in bytes, depth and nodes (aliases count each time they are used), so that no file costs more than a small
// multiple of its size. All functions may be called concurrently; each kind's schema is compiled once, when it is first needed.
package schema
