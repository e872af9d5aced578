// SPDX-License-Identifier: Apache-2.0

// Package problem is the one registry of message codes and the error that users see: what happened, why, how to fix it,
// what state things are in, and a stable code. codes.yaml is the source; codes_gen.go is generated from it.
//
// A *Error is immutable after it was built and may be shared between goroutines.
package problem

//go:generate go run ./gen
