// SPDX-License-Identifier: Apache-2.0

package traces

import (
	"context"
	"errors"
	"log/slog"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/strait-mesh/strait/federation"
	"github.com/strait-mesh/strait/internal/span"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

const serviceName = "opentelemetry.proto.collector.trace.v1.TraceService"

// Reporter is the resource attribute that names the SPIFFE ID of the proxy that sent a span.
const Reporter = "strait.reporter"

// ReceiverConfig says from whom spans are taken and where they go.
type ReceiverConfig struct {
	Store   *Store                 // required
	Cluster federation.ClusterName // the own one; required
	// Peer says who calls; required. identity.PeerFromContext knows.
	Peer func(context.Context) (spiffeid.ID, error)
	// Forward hands spans on to a collector; it must not block and may keep them. nil: they stay here.
	Forward func([]*tracepb.ResourceSpans)
	Logger  *slog.Logger
}

// Receiver is the OTLP service.
type Receiver struct{ cfg ReceiverConfig }

// NewReceiver returns a Receiver.
func NewReceiver(cfg ReceiverConfig) (*Receiver, error) {
	if cfg.Store == nil || cfg.Peer == nil || cfg.Cluster.IsZero() {
		return nil, errors.New("traces: Store, Peer and Cluster are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Receiver{cfg: cfg}, nil
}

type exporter interface {
	Export(context.Context, *tracepb.TracesData) (*emptypb.Empty, error)
}

// The collector's request and TracesData have the same bytes (repeated ResourceSpans = 1), and an empty response means that
// everything was accepted, so the collector's own messages need not be linked.
var serviceDesc = grpc.ServiceDesc{
	ServiceName: serviceName,
	HandlerType: (*exporter)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Export",
		Handler: func(srv any, ctx context.Context, dec func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			in := &tracepb.TracesData{}
			if err := dec(in); err != nil {
				return nil, err
			}
			if intercept == nil {
				return srv.(exporter).Export(ctx, in)
			}
			info := &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + serviceName + "/Export"}
			return intercept(ctx, in, info, func(ctx context.Context, req any) (any, error) {
				return srv.(exporter).Export(ctx, req.(*tracepb.TracesData))
			})
		},
	}},
}

// Register serves on g.
func (r *Receiver) Register(g grpc.ServiceRegistrar) { g.RegisterService(&serviceDesc, r) }

// Export takes spans in. Those that cannot be kept are dropped: a proxy could only send them again.
func (r *Receiver) Export(ctx context.Context, in *tracepb.TracesData) (*emptypb.Empty, error) {
	peer, err := r.cfg.Peer(ctx)
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	for _, rs := range in.GetResourceSpans() {
		r.attest(rs, peer)
	}
	if dropped := r.cfg.Store.Add(in.GetResourceSpans()); dropped > 0 {
		r.cfg.Logger.Debug("spans dropped", "peer", peer, "count", dropped)
	}
	if r.cfg.Forward != nil {
		r.cfg.Forward(in.GetResourceSpans())
	}
	return &emptypb.Empty{}, nil
}

// attest replaces what a resource claims of its origin by what the certificate says.
func (r *Receiver) attest(rs *tracepb.ResourceSpans, peer spiffeid.ID) {
	if rs.Resource == nil {
		rs.Resource = &resourcepb.Resource{}
	}
	proven := map[string]string{
		span.Cluster: string(r.cfg.Cluster), span.TrustDomain: peer.TrustDomain().String(), Reporter: peer.String(),
	}
	kept := make([]*commonpb.KeyValue, 0, len(rs.Resource.Attributes)+len(proven))
	for _, kv := range rs.Resource.Attributes {
		if _, replace := proven[kv.GetKey()]; !replace {
			kept = append(kept, kv)
		}
	}
	for _, key := range []string{span.Cluster, span.TrustDomain, Reporter} {
		kept = append(kept, &commonpb.KeyValue{
			Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: proven[key]}},
		})
	}
	rs.Resource.Attributes = kept
}
