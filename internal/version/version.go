// SPDX-License-Identifier: Apache-2.0

// Package version says which build this is and which wire versions it speaks.
package version

import (
	"runtime/debug"
)

var version string // set by -ldflags

// Wire is the version of Strait's own wire formats: tunnel, join, local session, registration.
const Wire = 1

// String is the semantic version of this build: from -ldflags, else from the module's build information.
func String() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "v0.1.0-dev"
}

// Revision is the source revision of this build, or empty.
func Revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}

// Go is the version of the Go toolchain that built this.
func Go() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.GoVersion
	}
	return ""
}
