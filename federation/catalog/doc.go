// SPDX-License-Identifier: Apache-2.0

// Package catalog signs, serves, verifies and stores what clusters offer each other.
package catalog
