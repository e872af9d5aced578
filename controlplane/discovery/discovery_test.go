// SPDX-License-Identifier: Apache-2.0

package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/discovery"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const within = 20 * time.Second

var (
	webID     = id("spiffe://us-east.acme/ns/shop/sa/web")
	cartID    = id("spiffe://us-east.acme/ns/shop/sa/cart")
	gatewayID = id("spiffe://us-east.acme/strait/gateway/gw-1")
)

func id(s string) spiffeid.ID {
	parsed, err := spiffeid.Parse(s)
	if err != nil {
		panic(err)
	}
	return parsed
}

// server serves s in memory. Callers say who they are by metadata: certificates are package identity's matter.
func serve(t testing.TB, cfg discovery.Config) (*discovery.Server, *grpc.ClientConn) {
	t.Helper()
	if cfg.Peer == nil {
		cfg.Peer = func(ctx context.Context) (spiffeid.ID, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return spiffeid.Parse(strings.Join(md.Get("peer"), ""))
		}
	}
	if cfg.Authorize == nil {
		cfg.Authorize = func(context.Context, spiffeid.ID, string, string, string) error { return nil }
	}
	s, err := discovery.New(cfg)
	must(t, err)
	l := bufconn.Listen(1 << 16)
	g := grpc.NewServer()
	s.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(); g.Stop(); <-served })
	return s, conn
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// delta drives the incremental variant with Envoy's own client and messages, and keeps a trace of what it saw.
type delta struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	got    chan *discoveryv3.DeltaDiscoveryResponse
	ended  chan error
	cancel context.CancelFunc
	last   *discoveryv3.DeltaDiscoveryResponse
	node   *corev3.Node
}

func openDelta(t *testing.T, conn *grpc.ClientConn, peer spiffeid.ID, node string) *delta {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "peer", peer.String()), 2*within)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	must(t, err)
	d := &delta{
		t: t, stream: stream, got: make(chan *discoveryv3.DeltaDiscoveryResponse, 64), ended: make(chan error, 1), cancel: cancel,
		node: &corev3.Node{Id: node, Cluster: "us-east"},
	}
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				d.ended <- err
				return
			}
			d.got <- r
		}
	}()
	t.Cleanup(cancel)
	return d
}

func (d *delta) send(q *discoveryv3.DeltaDiscoveryRequest) {
	d.t.Helper()
	q.Node, d.node = d.node, nil
	must(d.t, d.stream.Send(q))
}

func (d *delta) subscribe(typeURL string, names ...string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

// expect waits for one response and compares it: "name@version-less" of resources, "-name" of removals, in order.
func (d *delta) expect(why string, want ...string) *discoveryv3.DeltaDiscoveryResponse {
	d.t.Helper()
	select {
	case d.last = <-d.got:
	case err := <-d.ended:
		d.t.Fatalf("%s: the stream ended: %v", why, err)
	case <-time.After(within):
		d.t.Fatalf("%s: no response", why)
	}
	var have []string
	for _, r := range d.last.GetResources() {
		if r.GetVersion() == "" || r.GetResource().GetTypeUrl() != d.last.GetTypeUrl() {
			d.t.Fatalf("%s: resource %v", why, r)
		}
		have = append(have, r.GetName())
	}
	for _, n := range d.last.GetRemovedResources() {
		have = append(have, "-"+n)
	}
	if !slices.Equal(have, want) {
		d.t.Fatalf("%s: response %v, want %v", why, have, want)
	}
	return d.last
}

func (d *delta) ack() {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: d.last.GetTypeUrl(), ResponseNonce: d.last.GetNonce()})
}

func (d *delta) nack(text string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: d.last.GetTypeUrl(), ResponseNonce: d.last.GetNonce(),
		ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: text},
	})
}

