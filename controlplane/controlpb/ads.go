// SPDX-License-Identifier: Apache-2.0

package controlpb

import (
	"context"

	"google.golang.org/grpc"
)

// Full method names of the aggregated discovery service (xDS transport protocol, "Aggregated Discovery Service").
const (
	ADSServiceName  = "envoy.service.discovery.v3.AggregatedDiscoveryService"
	ADSStreamMethod = "/" + ADSServiceName + "/StreamAggregatedResources"
	ADSDeltaMethod  = "/" + ADSServiceName + "/DeltaAggregatedResources"
	TypeURLPrefix   = "type.googleapis.com/strait.v1."
	TypeSelf        = TypeURLPrefix + "Self"
	TypeService     = TypeURLPrefix + "Service"
	TypeGateway     = TypeURLPrefix + "Gateway"
	TypeBundle      = TypeURLPrefix + "Bundle"
	TypePeer        = TypeURLPrefix + "Peer"
	TypeGrant       = TypeURLPrefix + "Grant"
	TypeDenied      = TypeURLPrefix + "Denied"
)

// ADSServer serves both variants of the xDS transport.
type ADSServer interface {
	StreamAggregatedResources(grpc.BidiStreamingServer[DiscoveryRequest, DiscoveryResponse]) error
	DeltaAggregatedResources(grpc.BidiStreamingServer[DeltaDiscoveryRequest, DeltaDiscoveryResponse]) error
}

var adsDesc = grpc.ServiceDesc{
	ServiceName: ADSServiceName,
	HandlerType: (*ADSServer)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName: "StreamAggregatedResources",
		Handler: func(srv any, s grpc.ServerStream) error {
			return srv.(ADSServer).StreamAggregatedResources(
				&grpc.GenericServerStream[DiscoveryRequest, DiscoveryResponse]{ServerStream: s})
		},
		ServerStreams: true, ClientStreams: true,
	}, {
		StreamName: "DeltaAggregatedResources",
		Handler: func(srv any, s grpc.ServerStream) error {
			return srv.(ADSServer).DeltaAggregatedResources(
				&grpc.GenericServerStream[DeltaDiscoveryRequest, DeltaDiscoveryResponse]{ServerStream: s})
		},
		ServerStreams: true, ClientStreams: true,
	}},
}

// RegisterADSServer registers s under Envoy's service name.
func RegisterADSServer(r grpc.ServiceRegistrar, s ADSServer) { r.RegisterService(&adsDesc, s) }

// StreamDelta opens the delta variant on conn.
func StreamDelta(ctx context.Context, conn grpc.ClientConnInterface, opts ...grpc.CallOption,
) (grpc.BidiStreamingClient[DeltaDiscoveryRequest, DeltaDiscoveryResponse], error) {
	s, err := conn.NewStream(ctx, &adsDesc.Streams[1], ADSDeltaMethod, opts...)
	if err != nil {
		return nil, err
	}
	return &grpc.GenericClientStream[DeltaDiscoveryRequest, DeltaDiscoveryResponse]{ClientStream: s}, nil
}

// StreamSotW opens the state-of-the-world variant on conn.
func StreamSotW(ctx context.Context, conn grpc.ClientConnInterface, opts ...grpc.CallOption,
) (grpc.BidiStreamingClient[DiscoveryRequest, DiscoveryResponse], error) {
	s, err := conn.NewStream(ctx, &adsDesc.Streams[0], ADSStreamMethod, opts...)
	if err != nil {
		return nil, err
	}
	return &grpc.GenericClientStream[DiscoveryRequest, DiscoveryResponse]{ClientStream: s}, nil
}
