// SPDX-License-Identifier: Apache-2.0

// Package settings merges one role's configuration from flags, STRAIT_* variables, the component file (strait.yaml) and
// defaults, in that order of precedence, and remembers where each value came from.
//
// A configuration is a flat struct whose fields carry tags: `name` (the flag and the key in the file), `default`, `help`
// and, for lists, a comma as separator. The environment variable of "data-dir" is STRAIT_DATA_DIR. Files are strict: an
// unknown section or key is an error that names the nearest known one.
package settings