// quiet proves that nothing more is under way: a fresh name is asked for and its removal is the next response.
func (d *delta) quiet(typeURL, why string) {
	d.t.Helper()
	name := "probe/" + strings.ReplaceAll(why, " ", "-")
	d.subscribe(typeURL, name)
	d.expect(why+": nothing before the probe", "-"+name)
	d.ack()
}

func svc(name string, revision uint64) *controlpb.Service {
	return &controlpb.Service{Namespace: "shop", Name: name, Revision: revision}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(within)
	for !cond() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("%s: not within %v", what, within)
		}
	}
}

const typeService = controlpb.TypeService

func TestDeltaByName(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	d := openDelta(t, conn, webID, "shop/web-1")
	d.subscribe(typeService, "shop/a", "shop/never")
	must(t, s.Set(typeService, "shop/a", svc("a", 1)))
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 1)}))
	r := d.expect("first answer, after the first Replace only", "shop/a", "-shop/never")
	got := &controlpb.Service{}
	must(t, proto.Unmarshal(r.GetResources()[0].GetResource().GetValue(), got))
	if !proto.Equal(got, svc("a", 1)) {
		t.Fatalf("resource %v", got)
	}
	d.ack()
	eventually(t, "both are acknowledged", func() bool {
		a, n, _ := s.Acked(typeService, "shop/a")
		b, m, _ := s.Acked(typeService, "shop/never")
		return a == 1 && n == 1 && b == 1 && m == 1
	})
	must(t, s.Set(typeService, "shop/a", svc("a", 1)))
	d.quiet(typeService, "the same bytes again")
	must(t, s.Set(typeService, "shop/b", svc("b", 2)))
	d.quiet(typeService, "not subscribed")
	must(t, s.Set(typeService, "shop/never", svc("never", 1)))
	d.expect("appears", "shop/never")
	d.ack()
	s.Delete(typeService, "shop/a")
	d.expect("goes", "-shop/a")
	d.ack()
	d.subscribe(typeService, "shop/never")
	d.expect("asked for again", "shop/never")
	d.ack()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesUnsubscribe: []string{"shop/never"}})
	eventually(t, "unsubscribed", func() bool { _, n, _ := s.Acked(typeService, "shop/never"); return n == 0 })
	must(t, s.Set(typeService, "shop/never", svc("never", 2)))
	d.quiet(typeService, "unsubscribed")
}

func TestDeltaWildcard(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 1)}))
	must(t, s.Replace(controlpb.TypeGateway, nil))
	d := openDelta(t, conn, gatewayID, "gw-1")
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService}) // the older way
	d.expect("everything", "shop/a", "shop/b")
	d.ack()
	d.subscribe(controlpb.TypeGateway, "*")
	d.expect("an empty answer says that there is nothing")
	d.ack()
	must(t, s.Set(typeService, "shop/c", svc("c", 1)))
	d.expect("one more", "shop/c")
	d.ack()
	s.Delete(typeService, "shop/a")
	d.expect("one less", "-shop/a")
	d.ack()
	d.subscribe(typeService, "shop/b")
	d.expect("a name besides the wildcard", "shop/b")
	d.ack()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesUnsubscribe: []string{"*"}})
	eventually(t, "no wildcard", func() bool { _, n, _ := s.Acked(typeService, "shop/c"); return n == 0 })
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/b": svc("b", 2), "shop/c": svc("c", 2)}))
	d.expect("the name stays", "shop/b")
	d.ack()
	d.cancel()
	eventually(t, "no subscriber", func() bool { return len(s.Subscribers()) == 0 })
}

