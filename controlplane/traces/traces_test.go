// SPDX-License-Identifier: Apache-2.0

package traces_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/traces"
	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sp is a span of trace n, with attributes "key=value".
func sp(n, id int, d time.Duration, attrs ...string) *tracepb.Span {
	s := &tracepb.Span{
		TraceId: binary.BigEndian.AppendUint64(make([]byte, 8), uint64(n)), SpanId: binary.BigEndian.AppendUint64(nil, uint64(id)),
		Name: "GET checkout", Kind: tracepb.Span_SPAN_KIND_SERVER,
		StartTimeUnixNano: uint64(n) * 1000, EndTimeUnixNano: uint64(n)*1000 + uint64(d),
	}
	for _, a := range attrs {
		k, v, _ := strings.Cut(a, "=")
		s.Attributes = append(s.Attributes, attr(k, v))
	}
	return s
}

func attr(k, v string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: k, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
}

func batch(spans ...*tracepb.Span) []*tracepb.ResourceSpans {
	return []*tracepb.ResourceSpans{{
		Resource:   &resourcepb.Resource{Attributes: []*commonpb.KeyValue{attr("service.name", "web"), attr("strait.cluster", "eu-west")}},
		ScopeSpans: []*tracepb.ScopeSpans{{Spans: spans}},
	}}
}

func traceID(n int) string { return fmt.Sprintf("%032x", n) }

func ids(list []*controlpb.Trace) string {
	var all []string
	for _, t := range list {
		all = append(all, strings.TrimLeft(t.GetId(), "0"))
	}
	return strings.Join(all, " ")
}

func TestQuery(t *testing.T) {
	s := traces.NewStore(traces.StoreConfig{})
	s.Add(batch(sp(1, 1, time.Millisecond), sp(2, 1, 5*time.Millisecond), sp(3, 1, time.Millisecond, "http.response.status_code=503"),
		sp(4, 1, 3*time.Millisecond, "strait.decision.reason=below_min_healthy"), sp(5, 1, time.Millisecond, "strait.decision.reason=local_ok")))
	s.Add(batch(sp(1, 2, time.Millisecond))) // 1 becomes the newest
	s.Add(batch(sp(1, 2, time.Millisecond))) // sent twice
	for _, tt := range []struct {
		q    traces.Query
		want string
	}{
		{traces.Query{}, "1 5 4 3 2"},
		{traces.Query{Limit: 2}, "1 5"},
		{traces.Query{Filter: "errors"}, "3"},
		{traces.Query{Filter: "failover"}, "4"},
		{traces.Query{Filter: "slow", Limit: 2}, "2 4"},
		{traces.Query{ID: traceID(3)}, "3"},
		{traces.Query{ID: "00000"}, "1 5 4 3 2"},
		{traces.Query{ID: "ffff"}, ""},
	} {
		if have := ids(s.Query(tt.q)); have != tt.want {
			t.Errorf("%+v: %q, want %q", tt.q, have, tt.want)
		}
	}
	one := s.Query(traces.Query{ID: traceID(1)})[0]
	if len(one.GetSpans()) != 2 || one.GetSpans()[0].GetService() != "web" || one.GetSpans()[0].GetKind() != "server" || one.GetSpans()[0].GetCluster() != "eu-west" {
		t.Fatalf("trace %v", one)
	}
}

// TestBounds is the ring under load: what is interesting outlives a flood of what is not, and the bounds hold.
func TestBounds(t *testing.T) {
	const maxBytes = 256 << 10
	s := traces.NewStore(traces.StoreConfig{MaxBytes: maxBytes, MaxSpans: 2000})
	n := 0
	add := func(d time.Duration, attrs ...string) {
		n++
		s.Add(batch(sp(n, 1, d, attrs...)))
		if st := s.Stats(); st.Bytes > maxBytes || st.Spans > 2000 {
			t.Fatalf("after %d traces: %+v", n, st)
		}
	}
	for range 200 {
		add(time.Millisecond)
	}
	add(time.Millisecond, "error.type=reset")
	failed := traceID(n)
	add(time.Millisecond, "strait.decision.reason=peer_unreachable")
	away := traceID(n)
	add(time.Second)
	slow := traceID(n)
	for range 20_000 {
		add(time.Millisecond)
	}
	for name, id := range map[string]string{"error": failed, "failover": away, "slow": slow, "latest": traceID(n)} {
		if len(s.Query(traces.Query{ID: id})) != 1 {
			t.Errorf("the %s trace was dropped", name)
		}
	}
	for range 20_000 {
		add(time.Millisecond, "error.type=reset") // errors alone may fill what nobody else needs, but not push all else out
	}
	if len(s.Query(traces.Query{ID: away})) != 1 || len(s.Query(traces.Query{ID: slow})) != 1 {
		t.Error("a flood of errors has pushed out what was kept for another reason")
	}
	if s.Stats().Traces < 100 {
		t.Errorf("only %d traces are kept", s.Stats().Traces)
	}
}

