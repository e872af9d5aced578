// SPDX-License-Identifier: Apache-2.0

// Command strait-proxy is Strait's data plane: the gateway and the sidecar of one cluster.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/strait-mesh/strait/cmd/strait-proxy/role"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := role.Run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
