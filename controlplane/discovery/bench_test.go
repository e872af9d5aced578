// SPDX-License-Identifier: Apache-2.0

package discovery_test

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
)

// BenchmarkPush is one change of one resource: marshalled, sent to every subscriber and acknowledged by all. Subscribers are real
// incremental streams over one in-memory gRPC connection, and their cost is in the figure, so it bounds the server's from above;
// it says nothing of TLS. cpu-us/push is user and system time of the process per subscriber.
//
//	go test -run '^$' -bench Push ./controlplane/discovery
func BenchmarkPush(b *testing.B) {
	for _, subscribers := range []int{1, 100, 1000} {
		for _, published := range []int{1, 10_000} {
			b.Run(fmt.Sprintf("subscribers=%d/published=%d", subscribers, published), func(b *testing.B) {
				benchmarkPush(b, subscribers, published)
			})
		}
	}
}

func benchmarkPush(b *testing.B, subscribers, published int) {
	s, conn := serve(b, discovery.Config{})
	all := map[string]proto.Message{}
	for i := range published {
		all[fmt.Sprintf("shop/svc-%05d", i)] = endpoint(0)
	}
	must(b, s.Replace(typeService, all))
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "peer", webID.String()))
	var wg sync.WaitGroup
	received := make(chan struct{}, subscribers)
	for range subscribers {
		stream, err := controlpb.StreamDelta(ctx, conn)
		must(b, err)
		must(b, stream.Send(&controlpb.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{"shop/svc-00000"}}))
		wg.Go(func() {
			for {
				r, err := stream.Recv()
				if err != nil {
					return
				}
				_ = stream.Send(&controlpb.DeltaDiscoveryRequest{TypeUrl: typeService, ResponseNonce: r.GetNonce()})
				received <- struct{}{}
			}
		})
	}
	b.Cleanup(func() { cancel(); wg.Wait() })
	await := func() {
		for range subscribers {
			<-received
		}
	}
	await()
	b.ReportAllocs()
	before, n := cpu(), 0
	for b.Loop() {
		n++
		must(b, s.Set(typeService, "shop/svc-00000", endpoint(n)))
		await()
	}
	b.ReportMetric(float64((cpu()-before).Microseconds())/float64(n*subscribers), "cpu-us/push")
}

func endpoint(revision int) *controlpb.Service {
	m := svc("checkout", uint64(revision))
	for i := range 8 {
		m.Local = append(m.Local, &controlpb.LocalEndpoint{
			Proxy: fmt.Sprintf("shop/checkout-%d", i), InboundAddress: fmt.Sprintf("10.0.0.%d:15008", i), SpiffeId: cartID.String(),
			Health: &controlpb.HealthCounts{Healthy: 1},
		})
	}
	return m
}

func cpu() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
