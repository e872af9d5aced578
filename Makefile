# SPDX-License-Identifier: Apache-2.0
# Two commands are enough to begin: make demo, make test.

GO      ?= go
BIN     := bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo v0.1.0-dev)
LDFLAGS := -s -w -X github.com/strait-mesh/strait/internal/version.version=$(VERSION) \
	-X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37
FUZZTIME ?= 10s
PKGS    := $(shell $(GO) list ./... 2>/dev/null)
# The embedded API server costs ten minutes to compile with -race: what links it is tested without.
M       := github.com/strait-mesh/strait
HEAVY   := $(M)/controlplane $(M)/controlplane/configapi $(M)/controlplane/schema $(M)/controlplane/objects \
	$(M)/cmd/strait $(M)/cmd/strait/% $(M)/docs $(M)/docs/% $(M)/e2e $(M)/e2e/%

.PHONY: all build demo test e2e soak bench fuzz check generate clean
all: build

build:
	@mkdir -p $(BIN)
	$(GO) build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/strait ./cmd/strait-proxy

demo: build
	./$(BIN)/strait demo up

test: build
	$(GO) test -race $(filter-out $(HEAVY),$(PKGS)); light=$$?; $(GO) test $(filter $(HEAVY),$(PKGS)) && exit $$light

e2e: build
	sh e2e/setup.sh
	STRAIT_E2E=1 $(GO) test -count=1 -timeout 25m ./e2e/...

soak: build
	sh e2e/setup.sh
	STRAIT_E2E=1 STRAIT_SOAK=1 $(GO) test -count=1 -timeout 90m ./e2e/...

bench: build
	sh e2e/setup.sh bench
	STRAIT_BENCH=1 $(GO) test -count=1 -timeout 15m -v -run TestBench ./e2e/bench

fuzz:
	sh .ci/fuzz.sh $(FUZZTIME)

check:
	sh .ci/check.sh

generate:
	$(GO) generate ./internal/problem ./controlplane/controlpb
	$(GO) run ./cmd/strait reference docs/reference

clean:
	rm -rf $(BIN)