func TestDeltaResumes(t *testing.T) {
	s, _ := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 1)}))
	va, vb := s.Version(typeService, "shop/a"), s.Version(typeService, "shop/b")

	// Another server with the same content has the same versions.
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 2)}))
	held := map[string]string{"shop/a": va, "shop/b": vb, "shop/gone": "0123"}
	d := openDelta(t, conn, webID, "shop/web-1")
	d.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: typeService, ResourceNamesSubscribe: []string{"shop/a", "shop/b", "shop/gone"}, InitialResourceVersions: held,
	})
	d.expect("by name: only what changed", "shop/b", "-shop/gone")
	d.ack()
	eventually(t, "what is held counts as acknowledged", func() bool { a, _, _ := s.Acked(typeService, "shop/a"); return a == 1 })

	d = openDelta(t, conn, gatewayID, "gw-1")
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: held})
	d.expect("all: only what changed", "shop/b", "-shop/gone")
	d.ack()
	held["shop/b"] = s.Version(typeService, "shop/b")
	delete(held, "shop/gone")
	d = openDelta(t, conn, gatewayID, "gw-1")
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: held})
	d.expect("all: nothing changed")
}

func TestNack(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1), "shop/b": svc("b", 1)}))
	d := openDelta(t, conn, webID, "shop/web-1")
	d.subscribe(typeService, "shop/a", "shop/b")
	d.expect("first", "shop/a", "shop/b")
	changed := s.Changed()
	d.nack("cannot bind")
	select {
	case <-changed:
	case <-time.After(within):
		t.Fatal("a refusal is a change")
	}
	eventually(t, "both are refused", func() bool {
		_, _, na := s.Acked(typeService, "shop/a")
		_, _, nb := s.Acked(typeService, "shop/b")
		return len(na) == 1 && len(nb) == 1 && na[0].Message == "cannot bind" && na[0].Peer == webID && na[0].Node == "shop/web-1"
	})
	d.quiet(typeService, "what was refused is not sent again")
	must(t, s.Set(typeService, "shop/a", svc("a", 2)))
	d.expect("until it changes", "shop/a")
	d.ack()
	eventually(t, "accepted", func() bool { a, _, n := s.Acked(typeService, "shop/a"); return a == 1 && len(n) == 0 })
}

// TestSlowStream is the bound on memory: a stream that reads nothing costs names, not bodies, and then gets the newest version.
func TestSlowStream(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 0), "shop/b": svc("b", 0)}))
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "peer", webID.String()))
	defer cancel()
	stream, err := controlpb.StreamDelta(ctx, conn)
	must(t, err)
	must(t, stream.Send(&controlpb.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{"shop/a", "shop/b"}}))
	_, err = stream.Recv()
	must(t, err)
	big := svc("a", 0)
	big.Local = []*controlpb.LocalEndpoint{{Proxy: strings.Repeat("x", 32<<10)}}
	const changes = 500
	for i := range changes {
		big.Revision = uint64(i + 1)
		must(t, s.Set(typeService, "shop/a", big))
	}
	responses, newest := 0, uint64(0)
	for newest != changes {
		r, err := stream.Recv()
		must(t, err)
		responses++
		got := &controlpb.Service{}
		must(t, proto.Unmarshal(r.GetResources()[0].GetResource().GetValue(), got))
		if got.GetRevision() <= newest {
			t.Fatalf("revision %d after %d", got.GetRevision(), newest)
		}
		newest = got.GetRevision()
		must(t, stream.Send(&controlpb.DeltaDiscoveryRequest{TypeUrl: typeService, ResponseNonce: r.GetNonce()}))
	}
	if responses > changes/2 {
		t.Errorf("%d responses for %d changes: nothing was coalesced", responses, changes)
	}
	t.Logf("%d changes in %d responses", changes, responses)
}

func TestUnansweredResponsesAreBounded(t *testing.T) {
	s, conn := serve(t, discovery.Config{})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 0)}))
	d := openDelta(t, conn, webID, "shop/web-1")
	d.subscribe(typeService, "shop/a")
	var first *discoveryv3.DeltaDiscoveryResponse
	for i := range 8 {
		r := d.expect(fmt.Sprintf("response %d without an answer", i), "shop/a")
		if first == nil {
			first = r
		}
		must(t, s.Set(typeService, "shop/a", svc("a", uint64(i+1))))
	}
	must(t, s.Set(typeService, "shop/a", svc("a", 100)))
	d.last = first
	d.ack() // makes room for one
	r := d.expect("the newest only", "shop/a")
	got := &controlpb.Service{}
	must(t, proto.Unmarshal(r.GetResources()[0].GetResource().GetValue(), got))
	if got.GetRevision() != 100 {
		t.Fatalf("revision %d, want the newest", got.GetRevision())
	}
}

