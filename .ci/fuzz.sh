#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs every fuzz target of the tree for the time given (default 10s). Targets that link the Kubernetes libraries cost ten minutes to
# compile with instrumentation: they run only with STRAIT_FUZZ_HEAVY=1; their seeds run in make test.
set -eu
cd "$(dirname "$0")/.."
time=${1:-10s}
count=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for file in $(git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | sort); do
	dir=$(dirname "$file")
	case $dir in
	controlplane/schema | controlplane/configapi | controlplane/compile) [ -n "${STRAIT_FUZZ_HEAVY:-}" ] || continue ;;
	esac
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "fuzz: $dir $target $time"
		# The fuzzer itself sometimes ends with "context deadline exceeded" when its time is up: that is no
		# finding. A finding always names the input that it wrote.
		if ! go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "./$dir" >"$log" 2>&1; then
			cat "$log"
			grep -q 'context deadline exceeded' "$log" && ! grep -q 'Failing input written' "$log" || exit 1
		fi
		tail -n 2 "$log"
		count=$((count + 1))
	done
done
[ "$count" -gt 0 ] || { echo "fuzz: no target found" >&2; exit 1; }
echo "fuzz: $count targets ok"
