// SPDX-License-Identifier: Apache-2.0

package http_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/sidecar/http"
)

// grpcBackend starts grpc-go's own interop server.
func grpcBackend(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return l.Addr().String()
}

// grpcClient is grpc-go in front of the rig.
func (r *rig) grpcClient() *grpc.ClientConn {
	r.t.Helper()
	cc, err := grpc.NewClient("passthrough:///checkout.shop", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", r.address)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { cc.Close() })
	return cc
}

// TestGRPCInterop runs grpc-go's own interop cases through the pair. They end the process on a failure.
func TestGRPCInterop(t *testing.T) {
	cases := []struct {
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
		{"status_code_and_message", interop.DoStatusCodeAndMessage},
		{"special_status_message", interop.DoSpecialStatusMessage},
		{"custom_metadata", interop.DoCustomMetadata},
	}
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{grpcBackend(t)}, protocol: http.H2C})
		client := testgrpc.NewTestServiceClient(r.grpcClient())
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
				defer cancel()
				c.run(ctx, client)
			})
		}
		t.Run("unimplemented_method", func(t *testing.T) { interop.DoUnimplementedMethod(context.Background(), r.grpcClient()) })
	})
}

// TestGRPCRefusals: what the sidecars say to a gRPC client comes as a gRPC status, and what the application says comes
// unchanged.
func TestGRPCRefusals(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		call := func(r *rig) error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_, err := testgrpc.NewTestServiceClient(r.grpcClient()).EmptyCall(ctx, &testgrpc.Empty{})
			return err
		}
		t.Run("no instance", func(t *testing.T) {
			r := newRig(t, e, rigOptions{protocol: http.H2C})
			if err := call(r); grpcstatus.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "STR-4102") {
				t.Errorf("got %v", err)
			}
		})
		t.Run("denied", func(t *testing.T) {
			r := newRig(t, e, rigOptions{backends: []string{grpcBackend(t)}, protocol: http.H2C})
			r.allow = func(c http.Call) *http.Refusal {
				if c.Path != "/grpc.testing.TestService/EmptyCall" {
					t.Errorf("judged %q", c.Path)
				}
				return &http.Refusal{Message: "no rule allows it"}
			}
			if err := call(r); grpcstatus.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "STR-6101 policy_denied") {
				t.Errorf("got %v", err)
			}
		})
		t.Run("unknown service", func(t *testing.T) {
			r := newRig(t, e, rigOptions{resolve: func(string, string) (http.Target, error) {
				return http.Target{}, context.DeadlineExceeded
			}})
			if err := call(r); grpcstatus.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "STR-4103") {
				t.Errorf("got %v", err)
			}
		})
		t.Run("deadline", func(t *testing.T) {
			r := newRig(t, e, rigOptions{protocol: http.H2C, backends: []string{grpcBackend(t)}, resolve: func(string, string) (http.Target, error) {
				return http.Target{Service: service, Timeout: 50 * time.Millisecond}, nil
			}})
			stream, err := testgrpc.NewTestServiceClient(r.grpcClient()).FullDuplexCall(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); grpcstatus.Code(err) != codes.DeadlineExceeded {
				t.Errorf("got %v", err)
			}
		})
	})
}

// TestGRPCMetrics: a gRPC call that failed inside a 200 counts as a failure with its status.
func TestGRPCMetrics(t *testing.T) {
	each(t, func(t *testing.T, e engine) {
		r := newRig(t, e, rigOptions{backends: []string{grpcBackend(t)}, protocol: http.H2C})
		_, err := testgrpc.NewTestServiceClient(r.grpcClient()).UnaryCall(context.Background(), &testgrpc.SimpleRequest{
			ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.Internal), Message: "mine"},
		})
		if grpcstatus.Code(err) != codes.Internal {
			t.Fatal(err)
		}
		if o := r.picker.await(t, 1)[0]; o.GRPC != int(codes.Internal) || o.Status != 200 {
			t.Errorf("outcome %+v", o)
		}
		r.awaitMetric("strait_requests_total", map[string]string{"reporter": "source", "classification": "failure", "grpc_code": "13", "protocol": "grpc"})
		r.awaitMetric("strait_requests_total", map[string]string{"reporter": "destination", "classification": "failure", "grpc_code": "13", "src_cluster": "us-east"})
	})
}
