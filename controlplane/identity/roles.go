// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/strait-mesh/strait/controlplane/controlpb"
	"github.com/strait-mesh/strait/controlplane/wire"
	"github.com/strait-mesh/strait/internal/problem"
	"github.com/strait-mesh/strait/trust/spiffeid"
)

// Kind is a set of kinds of callers.
type Kind uint8

// The kinds.
const (
	Workload Kind = 1 << iota
	Gateway
	Operator
	ControlPlane
)

var kindNames = []string{"workload", "gateway", "operator", "controlplane"}

// String lists the kinds of the set.
func (k Kind) String() string {
	var names []string
	for i, name := range kindNames {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "nobody"
	}
	return strings.Join(names, "|")
}

// KindOf is the kind that an ID says it is; 0 for any other.
func KindOf(id spiffeid.ID) Kind {
	if _, _, ok := id.Workload(); ok {
		return Workload
	}
	if _, ok := id.Gateway(); ok {
		return Gateway
	}
	if _, ok := id.Operator(); ok {
		return Operator
	}
	if id.IsControlPlane() {
		return ControlPlane
	}
	return 0
}

// TraceExportMethod is OTLP's, under the collector's own name.
const TraceExportMethod = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

// callers says which kinds of callers may use each RPC of 7400. An operator's role (viewer, operator, admin) is judged by the
// operator API itself.
var callers = map[string]Kind{
	controlpb.Identity_Renew_FullMethodName:    Workload | Gateway,
	controlpb.Identity_IssueJWT_FullMethodName: Workload,
	controlpb.Sessions_Report_FullMethodName:   Workload,
	controlpb.Gateways_Link_FullMethodName:     Gateway,
	controlpb.ADSStreamMethod:                  Workload | Gateway,
	controlpb.ADSDeltaMethod:                   Workload | Gateway,
	TraceExportMethod:                          Workload | Gateway,

	controlpb.Operator_Status_FullMethodName:          Operator,
	controlpb.Operator_TokenIssue_FullMethodName:      Operator,
	controlpb.Operator_TokenList_FullMethodName:       Operator,
	controlpb.Operator_TokenRevoke_FullMethodName:     Operator,
	controlpb.Operator_Join_FullMethodName:            Operator,
	controlpb.Operator_Leave_FullMethodName:           Operator,
	controlpb.Operator_MemberList_FullMethodName:      Operator,
	controlpb.Operator_MemberApprove_FullMethodName:   Operator,
	controlpb.Operator_MemberEvict_FullMethodName:     Operator,
	controlpb.Operator_ServiceList_FullMethodName:     Operator,
	controlpb.Operator_Why_FullMethodName:             Operator,
	controlpb.Operator_Trace_FullMethodName:           Operator,
	controlpb.Operator_Ping_FullMethodName:            Operator,
	controlpb.Operator_Check_FullMethodName:           Operator,
	controlpb.Operator_AccessIssue_FullMethodName:     Operator,
	controlpb.Operator_WorkloadToken_FullMethodName:   Operator,
	controlpb.Operator_GatewayToken_FullMethodName:    Operator,
	controlpb.Operator_WorkloadEvict_FullMethodName:   Operator,
	controlpb.Operator_WorkloadReadmit_FullMethodName: Operator,
	controlpb.Operator_TrustStatus_FullMethodName:     Operator,
	controlpb.Operator_TrustRotate_FullMethodName:     Operator,
	controlpb.Operator_TrustRevoke_FullMethodName:     Operator,
	controlpb.Operator_Withdrawals_FullMethodName:     Operator,
	controlpb.Operator_IssuerRequest_FullMethodName:   Operator,
	controlpb.Operator_IssuerImport_FullMethodName:    Operator,
	controlpb.Operator_Backup_FullMethodName:          Operator,
}

// Callers returns the kinds of callers that may use an RPC, by its full method name; none if it is unknown.
func Callers(method string) Kind { return callers[method] }

// authorize judges one call.
func authorize(ctx context.Context, method string) error {
	peer, ok := PeerFromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "no verified identity")
	}
	if kind := KindOf(peer.ID); callers[method]&kind == 0 || kind == 0 {
		return wire.ToStatus(problem.New(problem.AccessDenied, "%s may not call %s", peer.ID, method).
			WithWhy("it is for %s only", callers[method]).WithFix("use the command line, or the role that this identity was issued for"))
	}
	return nil
}

// RequireKindUnary refuses calls of kinds of callers that the table does not name.
func RequireKindUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := authorize(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// RequireKindStream refuses streams of kinds of callers that the table does not name.
func RequireKindStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := authorize(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, stream)
}
