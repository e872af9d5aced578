// SPDX-License-Identifier: Apache-2.0

package e2e_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/strait-mesh/strait/e2e/harness"
)

// interopCases are cases of grpc-go's own interoperability client.
var interopCases = []struct {
	name string
	run  func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption)
}{
	{"empty_unary", interop.DoEmptyUnaryCall},
	{"large_unary", interop.DoLargeUnaryCall},
	{"client_streaming", interop.DoClientStreaming},
	{"server_streaming", interop.DoServerStreaming},
	{"ping_pong", interop.DoPingPong},
	{"empty_stream", interop.DoEmptyStream},
	{"cancel_after_begin", interop.DoCancelAfterBegin},
	{"cancel_after_first_response", interop.DoCancelAfterFirstResponse},
	{"timeout_on_sleeping_server", interop.DoTimeoutOnSleepingServer},
	{"custom_metadata", interop.DoCustomMetadata},
	{"status_code_and_message", interop.DoStatusCodeAndMessage},
	{"special_status_message", interop.DoSpecialStatusMessage},
}

const interopEnv = "STRAIT_INTEROP" // CASE ADDRESS

// The client runs in a process of its own: its cases end the process when they fail.
func init() {
	name, addr, ok := strings.Cut(os.Getenv(interopEnv), " ")
	if !ok {
		return
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, c := range interopCases {
		if c.name == name {
			c.run(ctx, testgrpc.NewTestServiceClient(conn))
			os.Exit(0)
		}
	}
	fmt.Fprintln(os.Stderr, "no such case:", name)
	os.Exit(1)
}

// interopServer runs grpc-go's interoperability server and returns its address.
func interopServer(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return l.Addr().String()
}

// TestInterop: grpc-go's own client in us-east and server in eu-west pass their cases through two sidecars and two gateways.
func TestInterop(t *testing.T) {
	f := harness.New(t, harness.Options{Clusters: []string{"us-east", "eu-west"}})
	f.Up("shop")
	us, eu := f.Clusters["us-east"], f.Clusters["eu-west"]
	eu.StartSidecar("interop", eu.Register(harness.Workload{Name: "interop-1", Service: "interop", Address: interopServer(t), Port: "grpc/grpc", Token: true}), nil)
	eu.CLI("export", "shop/interop", "--to", "us-east")
	client := us.StartSidecar("client", us.Register(harness.Workload{Name: "client", Service: "client", Token: true}), []string{"shop/interop:grpc"})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(name string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, self)
		cmd.Env = append(os.Environ(), interopEnv+"="+name+" "+client.Upstreams[0])
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	}
	harness.Eventually(t, 20*time.Second, "the first call", func() error { return run("empty_unary") })
	for _, c := range interopCases {
		t.Run(c.name, func(t *testing.T) {
			if err := run(c.name); err != nil {
				t.Error(err)
			}
		})
	}
}
