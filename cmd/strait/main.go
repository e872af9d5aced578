// SPDX-License-Identifier: Apache-2.0

// Command strait is the operator's command line, the control plane and the demo.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/strait-mesh/strait/cmd/strait/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
