#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Regenerates the Go code of the protos: Debian's protoc 3.21 and the plugins pinned in tools/go.mod.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
(cd ../../tools && go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc)
PATH="$bin:$PATH" protoc -I . \
	--go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative \
	discovery.proto resources.proto proxy.proto localsession.proto operator.proto join.proto
