#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs every fuzz target of the tree for the time given (default 10s). Targets that link the Kubernetes libraries cost ten minutes to
# compile with instrumentation: they run only with STRAIT_FUZZ_HEAVY=1; their seeds run in make test.
set -eu
cd "$(dirname "$0")/.."
time=${1:-10s}
count=0
for file in $(git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | sort); do
	dir=$(dirname "$file")
	case $dir in
	controlplane/schema | controlplane/configapi | controlplane/compile) [ -n "${STRAIT_FUZZ_HEAVY:-}" ] || continue ;;
	esac
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "fuzz: $dir $target $time"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "./$dir"
		count=$((count + 1))
	done
done
[ "$count" -gt 0 ] || { echo "fuzz: no target found" >&2; exit 1; }
echo "fuzz: $count targets ok"
