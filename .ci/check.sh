#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# make check: format, vet, lint, layering, generated code, protos, documentation.
set -eu
cd "$(dirname "$0")/.."
fail() { echo "check: $*" >&2; exit 1; }

echo "check: gofmt"
bad=$(git ls-files '*.go' | xargs gofmt -l)
[ -z "$bad" ] || fail "gofmt these: $bad"

echo "check: go vet"
go vet ./...

echo "check: staticcheck"
go tool -modfile=tools/go.mod staticcheck ./...

echo "check: layering, dependency guards, registry of codes"
go test -count=1 . ./internal/problem

echo "check: generated code"
before=$(git ls-files -z '*_gen.go' '*.pb.go' | xargs -0 sha256sum)
go generate ./internal/problem
if command -v protoc >/dev/null; then ./controlplane/controlpb/gen.sh; else fail "protoc is missing (Debian: protobuf-compiler)"; fi
after=$(git ls-files -z '*_gen.go' '*.pb.go' | xargs -0 sha256sum)
[ "$before" = "$after" ] || fail "generated code is not up to date: run make generate"

echo "check: go.mod"
go mod verify >/dev/null || fail "go mod verify"

echo "check: documentation"
go test -count=1 ./docs/...
echo "check: ok"
