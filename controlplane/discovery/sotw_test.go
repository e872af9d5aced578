// SPDX-License-Identifier: Apache-2.0

package discovery_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
)

func TestStateOfTheWorld(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 1)}))
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "peer", webID.String()), 2*within)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	must(t, err)
	var last *discoveryv3.DiscoveryResponse
	request := func(fail string, names ...string) {
		t.Helper()
		q := &discoveryv3.DiscoveryRequest{TypeUrl: typeService, ResourceNames: names, VersionInfo: last.GetVersionInfo(), ResponseNonce: last.GetNonce()}
		if last == nil {
			q.Node = &corev3.Node{Id: "shop/web-1"}
		}
		if fail != "" {
			q.ErrorDetail = &rpcstatus.Status{Code: 3, Message: fail}
		}
		must(t, stream.Send(q))
	}
	expect := func(why string, want ...string) {
		t.Helper()
		if last, err = stream.Recv(); err != nil {
			t.Fatalf("%s: %v", why, err)
		}
		var have []string
		for _, r := range last.GetResources() {
			m := &controlpb.Service{}
			must(t, r.UnmarshalTo(m))
			have = append(have, fmt.Sprintf("%s=%d", m.GetName(), m.GetRevision()))
		}
		if !slices.Equal(have, want) {
			t.Fatalf("%s: %v, want %v", why, have, want)
		}
	}
	request("")
	expect("no names: everything", "a=1", "b=1")
	request("")
	eventually(t, "acknowledged", func() bool { a, n, _ := s.Acked(typeService, "shop/a"); return a == 1 && n == 1 })
	must(t, s.Set(typeService, "shop/c", svc("c", 1)))
	expect("again everything", "a=1", "b=1", "c=1")
	request("no c for me")
	eventually(t, "refused", func() bool {
		_, _, n := s.Acked(typeService, "shop/c")
		return len(n) == 1 && n[0].Message == "no c for me"
	})
	request("", "shop/b", "shop/none")
	eventually(t, "fewer names", func() bool { _, n, _ := s.Acked(typeService, "shop/a"); return n == 0 })
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/b": svc("b", 2), "shop/c": svc("c", 2)}))
	for {
		expectAny(t, stream, &last)
		if len(last.GetResources()) == 1 {
			m := &controlpb.Service{}
			must(t, last.GetResources()[0].UnmarshalTo(m))
			if m.GetName() == "b" && m.GetRevision() == 2 {
				break
			}
		}
	}
	request("", "shop/b", "shop/none")
	s.Delete(typeService, "shop/b")
	expect("absence is being left out")
}

func expectAny(t *testing.T, stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient, last **discoveryv3.DiscoveryResponse) {
	t.Helper()
	r, err := stream.Recv()
	must(t, err)
	*last = r
}