func TestLargeAnswersAreSplit(t *testing.T) {
	s, conn := serve(t, discovery.Config{MaxResponse: 64 << 10})
	all := map[string]proto.Message{}
	for i := range 100 {
		m := svc("big", uint64(i))
		m.Local = []*controlpb.LocalEndpoint{{Proxy: strings.Repeat("x", 8<<10)}}
		all[fmt.Sprintf("shop/%03d", i)] = m
	}
	must(t, s.Replace(typeService, all))
	d := openDelta(t, conn, gatewayID, "gw-1")
	d.subscribe(typeService, "*")
	seen, parts := 0, 0
	for seen < len(all) {
		select {
		case r := <-d.got:
			parts++
			seen += len(r.GetResources())
			if more := r.GetSystemVersionInfo() == "more"; more != (seen < len(all)) {
				t.Fatalf("after %d of %d: more is %v", seen, len(all), more)
			}
			d.last = r
			d.ack()
		case <-time.After(within):
			t.Fatalf("%d of %d", seen, len(all))
		}
	}
	if parts < 10 {
		t.Errorf("%d parts", parts)
	}
}

func TestJudgeAnew(t *testing.T) {
	allowed := make(chan bool, 1)
	allowed <- false
	s, conn := serve(t, discovery.Config{Authorize: func(context.Context, spiffeid.ID, string, string, string) error {
		ok := <-allowed
		allowed <- ok
		if !ok {
			return errors.New("not yet")
		}
		return nil
	}})
	must(t, s.Replace(typeService, map[string]proto.Message{"shop/a": svc("a", 1)}))
	d := openDelta(t, conn, webID, "n")
	d.subscribe(typeService, "shop/a")
	d.expect("hidden", "-shop/a")
	d.ack()
	<-allowed
	allowed <- true
	s.Judge()
	d.expect("admitted", "shop/a")
	d.ack()
	<-allowed
	allowed <- false
	s.Judge()
	d.expect("withdrawn", "-shop/a")
}

func TestRefusedStreams(t *testing.T) {
	_, conn := serve(t, discovery.Config{
		MaxNames: 10,
		VerifyNode: func(_ context.Context, peer spiffeid.ID, node *controlpb.Node) error {
			if node.GetId() != "mine" {
				return fmt.Errorf("%s is not node %s", peer, node.GetId())
			}
			return nil
		},
	})
	many := make([]string, 11)
	for i := range many {
		many[i] = fmt.Sprint("shop/", i)
	}
	for _, tt := range []struct {
		name, node string
		request    *discoveryv3.DeltaDiscoveryRequest
		want       codes.Code
	}{
		{"another's node", "yours", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService}, codes.PermissionDenied},
		{"no type", "mine", &discoveryv3.DeltaDiscoveryRequest{}, codes.InvalidArgument},
		{"too many names", "mine", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: many}, codes.ResourceExhausted},
		{"a long name", "mine", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{strings.Repeat("x", 600)}}, codes.InvalidArgument},
		{"an empty name", "mine", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeService, ResourceNamesSubscribe: []string{""}}, codes.InvalidArgument},
	} {
		d := openDelta(t, conn, webID, tt.node)
		d.send(tt.request)
		select {
		case err := <-d.ended:
			if status.Code(err) != tt.want {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
		case r := <-d.got:
			t.Errorf("%s: response %v", tt.name, r)
		case <-time.After(within):
			t.Errorf("%s: nothing happened", tt.name)
		}
	}
}