func TestHostileSpans(t *testing.T) {
	s := traces.NewStore(traces.StoreConfig{})
	long := sp(1, 1, 0, "key="+strings.Repeat("x", 1<<20), strings.Repeat("k", 1<<10)+"=v")
	for i := range 1000 {
		long.Attributes = append(long.Attributes, attr(fmt.Sprint("a", i), "\xff\xfe"))
		long.Events = append(long.Events, &tracepb.Span_Event{Name: strings.Repeat("e", 1000)})
	}
	nested := &commonpb.AnyValue{}
	for range 10_000 {
		nested = &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: &commonpb.ArrayValue{Values: []*commonpb.AnyValue{nested, nested}}}}
	}
	deep := sp(1, 2, 0)
	deep.Attributes = []*commonpb.KeyValue{{Key: "deep", Value: nested}, nil, {Key: "nil"}}
	backwards := sp(1, 3, 0)
	backwards.EndTimeUnixNano = 1
	short := sp(1, 4, 0)
	short.TraceId = short.TraceId[:7]
	dropped := s.Add(append(batch(long, deep, backwards, short, nil, &tracepb.Span{}), nil, &tracepb.ResourceSpans{ScopeSpans: []*tracepb.ScopeSpans{nil}}))
	if dropped != 4 {
		t.Errorf("%d dropped, want 4", dropped)
	}
	if st := s.Stats(); st.Spans != 2 || st.Bytes > 256<<10 {
		t.Errorf("%+v", st)
	}
	var many []*tracepb.Span
	for i := range 5000 {
		many = append(many, sp(2, i+1, 0))
	}
	if dropped := s.Add(batch(many...)); dropped != 3000 {
		t.Errorf("%d of 5000 spans of one trace dropped", dropped)
	}
}

func TestSpansForAPeer(t *testing.T) {
	s := traces.NewStore(traces.StoreConfig{})
	s.Add(batch(
		sp(1, 1, 0, "strait.src.cluster=eu-west", "strait.dst.cluster=us-east", "client.address=10.0.0.9", "http.request.method=GET"),
		sp(1, 2, 0, "strait.src.cluster=us-east", "strait.dst.cluster=ap-south", "strait.decision.candidates=eu-west 1/4 tripped"),
		sp(1, 3, 0, "strait.src.cluster=us-east", "strait.dst.cluster=us-east"),
		sp(1, 4, 0),
	))
	for asking, want := range map[string]int{"eu-west": 1, "ap-south": 1, "us-east": 3, "other": 0, "": 0} {
		if have := s.SpansFor(traceID(1), federation.ClusterName(asking)); len(have) != want {
			t.Errorf("%s sees %d spans, want %d", asking, len(have), want)
		}
	}
	got := s.SpansFor(traceID(1), "eu-west")[0].GetAttributes()
	if got["client.address"] != "" || got["http.request.method"] != "GET" {
		t.Errorf("attributes %v", got)
	}
	if got := s.SpansFor(traceID(1), "ap-south")[0].GetAttributes(); got["strait.decision.candidates"] != "" {
		t.Errorf("a third cluster's health went out: %v", got)
	}
	if len(s.SpansFor(traceID(1)[:31], "eu-west"))+len(s.SpansFor("", "eu-west")) != 0 {
		t.Error("a peer may not search by prefix")
	}
	if s.Query(traces.Query{})[0].GetSpans()[0].GetAttributes()["client.address"] == "" {
		t.Error("what is kept was changed by a peer's question")
	}
}

// TestExport sends OTLP as any exporter does, over gRPC under the collector's name.
func TestExport(t *testing.T) {
	web, err := spiffeid.Parse("spiffe://us-east.acme/ns/shop/sa/web")
	must(t, err)
	store := traces.NewStore(traces.StoreConfig{})
	var forwarded []*tracepb.ResourceSpans
	allowed := true
	r, err := traces.NewReceiver(traces.ReceiverConfig{
		Store: store, Cluster: "us-east", Forward: func(rs []*tracepb.ResourceSpans) { forwarded = append(forwarded, rs...) },
		Peer: func(context.Context) (spiffeid.ID, error) {
			if !allowed {
				return spiffeid.ID{}, errors.New("who are you")
			}
			return web, nil
		},
	})
	must(t, err)
	l := bufconn.Listen(1 << 16)
	intercepted := ""
	g := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		intercepted = info.FullMethod
		return next(ctx, req)
	}))
	r.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() { g.Stop(); <-served }()
	conn, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	must(t, err)
	defer conn.Close()
	const method = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
	in := &tracepb.TracesData{ResourceSpans: batch(sp(1, 1, time.Millisecond))} // it claims to be of eu-west
	must(t, conn.Invoke(t.Context(), method, in, &emptypb.Empty{}))
	got := store.Query(traces.Query{})
	if len(got) != 1 || got[0].GetSpans()[0].GetCluster() != "us-east" || got[0].GetSpans()[0].GetAttributes()[traces.Reporter] != web.String() {
		t.Fatalf("kept %v", got)
	}
	if len(forwarded) != 1 || intercepted != method {
		t.Fatalf("forwarded %d, intercepted %q", len(forwarded), intercepted)
	}
	allowed = false
	if err := conn.Invoke(t.Context(), method, in, &emptypb.Empty{}); status.Code(err) != codes.Unauthenticated {
		t.Fatalf("without an identity: %v", err)
	}
}
